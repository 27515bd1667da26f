"""cache-store copy: the same store at a new place, whole there or not at all."""

import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import cache_builder.store_copy
from cache_builder.gc import collect_garbage
from cache_builder.report import BuildReport
from cache_builder.store_copy import copy_store
from cache_builder.verify import verify_store
from shared.errors import ConfigError, StoreFormat, StoreFull, StoreMissing
from shared.manifest import open_manifest
from shared.manifest_shelf import sealed_manifests
from shared.record import encode_record
from shared.store import StoreReader, StoreWriter
from tests.children import end, in_a_child
from tests.pictures import write_shapes

Build = Callable[..., BuildReport]


@pytest.fixture(scope="module")
def before(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, run_build: Build) -> Path:
    """Pictures and their store, with two manifests of one name and one of another."""
    place = tmp_path_factory.mktemp("before")
    folder = write_shapes(place / "set", 6)
    run_build([folder], place / "store", tiny_model)
    (folder / "shape-00001.txt").write_text("another caption\n")
    run_build([folder], place / "store", tiny_model)
    run_build([folder], place / "store", tiny_model, "split.eval_fraction=0.5", manifest="half")
    return place


def records(store: Path) -> dict[bytes, bytes]:
    with StoreReader(store) as reader:
        keys = [key for page in reader.sizes() for key, _ in page]
        with reader.snapshot() as snapshot:
            return {key: snapshot.raw(key) for key in keys}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_copy_is_the_same_store(before: Path, tmp_path: Path, tiny_model: Path, run_build: Build) -> None:
    report = copy_store(before / "store", tmp_path / "deep/down/copy")
    copy = tmp_path / "deep/down/copy"
    assert names(copy.parent) == ["copy"]
    assert (report.manifests, report.records) == (3, len(records(copy)))
    assert records(copy) == records(before / "store")
    assert (copy / "store.json").read_bytes() == (before / "store/store.json").read_bytes()
    assert [(s.name, s.digest, s.is_current) for s in sealed_manifests(copy)] == [
        (s.name, s.digest, s.is_current) for s in sealed_manifests(before / "store")
    ]
    again = run_build([before / "set"], copy, tiny_model)
    assert (again.stored, again.encoded_captions) == (0, 0)
    assert again.digest == open_manifest(before / "store", "main").digest


def test_a_copy_gives_back_what_gc_freed(before: Path, tmp_path: Path) -> None:
    store = Path(shutil.copytree(before / "store", tmp_path / "store"))
    with StoreWriter(store) as writer:
        keys = [bytes([number]) * 16 for number in range(30)]
        writer.put_many([(key, encode_record(key, "waste", {}, {"text": "x" * 60_000})) for key in keys])
    long = (store / "data.mdb").stat().st_size
    assert collect_garbage(store).records == 30
    assert (store / "data.mdb").stat().st_size >= long
    copy_store(store, tmp_path / "copy")
    assert (tmp_path / "copy/data.mdb").stat().st_size < long - 30 * 60_000
    assert records(tmp_path / "copy") == records(before / "store")


def test_places_that_are_taken(before: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    full = tmp_path / "full"
    full.mkdir()
    (full / "cat.png").write_text("")
    for to in (tmp_path / "file", full, before / "store"):
        with pytest.raises(ConfigError, match="is there already"):
            copy_store(before / "store", to)
    assert names(tmp_path) == ["file", "full"]
    (tmp_path / "empty").mkdir()
    copy_store(before / "store", tmp_path / "empty")
    assert verify_store(tmp_path / "empty", deep=True).faults == []
    with pytest.raises(StoreMissing):
        copy_store(tmp_path / "none", tmp_path / "new")


def test_what_is_not_sound_is_not_copied(before: Path, tmp_path: Path) -> None:
    store = Path(shutil.copytree(before / "store", tmp_path / "store"))
    with StoreWriter(store) as writer:
        writer.put_many([(b"k" * 16, b"bad")])
    with pytest.raises(StoreFormat, match=r"cannot be copied as a sound store: record 6b6b.*--quarantine"):
        copy_store(store, tmp_path / "copy")
    assert names(tmp_path) == ["store"]


def test_too_little_room_is_said_first(before: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_builder.store_copy, "free_bytes", lambda path: 1000)
    with pytest.raises(StoreFull, match="free some space"):
        copy_store(before / "store", tmp_path / "copy")
    assert names(tmp_path) == []


def test_a_copy_beside_a_writer_is_of_one_moment(before: Path, tmp_path: Path) -> None:
    store = Path(shutil.copytree(before / "store", tmp_path / "store"))
    pid = in_a_child(lambda: write_for_ever(store))
    try:
        time.sleep(0.1)
        for number in range(3):
            copy_store(store, tmp_path / f"copy-{number}")
    finally:
        end(pid)
    counts = [len(records(tmp_path / f"copy-{number}")) for number in range(3)]
    assert len(records(before / "store")) < counts[0] < counts[1] < counts[2] <= len(records(store))
    assert verify_store(store, deep=True).faults == []


def write_for_ever(store: Path) -> None:
    with StoreWriter(store) as writer:
        for number in range(1 << 30):
            key = number.to_bytes(16, "big")
            writer.put_many([(key, encode_record(key, "test", {}, {"number": number}))])


@pytest.mark.parametrize("kills", [6, pytest.param(100, marks=pytest.mark.slow)])
def test_kill_9_leaves_a_whole_copy_or_none(before: Path, tmp_path: Path, kills: int) -> None:
    source = random.Random(3)
    for number in range(kills):
        to = tmp_path / f"copy-{number}"
        pid = in_a_child(lambda to=to: copy_store(before / "store", to))  # type: ignore[misc]
        time.sleep(source.uniform(0.005, 0.15))
        end(pid)
        if to.exists():
            assert records(to) == records(before / "store")
        else:
            copy_store(before / "store", to)
