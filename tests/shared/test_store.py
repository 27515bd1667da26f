"""The store through its front door: what is put is read, by anybody, and what is not a store is refused."""

import errno
import json
import os
import platform
import subprocess
import sys
import threading
from pathlib import Path

import lmdb
import numpy as np
import pytest

from shared.errors import RecordCorrupt, StoreError, StoreFormat, StoreFull, StoreIO, StoreMissing
from shared.record import encode_record
from shared.store import StoreReader, StoreWriter, _translated

KEYS = [bytes([number]) * 16 for number in range(8)]


def tensors(number: int) -> dict[str, np.ndarray]:
    source = np.random.default_rng(number)
    return {"mean": source.standard_normal((4, 6, 5)).astype(np.float16), "ids": np.arange(number)}


def framed(number: int) -> tuple[bytes, bytes]:
    return KEYS[number], encode_record(KEYS[number], "test", tensors(number), {"number": number})


@pytest.fixture
def store(tmp_path: Path) -> Path:
    with StoreWriter(tmp_path / "store") as writer:
        assert writer.put_many([framed(number) for number in range(4)]) == 4
    return tmp_path / "store"


def test_what_is_put_is_read(store: Path) -> None:
    with StoreReader(store) as reader, reader.snapshot() as snapshot:
        for number in range(4):
            record = snapshot.read(KEYS[number])
            assert (record.kind, record.meta) == ("test", {"number": number})
            assert all(np.array_equal(record.tensors[name], tensors(number)[name]) for name in ("mean", "ids"))


def test_copies_outlive_snapshot_and_store(store: Path) -> None:
    target = np.zeros((4, 6, 5), np.float16)
    with StoreReader(store) as reader:
        with reader.snapshot() as snapshot:
            record = snapshot.read(KEYS[1])
            meta = snapshot.copy_into(KEYS[1], {"mean": target})
        assert snapshot._transaction is None
    with StoreWriter(store) as writer:  # moves pages about
        writer.put_many([framed(number) for number in range(4, 8)])
    expected = tensors(1)["mean"]
    assert np.array_equal(target, expected)
    assert np.array_equal(record.tensors["mean"], expected)
    assert (meta, record.meta) == ({"number": 1}, {"number": 1})


def test_targets_may_be_rows_of_a_batch_and_hold_nothing_or_one(store: Path) -> None:
    with StoreWriter(store) as writer:
        scalar = encode_record(KEYS[5], "k", {"one": np.float32(3), "none": np.zeros((0, 3), np.float32)}, {})
        writer.put_many([(KEYS[5], scalar)])
        batch = np.zeros((3, 4, 6, 5), np.float16)
        one, none = np.zeros((), np.float32), np.zeros((0, 3), np.float32)
        with writer.snapshot() as snapshot:
            snapshot.copy_into(KEYS[2], {"mean": batch[1]})
            snapshot.copy_into(KEYS[5], {"one": one, "none": none})
    assert np.array_equal(batch[1], tensors(2)["mean"])
    assert not batch[[0, 2]].any()
    assert one == 3


@pytest.mark.parametrize(
    ("name", "target"),
    [
        ("mean", np.zeros((4, 6, 5), np.float32)),
        ("mean", np.zeros((4, 5, 6), np.float16)),
        ("mean", np.zeros((120,), np.float16)),
        ("mean", np.zeros((4, 6, 5), np.int16)),
        ("logvar", np.zeros((4, 6, 5), np.float16)),
    ],
)
def test_other_tensors_than_the_targets_are_named(store: Path, name: str, target: np.ndarray) -> None:
    named = pytest.raises(RecordCorrupt, match=f"{KEYS[1].hex()}.*{name}")
    with StoreReader(store) as reader, reader.snapshot() as snapshot, named:
        snapshot.copy_into(KEYS[1], {name: target})
    assert not target.any()


