"""Encoders on the machines of a Ray cluster: the one door to Ray. Nothing but bytes, numbers and texts goes through it.

fill.py -> RayRunner -> crew.py -> Ray -> ray_worker.py reads, decodes and encodes        this process alone writes

A Ray that is started here listens on loopback alone, has no dashboard and reports no usage. Ray pickles what goes
between our own processes; that is bytes (chunks.py), and nothing that a user gives is ever unpickled.
"""

import os
import re
import signal
import socket
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import psutil

from cache_builder.chunks import Header, alike, pack, pictures_message, read_here, unpack
from cache_builder.config import EncodeRules, RayRules
from cache_builder.crew import Crew, Task
from cache_builder.decoding import Encoded
from cache_builder.encode import Captions, Job, Records, SampleEncoder
from cache_builder.ray_worker import Worker, expected_of
from cache_builder.todo import Picture, Pictures
from cache_builder.transfer.shard_output import ShardOutput
from shared import errors
from shared.ahead import Ahead
from shared.errors import ConfigError, ExpertsError, Stopped
from shared.progress import say
from shared.record import verify_frame

T = TypeVar("T")
ROOT = Path(__file__).parents[1]
NAMED = 3  # pictures of a chunk that a message names
STORE_BYTES = 512 << 20  # of shared memory that a Ray started here may take
ANSWER_S = 10.0  # for an address to answer at all
START_TRIES = 3  # a Ray that has not begun after 30 s gives up, as on a machine that is busy with something else
_QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # or Ray warns that it will be so
}
_PRIVATE = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}  # on any system: its servers bind to 127.0.0.1
_HOST_PORT = re.compile(r"(.+):(\d+)")
_HERE = ("127.0.0.1:", "localhost:")


@contextmanager
def open_ray(address: str | None, device: str, rules: RayRules) -> Iterator["RayCluster"]:
    """The cluster at `address`, or one of this machine alone; what was started here ends with the block.

    Raises ConfigError where Ray is not installed, nobody answers at the address, or there is no room for a worker.
    """
    try:
        os.environ |= _QUIET | ({} if address and not address.startswith(_HERE) else _PRIVATE)
        import ray
    except ModuleNotFoundError:
        raise ConfigError("--runner ray needs Ray: pip install 'sdxl-experts[ray]'") from None
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    say(f"connecting to Ray at {address}" if address else "starting Ray on this machine")
    try:
        _connect(ray, address)
        for number, handler in before.items():  # Ray sets its own
            signal.signal(number, handler)
        yield RayCluster(ray, device, rules, () if address else _own_node())
    finally:
        ray.shutdown()


def _connect(ray: Any, address: str | None) -> None:
    if address and (found := _HOST_PORT.fullmatch(address)):
        try:
            socket.create_connection((found[1].strip("[]"), int(found[2])), ANSWER_S).close()
        except (OSError, OverflowError) as refused:  # Ray would try for minutes
            raise ConfigError(f"--ray-address {address}: no Ray cluster can be joined there: {refused}") from None
    for _ in range(START_TRIES):
        if (error := _tried(ray, address)) is None or "timed out during startup" not in error:
            break
    if error is not None:
        where = f"--ray-address {address}: no Ray cluster can be joined there" if address else "Ray cannot be started"
        raise ConfigError(f"{where}: {error}")


def _tried(ray: Any, address: str | None) -> str | None:
    """Join or start; what Ray says where that fails."""
    common: dict[str, Any] = {"log_to_driver": False, "logging_level": "critical"}
    try:
        if address:
            ray.init(address=address, **common)
        else:
            here = {"env_vars": {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}}
            ray.init("local", include_dashboard=False, object_store_memory=STORE_BYTES, runtime_env=here, **common)
    except Exception as error:  # noqa: BLE001 -- Ray raises what it likes; each is one line
        ray.shutdown()
        return (str(error).splitlines() or [type(error).__name__])[0][:300]
    return None


def _own_node() -> list[psutil.Process]:
    """What of Ray was started here: who keeps the books, and who starts workers."""
    return [child for child in psutil.Process().children() if child.name() in ("gcs_server", "raylet")]


def _lives(process: psutil.Process) -> bool:
    with suppress(psutil.NoSuchProcess):
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    return False


class RayCluster:
    """What crew.py asks of Ray, and what it has."""

    def __init__(self, ray: Any, device: str, rules: RayRules, node: Sequence[psutil.Process] = ()) -> None:
        """`node`: the processes of a Ray that was started here, without which it does nothing more."""
        self._ray, self._rules, self._node = ray, rules, node
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
        """As crew.py says; raises Stopped where the Ray that was started here has died, for it would wait and abort."""
        if not all(map(_lives, self._node)):
            raise Stopped("the Ray that was started here has died; what was stored stays, and the same command goes on")
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
        """As crew.py says."""
        done: list[Any] = self._ray.wait(calls, num_returns=1, timeout=timeout_s)[0]
        return done

    def answer(self, call: Any) -> bytes | None:
        """As crew.py says."""
        try:
            answer: bytes = self._ray.get(call)
        except self._ray.exceptions.RayTaskError as error:
            raise ExpertsError(f"a worker of the Ray cluster failed, what was stored stays: {error}") from None
        except self._ray.exceptions.RayError:
            return None
        return answer


@dataclass
class RayRunner:
    """Encodes captions, and reads, decodes and encodes pictures, on the workers of a crew."""

    crew: Crew
    rules: RayRules
    shards: ShardOutput | None = None

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
                self.crew.again.extend(self._sent([asked[index] for index in header["unread"]], rules, lost))
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
