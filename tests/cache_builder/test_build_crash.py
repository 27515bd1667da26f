"""Builds that are killed, interrupted, raced or out of space: nothing acknowledged is lost, the next one goes on."""

import contextlib
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cache_builder.report import BuildReport
from shared.errors import ManifestMismatch, StoreError
from shared.manifest import open_manifest
from shared.store import StoreReader, StoreWriter
from tests.pictures import write_shapes

Build = Callable[..., BuildReport]
ONE_BY_ONE = ("--set", "encode.batch=1", "--set", "encode.text_batch=2")  # many commits
COUNT = 40


class Undisturbed:
    """What a build that nobody disturbs gives."""

    def __init__(self, folder: Path, store: Path, digest: str, seconds: float) -> None:
        self.folder, self.store, self.digest, self.seconds = folder, store, digest, seconds
        manifest = open_manifest(store, "main")
        rows = manifest.rows(range(len(manifest)))
        self.latents = {row.variants[0].latent_key for row in rows}
        self.texts = {key for row in rows for key in row.text_keys} | {bytes.fromhex(manifest.settings.null_text_key)}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, commands: Any) -> Undisturbed:
    """One build to its end."""
    place = tmp_path_factory.mktemp("undisturbed")
    folder = write_shapes(place / "set", COUNT)
    commands.run("--help")  # the server's own start does not count
    started_s = time.monotonic()
    done = commands.build(folder, place / "store", tiny_model, *ONE_BY_ONE)
    assert (done.code, done.errors) == (0, [])
    digest = open_manifest(place / "store", "main").digest
    return Undisturbed(folder, place / "store", digest, time.monotonic() - started_s)


def stored(store: Path, keys: set[bytes]) -> set[bytes]:
    """Those of `keys` that `store` holds, each read and verified."""
    try:
        with StoreReader(store) as reader, reader.snapshot() as snapshot:
            present = {key for key in keys if snapshot.has(key)}
            for key in present:
                snapshot.read(key)
            return present
    except StoreError:
        assert not (store / "store.json").exists()  # killed before there was one
        return set()


def wait_for_records(count: int, store: Path, keys: set[bytes]) -> None:
    """Until a build has stored `count` of `keys`, or all."""
    end_s, found = time.monotonic() + 60, 0
    while found < min(count, len(keys)):
        assert time.monotonic() < end_s
        time.sleep(0.005)
        with contextlib.suppress(StoreError), StoreReader(store) as reader, reader.snapshot() as snapshot:
            found = sum(map(snapshot.has, keys))


def kill_and_go_on(kills: int, seed: int, place: Path, world: Undisturbed, model: Path, commands: Any) -> int:
    """Kill a build `kills` times at random moments, then let it finish; returns how many kills met a running build."""
    rng, store, met = random.Random(seed), place / "store", 0
    everything = world.latents | world.texts
    held: set[bytes] = set()
    for kill in range(kills):
        running = commands.start_build(world.folder, store, model, *ONE_BY_ONE)
        if kill % 3:
            wait_for_records(len(held) + rng.randint(1, 8), store, everything)
            time.sleep(rng.uniform(0, 0.02))
        else:
            time.sleep(rng.uniform(0, 0.6) * world.seconds)
        os.kill(running.pid, signal.SIGKILL)
        met += running.finish().code == -signal.SIGKILL
        now = stored(store, everything)
        assert held <= now
        held = now
        try:
            assert open_manifest(store, "main").digest == world.digest
        except ManifestMismatch:
            assert not (store / "manifests/main/current.json").exists()
    done = commands.build(world.folder, store, model, *ONE_BY_ONE)
    assert (done.code, done.errors) == (0, [])
    assert f'"stored": {len(world.latents - held)},' in done.out
    assert f'"encoded_captions": {len(world.texts - held)},' in done.out
    assert open_manifest(store, "main").digest == world.digest
    assert stored(store, everything) == everything
    return met


