"""A Ray cluster that others have started: its machines may die and come, and it stands when a build has ended."""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil
import pytest

from shared.errors import ExpertsError
from shared.manifest import open_manifest
from shared.store import StoreReader
from tests.pictures import write_shapes
from tests.ray_cluster import LiveCluster, kill_node, live_cluster
from tests.stores import records

pytest.importorskip("ray")
pytestmark = pytest.mark.slow

COUNT = 100
WAIT_S = 240


@pytest.fixture(scope="module")
def cluster() -> Iterator[LiveCluster]:
    with live_cluster() as cluster:
        yield cluster


@pytest.fixture
def on_cluster(
    cluster: LiveCluster, commands: Any, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Any]:
    """Starts `cache-build --runner ray --ray-address` of it."""

    def start(folder: Path, store: Path, *more: str, environment: Mapping[str, str] = cluster.environment) -> Any:
        monkeypatch.setattr(commands, "environment", environment)
        joined = ("--runner", "ray", "--ray-address", cluster.address)
        return commands.start_build(folder, store, tiny_model, *joined, "--set", "ray.chunk=2", *more)

    return start


def stored(store: Path) -> int:
    try:
        with StoreReader(store) as reader:
            return reader.count()
    except ExpertsError:
        return 0


def wait_until(is_so: Callable[[], object]) -> None:
    end_s = time.monotonic() + WAIT_S
    while not is_so():
        assert time.monotonic() < end_s
        time.sleep(0.05)


def workers(raylet: psutil.Process) -> list[psutil.Process]:
    found = []
    for child in raylet.children():
        with contextlib.suppress(psutil.Error):
            if child.cmdline()[:1] == ["ray::Worker"]:
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
