"""The only module that opens LMDB: one leased writer, many readers, records copied out before a transaction ends.

    STORE/data.mdb, lock.mdb    LMDB 0.9 format, one database: content key (16 bytes) -> framed record
    STORE/store.json            format version of all this (shared/store_card.py)
    STORE/writer.lock           flock held by the writer; says who
    STORE/manifests/            sealed views of the store (shared/manifest.py)

A live store is append-only, commits are synchronous, and "stored" is said only after commit returned.
"""

import contextlib
import errno
import os
import resource
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import lmdb

from shared.atomic import sync_file, sync_folder
from shared.errors import StoreBusy, StoreError, StoreFormat, StoreFull, StoreIO, StoreMissing
from shared.file_system import refuse_network
from shared.kept_memory import keep_freed_memory
from shared.lease import Lease
from shared.page_cache import drop_cached
from shared.preflight import check_data_file
from shared.snapshot import Snapshot
from shared.store_card import read_card, refuse_foreign_folder, write_card

MAP_SIZE_BYTES = 16 << 40  # address space, not memory or disk; the same for every process
MIN_MAP_SIZE_BYTES = 64 << 20
MAX_READERS = 1024
FREE_MARGIN_BYTES = 16 << 20
KEYS_IN_A_PAGE = 4096  # listed in one transaction


class _Environment:
    """An LMDB environment that opens lazily in each process and survives a map that somebody else grew."""

    readonly = True

    def __init__(self, path: Path) -> None:
        self.path = path
        self._env: Any = None
        self._pid = 0
        self._opening = threading.Lock()  # threads share one environment: LMDB refuses a second in one process

    @contextlib.contextmanager
    def snapshot(self) -> Iterator[Snapshot]:
        """A consistent view for the length of the block; what is read in it is copied, nothing points into the map."""
        with _translated(self.path):
            snapshot = Snapshot(self._begin())
            try:
                yield snapshot
            finally:
                snapshot.end()

    def sizes(self) -> Iterator[list[tuple[bytes, int]]]:
        """Every key, in order, with the bytes of its record: a page of them in each short transaction."""
        last: bytes | None = None
        while True:
            with self.snapshot() as snapshot:
                page = snapshot.sizes_after(last, KEYS_IN_A_PAGE)
            if not page:
                return
            yield page
            last = page[-1][0]

    def count(self) -> int:
        """Number of records."""
        with _translated(self.path):
            return int(self._opened().stat()["entries"])

    def readers(self) -> list[int]:
        """Pids of the processes that are in a read transaction just now; those of the dead are cleared first."""
        with _translated(self.path):
            env = self._opened()
            env.reader_check()
            table = [line.split() for line in env.readers().splitlines()]
        return sorted({int(row[0]) for row in table if len(row) == 3 and row[0].isdigit() and row[2] != "-"})

    def used_bytes(self) -> int:
        """Bytes of data.mdb that hold something: the rest is free pages, which the next records fill."""
        with _translated(self.path):
            env = self._opened()
            stat = env.stat()
        return int(stat["psize"] * (stat["branch_pages"] + stat["leaf_pages"] + stat["overflow_pages"] + 2))

    def copy_to(self, folder: Path) -> None:
        """Write a compact copy of data.mdb, as of one moment, durably into `folder`, which has none.

        The one transaction that may last: it takes no page from a store that only grows.
        """
        try:
            with _translated(self.path):
                self._opened().copy(str(folder), compact=True)
        except StoreFull:
            raise StoreFull(f"{folder}: no space left for a copy; free some and run the same command again") from None
        sync_file(folder / "data.mdb")
        sync_folder(folder)

    def close_environment(self) -> None:
        """Close LMDB in this process; the next use opens it again."""
        if self._env is not None:
            self._env.close()
        self._env = None

    def _begin(self) -> Any:
        env = self._opened()
        try:
            return env.begin(buffers=True)
        except lmdb.MapResizedError:  # another process has grown the map beyond ours
            env.set_mapsize(0)
        except lmdb.ReadersFullError:  # killed readers leave their slots behind
            env.reader_check()
        return env.begin(buffers=True)

    def _opened(self) -> Any:
        with self._opening:
            if self._env is not None and self._pid != os.getpid():  # an environment must not cross a fork
                self.close_environment()
            if self._env is None:
                self._env, self._pid = self._open(), os.getpid()
                self._env.reader_check()
            return self._env

    def _open(self) -> Any:
        size = MAP_SIZE_BYTES
        while True:
            try:
                return lmdb.open(
                    str(self.path),
                    map_size=size,
                    readonly=self.readonly,
                    create=False,
                    max_readers=MAX_READERS,
                    max_spare_txns=0,  # a spare holds a reader's slot, which a forked child would give away
                    lib_version=0,
                    sync=True,
                    metasync=True,
                    writemap=False,
                    map_async=False,
                    lock=True,
                )
            except lmdb.MemoryError:
                size //= 2
                if size < MIN_MAP_SIZE_BYTES:
                    raise StoreError(f"{self.path}: no address space to map the store (ulimit -v?)") from None


