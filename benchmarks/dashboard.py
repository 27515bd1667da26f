"""How quick the page is, and what it costs whoever works beside it: `python -m benchmarks.dashboard`.

A store of 100,000 small records and two runs of 100,000 log points each. Measured: from the start of the page's process
to its first answer; in a browser (chromium through Playwright, where both are there) first paint, and when figures and
curves are drawn; a status call at 20 requests/s; the processor time of a page that is looked at; and the steps of a
tiny trainer beside it, in turns with the page stopped, by the clock and in processor time.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any
from urllib.request import Request, urlopen

import numpy as np
import psutil

from benchmarks.dashboard_world import write_run, write_store

POLLS = {"api/status": 2.0, "api/runs": 3.0, "api/events": 5.0}  # seconds between two of a browser's questions
TRAINER = """
import sys, torch
from pathlib import Path
from benchmarks.train_world import SHAPES, write_world
from trainer.loop import train_expert
torch.set_num_threads(1)
world = write_world(Path(sys.argv[1]), SHAPES["tiny"], 64)
train_expert(world.request(Path(sys.argv[2]), "cpu", "steps=1000000", "batch=1", "log.every=1"))
"""


@contextmanager
def page(store: Path, runs: Path) -> Iterator[tuple[psutil.Process, str]]:
    """A page's process, and its address."""
    command = [sys.executable, "-m", "dashboard", "--store", str(store), "--runs-under", str(runs), "--port", "0"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        yield psutil.Process(process.pid), process.stderr.readline().strip().rpartition(" ")[2]
    finally:
        process.kill()
        process.communicate()


def first_answers(store: Path, runs: Path) -> dict[str, float]:
    """Seconds from the start of the process until it answers, and until all logs are read."""
    began_s = time.perf_counter()
    with page(store, runs) as (_, address):
        urlopen(address + "api/status").read()
        answered_s = time.perf_counter() - began_s
        while not json.loads(urlopen(address + "api/runs").read())["is_read"]:
            time.sleep(0.02)
        return {"first answer": answered_s, "all read": time.perf_counter() - began_s}


def paints(address: str) -> dict[str, float] | None:
    """Seconds from a visit's start to first paint, to figures, and to all curves; None without a browser.

    "one word" is the first paint of an answer that is one word: what the browser itself takes.
    """
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        return None
    if chromium is None:
        return None
    visits: list[dict[str, float]] = []
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        for _ in range(5):
            context = browser.new_context(viewport={"width": 1280, "height": 900})
            context.add_init_script(WATCH)
            tab = context.new_page()
            tab.set_default_timeout(120_000)
            tab.goto(address, wait_until="commit")
            tab.wait_for_function("() => window.seen.ready && window.seen.drawn")
            tab.wait_for_function(HAS_PAINTED)
            paint_ms = tab.evaluate(PAINT_MS)
            seen = tab.evaluate("window.seen")
            visits.append(
                {"first paint": paint_ms / 1000, "figures": seen["ready"] / 1000, "curves": seen["drawn"] / 1000}
            )
            tab.goto(address + "healthz")
            tab.wait_for_function(HAS_PAINTED)
            visits[-1]["one word"] = tab.evaluate(PAINT_MS) / 1000
            context.close()
        browser.close()
    return {name: median(visit[name] for visit in visits) for name in visits[0]}


PAINT_MS = "performance.getEntriesByName('first-contentful-paint')[0].startTime"
HAS_PAINTED = "() => performance.getEntriesByName('first-contentful-paint').length"
WATCH = """
window.seen = {};
const note = () => {
  const { ready, drawn } = document.body?.dataset ?? {};
  if (ready) window.seen.ready ??= performance.now();
  if (drawn === "all") window.seen.drawn ??= performance.now();
  if (!window.seen.drawn || !window.seen.ready) requestAnimationFrame(note);
};
requestAnimationFrame(note);
"""


def status_calls(address: str, seconds: float, per_s: float = 20.0) -> dict[str, float]:
    """Seconds that a status call takes at `per_s` requests/s, each on a connection of its own."""
    took: list[float] = []
    began_s = time.perf_counter()
    for number in range(int(seconds * per_s)):
        time.sleep(max(0.0, began_s + number / per_s - time.perf_counter()))
        asked_s = time.perf_counter()
        urlopen(address + "api/status").read()
        took.append(time.perf_counter() - asked_s)
    took.sort()
    return {"median": median(took), "p99": took[int(0.99 * len(took))], "worst": took[-1], "calls": len(took)}


class Browser:
    """Asks as an open page does, with what it has seen, for as long as it is there."""

    def __init__(self, address: str) -> None:
        self._ended = threading.Event()
        self._threads = [threading.Thread(target=self._ask, args=(address + name, s)) for name, s in POLLS.items()]
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        """Ask no more."""
        self._ended.set()
        for thread in self._threads:
            thread.join()

    def _ask(self, address: str, every_s: float) -> None:
        tag = ""
        while not self._ended.wait(every_s):
            try:
                with urlopen(Request(address, headers={"If-None-Match": tag}), timeout=30) as answer:
                    tag = answer.headers["etag"]
                    answer.read()
            except OSError:  # 304 is one for urllib
                continue


def grow(runs: Sequence[Path], ended: threading.Event) -> None:
    """These runs go on, a log point a second each."""
    step = 10_000_000
    while not ended.wait(1.0):
        step += 10
        for run in runs:
            point = {
                "time_s": time.time(),
                "event": "step",
                "step": step,
                "loss": 0.5,
                "learning_rate": 1e-6,
                "bins": [],
            }
            with (run / "events.jsonl").open("a") as log:
                log.write(json.dumps(point) + "\n")


class Trainer:
    """A tiny expert that is trained in a process of its own, and shown on the page like the other runs."""

    def __init__(self, world: Path, run: Path) -> None:
        self._child = subprocess.Popen([sys.executable, "-c", TRAINER, str(world), str(run)], stderr=subprocess.DEVNULL)
        self._process, self._log = psutil.Process(self._child.pid), run / "events.jsonl"
        while not self._steps():
            assert self._child.poll() is None
            time.sleep(0.1)

    def turn(self, seconds: float) -> "np.ndarray[tuple[int, ...], np.dtype[np.float64]]":
        """What it does in the next `seconds`: steps, time by the clock and processor time, seconds."""
        before = np.array([self._steps(), time.perf_counter(), sum(self._process.cpu_times()[:2])])
        time.sleep(seconds)
        return np.array([self._steps(), time.perf_counter(), sum(self._process.cpu_times()[:2])]) - before

    def close(self) -> None:
        """End it."""
        self._child.kill()
        self._child.wait()

    def _steps(self) -> int:
        return self._log.read_bytes().count(b'"event":"step"') if self._log.exists() else 0


def cost(process: psutil.Process, address: str, runs: Path, rounds: int, turn_s: float) -> dict[str, float]:
    """What a page that is looked at takes while runs go on, and what a trainer loses by it."""
    trainer, ended = Trainer(runs.parent / "world", runs / "trained"), threading.Event()
    growing = threading.Thread(target=grow, args=([runs / name for name in ("base", "refiner")], ended))
    growing.start()
    looked = Browser(address)
    turns = {True: np.zeros(3), False: np.zeros(3)}
    used_s = 0.0
    try:
        time.sleep(3)
        for number in range(2 * rounds):
            is_on = number % 2 == number // 2 % 2  # with, without, without, with: a drift weighs on both
            process.send_signal(signal.SIGCONT if is_on else signal.SIGSTOP)
            used = sum(process.cpu_times()[:2])
            turns[is_on] += trainer.turn(turn_s)
            used_s += sum(process.cpu_times()[:2]) - used
    finally:
        process.send_signal(signal.SIGCONT)
        ended.set()
        looked.close()
        growing.join()
        trainer.close()
    (steps, took_s, cpu_s), (steps_without, took_without_s, cpu_without_s) = turns[True], turns[False]
    return {
        "share of a core": used_s / (rounds * turn_s),
        "steps kept": (steps / took_s) / (steps_without / took_without_s),
        "processor time of a step": (cpu_s / steps) / (cpu_without_s / steps_without),
    }


def main() -> int:
    """Measure, print, and keep the numbers where --json says."""
    parser = argparse.ArgumentParser(
        prog="benchmarks.dashboard", description="How quick the page is, and what it costs."
    )
    parser.add_argument("--records", type=int, default=100_000, help="default: %(default)s")
    parser.add_argument("--lines", type=int, default=100_000, help="log points of each run (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=30, help="of status calls (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=8, help="turns with and without the page (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="file for the numbers")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        store, runs = Path(name) / "store", Path(name) / "runs"
        write_store(store, options.records * 2 // 3)  # and half as many captions
        write_run(runs / "base", "base", 350, 1000, options.lines)
        write_run(runs / "refiner", "refiner", 0, 350, options.lines)
        results: dict[str, Any] = {"started": first_answers(store, runs)}
        with page(store, runs) as (process, address):
            results["visit at once, s"] = paints(address)
            results["visit, s"] = paints(address)
            results["status call, s"] = status_calls(address, options.seconds)
            results["memory, MiB"] = {"page": process.memory_info().rss / 2**20}
            results["beside it"] = cost(process, address, runs, options.rounds, 6.0)
    for title, values in results.items():
        told = ", ".join(f"{name} {value:.4g}" for name, value in (values or {"no browser": 0}).items())
        print(f"{title:18} {told}")
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
