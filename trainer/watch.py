"""`evaluate-experts --watch`: follow run folders while they train, and judge what they have come to, round by round.

newest verified checkpoint of each run -> held, so that rotation may remove it -> a round -> OUT/report.json, .html

A round is judged as soon as one of the experts has a newer checkpoint, one UNet at a time. Between rounds it rests so
long that rounds take at most --max-share of the time; it begins none where the device has no room for a UNet.
"""

import math
import os
import shutil
import time
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch

from shared.device import choose_device
from shared.errors import CheckpointError, ConfigError, DataError, ExpertsError, Stopped
from shared.progress import say
from shared.stopping import StopRequest, stop_requests
from shared.store import StoreReader
from shared.weights import weight_shapes
from trainer.bench import Bench, open_bench
from trainer.checkpoint import Checkpoint, newest_checkpoint
from trainer.evaluate import EvaluateRequest, begin_report, judge, judged
from trainer.gallery import Gallery, open_gallery
from trainer.lineup import LineUp, line_up
from trainer.report import JudgedExpert, Report, Round, read_report, write_report
from trainer.report_page import report_page
from trainer.rotation import list_checkpoints
from trainer.trackers import Curves, require_known
from trainer.waiting import wait_for_store

PAUSE_S = 2.0  # between two looks
HELD = ".held"  # below OUT: links to the weights that are judged
ROOM = 1.5  # of a UNet's weights, for what it computes
Found = Sequence[Checkpoint | None]


def watch(request: EvaluateRequest, max_share: float, trackers: Sequence[str] = (), pause_s: float = PAUSE_S) -> Path:
    """Judge until every run has come to the step that its configuration names; returns the page.

    Goes on with the report that is in OUT. Raises Stopped (exit 75) where the process is asked to stop; the round that
    it was in is left out. Raises ConfigError where the report there is of something else or a tracker is none that
    is known, and what `evaluate` raises.
    """
    require_known(trackers)
    for run in request.experts:
        if (run / "checksums.json").exists() or run.is_file():
            raise ConfigError(f"--watch follows run folders; {run} is one checkpoint")
    device = choose_device(request.device)
    wait_for_store(request.store)
    shutil.rmtree(request.out / HELD, ignore_errors=True)  # of a watch that was killed
    report, curves = read_report(request.out), Curves(request.out, 0, tuple(trackers), "sdxl-experts", {})
    try:
        with StoreReader(request.store) as store, stop_requests() as stop:
            watcher = _Watcher(request, store, device, stop, report, curves)
            while not watcher.is_done():
                began_s = time.perf_counter()
                is_judged = watcher.look()
                took_s = time.perf_counter() - began_s
                _rest(took_s * (1 / max_share - 1) if is_judged else pause_s, stop)
    finally:
        curves.close()
        shutil.rmtree(request.out / HELD, ignore_errors=True)
    return request.out / "report.html"


