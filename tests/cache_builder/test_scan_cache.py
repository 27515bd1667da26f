"""What is not read again: nothing that may have changed, and with a cache and without the manifest is the same."""

import itertools
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cache_builder import scan_cache
from cache_builder.build import BuildOptions
from cache_builder.config import BuildConfig
from cache_builder.datasets import choose_datasets, open_sources
from cache_builder.diff import diff_folder
from cache_builder.dry_run import DryRunOptions, dry_run
from cache_builder.report import BuildReport
from cache_builder.scan_cache import MAX_VALUE_BYTES, ScanCache, cache_path, file_state
from shared import beneath
from shared.config import load_config
from shared.store import StoreReader
from tests.pictures import write_shapes

PICTURES = 6
SMALL = ("images.resolution=64", "images.step=16", "encode.batch=4")  # as run_build does
Build = Callable[..., BuildReport]


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that a source opens."""
    names: list[str] = []
    open_unfollowed = beneath.open_unfollowed

    def listen(path: str, *more: Any) -> Any:
        names.append(os.path.basename(path))
        return open_unfollowed(path, *more)

    monkeypatch.setattr(beneath, "open_unfollowed", listen)
    return names


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files that were written a moment ago count as settled."""
    monkeypatch.setattr(scan_cache, "SETTLED_NS", -1)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_shapes(tmp_path / "set", PICTURES)


def change_in_place(path: Path) -> None:
    """One byte, and the times put back."""
    times, data = path.stat(), bytearray(path.read_bytes())
    data[-20] ^= 1
    with path.open("r+b") as file:
        file.write(data)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def exchange(path: Path) -> None:
    """Another file of the same size and mtime under the name."""
    times, data = path.stat(), bytearray(path.read_bytes())
    data[-20] ^= 1
    other = path.with_name(".other")
    other.write_bytes(data)
    os.utime(other, ns=(times.st_atime_ns, times.st_mtime_ns))
    other.rename(path)


def test_an_unchanged_file_is_not_opened(
    folder: Path, tmp_path: Path, tiny_model: Path, run_build: Build, opened: list[str], at_once: None
) -> None:
    def build(**options: Any) -> tuple[list[str], BuildReport]:
        opened.clear()
        report = run_build([folder], tmp_path / "store", tiny_model, **options)
        return sorted(opened), report

    every = sorted(path.name for path in folder.iterdir())
    first = build()[1]
    names, again = build()
    assert (names, again.digest, again.reused) == ([], first.digest, PICTURES)
    names, rehashed = build(rehash=True)
    assert (names, rehashed.digest) == (every, first.digest)
    assert build()[0] == []

    touched = folder / "shape-00002.png"
    os.utime(touched, (1, 1))
    names, report = build()
    assert (names, report.digest, report.encoded_crops) == ([touched.name], first.digest, 0)

    caption = folder / "shape-00003.txt"
    caption.write_text("another caption")
    names, report = build()
    assert (names, report.encoded_crops, report.encoded_captions) == ([caption.name], 0, 1)


def test_who_only_looks_reads_the_cache_and_leaves_it(
    folder: Path, tmp_path: Path, tiny_model: Path, run_build: Build, opened: list[str], at_once: None
) -> None:
    store = tmp_path / "store"
    run_build([folder], store, tiny_model)
    changed = folder / "shape-00003.txt"
    changed.write_text("another caption")
    kept = {path: path.read_bytes() for path in (store / "scans").iterdir()}
    opened.clear()
    assert diff_folder(store, folder, "main", None).changed == {"shape-00003.png": "captions"}
    assert opened == [changed.name]
    opened.clear()
    config = choose_datasets(load_config(BuildConfig, sets=SMALL), folder, None)
    how = DryRunOptions(timing=False)
    foreseen = dry_run(open_sources(config.datasets), tiny_model, config, BuildOptions(store, "main", "cpu"), how)
    assert (foreseen.account.encoded_captions, foreseen.account.encoded_crops) == (1, 0)
    assert opened == [changed.name]
    assert {path: path.read_bytes() for path in (store / "scans").iterdir()} == kept


@pytest.mark.parametrize("change", [change_in_place, exchange])
@pytest.mark.parametrize("name", ["shape-00001.bmp", "shape-00001.txt"])
def test_an_edit_that_keeps_size_and_mtime_is_seen(
    change: Callable[[Path], None], name: str, folder: Path, tmp_path: Path, tiny_model: Path, run_build: Build,
    at_once: None,
) -> None:  # fmt: skip
    from PIL import Image

    picture = folder / "shape-00001.png"
    Image.open(picture).save(picture.with_suffix(".bmp"))  # not compressed: any byte may change
    picture.unlink()
    before = run_build([folder], tmp_path / "store", tiny_model)
    state = file_state(str(folder / name))
    time.sleep(0.02)  # more than the grain of a file system's clock
    change(folder / name)
    assert file_state(str(folder / name))[:2] == state[:2]
    after = run_build([folder], tmp_path / "store", tiny_model)
    assert after.digest != before.digest
    assert (after.encoded_crops, after.encoded_captions) == ((1, 0) if name.endswith("bmp") else (0, 1))


def test_what_was_just_written_is_read_again(
    folder: Path, tmp_path: Path, tiny_model: Path, run_build: Build, opened: list[str]
) -> None:
    run_build([folder], tmp_path / "store", tiny_model)
    opened.clear()
    run_build([folder], tmp_path / "store", tiny_model)
    assert len(opened) == 2 * PICTURES


