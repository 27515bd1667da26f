"""Encoders on the machines of a Ray cluster. Nothing but bytes, numbers and texts goes through Ray.

fill.py -> RayRunner -> crew.py -> Ray -> ray_worker.py reads, decodes and encodes        this process alone writes

Ray pickles what goes between our own processes; that is bytes (chunks.py), and nothing that a user gives is ever
unpickled. ray_joining.py is the door to it.
"""

import os
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from cache_builder.chunks import Header, alike, pack, pictures_message, read_here, unpack
from cache_builder.config import EncodeRules, RayRules
from cache_builder.crew import Crew, Task
from cache_builder.decoding import Encoded
from cache_builder.encode import Captions, Job, Records, SampleEncoder
from cache_builder.ray_joining import joined_ray
from cache_builder.ray_worker import Worker, expected_of
from cache_builder.todo import Picture, Pictures
from cache_builder.transfer.shard_output import ShardOutput
from shared import errors
from shared.ahead import Ahead
from shared.errors import ConfigError, ExpertsError, Stopped
from shared.progress import say
from shared.record import verify_frame

T = TypeVar("T")
NAMED = 3  # pictures of a chunk that a message names


@contextmanager
def open_ray(address: str | None, device: str, rules: RayRules) -> Iterator["RayCluster"]:
    """The cluster at `address`, or one of this machine alone; what was started here ends with the block.

    Raises ConfigError where Ray is not installed, nobody answers at the address, or there is no room for a worker.
    """
    with joined_ray(address) as (ray, gone):
        yield RayCluster(ray, device, rules, gone)


class RayCluster:
    """What crew.py asks of Ray, and what it has."""

    def __init__(self, ray: Any, device: str, rules: RayRules, gone: Callable[[], str] = str) -> None:
        """`gone` says what of Ray is gone without which it does nothing more; "" as long as it stands."""
        self._ray, self._rules, self._gone = ray, rules, gone
        there = ray.cluster_resources()
        gpus, cpus = int(there.get("GPU", 0)), int(there.get("CPU", 0))
        if device not in ("auto", "cuda", "cpu"):
            raise ConfigError(f"--device {device}: with --runner ray it is auto, cuda or cpu; Ray chooses which GPU")
        self.device = device if device != "auto" else "cuda" if gpus else "cpu"
        fitting = cpus // rules.cpus
        most = min(gpus, fitting) if self.device == "cuda" else fitting
        self.count = min(rules.workers or most, most)
        if not self.count:
            raise ConfigError(
                f"the Ray cluster has {gpus} GPUs and {cpus} CPUs: no room for a worker on {self.device} with "
                f"{rules.cpus} CPUs (--device, ray.cpus)"
            )
        self._told = b""

    def runner(
        self, like: SampleEncoder, vae_digest: str, text_digests: Mapping[str, str], shards: ShardOutput | None = None
    ) -> "RayRunner":
        """Workers that encode as `like` does, from weights of these digests; into `shards` where there are any."""
        self._told = pack(
            {
                "model": os.path.abspath(like.model),
                "device": self.device,
                "dtype": like.dtype,
                "latents": like.latents,
                "chunks": like.chunks,
                "threads": self._rules.cpus,
                "to": shards and shards.address,
                "expects": expected_of(vae_digest, text_digests),
            }
        )
        return RayRunner(Crew(self, self.count), self._rules, shards)

    def hire(self) -> Any:
        """As crew.py says; raises Stopped where Ray is gone, for it would wait and abort."""
        self._require_ray()
        options = {
            "num_cpus": self._rules.cpus,
            "num_gpus": int(self.device == "cuda"),
            "max_concurrency": 2,
            "max_restarts": 0,  # the crew hires another
        }
        return self._ray.remote(Worker).options(**options).remote(self._told)

    def dismiss(self, actor: Any) -> None:
        """As crew.py says."""
        self._ray.kill(actor)

    def call(self, actor: Any, message: bytes | None) -> Any:
        """As crew.py says."""
        return actor.check.remote() if message is None else actor.work.remote(message)

    def wait(self, calls: list[Any], timeout_s: float) -> list[Any]:
        """As crew.py says; raises Stopped where Ray is gone."""
        self._require_ray()
        done: list[Any] = self._ray.wait(calls, num_returns=1, timeout=timeout_s)[0]
        return done

    def _require_ray(self) -> None:
        if what := self._gone():
            raise Stopped(f"{what}; what was stored stays, and the same command goes on")

    def answer(self, call: Any) -> bytes | None:
        """As crew.py says."""
        try:
            answer: bytes = self._ray.get(call)
        except self._ray.exceptions.RayTaskError as error:
            raise ExpertsError(f"a worker of the Ray cluster failed, what was stored stays: {_last(error)}") from None
        except self._ray.exceptions.RayError as error:
            if getattr(error, "actor_init_failed", False):  # and would each time
                raise ConfigError(
                    "a worker of the Ray cluster cannot begin; every machine of it needs this version of sdxl-experts, "
                    f"with the same versions of Python and Ray: {_last(error)}"
                ) from None
            return None
        return answer


