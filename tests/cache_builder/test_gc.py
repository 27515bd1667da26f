"""cache-store gc: what no manifest names goes, everything that anybody could need stays."""

import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import cache_builder.gc
from cache_builder.gc import collect_garbage
from cache_builder.report import BuildReport
from cache_builder.verify import verify_store
from shared.errors import ConfigError, ManifestMismatch, StoreBusy, StoreLocked, StoreMissing
from shared.manifest import open_manifest
from shared.manifest_shelf import sealed_manifests
from shared.store import StoreReader, StoreWriter
from tests.children import end, in_a_child
from tests.pictures import write_shapes

Build = Callable[..., BuildReport]


@pytest.fixture(scope="module")
def before(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, run_build: Build) -> Path:
    """A data set that was built, edited and built again: two manifests, of which the second is current."""
    place = tmp_path_factory.mktemp("before")
    folder = write_shapes(place / "set", 8)
    run_build([folder], place / "store", tiny_model)
    (folder / "shape-00001.txt").write_text("another caption\n")
    (folder / "shape-00002.png").write_bytes((folder / "shape-00002.png").read_bytes() + b"\0")
    run_build([folder], place / "store", tiny_model)
    return place


@pytest.fixture
def store(before: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(before / "store", tmp_path / "store"))


def digests(store: Path) -> tuple[str, str]:
    """The old one's and the current one's."""
    old, new = sorted(sealed_manifests(store), key=lambda sealed: sealed.is_current)
    return old.digest, new.digest


def keys_of(store: Path) -> set[bytes]:
    with StoreReader(store) as reader:
        return {key for page in reader.sizes() for key, _ in page}


def test_after_builds_there_is_no_garbage(store: Path) -> None:
    keys = keys_of(store)
    for dry_run in (True, False):
        report = collect_garbage(store, dry_run=dry_run)
        assert (report.records, report.kept_records, len(report.kept_manifests)) == (0, len(keys), 2)
    assert keys_of(store) == keys


def test_a_dropped_manifest_takes_what_it_alone_names(
    store: Path, before: Path, tiny_model: Path, run_build: Build
) -> None:
    old, new = digests(store)
    keys = keys_of(store)
    foreseen = collect_garbage(store, dry_run=True, drop=[old[:12]])
    assert (keys_of(store), digests(store)) == (keys, (old, new))
    done = collect_garbage(store, drop=[old[:12]])
    # latents and facts of the old picture, embeds and token count of the old caption
    assert done.records == foreseen.records == 4
    assert (done.bytes, done.kept_records) == (foreseen.bytes, foreseen.kept_records)
    assert len(keys - keys_of(store)) == 4
    assert [sealed.digest for sealed in sealed_manifests(store)] == [new]
    assert verify_store(store, deep=True).faults == []
    with pytest.raises(ManifestMismatch, match="no longer in"):
        open_manifest(store, "main", old)
    report = run_build([before / "set"], store, tiny_model)
    assert (report.stored, report.encoded_captions, report.digest) == (0, 0, new)


def test_what_a_build_left_that_never_completed_goes(store: Path, tiny_model: Path, run_build: Build) -> None:
    keys = keys_of(store)
    more = write_shapes(store.parent / "more", 3, seed=5)
    run_build([more], store, tiny_model, manifest="more")
    (sealed,) = [sealed for sealed in sealed_manifests(store) if sealed.name == "more"]
    shutil.rmtree(sealed.folder)  # as if it had been killed before it sealed
    left = keys_of(store) - keys
    assert len(left) >= 3 * 2 + 3 * 2
    assert collect_garbage(store).records == len(left)
    assert keys_of(store) == keys


def test_the_current_manifest_is_dropped_only_when_told(store: Path) -> None:
    old, new = digests(store)
    with pytest.raises(ConfigError, match="--even-current"):
        collect_garbage(store, drop=[new])
    assert digests(store) == (old, new)
    report = collect_garbage(store, drop=[new], even_current=True)
    assert report.records == 4
    with pytest.raises(ManifestMismatch, match="no manifest 'main'"):
        open_manifest(store, "main")
    assert open_manifest(store, "main", old).digest == old
    assert collect_garbage(store, drop=[old]).kept_records == 0
    assert keys_of(store) == set()


