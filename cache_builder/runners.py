"""Where batches are encoded: in a thread of this process, or in a process for each of several devices.

decoding.py -> Runner.run(batches) -> fill.py commits        the encoders work while both of the others do
"""

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Protocol, TypeVar, runtime_checkable

from cache_builder.config import EncodeRules
from cache_builder.decoding import Encoded
from cache_builder.encode import Job, Records, SampleEncoder
from cache_builder.encoder_process import EncoderProcess
from cache_builder.todo import Pictures
from shared.ahead import Ahead
from shared.errors import ConfigError

T = TypeVar("T")


class Encoder(Protocol):
    """Makes the records of one batch: a SampleEncoder, or what stands in for one."""

    def encode(self, job: Job) -> Records:
        """One record for each crop, two for each caption."""
        ...


class Runner(Protocol):
    """Encodes batches; used as a context manager, which ends whatever it started."""

    def run(self, work: Iterable[tuple[T, Job]]) -> Generator[tuple[T, Records]]:
        """The records of each job of `work` with the tag that came with it, as they are made.

        `work` is drawn from in a thread of its own, a few jobs ahead. Close the generator to end it early.
        """
        ...


@runtime_checkable
class PictureRunner(Protocol):
    """A runner that reads and decodes too: pictures go out by where they lie."""

    def run_pictures(self, pictures: Pictures, rules: EncodeRules, lost: dict[bytes, str]) -> Generator[list[Encoded]]:
        """What becomes of the crops of `pictures`, a chunk at a time, in any order.

        What cannot be decoded is put into `lost` instead: {latent key of each of its crops: why}.
        """
        ...


def device_names(setting: str) -> tuple[str, ...]:
    """The devices of "cuda:0,cuda:1"; raises ConfigError where they are not all of one kind."""
    names = tuple(name.strip() for name in setting.split(","))
    kinds = {name.partition(":")[0] for name in names}
    if len(names) > 1 and (len(kinds) > 1 or kinds & {"", "auto"}):
        raise ConfigError(
            f"--device {setting}: name devices of one kind, as cuda:0,cuda:1; who encodes a picture must not change it"
        )
    return names


def open_runner(encoder: SampleEncoder) -> AbstractContextManager[Runner]:
    """`encoder` itself for one device; for several, a process for each with an encoder that is told the same."""
    names = device_names(encoder.device)
    return LocalRunner(encoder) if len(names) == 1 else ProcessRunner(encoder, names)


class LocalRunner:
    """Encodes in a thread of this process."""

    def __init__(self, encoder: Encoder) -> None:
        self._encoder = encoder

    def run(self, work: Iterable[tuple[T, Job]]) -> Generator[tuple[T, Records]]:
        """As Runner says."""
        yield from _side_by_side(work, [self._encoded])

    def __enter__(self) -> "LocalRunner":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def _encoded(self, jobs: Iterator[tuple[T, Job]]) -> Iterator[tuple[T, Records]]:
        return ((tag, self._encoder.encode(job)) for tag, job in jobs)


class ProcessRunner:
    """Encodes in a spawned process for each device; they begin with the first job, and never see the store."""

    def __init__(self, encoder: SampleEncoder, devices: Sequence[str]) -> None:
        self._processes = [EncoderProcess(encoder, device, len(devices)) for device in devices]

    def run(self, work: Iterable[tuple[T, Job]]) -> Generator[tuple[T, Records]]:
        """As Runner says; raises Stopped where a process dies."""
        yield from _side_by_side(work, [process.encoded for process in self._processes], self._kill)

    def __enter__(self) -> "ProcessRunner":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self._kill()
        for process in self._processes:
            process.close()

    def _kill(self) -> None:
        for process in self._processes:
            process.kill()


def _side_by_side(
    work: Iterable[tuple[T, Job]],
    lanes: Sequence[Callable[[Iterator[tuple[T, Job]]], Iterator[tuple[T, Records]]]],
    interrupt: Callable[[], None] = lambda: None,
) -> Generator[tuple[T, Records]]:
    """What the lanes make of `work`; each takes its next job when it can. `interrupt` ends lanes that nobody awaits."""
    ahead = len(lanes) + 1
    with Ahead(work, count=ahead) as jobs, Ahead(*(lane(jobs) for lane in lanes), count=ahead) as done:
        try:
            yield from done
        except BaseException:
            interrupt()
            raise
        finally:
            jobs.stop()
