"""An encoder in a process of its own, one for each device: jobs go down its stdin, records come back up its stdout.

runners.py -> EncoderProcess.encoded | pipe | serve -> SampleEncoder        the child ends when its pipe does

A message is [u32 length of the header | header: msgpack | blobs], the header says how long the blobs are:

    job      {"keys": [...], "hw": [h, w], "blobs": [...]}     pixels uint8 [h, w, 3] of each crop
             {"keys": [...], "captions": [...], "blobs": []}
    records  {"keys": [key | nil, ...], "blobs": [...]}        framed records; nil is a crop without one
             {"error": class, "message": str, "blobs": []}     of shared.errors
"""

import contextlib
import os
import signal
import struct
import subprocess
import sys
import traceback
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any, TypeVar

import msgpack
import numpy as np

from cache_builder.encode import Captions, Crop, Job, Records, SampleEncoder
from shared import errors
from shared.ahead import Ahead
from shared.errors import ExpertsError, Stopped

T = TypeVar("T")
ROOT = Path(__file__).parents[1]
COMMAND = (sys.executable, "-m", "cache_builder.encoder_process")
IN_FLIGHT = 2  # one that is encoded and one that is ready
END_S = 10.0  # for an idle child to end by itself
_LENGTH = struct.Struct("<I")


