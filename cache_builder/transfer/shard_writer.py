"""Frames -> one shard, a row group after the other: the writing side of the Parquet file that shards.py describes.

Encoded and summed in pieces that stay in the processor's cache, so that memory is not read again for each step.
"""

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cache_builder.transfer.shards import SCHEMA, Row
from shared.errors import RecordCorrupt
from shared.record import frame_checksum

PAGE_BYTES = 256 << 10  # a page holds a frame, or as many small ones

Bytes = np.ndarray[Any, np.dtype[np.uint8]]


@dataclass(frozen=True)
class Group:
    """Frames of one row group: frame i is data[ends[i - 1]:ends[i]]."""

    keys: Sequence[bytes]
    ends: Sequence[int]
    data: Bytes

    def frames(self) -> Iterator[tuple[bytes, memoryview]]:
        """Each key with its frame, a view."""
        view = self.data.data
        for key, start, end in zip(self.keys, (0, *self.ends), self.ends, strict=False):
            yield key, view[start:end]


def joined(records: Sequence[tuple[bytes, bytes]]) -> Group:
    """A group of frames that lie here and there."""
    ends = list(itertools.accumulate(len(frame) for _, frame in records))
    return Group([key for key, _ in records], ends, np.frombuffer(b"".join(frame for _, frame in records), np.uint8))


class ShardWriter:
    """Takes the row groups of one shard, in order; raises RecordCorrupt where frames are not those of its rows."""

    def __init__(self, writer: pq.ParquetWriter, rows: Sequence[Row]) -> None:
        self._writer, self._rows = writer, iter(rows)

    def write(self, group: Group) -> None:
        """Write a row group; its data may be changed afterwards."""
        here = [(key, frame_checksum(frame)) for key, frame in group.frames()]
        if here != list(itertools.islice(self._rows, len(here))):
            raise RecordCorrupt("records changed while they were exported")
        keys, checksums = zip(*here, strict=True)
        short = SCHEMA.field("key").type
        offsets = pa.py_buffer(np.array([0, *group.ends], np.int32))
        frames = pa.Array.from_buffers(pa.binary(), len(here), [None, offsets, pa.py_buffer(group.data)])
        columns = [pa.array(keys, short), pa.array(checksums, short), frames]
        self._writer.write_table(pa.Table.from_arrays(columns, schema=SCHEMA), row_group_size=len(here))


@contextmanager
def writing_shard(file: Any, rows: Sequence[Row]) -> Iterator[ShardWriter]:
    """A shard of `rows` in an open file, whole when the block ends."""
    with pq.ParquetWriter(
        file,
        SCHEMA,
        compression="none",  # latents are noise to zstd, and what it gains of texts is little of the whole
        use_dictionary=False,
        write_statistics=False,
        write_page_checksum=True,
        data_page_size=PAGE_BYTES,
        write_batch_size=1,  # after each frame it is asked whether the page is full
    ) as writer:
        yield ShardWriter(writer, rows)