class StoreReader(_Environment):
    """Reads a store that others may be writing; raises StoreMissing or StoreFormat where there is none to read."""

    def __init__(self, path: Path) -> None:
        if not (path / "store.json").exists():
            raise StoreMissing(f"no store at {path}: make one with cache-build FOLDER --store {path} --model MODEL")
        refuse_network(path)
        read_card(path)
        check_data_file(path / "data.mdb")
        super().__init__(path)

    def close(self) -> None:
        """Close the store."""
        self.close_environment()

    def __enter__(self) -> "StoreReader":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class StoreWriter(_Environment):
    """The one writer of a store, created where absent; holds the lease until closed."""

    readonly = False

    def __init__(self, path: Path, *, wait: bool = False) -> None:
        """Raises StoreLocked while another process holds the lease, unless `wait`; StoreFormat for foreign folders."""
        refuse_network(path)
        refuse_foreign_folder(path)
        path.mkdir(parents=True, exist_ok=True)
        super().__init__(path)
        keep_freed_memory()
        self._lease = Lease(path / "writer.lock", f"store {path} is being written", "wait for it (--wait)", wait=wait)
        try:
            self._prepare()
        except BaseException:
            self._lease.release()
            raise

    def put_many(self, records: Sequence[tuple[bytes, bytes | memoryview]], *, cached: bool = True) -> int:
        """Commit framed records under their keys, durably, and return how many were new; present keys stay as they are.

        Unless `cached`, what the file has grown by leaves the page cache: where far more is put than is read soon.
        Raises StoreFull or StoreIO; then nothing of this batch is stored and everything before it is.
        """
        self._check_space(sum(len(value) for _, value in records))
        data = self.path / "data.mdb"
        before = data.stat().st_size
        new = self._commit(lambda transaction: sum(transaction.put(*record, overwrite=False) for record in records))
        if not cached:
            drop_cached(data, before, data.stat().st_size)
        return new

    def delete_many(self, keys: Sequence[bytes]) -> int:
        """Delete the records of `keys`, durably, and return how many there were: quarantine and garbage collection.

        Nothing else deletes, and no transaction both puts and deletes (see _extend_file).
        """
        self._extend_file()
        return self._commit(lambda transaction: sum(transaction.delete(key) for key in keys))

    def _commit(self, work: Callable[[Any], int]) -> int:
        while True:
            try:
                with _translated(self.path), self._opened().begin(write=True) as transaction:
                    return work(transaction)
            except lmdb.MapFullError:
                self._grow_map()
            except (StoreFull, StoreIO):
                self.close_environment()  # LMDB's state after a failed write is not to be trusted
                raise

    def close(self) -> None:
        """Close LMDB and give the lease back."""
        self.close_environment()
        self._lease.release()

    def __enter__(self) -> "StoreWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def leave_lease(self) -> None:
        """In a forked child: give up its share in the writer's lease, which stays with the parent."""
        self._lease.release()  # closes one of two descriptors: the lock goes with the last

    def _prepare(self) -> None:
        data, card = self.path / "data.mdb", self.path / "store.json"
        if card.exists():
            read_card(self.path)
        elif data.exists() and data.stat().st_size < 8192:
            data.unlink()  # killed while LMDB made the file: there is nothing in it
        if data.exists():
            check_data_file(data)
        with _translated(self.path):
            self._opened()
        if not card.exists():
            write_card(self.path)

    def _check_space(self, needed_bytes: int) -> None:
        free = free_bytes(self.path)
        if free < needed_bytes:
            raise StoreFull(
                f"{self.path}: no space left for {needed_bytes >> 10} KiB more; free some and run the same command "
                "again, what is stored stays stored"
            )

    def _extend_file(self) -> None:
        """Make data.mdb longer than any deletion can say it is, with a hole that takes no space.

        A deletion may use pages at the end, give them up unwritten and still count them: the next pre-flight would
        take the file for one that was cut short.
        """
        with _translated(self.path):
            env = self._opened()
            info, stat = env.info(), env.stat()
            tree = stat["branch_pages"] + stat["leaf_pages"]
            pages = info["last_pgno"] + 1 + 2 * tree + stat["overflow_pages"] // 64 + 1024
            data = self.path / "data.mdb"
            if data.stat().st_size < pages * stat["psize"]:
                os.truncate(data, pages * stat["psize"])

    def _grow_map(self) -> None:
        with _translated(self.path):
            env = self._opened()
            try:
                env.set_mapsize(env.info()["map_size"] * 2)
            except lmdb.MemoryError:
                raise StoreFull(f"{self.path}: no address space to grow the map (ulimit -v?)") from None


Store = StoreReader | StoreWriter


class _translated(contextlib.AbstractContextManager[None]):
    """LMDB's errors as ours; MapFull passes, its one caller replays."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not isinstance(error, lmdb.Error) or isinstance(error, lmdb.MapFullError):
            return
        code = getattr(error, "code", 0)
        full = code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        if full or (code == errno.EIO and _is_out_of_room(self.path)):
            raise StoreFull(f"{self.path}: no space left; free some and run the same command again") from error
        if code == errno.EIO:
            raise StoreIO(f"{self.path}: the disk failed ({error}); check it before writing again") from error
        if isinstance(
            error, (lmdb.InvalidError, lmdb.VersionMismatchError, lmdb.CorruptedError, lmdb.PageNotFoundError)
        ):
            raise StoreFormat(f"{self.path}: not an LMDB store that can be read ({error})") from error
        if isinstance(error, (lmdb.LockError, lmdb.BadRslotError, lmdb.ReadersFullError)):
            raise StoreBusy(
                f"{self.path}: LMDB's reader table is in conflict ({error}); containers that share a store must share "
                "a PID namespace (docker: --pid, compose: pid:)"
            ) from error
        raise StoreError(f"{self.path}: {error}") from error


def free_bytes(path: Path) -> int:
    """Bytes that a store at `path` may still write."""
    return max(0, shutil.disk_usage(path).free - FREE_MARGIN_BYTES)


def _is_out_of_room(path: Path) -> bool:
    """Whether an EIO means a full disk: LMDB calls a write cut short that, and so a disk or a file limit fills up."""
    room = shutil.disk_usage(path).free
    limit, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
    if limit != resource.RLIM_INFINITY:
        room = min(room, limit - (path / "data.mdb").stat().st_size)
    return room < FREE_MARGIN_BYTES
