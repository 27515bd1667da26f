"""cache-store verify: what is wrong is found and named, what is sound is left alone, a quarantine loses nothing."""

import os
import random
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import shared.record
from cache_builder.gc import collect_garbage
from cache_builder.in_child import in_child
from cache_builder.report import BuildReport
from cache_builder.stats import store_stats
from cache_builder.store_copy import copy_store
from cache_builder.verify import Verdict, verify_store
from shared.errors import Stopped, StoreError, StoreFormat, StoreLocked, StoreMissing
from shared.manifest import open_manifest
from shared.record import encode_record
from shared.store import StoreReader, StoreWriter
from tests.pictures import write_shapes

Build = Callable[..., BuildReport]
PICTURES = 6


@pytest.fixture(scope="module")
def before(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, run_build: Build) -> Path:
    """A folder of pictures, `set`, and their store."""
    place = tmp_path_factory.mktemp("before")
    run_build([write_shapes(place / "set", PICTURES)], place / "store", tiny_model)
    return place


@pytest.fixture
def store(before: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(before / "store", tmp_path / "store"))


def rows_of(store: Path) -> list[Any]:
    manifest = open_manifest(store, "main")
    return manifest.rows(range(len(manifest)))


def put_instead(store: Path, key: bytes, data: bytes | None) -> None:
    """Make a record another one, or none."""
    with StoreWriter(store) as writer:
        writer.delete_many([key])
        if data is not None:
            writer.put_many([(key, data)])


def raw(store: Path, key: bytes) -> bytes:
    with StoreReader(store) as reader, reader.snapshot() as snapshot:
        return snapshot.raw(key)


def faulty_keys(verdict: Verdict) -> set[bytes]:
    return {bytes.fromhex(fault.key) for fault in verdict.faults}


def tree(folder: Path) -> dict[str, bytes]:
    """Every file that a look must leave alone."""
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != "lock.mdb"}


@pytest.mark.parametrize("deep", [False, True])
def test_a_sound_store_is_sound_and_left_alone(store: Path, deep: bool) -> None:
    files = tree(store)
    verdict = verify_store(store, deep=deep)
    assert (verdict.faults, verdict.manifests) == ([], 1)
    with StoreReader(store) as reader:
        assert verdict.records == reader.count() > 3 * PICTURES
    assert tree(store) == files


def flip(data: bytes) -> bytes:
    return data[:-70] + bytes([data[-70] ^ 4]) + data[-69:]


def not_finite(key: bytes) -> bytes:
    mean = np.ones((4, 8, 8), np.float16)
    mean[2, 3, 4] = np.inf
    return encode_record(key, "latents", {"mean": mean}, {})