def _last(error: Exception) -> str:
    """The last line, which says what was wrong where the others say in which file."""
    return ([line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__])[-1][:300]


@dataclass
class RayRunner:
    """Encodes captions, and reads, decodes and encodes pictures, on the workers of a crew."""

    crew: Crew
    rules: RayRules
    shards: ShardOutput | None = None
    _said_unread: bool = False

    def run(self, work: Iterable[tuple[T, Job]]) -> Generator[tuple[T, Records]]:
        """As Runner says, for captions."""
        tasks = (_captions_task(tag, job) for tag, job in work)
        for task, (header, frames) in self._answers(tasks):
            yield task.tag, [*zip(header["keys"], frames, strict=True)]

    def run_pictures(self, pictures: Pictures, rules: EncodeRules, lost: dict[bytes, str]) -> Generator[list[Encoded]]:
        """As PictureRunner says; what a worker cannot read, though this machine can, is sent to one."""
        with closing(self._answers(self._picture_tasks(pictures, rules, lost))) as answers:
            for task, (header, frames) in answers:
                asked: Sequence[Picture] = task.tag
                for index, why in header["lost"]:
                    lost.update((crop.latent_key, why) for crop in asked[index].crops)
                self._say_unread(asked, header["unread"])
                self.crew.again.extend(self._sent([asked[index] for index, _ in header["unread"]], rules, lost))
                yield _encoded(asked, header, frames)

    def __enter__(self) -> "RayRunner":
        return self

    def __exit__(self, *_: object) -> None:
        self.crew.close()

    def _answers(self, tasks: Iterable[Task]) -> Generator[tuple[Task, tuple[Header, Sequence[bytes]]]]:
        with Ahead(tasks, count=2) as ready, closing(self.crew.answers(ready, _said)) as answers:
            for task, (header, frames) in answers:
                if self.shards is not None and "shard" in header:
                    self.shards.add(header["shard"])
                yield task, (header, frames)

    def _say_unread(self, asked: Sequence[Picture], unread: Sequence[tuple[int, str]]) -> None:
        """Once: it costs this machine and its network what the workers were to do."""
        if unread and not self._said_unread:
            self._said_unread = True
            say(
                "a worker of the Ray cluster cannot read pictures that this machine reads and sends to it instead; the "
                f"first is {asked[unread[0][0]].samples[0].path}: {unread[0][1]}"
            )

    def _picture_tasks(self, pictures: Pictures, rules: EncodeRules, lost: dict[bytes, str]) -> Iterator[Task]:
        for is_placed, some in alike(pictures, self.rules.chunk):
            if is_placed:
                yield _pictures_task(some, None, rules)
            else:
                yield from self._sent(some, rules, lost)

    def _sent(self, pictures: Sequence[Picture], rules: EncodeRules, lost: dict[bytes, str]) -> Iterator[Task]:
        for some, files in read_here(pictures, lost, self.rules.chunk):
            yield _pictures_task(some, files, rules)


def _captions_task(tag: Any, job: Job) -> Task:
    assert isinstance(job, Captions)
    message = pack({"keys": [*job.keys], "captions": [*job.texts]})
    return Task(tag, f"{len(job.keys)} captions (first {job.texts[0][:60]!r})", message)


def _pictures_task(pictures: Sequence[Picture], files: Sequence[bytes] | None, rules: EncodeRules) -> Task:
    names = [picture.samples[0].path for picture in pictures]
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    message = pictures_message(pictures, files, {"batch": rules.batch})
    return Task(pictures, ", ".join(names[:NAMED]) + more, message)


def _said(answer: bytes) -> tuple[Header, Sequence[bytes]]:
    """An answer; raises what the worker raised."""
    header, blobs = unpack(answer)
    if "error" in header:
        raise getattr(errors, header["error"])(header["message"])
    return header, [bytes(blob) for blob in blobs]


def _encoded(asked: Sequence[Picture], header: Header, frames: Sequence[bytes]) -> list[Encoded]:
    made, rest = [], iter(frames)
    for index, key, thumbnail, is_finite in header["made"]:
        framed = None
        if is_finite and "shard" not in header:
            framed = key, next(rest)
            verify_frame(*framed)
        made.append(Encoded(asked[index], key, thumbnail, framed, None, is_finite and framed is None))
    return made