@pytest.mark.parametrize("digest", ["", "0123", "f" * 64, "../../x", "current"])
def test_digests_that_are_none(store: Path, digest: str) -> None:
    with pytest.raises(ConfigError, match="no manifest of digest"):
        collect_garbage(store, drop=[digest])
    assert len(sealed_manifests(store)) == 2


def test_a_manifest_that_somebody_trains_on_stays(store: Path) -> None:
    old, _ = digests(store)
    keys = keys_of(store)
    run = open_manifest(store, "main", old)
    with pytest.raises(StoreLocked, match="open in another process"):
        collect_garbage(store, drop=[old])
    assert keys_of(store) == keys
    assert run.rows([0]) == open_manifest(store, "main", old).rows([0])
    del run
    assert collect_garbage(store, drop=[old]).records == 4


def test_never_under_a_build(store: Path) -> None:
    keys = keys_of(store)
    with StoreWriter(store), pytest.raises(StoreLocked, match="is being written"):
        collect_garbage(store, drop=[digests(store)[0]])
    assert (keys_of(store), len(sealed_manifests(store))) == (keys, 2)


def test_never_under_a_reader(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who reads without end is told of; who reads a batch now and then is waited for."""
    monkeypatch.setattr(cache_builder.gc, "READERS_WAIT_S", 0.3)
    keys, (old, _) = keys_of(store), digests(store)
    hanging = in_a_child(lambda: read_for(store, 60.0, 60.0))
    try:
        time.sleep(0.3)
        with pytest.raises(StoreBusy, match=f"read by pid {hanging}"):
            collect_garbage(store, drop=[old])
    finally:
        end(hanging)
    assert (keys_of(store), len(sealed_manifests(store))) == (keys, 2)
    short = in_a_child(lambda: read_for(store, 60.0, 0.02))
    try:
        time.sleep(0.1)
        assert collect_garbage(store, drop=[old]).records == 4
    finally:
        end(short)


def read_for(store: Path, seconds: float, batch_s: float) -> None:
    end_s = time.monotonic() + seconds
    with StoreReader(store) as reader:
        while time.monotonic() < end_s:
            with reader.snapshot():
                time.sleep(batch_s)
            time.sleep(0.02)


@pytest.mark.parametrize("file", ["arrow", "seal", "current.json"])
def test_what_an_unreadable_manifest_names_is_not_known_so_nothing_goes(store: Path, file: str) -> None:
    old, _ = digests(store)
    keys = keys_of(store)
    folder = store / "manifests/main"
    names = {"arrow": f"{old}.arrow", "seal": f"{old}.json", "current.json": "current.json"}
    (folder / names[file]).write_bytes(b"{")
    with pytest.raises(ManifestMismatch, match="damaged"):
        collect_garbage(store)
    assert keys_of(store) == keys
    if file != "current.json":
        assert collect_garbage(store, drop=[old]).records == 4


def test_a_store_without_a_manifest_is_not_emptied(store: Path, tmp_path: Path) -> None:
    shutil.rmtree(store / "manifests")
    with pytest.raises(ConfigError, match="let the build complete"):
        collect_garbage(store)
    assert keys_of(store)
    with pytest.raises(StoreMissing):
        collect_garbage(tmp_path / "none")
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("kills", [6, pytest.param(100, marks=pytest.mark.slow)])
def test_kill_9_leaves_a_sound_store_and_the_same_command_goes_on(
    before: Path, tmp_path: Path, kills: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache_builder.gc, "KEYS_AT_ONCE", 1)
    source = random.Random(8)
    for kill in range(kills):
        store = Path(shutil.copytree(before / "store", tmp_path / f"store-{kill}"))
        old, new = digests(store)
        pid = in_a_child(lambda store=store, old=old: collect_garbage(store, drop=[old]))  # type: ignore[misc]
        time.sleep(source.uniform(0.005, 0.06))
        end(pid)
        assert verify_store(store, deep=True).faults == []
        left = {sealed.digest for sealed in sealed_manifests(store)}
        collect_garbage(store, drop=left & {old})
        assert verify_store(store, deep=True).faults == []
        assert [sealed.digest for sealed in sealed_manifests(store)] == [new]
        assert collect_garbage(store).records == 0