@pytest.mark.parametrize("kills", [25, pytest.param(500, marks=pytest.mark.slow)])
def test_kills_lose_nothing_and_the_next_build_goes_on(
    tmp_path: Path, undisturbed: Undisturbed, tiny_model: Path, commands: Any, kills: int
) -> None:
    met = seed = 0
    while met < kills:
        place = tmp_path / str(seed)
        place.mkdir()
        met += kill_and_go_on(min(10, kills - met + 1), seed, place, undisturbed, tiny_model, commands)
        shutil.rmtree(place)
        seed += 1


def test_an_interrupt_is_one_line_and_loses_nothing(
    tmp_path: Path, undisturbed: Undisturbed, tiny_model: Path, commands: Any
) -> None:
    store, everything = tmp_path / "store", undisturbed.latents | undisturbed.texts
    running = commands.start_build(undisturbed.folder, store, tiny_model, *ONE_BY_ONE)
    wait_until(lambda: "VAE" in running.err.read_text(), running)
    os.kill(running.pid, signal.SIGINT)
    done = running.finish()
    assert done.code == 75
    assert done.out == ""
    assert done.errors == ["stopped: interrupted; what was stored or saved stays, and the same command goes on"]
    held = stored(store, everything)
    assert undisturbed.texts <= held < everything
    done = commands.build(undisturbed.folder, store, tiny_model, *ONE_BY_ONE)
    assert f'"stored": {len(undisturbed.latents - held)},' in done.out
    assert open_manifest(store, "main").digest == undisturbed.digest


def wait_until(condition: Callable[[], bool], running: Any, limit_s: float = 60) -> None:
    end_s = time.monotonic() + limit_s
    while not (running.err.exists() and condition()):
        assert time.monotonic() < end_s
        time.sleep(0.01)


def test_readers_see_whole_records_while_a_build_goes_on(
    tmp_path: Path, undisturbed: Undisturbed, tiny_model: Path, commands: Any, run_build: Build
) -> None:
    folder, store = write_shapes(tmp_path / "set", 4), tmp_path / "store"
    first = run_build([folder], store, tiny_model)
    frozen = open_manifest(store, "main")
    old = {row.variants[0].latent_key for row in frozen.rows(range(len(frozen)))}
    shutil.copytree(undisturbed.folder, folder, dirs_exist_ok=True)
    running = commands.start_build(folder, store, tiny_model, *ONE_BY_ONE)
    counts, ended = [], threading.Event()

    def look() -> None:
        with StoreReader(store) as reader:
            while not ended.is_set():
                with reader.snapshot() as snapshot:
                    assert all(snapshot.read(key).tensors["mean"].any() for key in old)
                    new = [key for key in undisturbed.latents if snapshot.has(key)]
                    counts.append(sum(snapshot.read(key).kind == "latents" for key in new))
                assert open_manifest(store, "main", first.digest).rows([0])
                time.sleep(0.005)

    watcher = threading.Thread(target=look)
    watcher.start()
    done = running.finish()
    ended.set()
    watcher.join()
    assert done.code == 0
    assert counts == sorted(counts)
    assert len(set(counts)) > 3  # it grew under the reader's eyes
    assert len(frozen) == 4
    assert len(open_manifest(store, "main")) == COUNT


@pytest.mark.parametrize("rivals", [3, pytest.param(50, marks=pytest.mark.slow)])
def test_a_rival_is_refused_at_once_and_told_who_builds(
    tmp_path: Path, undisturbed: Undisturbed, tiny_model: Path, commands: Any, rivals: int
) -> None:
    store = tmp_path / "store"
    with StoreWriter(store):
        for _ in range(rivals):
            started_s = time.monotonic()
            done = commands.build(undisturbed.folder, store, tiny_model, *ONE_BY_ONE)
            assert time.monotonic() - started_s < 2
            assert done.code == 73
            (error,) = done.errors
            assert re.fullmatch(rf"error: store .* is being written by pid {os.getpid()} on .*\(--wait\)", error)
        waiting = commands.start_build(undisturbed.folder, store, tiny_model, *ONE_BY_ONE, "--wait")
        time.sleep(0.5)
        assert not (store / "manifests").exists()
    assert waiting.finish().code == 0
    assert open_manifest(store, "main").digest == undisturbed.digest


