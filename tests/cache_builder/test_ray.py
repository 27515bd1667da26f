"""A real Ray on this machine, its workers processes of their own: what one process makes, whoever dies meanwhile.

tests/cache_builder/test_crew.py runs the same in this process, quickly.
"""

import contextlib
import os
import random
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from cache_builder.transfer.store_import import import_store
from shared.manifest import open_manifest
from tests.pictures import write_shapes
from tests.stores import records, stored

pytest.importorskip("ray")
pytestmark = [
    pytest.mark.filterwarnings("ignore::ResourceWarning"),  # Ray leaves files and processes to its end
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

COUNT = 24
WORKERS = 2


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shapes(tmp_path_factory.mktemp("data") / "set", COUNT)


@pytest.fixture(scope="module")
def here(pictures: Path, tiny_model: Path, commands: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process makes of them, told the same."""
    store: Path = tmp_path_factory.mktemp("one") / "store"
    assert commands.build(pictures, store, tiny_model).code == 0
    return store


@pytest.fixture(scope="module")
def on_ray(commands: Any, tiny_model: Path) -> Callable[..., Any]:
    """Starts `cache-build --runner ray`, as users do."""

    def start(folder: Path, store: Path, *more: str) -> Any:
        settings = ("--set", "ray.chunk=2", "--set", f"ray.workers={WORKERS}", "--set", "encode.text_batch=4")
        return commands.start_build(folder, store, tiny_model, "--runner", "ray", *settings, *more)

    return start


def is_same(store: Path, here: Path) -> bool:
    return (
        open_manifest(store, "main").digest == open_manifest(here, "main").digest
        and records(store).keys() == records(here).keys()
    )


def below(pid: int, name: str) -> list[psutil.Process]:
    """Processes that a build started, by a part of their name."""
    with contextlib.suppress(psutil.Error):
        found = []
        for process in psutil.Process(pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if any(name in part for part in process.cmdline()[:1]):
                    found.append(process)
        return found
    return []


@contextlib.contextmanager
def killing(pid: int, name: str, times: int, seed: int) -> Iterator[list[int]]:
    """Kills one of the processes of that name now and then, until the block ends; the pids of those that were."""
    killed: list[int] = []
    ended, draw = threading.Event(), random.Random(seed)

    def work() -> None:
        while not ended.wait(draw.uniform(0.3, 1.5)) and len(killed) < times:
            if found := below(pid, name):
                chosen = draw.choice(found)
                with contextlib.suppress(psutil.Error):
                    chosen.kill()
                    killed.append(chosen.pid)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield killed
    finally:
        ended.set()
        thread.join()


def test_two_workers_fill_the_store_that_one_process_does_on_loopback_alone(
    tmp_path: Path, pictures: Path, here: Path, on_ray: Any
) -> None:
    running = on_ray(pictures, tmp_path / "store")
    ports: set[str] = set()
    seen = 0
    while Path(f"/proc/{running.pid}").exists() and seen < 40:
        for process in below(running.pid, ""):
            with contextlib.suppress(psutil.Error):
                ports |= {c.laddr.ip for c in process.net_connections("inet") if c.status == psutil.CONN_LISTEN}
        seen += 1
        time.sleep(0.5)
    done = running.finish()
    assert done.code == 0, done.errors
    assert ports <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}
    assert ports
    assert is_same(tmp_path / "store", here)
    assert not any("Traceback" in line for line in done.errors)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(int(os.environ.get("SDXL_EXPERTS_RAY_KILLS", "1"))))
def test_workers_that_are_killed_change_nothing(
    tmp_path: Path, pictures: Path, here: Path, on_ray: Any, seed: int
) -> None:
    running = on_ray(pictures, tmp_path / "store")
    with killing(running.pid, "ray::Worker", 5, seed) as killed:
        done = running.finish()
    assert done.code == 0, done.errors
    assert killed
    assert is_same(tmp_path / "store", here)


@pytest.mark.slow
def test_a_node_that_is_killed_five_times_loses_nothing(
    tmp_path: Path, commands: Any, tiny_model: Path, on_ray: Any
) -> None:
    """All of the Ray that a build has started, each time when more is stored; the same command goes on."""
    many, store = write_shapes(tmp_path / "set", 120), tmp_path / "store"
    assert commands.build(many, tmp_path / "here", tiny_model).code == 0
    for _ in range(5):
        before, running = stored(store), on_ray(many, store)
        end_s = time.monotonic() + 240
        while stored(store) <= before + 20:
            assert time.monotonic() < end_s
            time.sleep(0.02)
        for process in below(running.pid, ""):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        done = running.finish()
        assert (done.code, done.errors[-1][:46]) == (75, "stopped: the Ray that was started here has die"), done.errors
        assert stored(store) > before
    done = on_ray(many, store).finish()
    assert done.code == 0, done.errors
    assert is_same(store, tmp_path / "here")


@pytest.mark.slow
def test_shards_that_workers_write_are_imported_as_the_store_of_one_process(
    tmp_path: Path, pictures: Path, here: Path, on_ray: Any
) -> None:
    to = tmp_path / "shards"
    done = on_ray(pictures, tmp_path / "work", "--output", "shards", "--to", str(to)).finish()
    assert done.code == 0, done.errors
    assert not any(len(frame) > 1000 for frame in records(tmp_path / "work").values())  # facts alone
    import_store(str(to), tmp_path / "store")
    assert is_same(tmp_path / "store", here)


@pytest.mark.slow
def test_an_address_where_nobody_answers_is_one_line(tmp_path: Path, pictures: Path, on_ray: Any) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        done = on_ray(pictures, tmp_path / "store", "--ray-address", address).finish()
    assert done.code == 64
    assert len(done.errors) <= 2
    assert done.errors[-1].startswith(f"error: --ray-address {address}: no Ray cluster can be joined there")
    assert not (tmp_path / "store").exists()


@pytest.mark.slow
def test_sigterm_ends_the_build_and_ray(tmp_path: Path, pictures: Path, on_ray: Any) -> None:
    running = on_ray(pictures, tmp_path / "store")
    end_s = time.monotonic() + 120
    while not (workers := below(running.pid, "ray::Worker")) and time.monotonic() < end_s:
        time.sleep(0.1)
    assert workers
    os.kill(running.pid, signal.SIGTERM)
    done = running.finish()
    assert done.code == 75
    assert done.errors[-1].startswith("stopped: interrupted")
    _, alive = psutil.wait_procs(workers, 30)
    assert not alive
