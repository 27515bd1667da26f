"""A Ray cluster that others have started: its machines may die and come, and it stands when a build has ended."""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import psutil
import pytest

from cache_builder.places import open_place
from shared.manifest import open_manifest
from tests.pictures import write_shapes
from tests.ray_cluster import LiveCluster, kill_node, live_cluster
from tests.stores import records, stored

pytest.importorskip("ray")
pytestmark = pytest.mark.slow

FEW, COUNT = 8, 100
WAIT_S = 240


@pytest.fixture(scope="module")
def cluster(s3_environment: dict[str, str]) -> Iterator[LiveCluster]:
    """Its machines have credentials of their own for the server."""
    with live_cluster(**s3_environment) as cluster:
        yield cluster


@pytest.fixture
def on_cluster(
    cluster: LiveCluster, commands: Any, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Any]:
    """Starts `cache-build --runner ray --ray-address` of it."""

    def start(
        folder: Path | str,
        store: Path,
        *more: str,
        environment: Mapping[str, str] = MappingProxyType({}),
        token: Mapping[str, str] = cluster.environment,
    ) -> Any:
        monkeypatch.setattr(commands, "environment", {**environment, **token})
        joined = ("--runner", "ray", "--ray-address", cluster.address)
        return commands.start_build(folder, store, tiny_model, *joined, "--set", "ray.chunk=2", *more)

    return start


def wait_until(is_so: Callable[[], object]) -> None:
    end_s = time.monotonic() + WAIT_S
    while not is_so():
        assert time.monotonic() < end_s
        time.sleep(0.05)


def workers(raylet: psutil.Process) -> list[psutil.Process]:
    found = []
    for child in raylet.children(recursive=True):
        with contextlib.suppress(psutil.Error, IndexError):
            if child.cmdline()[0].startswith("ray::Worker"):
                found.append(child)
    return found


def test_a_machine_that_dies_and_another_that_comes_change_nothing(
    tmp_path: Path, cluster: LiveCluster, commands: Any, tiny_model: Path, on_cluster: Any
) -> None:
    pictures, store = write_shapes(tmp_path / "set", COUNT), tmp_path / "store"
    assert commands.build(pictures, tmp_path / "one", tiny_model).code == 0
    second = cluster.add_node()
    running = on_cluster(pictures, store)
    wait_until(lambda: workers(second) and stored(store) > COUNT)
    kill_node(second)
    third = cluster.add_node()
    wait_until(lambda: workers(third))
    done = running.finish()
    assert done.code == 0, done.errors
    assert any("a worker of the Ray cluster has died" in line for line in done.errors)
    assert open_manifest(store, "main").digest == open_manifest(tmp_path / "one", "main").digest
    assert records(store).keys() == records(tmp_path / "one").keys()
    wait_until(lambda: not workers(third))
    assert cluster.count_nodes() == 2
    kill_node(third)


def upload(folder: Path, address: str) -> None:
    place = open_place(address)
    for path in folder.iterdir():
        place.write(path.name, path.read_bytes())


def test_a_bucket_is_read_and_written_by_the_workers(
    tmp_path: Path, bucket: str, commands: Any, tiny_model: Path, on_cluster: Any, s3_environment: Mapping[str, str]
) -> None:
    pictures = write_shapes(tmp_path / "set", FEW)
    assert commands.build(pictures, tmp_path / "one", tiny_model).code == 0
    upload(pictures, f"{bucket}/ray/set")
    to = ("--output", "shards", "--to", f"{bucket}/ray/shards")
    done = on_cluster(f"{bucket}/ray/set", tmp_path / "work", *to, environment=s3_environment).finish()
    assert done.code == 0, done.errors
    assert not any("cannot read" in line for line in done.errors)
    assert not any(len(frame) > 1000 for frame in records(tmp_path / "work").values())  # facts alone
    assert commands.store("import", f"{bucket}/ray/shards", "--store", str(tmp_path / "store")).code == 0
    assert open_manifest(tmp_path / "store", "main").digest == open_manifest(tmp_path / "one", "main").digest
    assert records(tmp_path / "store").keys() == records(tmp_path / "one").keys()


def test_what_cannot_be_joined_or_written_is_one_line(
    tmp_path: Path, bucket: str, on_cluster: Any, s3_environment: Mapping[str, str]
) -> None:
    pictures = write_shapes(tmp_path / "set", FEW)
    done = on_cluster(pictures, tmp_path / "store", token={"RAY_AUTH_MODE": "disabled"}).finish()
    assert (done.code, "there: it asks for a token: RAY_AUTH_MODE=token" in done.errors[-1]) == (64, True), done.errors
    to = ("--output", "shards", "--to", "s3://nobodys/shards")
    done = on_cluster(pictures, tmp_path / "store", *to, environment=s3_environment).finish()
    assert (done.code, "there is no such bucket; make it first" in done.errors[-1]) == (74, True), done.errors


def test_a_head_that_is_gone_ends_the_build_with_what_is_stored(
    tmp_path: Path, commands: Any, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its worker is held up meanwhile, or the build might end first."""
    pictures, store = write_shapes(tmp_path / "set", COUNT), tmp_path / "store"
    with live_cluster() as cluster:
        monkeypatch.setattr(commands, "environment", cluster.environment)
        joined = ("--runner", "ray", "--ray-address", cluster.address)
        running = commands.start_build(pictures, store, tiny_model, *joined, "--set", "encode.text_batch=2")
        wait_until(lambda: stored(store) > 20)
        (worker,) = workers(cluster.head.parent())
        worker.suspend()
        cluster.head.kill()
        done = running.finish()
        worker.kill()
    said = f"stopped: the head of the Ray cluster has not answered at {cluster.address} for 30 s; what was stored stays"
    assert (done.code, done.errors[-1][: len(said)]) == (75, said), done.errors
    assert stored(store) > 20