@pytest.mark.parametrize("damage", ["absent", "flipped", "cut", "empty", "version", "folder", "foreign"])
def test_the_cache_is_disposable(
    damage: str, folder: Path, tmp_path: Path, tiny_model: Path, run_build: Build, opened: list[str], at_once: None
) -> None:
    first = run_build([folder], tmp_path / "store", tiny_model)
    (path,) = (tmp_path / "store/scans").glob("*.scan")
    data = path.read_bytes()
    spoiled = {
        "flipped": data[:-1] + bytes([data[-1] ^ 1]),
        "cut": data[: len(data) // 2],
        "empty": b"",
        "version": data[:4] + b"\x09\x00" + data[6:],
        "foreign": b"SXSC\x03\x00" + bytes(42),
    }
    path.unlink()
    if damage == "folder":
        path.mkdir()
    elif damage != "absent":
        path.write_bytes(spoiled[damage])
    opened.clear()
    report = run_build([folder], tmp_path / "store", tiny_model)
    assert (report.digest, report.reused, len(opened)) == (first.digest, PICTURES, 2 * PICTURES)


def test_a_picture_whose_facts_are_lost_is_read_again(
    folder: Path, tmp_path: Path, tiny_model: Path, run_build: Build, opened: list[str], at_once: None
) -> None:
    from shared.store import StoreWriter

    first = run_build([folder], tmp_path / "store", tiny_model)
    with StoreWriter(tmp_path / "store") as store:
        keys = [key for page in store.sizes() for key, _ in page]
        with store.snapshot() as snapshot:
            facts = [key for key in keys if snapshot.read(key).kind == "picture facts"]
        store.delete_many(facts[:2])
    opened.clear()
    report = run_build([folder], tmp_path / "store", tiny_model)
    assert (report.digest, report.reused + report.stored) == (first.digest, PICTURES)
    assert len(opened) == 4  # looked at and decoded
    with StoreReader(tmp_path / "store") as reader, reader.snapshot() as snapshot:
        assert all(snapshot.has(key) for key in facts)


def test_a_kept_cache_and_none_give_the_same_manifest(
    folder: Path, tmp_path: Path, tiny_model: Path, run_build: Build, at_once: None
) -> None:
    run_build([folder], tmp_path / "kept", tiny_model)
    (folder / "shape-00001.png").rename(folder / "moved.png")
    (folder / "shape-00001.txt").rename(folder / "moved.txt")
    (folder / "shape-00002.png").write_bytes((folder / "shape-00003.png").read_bytes())
    (folder / "shape-00004.png").write_bytes(b"no picture")
    sets = ("captions.lines=whole", "max_quarantined=0.5")
    kept, fresh = (
        run_build([folder], tmp_path / name, tiny_model, *sets, allow_shrink=True) for name in ("kept", "fresh")
    )
    assert kept.digest == fresh.digest
    assert (kept.duplicate, kept.quarantined) == (fresh.duplicate, fresh.quarantined)


def test_what_a_cache_keeps(tmp_path: Path, at_once: None) -> None:
    path, state = cache_path(tmp_path, "set"), (5, 10, 10, 2)
    cache = ScanCache(path)
    cache.put("caption", "a.txt", state, state, b"words")
    cache.put("caption", "empty.txt", state, state, b"")
    cache.put("caption", "long.txt", state, state, bytes(MAX_VALUE_BYTES + 1))
    cache.put("caption", "moving.txt", state, (5, 10, 11, 2), b"words")
    cache.save()
    again = ScanCache(path)
    assert again.get("caption", "empty.txt", state) == b""
    assert [again.get("caption", "a.txt", state) for _ in range(2)] == [b"words", b"words"]  # asked for twice
    assert again.get("picture", "a.txt", state) is None
    assert again.get("caption", "b.txt", state) is None
    assert all(again.get("caption", name, state) is None for name in ("long.txt", "moving.txt"))
    for index in range(4):
        assert again.get("caption", "a.txt", (*state[:index], 7, *state[index + 1 :])) is None  # type: ignore[arg-type]
    again.save()
    assert ScanCache(path, rehash=True).get("caption", "a.txt", state) is None
    forgetful = ScanCache(path)
    forgetful.save()  # a scan that met none of them
    assert ScanCache(path).get("caption", "a.txt", state) is None


@pytest.fixture(scope="module")
def cache_bytes(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes]:
    path = tmp_path_factory.mktemp("store") / "scans/x.scan"
    cache = ScanCache(path)
    for index in range(20):
        state = (index, 1, 1, index)
        cache.put("caption", f"{index}.txt", state, state, bytes(range(index)))
    cache.save()
    return path, path.read_bytes()


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_a_damaged_cache_knows_nothing(cache_bytes: tuple[Path, bytes], data: st.DataObject) -> None:
    path, whole = cache_bytes
    at = data.draw(st.integers(0, len(whole) - 1))
    bit = 1 << data.draw(st.integers(0, 7))
    for spoiled in (whole[:at], whole[:at] + bytes([whole[at] ^ bit]) + whole[at + 1 :]):
        path.write_bytes(spoiled)
        cache = ScanCache(path)
        assert not any(cache.get("caption", f"{i}.txt", (i, 1, 1, i)) for i in range(20))


def test_each_data_set_has_its_own(tmp_path: Path) -> None:
    ids = ["a", "b", "../up", "a/b", "ü", "x" * 500]
    paths = [cache_path(tmp_path, each) for each in ids]
    assert all(path.parent == tmp_path / "scans" for path in paths)
    assert not any(one == other for one, other in itertools.combinations(paths, 2))