DAMAGE: dict[str, Callable[[bytes, bytes, bytes], bytes]] = {
    "a bit": lambda key, data, other: flip(data),
    "cut short": lambda key, data, other: data[:-1],
    "empty": lambda key, data, other: b"",
    "another's record": lambda key, data, other: other,
    "no record": lambda key, data, other: b"x" * len(data),
    "not finite": lambda key, data, other: not_finite(key),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_deep_finds_a_bad_record_and_quick_does_not_read_it(store: Path, damage: str) -> None:
    first, second = rows_of(store)[:2]
    key = first.variants[0].latent_key
    put_instead(store, key, DAMAGE[damage](key, raw(store, key), raw(store, second.variants[0].latent_key)))
    assert verify_store(store).faults == []
    (fault,) = verify_store(store, deep=True).faults
    assert (fault.what, fault.key, fault.samples) == ("record", key.hex(), [f"main: set/{first.path}"])


def test_what_is_named_and_absent_is_found_by_both(store: Path) -> None:
    row = rows_of(store)[0]
    null = bytes.fromhex(open_manifest(store, "main").settings.null_text_key)
    gone = {row.variants[0].latent_key, row.text_keys[0], null}
    for key in gone:
        put_instead(store, key, None)
    for deep in (False, True):
        verdict = verify_store(store, deep=deep)
        assert faulty_keys(verdict) == gone
        by_key = {fault.key: fault.samples for fault in verdict.faults}
        assert by_key[row.variants[0].latent_key.hex()] == [f"main: set/{row.path}"]
        assert by_key[null.hex()] == ["main: the empty prompt"]


def test_damaged_manifests_are_named(store: Path) -> None:
    (arrow,) = (store / "manifests/main").glob("*.arrow")
    whole = arrow.read_bytes()
    arrow.write_bytes(flip(whole))
    (fault,) = verify_store(store).faults
    assert (fault.what, "damaged (checksum)" in fault.why) == ("manifest", True)
    arrow.write_bytes(whole)
    arrow.with_suffix(".json").unlink()  # the current one is a copy of it
    assert verify_store(store).faults == []
    (store / "manifests/main/current.json").write_text("{")
    (fault,) = verify_store(store).faults
    assert "current.json is damaged" in fault.why


def test_a_key_that_is_none_is_a_fault(store: Path) -> None:
    with StoreWriter(store) as writer:
        writer.put_many([(b"short", b"x"), (b"k" * 100, b"x")])
    assert len(verify_store(store).faults) == 2
    assert verify_store(store, quarantine=True, deep=True).quarantined == 2
    assert verify_store(store, deep=True).faults == []


# --- quarantine ---


def test_a_quarantined_record_is_kept_aside_and_encoded_anew(
    store: Path, before: Path, tiny_model: Path, run_build: Build
) -> None:
    rows = rows_of(store)
    keys = [rows[0].variants[0].latent_key, rows[1].text_keys[0]]
    digest, good = open_manifest(store, "main").digest, [raw(store, key) for key in keys]
    bad = [flip(data) for data in good]
    for key, data in zip(keys, bad, strict=True):
        put_instead(store, key, data)
    verdict = verify_store(store, deep=True, quarantine=True)
    assert (faulty_keys(verdict), verdict.quarantined) == (set(keys), 2)
    kept = {path.read_bytes() for path in (store / "quarantine").glob("*.record")}
    assert kept == set(bad)
    assert (store / "quarantine/log.jsonl").read_text().count(rows[0].path) == 1
    with StoreReader(store) as reader, reader.snapshot() as snapshot:
        assert not any(snapshot.has(key) for key in keys)
    assert faulty_keys(verify_store(store)) == set(keys)  # named and, until the next build, absent
    report = run_build([before / "set"], store, tiny_model)
    assert (report.stored, report.encoded_captions, report.digest) == (1, 1, digest)
    assert verify_store(store, deep=True).faults == []
    for key, data in zip(keys, good, strict=True):  # bits of a batch may differ, the record's shape may not
        assert len(raw(store, key)) == len(data)


def test_a_quarantine_needs_the_lease(store: Path) -> None:
    key = rows_of(store)[0].variants[0].latent_key
    put_instead(store, key, b"bad")
    with StoreWriter(store), pytest.raises(StoreLocked):
        verify_store(store, deep=True, quarantine=True)
    assert raw(store, key) == b"bad"
    assert not (store / "quarantine").exists()


def test_what_a_newer_version_wrote_is_not_set_aside(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key = rows_of(store)[0].variants[0].latent_key
    with monkeypatch.context() as patch:
        patch.setattr(shared.record, "FRAME_VERSION", 2)
        newer = encode_record(key, "latents", {"mean": np.ones((4, 8, 8), np.float16)}, {})
    put_instead(store, key, newer)
    verdict = verify_store(store, deep=True, quarantine=True)
    assert [(fault.is_newer, "update it" in fault.why) for fault in verdict.faults] == [(True, True)]
    assert verdict.quarantined == 0
    assert raw(store, key) == newer


def test_where_there_is_no_store_none_is_made(tmp_path: Path) -> None:
    for quarantine in (False, True):
        with pytest.raises(StoreMissing):
            verify_store(tmp_path / "none", quarantine=quarantine)
    assert not (tmp_path / "none").exists()


# --- damage to the files ---


@pytest.mark.parametrize("count", [25, pytest.param(1000, marks=pytest.mark.slow)])
def test_no_damage_is_silent_and_none_is_a_signal(store: Path, count: int) -> None:
    """Whatever happens to data.mdb, deep verification names it or every record is right; the process never dies."""
    data, source = store / "data.mdb", random.Random(5)
    whole = data.read_bytes()
    sound = all_records(store)
    found = 0
    for number in range(count):
        with data.open("r+b") as file:
            at = source.randrange(len(whole) // 4096) * 4096
            file.seek(at + (source.randrange(4096) if number % 2 else 0))
            file.write(bytes([source.randrange(256)]) if number % 2 else bytes(4096))
        try:
            faults = verify_store(store, deep=True).faults
        except StoreError:
            found += 1
        else:
            found += bool(faults)
            assert faults or all_records(store) == sound
        data.write_bytes(whole)
    assert found > count // 8  # the rest hit ends of pages and free ones
    assert verify_store(store, deep=True).faults == []


def all_records(store: Path) -> dict[bytes, bytes]:
    with StoreReader(store) as reader:
        keys = [key for page in reader.sizes() for key, _ in page]
        with reader.snapshot() as snapshot:
            return {key: snapshot.raw(key) for key in keys}


def test_no_command_dies_of_a_damaged_tree(store: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """LMDB aborts on a zeroed page of its tree: each command that walks it says so in a line."""
    data = store / "data.mdb"
    whole = data.read_bytes()
    pages = [whole[at : at + 4096] for at in range(0, len(whole), 4096)]
    is_leaf = [number > 1 and page[10:12] == b"\2\0" for number, page in enumerate(pages)]
    data.write_bytes(b"".join(bytes(4096) if leaf else page for leaf, page in zip(is_leaf, pages, strict=True)))
    for command in (
        lambda: verify_store(store),
        lambda: verify_store(store, deep=True, quarantine=True),
        lambda: collect_garbage(store),
        lambda: store_stats(store),
        lambda: copy_store(store, tmp_path / "copy"),
    ):
        with pytest.raises(StoreError, match=r"data\.mdb is damaged|not an LMDB store"):
            command()
    assert capfd.readouterr().err == ""
    assert sorted(path.name for path in tmp_path.iterdir()) == ["store"]


@pytest.mark.parametrize(("number", "kind"), [(signal.SIGBUS, StoreFormat), (signal.SIGKILL, Stopped)])
def test_a_signal_is_told_in_a_line(store: Path, number: signal.Signals, kind: type[Exception]) -> None:
    with pytest.raises(kind, match=number.name):
        in_child(store, lambda: os.kill(os.getpid(), number))


@pytest.mark.parametrize("count", [20, pytest.param(500, marks=pytest.mark.slow)])
def test_a_file_cut_short_is_told(store: Path, count: int) -> None:
    data, source = store / "data.mdb", random.Random(6)
    whole = data.read_bytes()
    for _ in range(count):
        data.write_bytes(whole[: source.randrange(len(whole))])
        with pytest.raises(StoreFormat):
            verify_store(store, deep=True)