def test_a_target_that_would_be_copied_is_refused(store: Path) -> None:
    """Reshaping an array that is not contiguous copies it: the tensor would be written nowhere."""
    target = np.zeros((4, 6, 10), np.float16)[:, :, ::2]
    refused = pytest.raises(ValueError, match="C-contiguous")
    with StoreReader(store) as reader, reader.snapshot() as snapshot, refused:
        snapshot.copy_into(KEYS[1], {"mean": target})


def test_an_absent_key_is_named(store: Path) -> None:
    with StoreReader(store) as reader, reader.snapshot() as snapshot:
        assert snapshot.has(KEYS[0])
        assert not snapshot.has(KEYS[7])
        with pytest.raises(RecordCorrupt, match=f"{KEYS[7].hex()} is not in the store"):
            snapshot.read(KEYS[7])


def test_put_is_idempotent_and_overwrites_nothing(store: Path) -> None:
    other = encode_record(KEYS[1], "other", {}, {})
    with StoreWriter(store) as writer:
        assert writer.put_many([framed(0), (KEYS[1], other), framed(4), framed(4)]) == 1
        assert writer.put_many([framed(number) for number in range(5)]) == 0
        assert writer.put_many([]) == 0
        with writer.snapshot() as snapshot:
            assert snapshot.read(KEYS[1]).kind == "test"


def test_a_batch_goes_in_whole_or_not_at_all(store: Path) -> None:
    with StoreWriter(store) as writer:
        with pytest.raises(Exception, match="MDB_BAD_VALSIZE"):
            writer.put_many([framed(4), (b"", b"no key")])
        with writer.snapshot() as snapshot:
            assert not snapshot.has(KEYS[4])
        assert writer.put_many([framed(4)]) == 1


def test_deleted_records_are_gone_and_can_be_put_again(store: Path) -> None:
    with StoreWriter(store) as writer:
        assert writer.delete_many([KEYS[1], KEYS[7]]) == 1
        with writer.snapshot() as snapshot:
            assert [snapshot.has(key) for key in KEYS[:3]] == [True, False, True]
        assert writer.put_many([framed(1)]) == 1


def test_a_commit_is_seen_by_another_process_and_the_next_snapshot(store: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from shared.store import StoreReader\n"
        "with StoreReader(Path(sys.argv[1])) as reader, reader.snapshot() as snapshot:\n"
        "    print([snapshot.has(bytes([n]) * 16) for n in range(6)])"
    )
    with StoreWriter(store) as writer, writer.snapshot() as before:
        writer.put_many([framed(4)])
        there = subprocess.run([sys.executable, "-c", code, store], capture_output=True, text=True, check=True)
        assert there.stdout.strip() == str([True] * 5 + [False])
        assert not before.has(KEYS[4])  # a snapshot is of one moment
        with writer.snapshot() as after:
            assert after.has(KEYS[4])


def test_threads_have_snapshots_of_their_own(store: Path) -> None:
    wrong: list[int] = []
    with StoreReader(store) as reader:

        def read() -> None:
            for step in range(200):
                with reader.snapshot() as snapshot:
                    number = step % 4
                    if not np.array_equal(snapshot.read(KEYS[number]).tensors["mean"], tensors(number)["mean"]):
                        wrong.append(step)

        threads = [threading.Thread(target=read) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert wrong == []


# --- what is no store ---


def test_where_there_is_nothing_it_says_how_to_make_a_store(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "absent"):
        with pytest.raises(StoreMissing, match="cache-build") as caught:
            StoreReader(path)
        assert caught.value.exit_code == 65
    assert list(tmp_path.iterdir()) == []


def test_a_store_without_its_data_is_missing_it(store: Path) -> None:
    (store / "data.mdb").unlink()
    with pytest.raises(StoreMissing, match=r"data\.mdb is missing"):
        StoreReader(store)


def test_foreign_folders_and_files_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "cat.png").write_bytes(b"cat")
    with pytest.raises(StoreFormat, match=r"cat\.png"):
        StoreWriter(tmp_path / "pictures")
    with pytest.raises(StoreFormat, match="is a file"):
        StoreWriter(tmp_path / "pictures" / "cat.png")
    assert os.listdir(tmp_path / "pictures") == ["cat.png"]