class _Watcher:
    """What is known of the runs, and the report so far."""

    def __init__(
        self,
        request: EvaluateRequest,
        store: StoreReader,
        device: torch.device,
        stop: StopRequest,
        report: Report | None,
        curves: Curves,
    ) -> None:
        self._request, self._store, self._device, self._stop = request, store, device, stop
        self._report, self._curves = report, curves
        last = report.rounds[-1].experts if report and report.rounds else []
        self._steps = tuple(one.step for one in last) or (None,) * len(request.experts)
        self._opened: tuple[object, Bench, Gallery | None] | None = None
        self._listed: list[Path | None] = []
        self._said = ""

    def is_done(self) -> bool:
        """Whether every run was judged at its last step."""
        runs = zip(self._request.experts, self._steps, strict=True)
        return all(step is not None and step == _last_step(run) for run, step in runs)

    def look(self) -> bool:
        """Judge a round if there is something new; returns whether there was."""
        listed = [next(iter(list_checkpoints(run)), None) for run in self._request.experts]
        if not any(listed):
            self._say("waiting: " + ", ".join(f"{run} {_state(run)}" for run in self._request.experts))
            return False
        if listed == self._listed or not self._has_room([path for path in listed if path]):
            return False  # verifying reads every byte: not at every look
        found = [_newest(run, self._say) for run in self._request.experts]
        steps = tuple(None if one is None else one.state.step for one in found)
        present = [one for one in found if one is not None]
        if not present or steps == self._steps:
            self._listed = listed
            return False
        try:
            round_ = self._judge(found)
        except (ExpertsError, OSError) as error:
            gone = [one.path for one in present if not one.path.exists()]
            if isinstance(error, Stopped) or not gone:
                raise
            say(f"passed over: {gone[0]} was removed meanwhile")
            return False
        self._steps, self._listed = steps, listed
        self._keep(round_)
        return True

    def _judge(self, found: Found) -> Round:
        request = self._request
        held = [None if one is None else _hold(one, request.out / HELD / str(i)) for i, one in enumerate(found)]
        present = [one for one in held if one is not None]
        line, bench, gallery = self._open(present, is_whole=len(present) == len(held) > 1)
        states = [
            judged(run, one) if one is not None else JudgedExpert(name=run.name, run=str(run), state=_state(run))
            for run, one in zip(request.experts, held, strict=True)
        ]
        begun = begin_report(request, bench, line)
        if self._report is None:
            self._report = begun
        _check_same(self._report, begun, request.out)
        self._report = begun.model_copy(update={"rounds": self._report.rounds})
        number = len(self._report.rounds) + 1
        return judge(request, bench, line, gallery, states, self._device, number, self._check)

    def _open(self, present: Sequence[Checkpoint], *, is_whole: bool) -> tuple[LineUp, Bench, Gallery | None]:
        """The line-up of this round; samples and embeds are chosen anew where other runs or manifests are there."""
        request, facts = self._request, [one.card.facts for one in present]
        kind = [(own.name, own.timesteps, own.manifests) for own in facts]
        bench = self._opened[1] if self._opened and self._opened[0] == kind else None
        request.out.mkdir(parents=True, exist_ok=True)
        if bench is None or self._opened is None:
            bench = open_bench(request.store, self._store, request.manifest, present)
            line = line_up(present, request.model, request.base, bench.manifest.settings, is_whole=is_whole)
            gallery = open_gallery(request.pictures, request.model, self._store, request.out, bench, line, self._device)
            self._opened = (kind, bench, gallery)
            return line, bench, gallery
        line = line_up(present, request.model, request.base, bench.manifest.settings, is_whole=is_whole)
        return line, bench, self._opened[2]

    def _keep(self, round_: Round) -> None:
        assert self._report is not None
        self._report = self._report.with_round(round_)
        write_report(self._request.out, self._report, report_page(self._report, self._request.out))
        told = ", ".join(f"{one.name} {one.step if one.state == 'judged' else one.state}" for one in round_.experts)
        pair = round_.choices[-1]
        say(f"round {round_.number}: {told}: loss {pair.loss:.5f}" + (f", CLIP {pair.clip:.2f}" if pair.clip else ""))
        values = {"pair/eval_loss": pair.loss, "pair/clip": pair.clip}
        values |= {f"{one.candidate}/eval_loss [{one.low}, {one.high})": one.loss for one in round_.losses}
        at = sum(one.step or 0 for one in round_.experts)
        self._curves.log({name: value for name, value in values.items() if value is not None}, at)

    def _has_room(self, checkpoints: Sequence[Path]) -> bool:
        if self._device.type != "cuda":
            return True
        free = torch.cuda.mem_get_info(self._device)[0]
        needed = room_bytes([*(path / "unet" for path in checkpoints), self._request.model / "unet"])
        if free < needed:
            self._say(f"waiting: {free >> 20} MiB free on {self._device}, a UNet needs {needed >> 20} MiB")
        return free >= needed

    def _check(self) -> None:
        if self._stop.asked():
            raise Stopped(f"asked to stop; {self._request.out} has all rounds before, the same command goes on")

    def _say(self, line: str) -> None:
        """Say what has not just been said."""
        if line != self._said:
            self._said = line
            say(line)


def room_bytes(folders: Sequence[Path]) -> int:
    """What a round takes on a device: the largest UNet of these folders in fp32, however it is saved, and passes."""
    return int(max(_fp32_bytes(folder) for folder in folders) * ROOM)


def _fp32_bytes(folder: Path) -> int:
    try:
        return sum(4 * math.prod(shape) for shape in weight_shapes(folder).values())
    except (DataError, OSError):  # removed meanwhile, or damaged, which is said where it is opened
        return 0


def _newest(run: Path, on_bad: Callable[[str], None]) -> Checkpoint | None:
    """The newest checkpoint that verifies; None where there is none or each was removed meanwhile."""
    try:
        return newest_checkpoint(run, lambda why: on_bad(f"passed over: {why}"))
    except CheckpointError as error:
        on_bad(str(error))
        return None


def _hold(checkpoint: Checkpoint, folder: Path) -> Checkpoint:
    """The same, by links to its files that rotation does not remove; itself where OUT is on another disk."""
    shutil.rmtree(folder, ignore_errors=True)
    own = folder / checkpoint.path.name
    weights = checkpoint.weights_folder()
    try:
        for file in (checkpoint.path / "checksums.json", *weights.iterdir()):
            held = own / file.relative_to(checkpoint.path)
            held.parent.mkdir(parents=True, exist_ok=True)
            os.link(file, held)
    except FileNotFoundError:
        raise
    except OSError:
        return checkpoint
    return replace(checkpoint, path=own)


def _state(run: Path) -> Literal["not started", "no checkpoint yet"]:
    return "no checkpoint yet" if (run / "config.toml").exists() else "not started"


def _last_step(run: Path) -> int | None:
    """The step at which training ends, as the run's own configuration says."""
    try:
        steps = tomllib.loads((run / "config.toml").read_text(encoding="utf-8")).get("steps")
    except (OSError, ValueError):
        return None
    return steps if isinstance(steps, int) else None


def _check_same(there: Report, begun: Report, out: Path) -> None:
    """Rounds stand in one report where they are of the same start model, draws and prompts."""
    for field in ("model", "manifest", "draws", "prompts", "clip", "drawing"):
        if getattr(there, field) != getattr(begun, field):
            raise ConfigError(f"{out} holds an evaluation with another {field}: name another --out")


def _rest(seconds: float, stop: StopRequest) -> None:
    """Sleep; raises Stopped as soon as it is asked to stop."""
    until_s = time.monotonic() + seconds
    while True:
        if stop.asked():
            raise Stopped("asked to stop; the report has all rounds so far, the same command goes on")
        left_s = until_s - time.monotonic()
        if left_s <= 0:
            return
        time.sleep(min(0.2, left_s))