class EncoderProcess:
    """The parent's side; the child is started by the first job."""

    def __init__(self, like: SampleEncoder, device: str, count: int) -> None:
        """An encoder that is told what `like` was, on `device`, as one of `count`."""
        self._told = [str(like.model), device, like.dtype, like.latents, str(like.chunks)]
        self._device, self._count = device, count
        self._child: subprocess.Popen[bytes] | None = None
        self._killed = False

    def encoded(self, jobs: Iterator[tuple[T, Job]]) -> Iterator[tuple[T, Records]]:
        """Each job's tag and records, in order; raises what the child's encoder raised, or Stopped where it died."""
        sent: deque[T] = deque()
        for tag, job in jobs:
            self._send(job)
            sent.append(tag)
            if len(sent) == IN_FLIGHT:
                yield sent.popleft(), self._receive()
        while sent:
            yield sent.popleft(), self._receive()

    def kill(self) -> None:
        """End the child at once; it holds nothing that could be lost."""
        self._killed = True
        if self._child is not None:
            self._child.kill()

    def close(self) -> None:
        """Let the child end, and wait for it."""
        if self._child is None:
            return
        for pipe in (self._child.stdin, self._child.stdout):
            if pipe is not None and (pipe is self._child.stdin or self._killed):
                _close(pipe)
        try:
            self._child.wait(END_S)
        except subprocess.TimeoutExpired:
            self._child.kill()
            self._child.wait()
        if self._child.stdout is not None:
            _close(self._child.stdout)

    def _send(self, job: Job) -> None:
        child = self._started()
        assert child.stdin is not None
        try:
            write_message(child.stdin, *_job_message(job))
        except BrokenPipeError:
            raise self._death() from None

    def _receive(self) -> Records:
        child = self._started()
        assert child.stdout is not None
        try:
            header, blobs = read_message(child.stdout)
        except EOFError:
            raise self._death() from None
        if "error" in header:
            raise getattr(errors, header["error"])(header["message"])
        records = iter(blobs)
        return [None if key is None else (key, bytes(next(records))) for key in header["keys"]]

    def _started(self) -> "subprocess.Popen[bytes]":
        if self._child is None and not self._killed:
            # A group of its own: Ctrl-C is the parent's to answer. No environment of LMDB is ever forked.
            self._child = subprocess.Popen(
                [*COMMAND, *self._told],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env=self._environment(),
                process_group=0,
            )
        if self._child is None:
            raise Stopped("the build ends")
        return self._child

    def _environment(self) -> dict[str, str]:
        path = os.pathsep.join(part for part in (str(ROOT), os.environ.get("PYTHONPATH", "")) if part)
        environment = os.environ | {"PYTHONPATH": path}
        if self._device.startswith("cpu"):  # or each would take all cores
            threads = max(1, (os.cpu_count() or 1) // self._count)
            environment.setdefault("OMP_NUM_THREADS", str(threads))
        return environment

    def _death(self) -> ExpertsError:
        assert self._child is not None
        code = self._child.wait()
        if code < 0:
            how = f"was ended by {signal.Signals(-code).name}"
            return Stopped(f"the encoder on {self._device} {how}; what was stored stays, and the same command goes on")
        return ExpertsError(f"the encoder on {self._device} failed, as said above; what was stored stays")


def write_message(pipe: IO[bytes], header: dict[str, Any], blobs: Sequence[Any]) -> None:
    """Send a header and blobs (bytes or C-contiguous arrays)."""
    views = [memoryview(blob).cast("B") for blob in blobs]
    packed = msgpack.packb(header | {"blobs": [len(view) for view in views]})
    pipe.write(_LENGTH.pack(len(packed)) + packed)
    for view in views:
        pipe.write(view)
    pipe.flush()


def read_message(pipe: IO[bytes]) -> tuple[dict[str, Any], list[bytearray]]:
    """Receive what write_message sent; raises EOFError where the other side is gone."""
    (length,) = _LENGTH.unpack(_read(pipe, _LENGTH.size))
    header: dict[str, Any] = msgpack.unpackb(_read(pipe, length))
    return header, [_read(pipe, size) for size in header["blobs"]]


def serve(jobs: IO[bytes], answers: IO[bytes], encoder: SampleEncoder) -> None:
    """The child's side: answer every job until there are no more, reading the next one while this one is encoded."""
    for header, blobs in Ahead(_messages(jobs), count=1):
        try:
            records = encoder.encode(_job(header, blobs))
        except ExpertsError as error:
            write_message(answers, {"error": known_class(error), "message": str(error)}, [])
        else:
            keys = [None if record is None else record[0] for record in records]
            write_message(answers, {"keys": keys}, [record[1] for record in records if record is not None])


def _job_message(job: Job) -> tuple[dict[str, Any], list[Any]]:
    if isinstance(job, Captions):
        return {"keys": list(job.keys), "captions": list(job.texts)}, []
    return {"keys": [crop.key for crop in job], "hw": job[0].size_hw}, [crop.pixels for crop in job]


def _job(header: dict[str, Any], blobs: Sequence[bytearray]) -> Job:
    if "captions" in header:
        return Captions(header["captions"], header["keys"])
    pixels = [np.frombuffer(blob, np.uint8).reshape(*header["hw"], 3) for blob in blobs]
    return [Crop(key, each) for key, each in zip(header["keys"], pixels, strict=True)]


def _messages(pipe: IO[bytes]) -> Iterator[tuple[dict[str, Any], list[bytearray]]]:
    while True:
        try:
            yield read_message(pipe)
        except EOFError:
            return


def _read(pipe: IO[bytes], size: int) -> bytearray:
    data = bytearray(size)
    if pipe.readinto(data) != size:  # type: ignore[attr-defined]
        raise EOFError
    return data


def known_class(error: ExpertsError) -> str:
    """The class of shared.errors that an error is of, by name."""
    return next(base.__name__ for base in type(error).__mro__ if base.__module__ == errors.__name__)


def _close(pipe: IO[bytes]) -> None:
    with contextlib.suppress(OSError):  # where the other side is gone, with what was still on its way
        pipe.close()


def _main(model: str, device: str, dtype: Any, latents: str, chunks: str) -> None:
    jobs, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever a library prints goes where people read
    code = 1
    try:
        serve(jobs, answers, SampleEncoder(Path(model), device, dtype, latents, int(chunks)))
        code = 0
    except BrokenPipeError:
        code = 0  # the parent is gone, and wants no answer
    except BaseException:  # noqa: BLE001 -- told, and the parent says in a line that this process failed
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)  # a thread may still be waiting for the next job


if __name__ == "__main__":
    _main(*sys.argv[1:])
