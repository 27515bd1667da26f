"""Encoding on a cluster without the cluster: the same tasks, messages and workers, in this process, dying at will.

tests/cache_builder/test_ray.py runs the same with Ray's own processes.
"""

import random
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from cache_builder import ray_runner
from cache_builder.chunks import pack, unpack
from cache_builder.cli import _cache_build
from cache_builder.config import RayRules
from cache_builder.crew import DEATHS_AMONG_OTHERS, DEATHS_AT_THE_END, Crew, Task
from cache_builder.ray_runner import RayCluster
from cache_builder.ray_worker import Worker
from cache_builder.report import BuildReport
from cache_builder.transfer.store_import import import_store
from shared.errors import ConfigError, DataError, ExpertsError, Stopped, StoreMissing
from shared.manifest import open_manifest
from tests.pictures import write_shapes
from tests.stores import records

Build = Callable[..., BuildReport]
COUNT = 24


class Nearby(RayCluster):
    """Workers in this process; one in five calls ends its worker, and each task is done one to three times."""

    def __init__(self, seed: int, deaths: float = 0.2, copies: int = 3, blind: bool = False) -> None:
        self._rules, self.device, self.count = RayRules(chunk=3), "cpu", 2
        self._draw, self._deaths, self._copies, self._blind = random.Random(seed), deaths, copies, blind
        self._told = b""
        self.dead: set[Any] = set()
        self.calls = Counter[str]()
        self._died_over = Counter[bytes]()

    def hire(self) -> Any:
        return Worker(self._told)

    def dismiss(self, actor: Any) -> None:
        self.dead.add(actor)

    def call(self, actor: Any, message: bytes | None) -> Any:
        return actor, message, self._draw.random(), object()

    def wait(self, calls: list[Any], timeout_s: float) -> list[Any]:
        return [self._draw.choice(calls)]

    def answer(self, call: Any) -> bytes | None:
        actor, message, draw, _ = call
        if message is None:
            return bytes(actor.check())
        self.calls["work"] += 1
        if actor in self.dead or (draw < self._deaths and self._died_over[message] < 2):
            self.dead.add(actor)
            self._died_over[message] += 1
            self.calls["deaths"] += 1
            return None
        for _ in range(self._draw.randint(1, self._copies) - 1):  # its answer was lost on the way, say
            actor.work(message)
        if self._blind:
            message = _elsewhere(message)
        return bytes(actor.work(message))


def _elsewhere(message: bytes) -> bytes:
    """The same on a machine that has none of the folders."""
    header, blobs = unpack(message)
    for row in header.get("pictures", []):
        row[0] = row[0] and ["/nowhere/at/all", *row[0][1:]]
    return pack({key: value for key, value in header.items() if key != "blobs"}, blobs)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shapes, one that is cut short, and one that says it is another size than it is."""
    folder = write_shapes(tmp_path_factory.mktemp("data") / "set", COUNT)
    Image.effect_noise((90, 80), 60).save(folder / "cut.png")
    (folder / "cut.png").write_bytes((folder / "cut.png").read_bytes()[:-900])
    (folder / "cut.txt").write_text("a picture that ends early")
    return folder


@pytest.fixture(scope="module")
def here(pictures: Path, tiny_model: Path, run_build: Build, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What one process makes of them."""
    store = tmp_path_factory.mktemp("one") / "store"
    return store, run_build([pictures], store, tiny_model)


@pytest.fixture
def build_nearby(monkeypatch: pytest.MonkeyPatch, run_build: Build) -> Callable[..., BuildReport]:
    """A build with --runner ray on a `Nearby` in place of Ray."""

    def build(cluster: Nearby, *arguments: Any, **options: Any) -> BuildReport:
        @contextmanager
        def opened(*_: Any) -> Iterator[Nearby]:
            yield cluster

        monkeypatch.setattr(ray_runner, "open_ray", opened)
        return run_build(*arguments, runner="ray", **options)

    return build


def accounts(report: BuildReport) -> dict[str, Any]:
    return {key: value for key, value in report.as_json().items() if key != "seconds"}


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_tasks_that_run_one_to_three_times_on_workers_that_die_give_what_one_process_gives(
    tmp_path: Path, pictures: Path, here: Any, tiny_model: Path, build_nearby: Any, seed: int
) -> None:
    cluster = Nearby(seed)
    report = build_nearby(cluster, [pictures], tmp_path / "store", tiny_model)
    assert cluster.calls["deaths"] > 0
    assert accounts(report) == accounts(here[1])
    assert len(report.quarantined) == 1
    assert open_manifest(tmp_path / "store", "main").digest == open_manifest(here[0], "main").digest
    assert records(tmp_path / "store").keys() == records(here[0]).keys()
    again = build_nearby(Nearby(seed, deaths=1), [pictures], tmp_path / "store", tiny_model)
    assert (again.digest, again.stored, again.reused) == (report.digest, 0, COUNT)