def test_an_empty_folder_or_one_that_a_kill_left_becomes_a_store(tmp_path: Path) -> None:
    left = tmp_path / "left"
    left.mkdir()
    (left / ".store.json.4242.tmp").write_bytes(b"{")
    (left / "data.mdb").write_bytes(bytes(4096))
    (left / "lock.mdb").touch()
    (left / "writer.lock").touch()
    for path in (left, tmp_path / "a" / "b"):
        with StoreWriter(path) as writer:
            assert writer.put_many([framed(1)]) == 1


@pytest.mark.parametrize("card", [b"", b"{", b"[]", b"{}", b"\xff", b"null"])
def test_a_damaged_card_is_named(store: Path, card: bytes) -> None:
    (store / "store.json").write_bytes(card)
    for open_store in (StoreReader, StoreWriter):
        with pytest.raises(StoreFormat, match=r"store\.json cannot be read"):
            open_store(store)


def test_a_newer_store_says_update(store: Path) -> None:
    (store / "store.json").write_text(json.dumps({"format": 2}))
    for open_store in (StoreReader, StoreWriter):
        with pytest.raises(StoreFormat, match=r"store format 2; this program reads 1: update"):
            open_store(store)


def test_the_lease_is_given_back_when_opening_fails(store: Path) -> None:
    card = (store / "store.json").read_bytes()
    (store / "store.json").write_bytes(b"{")
    with pytest.raises(StoreFormat):
        StoreWriter(store)
    (store / "store.json").write_bytes(card)
    StoreWriter(store).close()


# --- LMDB's formats ---


def lmdb_1(folder: Path) -> None:
    with lmdb.open(str(folder), lib_version=1) as env, env.begin(write=True) as transaction:
        transaction.put(KEYS[0], b"value")


@pytest.mark.parametrize("open_store", [StoreReader, StoreWriter])
def test_an_lmdb_1_0_file_is_refused(store: Path, open_store: type, tmp_path: Path) -> None:
    lmdb_1(tmp_path / "one")
    os.replace(tmp_path / "one" / "data.mdb", store / "data.mdb")
    (store / "lock.mdb").unlink()
    with pytest.raises(StoreFormat, match=r"another format \(1\.0") as caught:
        open_store(store)
    assert caught.value.exit_code == 65


def test_a_new_store_is_0_9_whatever_the_environment_says(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from shared.store import StoreWriter\n"
        "StoreWriter(Path(sys.argv[1])).close()"
    )
    environment = os.environ | {"LMDB_DEFAULT_LIB_VERSION": "1"}
    subprocess.run([sys.executable, "-c", code, tmp_path / "store"], check=True, env=environment)
    header = (tmp_path / "store" / "data.mdb").read_bytes()[16:24]
    assert header == bytes.fromhex("dec0efbe 01000000")
    with StoreReader(tmp_path / "store") as reader, reader.snapshot() as snapshot:
        assert not snapshot.has(KEYS[0])


def test_durability_is_on(store: Path) -> None:
    with StoreWriter(store) as writer, writer.snapshot():
        flags = writer._env.flags()
    assert (flags["sync"], flags["metasync"], flags["lock"]) == (True, True, True)
    assert (flags["writemap"], flags["map_async"]) == (False, False)


@pytest.mark.parametrize(
    ("code", "limited", "expected"),
    [
        (errno.ENOSPC, False, StoreFull),
        (errno.EDQUOT, False, StoreFull),
        (errno.EIO, False, StoreIO),
        (errno.EIO, True, StoreFull),  # a write cut short, which is how a disk or a limit fills up
        (errno.EACCES, False, StoreError),
    ],
)
def test_errors_of_the_disk_are_told_apart(
    store: Path, monkeypatch: pytest.MonkeyPatch, code: int, limited: bool, expected: type[StoreError]
) -> None:
    if limited:
        monkeypatch.setattr("shared.store.FREE_MARGIN_BYTES", 1 << 60)
    error = lmdb.Error("mdb_txn_commit")
    error.code = code
    with pytest.raises(StoreError) as caught, _translated(store):
        raise error
    assert type(caught.value) is expected
    assert str(store) in str(caught.value)


