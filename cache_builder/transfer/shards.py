"""One shard -> frames: a Parquet file of three columns. The door to Parquet on this side.

    key       fixed_len_byte_array(16)   content key of a record
    checksum  fixed_len_byte_array(16)   the one that stands in its frame
    frame     byte_array                 the record as the store has it (shared/record.py)

Written by shard_writer.py. A shard's digest is blake2b-256 over keys and checksums in order: it names the content
whatever the file looks like, is known before a byte is written, and is verified before a frame is read, each of which
must then have the checksum of its row. Every page has a checksum too, verified where no better one covers the bytes.
"""

import hashlib
import itertools
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cache_builder.places import Place, explain_io
from shared.errors import DataError, RecordCorrupt, RecordNewer
from shared.record import KEY_BYTES, decode_record, frame_checksum

SHARD_FORMAT = 1
GROUP_BYTES = 16 << 20  # of frames in a row group, which is read and written at once
GROUP_ROWS = 4096
MOST_GROUP_BYTES = 1 << 30  # a row group that says it is larger is not one of ours
READ_BYTES = 1 << 20  # of a local file, into memory that is used again
ROWS_AT_ONCE = 8  # decoded: what is small is allocated again and again in the same pages
_SHORT = pa.binary(KEY_BYTES)
SCHEMA = pa.schema(
    [
        pa.field("key", _SHORT, nullable=False),
        pa.field("checksum", _SHORT, nullable=False),
        pa.field("frame", pa.binary(), nullable=False),
    ]
)

Frame = tuple[bytes, memoryview]
Row = tuple[bytes, bytes]  # key, checksum


def shard_digest(rows: Iterable[Row]) -> str:
    """blake2b-256, hex, over the format version and each key and checksum, in order."""
    digest = hashlib.blake2b(b"sdxl-experts shard %d" % SHARD_FORMAT, digest_size=32)
    for key, checksum in rows:
        digest.update(key + checksum)
    return digest.hexdigest()


def row_groups(sizes: Sequence[int]) -> Iterator[slice]:
    """Which records of these sizes, bytes, are written together, and read together."""
    start = 0
    while start < len(sizes):
        end, size = start, 0
        while end < len(sizes) and end - start < GROUP_ROWS and (size < GROUP_BYTES or end == start):
            size += sizes[end]
            end += 1
        yield slice(start, end)
        start = end


class ShardReader:
    """The shard of a digest at a place, or of any; raises DataError where it is not whole, or not that one."""

    def __init__(self, place: Place, name: str, digest: str | None) -> None:
        self.label = place.label(name)
        self._place, self._name = place, name
        self._stream = place.open(name)
        try:
            with self._untrusted():
                self._file = pq.ParquetFile(self._stream, page_checksum_verification=True)
                self._check_footer()
                short = self._file.read(["key", "checksum"], use_threads=False)
                self.rows: list[Row] = list(zip(*(column.to_pylist() for column in short.columns), strict=True))
                self.digest = shard_digest(self.rows)
                if digest not in (None, self.digest):
                    raise ValueError("it holds other records than it should (digest)")
                self._frames = self._unsummed(is_local=place.is_local)
        except BaseException:
            self.close()
            raise

    def _unsummed(self, *, is_local: bool) -> pq.ParquetFile:
        """The file for its frames: what their pages' checksums cover, their own cover better, and are verified too."""
        # The kernel reads ahead on a disk; a server is asked for a whole row group at once.
        options: dict[str, Any] = {"pre_buffer": False, "buffer_size": READ_BYTES} if is_local else {"pre_buffer": True}
        return pq.ParquetFile(self._stream, metadata=self._file.metadata, **options)

    def groups(self) -> Iterator[list[Row]]:
        """Rows of each row group."""
        start = 0
        for index in range(self._file.num_row_groups):
            end = start + self._file.metadata.row_group(index).num_rows
            yield self.rows[start:end]
            start = end

    def frames(self, group: int) -> Iterator[Frame]:
        """Keys and frames of a row group, each frame verified: the one of its row, whole, and a record."""
        expected = iter(next(itertools.islice(self.groups(), group, None)))
        with self._untrusted():
            batches = self._frames.iter_batches(ROWS_AT_ONCE, [group], use_threads=False)
        while (batch := self._next(batches)) is not None:
            keys, checksums, frames = batch.columns
            for key, checksum, frame in zip(keys.to_pylist(), checksums.to_pylist(), frames, strict=True):
                view = memoryview(frame.as_buffer()).cast("B")  # Arrow has signed bytes
                try:
                    decode_record(key, view)
                    if frame_checksum(view) != checksum or next(expected, None) != (key, checksum):
                        raise RecordCorrupt(f"record {key.hex()} is another than its row says")
                except RecordNewer as error:
                    raise DataError(f"{self.label}: {error}") from None
                except RecordCorrupt as error:
                    raise DataError(f"{self.label}: {error}; {_WAY_OUT}") from None
                yield key, view
        if next(expected, None) is not None:
            raise self._damaged(ValueError(f"row group {group} ends before its last row"))
        sizes = [self._file.metadata.row_group(index).total_byte_size for index in range(group + 1)]
        self._place.drop_cached(self._name, sum(sizes[:-1]), sum(sizes))

    def _next(self, batches: Iterator[pa.RecordBatch]) -> pa.RecordBatch | None:
        with self._untrusted():
            return next(batches, None)

    def close(self) -> None:
        """Let go of the file."""
        with suppress(OSError):
            self._stream.close()

    def __enter__(self) -> "ShardReader":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _check_footer(self) -> None:
        """What is read later is bounded by the file, so far as the footer says.

        Columns are not asked for: pyarrow ends the process where what a damaged footer says of one cannot be.
        """
        if not self._file.schema_arrow.equals(SCHEMA):
            raise ValueError(
                f"its columns are {', '.join(self._file.schema_arrow.names)[:80]}, not key, checksum and frame"
            )
        footer, size = self._file.metadata, self._stream.size()
        for index in range(footer.num_row_groups):
            group = footer.row_group(index)
            if not 0 <= group.total_byte_size <= min(size, MOST_GROUP_BYTES):
                raise ValueError(f"row group {index} says it has {group.total_byte_size} bytes")

    @contextmanager
    def _untrusted(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno or "AWS Error" in str(error):
                raise explain_io(self.label, error) from None
            raise self._damaged(error) from None
        except (pa.ArrowException, ValueError, KeyError, TypeError, OverflowError, MemoryError) as error:
            raise self._damaged(error) from None

    def _damaged(self, error: BaseException) -> DataError:
        said = (str(error).splitlines() or [type(error).__name__])[0][:160]
        return DataError(f"{self.label} is no shard, or damaged: {said}; {_WAY_OUT}")


_WAY_OUT = "remove that file and run the same cache-store export again, which writes what is not there"
