"""`--runner ray` against one process, and what its one writer takes: `python -m benchmarks.ray_build [--pictures 200]`.

    writing   records of 438 KiB out of workers' answers into a store, each frame verified, each commit synced
    encoding  a build by two Ray workers on two cores against the same build in one process that has one core

What each build spends to start (Ray, weights) is taken off by a build of a tenth of the pictures. Both run under
taskset, one after the other; a machine that does something else meanwhile makes the ratio worthless.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from cache_builder.chunks import pack
from cache_builder.crew import Crew, Task
from cache_builder.ray_runner import _said  # what each answer goes through
from demo.tiny_model import write_tiny_model
from shared.record import encode_record, verify_frame
from shared.store import StoreWriter
from tests.pictures import write_shapes

RECORD_VALUES = 438 * 1024 // 2  # of two bytes
AT_ONCE = 32


class Answers:
    """A cluster whose workers have always answered already."""

    def __init__(self, answers: list[bytes]) -> None:
        self.made = answers

    def hire(self) -> object:
        return object()

    def dismiss(self, actor: object) -> None:
        pass

    def call(self, actor: object, message: bytes | None) -> tuple[object, bytes | None]:
        return object(), message

    def wait(self, calls: list[tuple[object, bytes | None]], timeout_s: float) -> list[tuple[object, bytes | None]]:
        return calls[:1]

    def answer(self, call: tuple[object, bytes | None]) -> bytes:
        return pack({}) if call[1] is None else self.made[int(call[1])]


def answer_of(chunk: int) -> bytes:
    """Of a worker, AT_ONCE records."""
    keys = [(chunk * AT_ONCE + index).to_bytes(16, "big") for index in range(AT_ONCE)]
    values = np.random.default_rng(chunk).integers(0, 2**16, RECORD_VALUES, np.uint16).view(np.float16)
    return pack({"keys": keys}, [encode_record(key, "latents", {"mean": values}, {}) for key in keys])


def writing(folder: Path, count: int) -> None:
    """Say how many records a second come out of answers into a store, beside the same put into one straight away."""
    tasks = [Task(None, "", b"%d" % chunk) for chunk in range(count // AT_ONCE)]
    answers = Answers([answer_of(chunk) for chunk in range(len(tasks))])
    began, cpu_s = time.perf_counter(), time.process_time()
    with StoreWriter(folder / "answers") as store:
        for _, (header, frames) in Crew(answers, 2).answers(iter(tasks), _said):
            records = list(zip(header["keys"], frames, strict=True))
            for record in records:
                verify_frame(*record)
            store.put_many(records)
    taken_s, cpu_s = time.perf_counter() - began, time.process_time() - cpu_s
    frames_of = [list(zip(header["keys"], frames, strict=True)) for header, frames in map(_said, answers.made)]
    began = time.perf_counter()
    with StoreWriter(folder / "straight") as store:
        for records in frames_of:
            store.put_many(records)
    straight_s, done = time.perf_counter() - began, len(tasks) * AT_ONCE
    print(
        f"writing: {done / taken_s:.0f} records of 438 KiB a second, each commit synced; straight into a store "
        f"{done / straight_s:.0f}, so {straight_s / taken_s:.2f} of it; {cpu_s / done * 1000:.2f} ms of CPU a record"
    )


def build_s(folder: Path, pictures: Path, cores: str, *more: str) -> tuple[float, float]:
    """Seconds of a build, and seconds of CPU that it and its children took."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = ["taskset", "-c", cores, sys.executable, "-m", "cache_builder.cli", str(pictures), "--device", "cpu"]
    command += ["--store", tempfile.mkdtemp(dir=folder), "--model", str(folder / "model"), "--json", *more]
    done = subprocess.run(command, check=True, capture_output=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu_s = sum(getattr(after, name) - getattr(before, name) for name in ("ru_utime", "ru_stime"))
    return float(json.loads(done.stdout)["seconds"]), cpu_s


def encoding(folder: Path, count: int) -> None:
    """Say how long both take."""
    sets = ["--set", "images.resolution=512", "--set", "encode.threads=1", "--set", "ray.chunk=4"]
    write_tiny_model(folder / "model")
    few, many = (write_shapes(folder / f"set-{size}", size) for size in (max(8, count // 10), count))
    seconds = {}
    for name, cores, more in (("one process", "0", ()), ("two Ray workers", "0,1", ("--runner", "ray"))):
        start_s, _ = build_s(folder, few, cores, *sets, *more)
        whole_s, cpu_s = build_s(folder, many, cores, *sets, *more)
        seconds[name] = whole_s - start_s
        print(f"{name}: {whole_s:.1f} s, {start_s:.1f} for a tenth; seconds of CPU {cpu_s:.1f}")
    print(f"two Ray workers against one process: {seconds['one process'] / seconds['two Ray workers']:.2f}x")


def main() -> None:
    """Measure, and say what was found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pictures", type=int, default=200)
    parser.add_argument("--records", type=int, default=960)
    parser.add_argument("--only", choices=["writing", "encoding"])
    told = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=".") as folder:
        if told.only != "encoding":
            writing(Path(folder), told.records)
        if told.only != "writing":
            encoding(Path(folder), told.pictures)


if __name__ == "__main__":
    main()