def test_a_worker_that_sees_no_folder_is_sent_the_pictures_and_that_is_said_once(
    tmp_path: Path, pictures: Path, here: Any, tiny_model: Path, build_nearby: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    report = build_nearby(Nearby(0, deaths=0, blind=True), [pictures], tmp_path / "store", tiny_model)
    assert (
        capsys.readouterr().err.count("a worker of the Ray cluster cannot read pictures that this machine reads") == 1
    )
    assert accounts(report) == accounts(here[1])
    assert records(tmp_path / "store").keys() == records(here[0]).keys()


def test_a_machine_with_other_weights_is_refused_in_a_line(
    tmp_path: Path, pictures: Path, tiny_model: Path, build_nearby: Any
) -> None:
    class Strange(Nearby):
        def hire(self) -> Any:
            told, _ = unpack(self._told)
            told["expects"]["vae"] = "0" * 64
            return Worker(pack({key: value for key, value in told.items() if key != "blobs"}))

    with pytest.raises(ConfigError, match=r"^Ray worker on \S+: \S+ holds other weights than here; every machine of"):
        build_nearby(Strange(0), [pictures], tmp_path / "store", tiny_model)


# --- shards in place of a store ---


def test_shards_that_workers_write_are_the_store_of_one_process(
    tmp_path: Path, pictures: Path, here: Any, tiny_model: Path, build_nearby: Any
) -> None:
    """Whatever is done twice, and stopped in the middle: the import has the digest and the records of one process."""
    to = str(tmp_path / "shards")
    with pytest.raises(Stopped):
        build_nearby(Stopping(1), [pictures], tmp_path / "work", tiny_model, shards_to=to)
    with pytest.raises(StoreMissing, match=r"holds no export\.json"):
        import_store(to, tmp_path / "early")
    written = sorted((tmp_path / "shards/shards").iterdir())
    assert written
    written[0].write_bytes(written[0].read_bytes()[:-40])  # as a bucket may have it of a write that was broken off
    report = build_nearby(Nearby(2), [pictures], tmp_path / "work", tiny_model, shards_to=to)
    assert report.encoded_captions < here[1].encoded_captions or report.encoded_crops < here[1].encoded_crops
    assert report.digest == here[1].digest
    assert not list((tmp_path / "work").glob(".sealing*"))
    assert all(len(frame) < 1000 for frame in records(tmp_path / "work").values())  # facts alone
    import_store(to, tmp_path / "store")
    assert open_manifest(tmp_path / "store", "main").digest == open_manifest(here[0], "main").digest
    assert records(tmp_path / "store").keys() == records(here[0]).keys()
    again = build_nearby(Nearby(3, deaths=1), [pictures], tmp_path / "work", tiny_model, shards_to=to)
    assert (again.digest, again.stored, again.encoded_captions) == (report.digest, 0, 0)


def test_a_shard_that_was_damaged_later_is_made_anew_and_no_longer_listed(
    tmp_path: Path, pictures: Path, here: Any, tiny_model: Path, build_nearby: Any
) -> None:
    to = str(tmp_path / "shards")
    build_nearby(Nearby(5, deaths=0), [pictures], tmp_path / "work", tiny_model, shards_to=to)
    for path in (tmp_path / "shards/shards").iterdir():
        path.write_bytes(path.read_bytes()[:-40])
    sets = ("encode.text_batch=5", "ray.chunk=7")  # so that no shard has its old name
    build_nearby(Nearby(6, deaths=0), [pictures], tmp_path / "work", tiny_model, *sets, shards_to=to)
    import_store(to, tmp_path / "store")
    assert open_manifest(tmp_path / "store", "main").digest == open_manifest(here[0], "main").digest
    assert records(tmp_path / "store").keys() == records(here[0]).keys()


def test_the_command_hands_on_where_records_are_made_and_where_they_go(
    tmp_path: Path, pictures: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    monkeypatch.setattr("cache_builder.build.build", lambda *told: asked.append(told[3]) or BuildReport())
    command = {"folder": str(pictures), "store": tmp_path / "store", "model": str(tiny_model)}
    _cache_build(**command)
    _cache_build(**command, runner="ray", ray_address="there:1", output="shards", to="s3://set/shards")
    assert [(one.runner, one.ray_address, one.shards_to) for one in asked] == [
        ("local", None, None),
        ("ray", "there:1", "s3://set/shards"),
    ]


def test_a_wrong_address_is_said_before_anything_is_scanned(
    tmp_path: Path, pictures: Path, tiny_model: Path, build_nearby: Any
) -> None:
    for words, said in (
        ({"output": "shards"}, "--output shards needs --to"),
        ({"to": "x"}, "--to x is for --output"),
        ({"output": "records"}, "--output records: it is store or shards"),
    ):
        with pytest.raises(ConfigError, match=said):
            _cache_build(folder=str(pictures), store=tmp_path / "work", model=str(tiny_model), runner="ray", **words)
    with pytest.raises(ConfigError, match=r"^ftp://there/x: name a folder, or s3://"):
        build_nearby(Nearby(0), [pictures], tmp_path / "work", tiny_model, shards_to="ftp://there/x")
    assert not (tmp_path / "work").exists()


class Stopping(Nearby):
    """Asks to stop after some answers."""

    def answer(self, call: Any) -> bytes | None:
        if self.calls["work"] > 6:
            raise Stopped("asked to")
        return super().answer(call)


# --- who does what ---


class Bare:
    """Answers with the task itself, unless `harmful` is in it: then the worker dies."""

    def __init__(self, harmful: bytes = b"none", starts: bool = True) -> None:
        self._harmful, self._starts = harmful, starts
        self.together: list[list[bytes]] = []

    def hire(self) -> Any:
        return object()

    def dismiss(self, actor: Any) -> None:
        pass

    def call(self, actor: Any, message: bytes | None) -> Any:
        return actor, message, object()

    def wait(self, calls: list[Any], timeout_s: float) -> list[Any]:
        self.together.append([message for _, message, _ in calls if message])
        return calls[:1] if self._starts else []

    def answer(self, call: Any) -> bytes | None:
        return None if call[1] and self._harmful in call[1] else call[1] or b""


def run_crew(cluster: Bare, count: int = 20, workers: int = 3) -> list[bytes]:
    return sorted(answer for _, answer in Crew(cluster, workers).answers(some_tasks(count), bytes))


def some_tasks(count: int) -> Iterator[Task]:
    return (Task(number, f"picture {number}", b"task %d." % number) for number in range(count))


def test_no_more_than_two_tasks_wait_for_each_worker() -> None:
    cluster = Bare()
    assert run_crew(cluster) == sorted(b"task %d." % number for number in range(20))
    assert max(map(len, cluster.together)) == 6


def test_a_task_that_ends_its_workers_is_named_when_all_others_are_done() -> None:
    crew, done = Crew(Bare(b"task 7."), 3), []
    deaths = DEATHS_AMONG_OTHERS + DEATHS_AT_THE_END
    with pytest.raises(DataError, match=f"^{deaths} workers died over picture 7, the last 3 with no other task in the"):
        done.extend(answer for _, answer in crew.answers(some_tasks(20), bytes))
    assert sorted(done) == sorted(b"task %d." % number for number in range(20) if number != 7)


def test_a_task_whose_workers_are_ended_from_outside_is_done_last_and_with_no_other() -> None:
    class Unlucky(Bare):
        deaths = 0
        late: list[list[bytes]]

        def wait(self, calls: list[Any], timeout_s: float) -> list[Any]:
            if self.deaths >= DEATHS_AMONG_OTHERS and any(call[1] == b"task 7." for call in calls):
                self.late.append([message for _, message, _ in calls if message])
            return super().wait(calls, timeout_s)

        def answer(self, call: Any) -> bytes | None:
            if call[1] == b"task 7." and self.deaths < DEATHS_AMONG_OTHERS + DEATHS_AT_THE_END - 1:
                self.deaths += 1
                return None
            return super().answer(call)

    cluster = Unlucky()
    cluster.late = []
    assert run_crew(cluster, 60) == sorted(b"task %d." % number for number in range(60))
    assert cluster.deaths == DEATHS_AMONG_OTHERS + DEATHS_AT_THE_END - 1
    assert len(cluster.late) >= DEATHS_AT_THE_END
    assert all(together == [b"task 7."] for together in cluster.late)


def test_workers_that_end_before_they_begin_are_an_error() -> None:
    class Failing(Bare):
        def answer(self, call: Any) -> bytes | None:
            return None

    with pytest.raises(ExpertsError, match="6 workers of the Ray cluster in a row ended before they had begun"):
        run_crew(Failing())


def test_a_cluster_without_workers_is_not_waited_for_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cache_builder.crew.LOST_S", 0.05)
    with pytest.raises(Stopped, match="no worker of the Ray cluster has been ready"):
        run_crew(Bare(starts=False))