def test_little_space_left_is_said_before_anything_is_written(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with StoreWriter(store) as writer:
        monkeypatch.setattr("shared.store.FREE_MARGIN_BYTES", 1 << 60)
        with pytest.raises(StoreFull, match="no space left") as caught:
            writer.put_many([framed(5)])
        assert caught.value.exit_code == 74
        monkeypatch.undo()
        assert writer.put_many([framed(5)]) == 1


# --- looking after a store ---


def test_every_key_is_listed_once_in_order_with_its_size(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    odd = {b"\0" * 15: b"a", b"\xff" * 16: b"bc", b"x": b"d", b"y" * 300: b""}
    with StoreWriter(store) as writer:
        writer.put_many(list(odd.items()))
        expected = sorted([*odd.items(), *(framed(number) for number in range(4))])
        for page in (1, 2, 3, 100):
            monkeypatch.setattr("shared.store.KEYS_IN_A_PAGE", page)
            pages = list(writer.sizes())
            assert all(len(each) <= page for each in pages)
            assert [item for each in pages for item in each] == [(key, len(value)) for key, value in expected]
        assert writer.count() == len(expected)
        assert 4096 * 3 <= writer.used_bytes() <= (store / "data.mdb").stat().st_size
    with StoreWriter(store.parent / "empty") as writer:
        assert (list(writer.sizes()), writer.count()) == ([], 0)


def test_keys_can_be_listed_while_they_are_deleted(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shared.store.KEYS_IN_A_PAGE", 2)
    with StoreWriter(store) as writer:
        seen = []
        for page in writer.sizes():
            seen += [key for key, _ in page]
            writer.delete_many([key for key, _ in page])
        assert (seen, writer.count()) == (KEYS[:4], 0)


def test_who_reads_is_known_and_the_dead_are_forgotten(store: Path) -> None:
    with StoreReader(store) as reader:
        assert reader.readers() == []
        with reader.snapshot(), reader.snapshot():
            assert reader.readers() == [os.getpid()]
        assert reader.readers() == []
        code = (
            "import os, sys; from pathlib import Path; from shared.store import StoreReader\n"
            "snapshot = StoreReader(Path(sys.argv[1])).snapshot(); snapshot.__enter__()\n"
            "print('in', flush=True); sys.stdin.read(); os._exit(0)"
        )
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        child = subprocess.Popen([sys.executable, "-c", code, store], **pipes)  # type: ignore[call-overload]
        assert child.stdout.readline() == b"in\n"
        assert reader.readers() == [child.pid]
        child.communicate()  # it ends inside its transaction, as if killed
        assert reader.readers() == []


def test_a_copy_holds_the_same_and_less(store: Path, tmp_path: Path) -> None:
    to = tmp_path / "to"
    to.mkdir()
    with StoreWriter(store) as writer:
        writer.put_many([(bytes([9, number]) * 8, b"x" * 5000) for number in range(50)])
        writer.delete_many([bytes([9, number]) * 8 for number in range(50)])
        writer.copy_to(to)
    assert (to / "data.mdb").stat().st_size < (store / "data.mdb").stat().st_size
    with StoreWriter(to) as copy, copy.snapshot() as snapshot:
        assert copy.count() == 4
        assert all(np.array_equal(snapshot.read(KEYS[n]).tensors["mean"], tensors(n)["mean"]) for n in range(4))
        with pytest.raises(StoreError):
            copy.copy_to(to)  # never onto what is there


def test_a_copy_says_which_side_is_at_fault(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The target where it is full, the store where it is damaged."""

    def copy_fails(error: lmdb.Error, code: int) -> str:
        class Failing:
            def copy(self, *_: object, **__: object) -> None:
                error.code = code
                raise error

        with StoreReader(store) as reader:
            monkeypatch.setattr(reader, "_opened", Failing)
            with pytest.raises(StoreError) as caught:
                reader.copy_to(tmp_path / "new")
        return str(caught.value)

    assert copy_fails(lmdb.Error("copy"), errno.ENOSPC).startswith(f"{tmp_path / 'new'}: no space left")
    assert copy_fails(lmdb.CorruptedError("copy"), 0).startswith(f"{store}: not an LMDB store")


def test_tensors_that_a_reader_does_not_know_are_passed_over(store: Path) -> None:
    """`mask` is reserved; whatever later versions add to a record, today's readers find what they know."""
    source = np.random.default_rng(7)
    known = {name: source.standard_normal((4, 6, 5)).astype(np.float16) for name in ("mean", "logvar")}
    extra = {"mask": source.integers(0, 256, (6, 5), dtype=np.uint8), "later": np.arange(3)}
    for number, order in enumerate(({**extra, **known}, {**known, **extra}), 4):
        with StoreWriter(store) as writer:
            writer.put_many([(KEYS[number], encode_record(KEYS[number], "latents", order, {"later": 1}))])
        targets = {name: np.zeros((4, 6, 5), np.float16) for name in known}
        with StoreReader(store) as reader, reader.snapshot() as snapshot:
            snapshot.copy_into(KEYS[number], targets)
            assert np.array_equal(snapshot.read(KEYS[number]).tensors["mask"], extra["mask"])
        assert all(np.array_equal(targets[name], known[name]) for name in known)


def test_raw_bytes_lie_one_after_the_other_in_a_given_array(store: Path) -> None:
    frames = [framed(number)[1] for number in (2, 0, 3)]
    room = np.full(sum(map(len, frames)) + 5, 7, np.uint8)
    with StoreReader(store) as reader, reader.snapshot() as snapshot:
        with pytest.raises(RecordCorrupt, match="longer than it was"):
            snapshot.raw_into(KEYS[:4], room[: len(framed(0)[1]) + 1])
        with pytest.raises(RecordCorrupt, match="not in the store"):
            snapshot.raw_into(KEYS[7:], room)
        ends = snapshot.raw_into([KEYS[2], KEYS[0], KEYS[3]], room)
        assert snapshot.raw_into([], room) == []
    assert ends == np.cumsum([len(frame) for frame in frames]).tolist()
    assert room.tobytes() == b"".join(frames) + b"\7" * 5


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="these are settings of glibc")
def test_memory_of_one_commit_serves_the_next(tmp_path: Path) -> None:
    code = """
import resource, sys
from pathlib import Path
from shared.store import StoreWriter
value, faults = bytes(300_000), []
with StoreWriter(Path(sys.argv[1])) as writer:
    for commit in range(5):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        writer.put_many([(bytes([commit, number]) * 8, value) for number in range(40)])
        faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(max(faults[1:]))
"""
    ran = subprocess.run([sys.executable, "-c", code, tmp_path / "store"], capture_output=True, text=True, check=True)
    assert int(ran.stdout) < 40 * 300_000 // 4096 // 4  # pages of the records, each found anew


def test_records_may_leave_the_page_cache(tmp_path: Path) -> None:
    with StoreWriter(tmp_path / "store") as writer:
        data, was_cached = tmp_path / "store/data.mdb", []
        for number in range(2):
            middle = data.stat().st_size + 1_500_000
            writer.put_many([(KEYS[number], bytes(3_000_000))], cached=not number)
            was_cached.append(is_cached(data, middle))
    if not was_cached[0]:
        pytest.skip("this file system does not say what is cached")
    assert was_cached == [True, False]


def is_cached(path: Path, offset: int) -> bool:
    """Whether some bytes of a file can be had without the disk."""
    with path.open("rb") as file:
        try:
            return os.preadv(file.fileno(), [bytearray(16)], offset, os.RWF_NOWAIT) > 0
        except OSError:
            return False