def test_two_builds_at_once_do_the_work_once(
    tmp_path: Path, undisturbed: Undisturbed, tiny_model: Path, commands: Any
) -> None:
    store = tmp_path / "store"
    both = [commands.start_build(undisturbed.folder, store, tiny_model, *ONE_BY_ONE, "--wait") for _ in range(2)]
    done = [running.finish() for running in both]
    assert [one.code for one in done] == [0, 0]
    counts = sorted(int(re.search(r'"stored": (\d+),', one.out)[1]) for one in done)  # type: ignore[index]
    assert counts == [0, COUNT]
    assert open_manifest(store, "main").digest == undisturbed.digest


def test_a_full_disk_stops_the_build_and_the_same_command_goes_on(
    tmp_path: Path, undisturbed: Undisturbed, tiny_model: Path, commands: Any
) -> None:
    """A limit on the length of files stands in for the disk: LMDB's writes fail in the same way."""
    store, everything, full = tmp_path / "store", undisturbed.latents | undisturbed.texts, 0
    size = (undisturbed.store / "data.mdb").stat().st_size
    held: set[bytes] = set()
    for limit in (100_000, size // 3, int(size * 0.7)):
        done = commands.build(undisturbed.folder, store, tiny_model, *ONE_BY_ONE, file_limit=limit)
        assert done.code == 74
        (error,) = done.errors
        assert re.match(r"error: .*no space left.*run the same command again", error)
        now = stored(store, everything)
        assert held <= now
        full += len(now) > len(held)
        held = now
        assert not (store / "manifests").exists()
    assert full >= 2
    done = commands.build(undisturbed.folder, store, tiny_model, *ONE_BY_ONE)
    assert done.code == 0
    assert f'"stored": {len(undisturbed.latents - held)},' in done.out
    assert open_manifest(store, "main").digest == undisturbed.digest


def test_a_manifest_that_does_not_fit_leaves_the_last_one(
    tmp_path: Path, undisturbed: Undisturbed, tiny_model: Path, commands: Any, run_build: Build
) -> None:
    store = shutil.copytree(undisturbed.store, tmp_path / "store")
    arrow = next(store.glob("manifests/main/*.arrow"))
    limit = arrow.stat().st_size // 2
    done = commands.build(undisturbed.folder, store, tiny_model, "--set", "seed=7", file_limit=limit)
    assert done.code == 74
    assert len(done.errors) == 1
    assert open_manifest(store, "main").digest == undisturbed.digest
    done = commands.build(undisturbed.folder, store, tiny_model, "--set", "seed=7")
    assert done.code == 0
    assert open_manifest(store, "main").digest != undisturbed.digest


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("unshare"), reason="mounts a file system")
def test_a_small_file_system_runs_full(
    tmp_path: Path, undisturbed: Undisturbed, tiny_model: Path, arguments_of: Callable[..., list[str]]
) -> None:
    """Sixteen MiB are always left free, so 17 hold one MiB; then the disk grows and the same command goes on."""
    (tmp_path / "disk").mkdir()
    command = [sys.executable, "-m", "cache_builder.cli"]
    command += arguments_of(undisturbed.folder, tmp_path / "disk/store", tiny_model, *ONE_BY_ONE)
    script = 'mount -t tmpfs -o size=17m tmpfs "$0"; "$@"; echo $?; mount -o remount,size=64m "$0"; "$@"; echo $?'
    done = subprocess.run(
        ["unshare", "-m", "bash", "-c", script, str(tmp_path / "disk"), *command], capture_output=True, text=True
    )
    codes = [line for line in done.stdout.splitlines() if line.isdigit()]
    assert codes == ["74", "0"]
    errors = [line for line in done.stderr.splitlines() if not line.startswith("loading ")]
    assert len(errors) == 1
    assert "free some" in errors[0]
    assert undisturbed.digest in done.stdout
