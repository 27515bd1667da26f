"""What is read of a store within one transaction: copied out before it ends, and verified where it is decoded.

StoreReader.snapshot() (shared/store.py) -> Snapshot -> records, frames, keys
"""

import itertools
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from shared.errors import RecordCorrupt
from shared.record import Array, Record, decode_record, frame_checksum

_INTEGERS = {dtype.itemsize: dtype for dtype in map(np.dtype, (np.uint8, np.uint16, np.uint32, np.uint64))}


class Snapshot:
    """One read transaction: everything read in it is of one moment. Lives for one batch at most."""

    def __init__(self, transaction: Any) -> None:
        self._transaction: Any = transaction

    def has(self, key: bytes) -> bool:
        """Whether a record is stored under `key`; does not read it."""
        return self._transaction.get(key) is not None

    def has_each(self, keys: Iterable[bytes]) -> list[bool]:
        """Whether a record is stored under each of `keys`; sorted ones are found fastest."""
        with self._transaction.cursor() as cursor:
            return [cursor.set_key(key) for key in keys]

    def read(self, key: bytes) -> Record:
        """A copy of the record of `key`; raises RecordCorrupt where it is absent or damaged."""
        return decode_record(key, bytes(self._view(key)))

    def copy_into(self, key: bytes, targets: Mapping[str, Array]) -> Mapping[str, Any]:
        """Verify the record of `key`, copy its tensors straight from the map into `targets`, return its meta.

        Targets are C-contiguous arrays of the tensors' dtypes and shapes; raises RecordCorrupt where the record has
        other tensors, or is absent or damaged; targets may then be partly written.
        """
        record = decode_record(key, self._view(key))
        for name, target in targets.items():
            source = record.tensors.get(name)
            if source is None or source.shape != target.shape or source.dtype != target.dtype:
                found = "absent" if source is None else f"{source.dtype} {source.shape}"
                raise RecordCorrupt(
                    f"record {key.hex()}: tensor {name!r} is {found}, not {target.dtype} {target.shape}"
                )
            if not target.flags.c_contiguous:
                raise ValueError(f"target of tensor {name!r} is not C-contiguous")
            # As integers: copies through half-precision views run at half the rate.
            integers = _INTEGERS[target.dtype.itemsize]
            target.view(integers)[...] = source.view(integers)
        return record.meta

    def raw(self, key: bytes) -> bytes:
        """A copy of the bytes under `key`, unverified: what a quarantine keeps; raises RecordCorrupt where absent."""
        return bytes(self._view(key))

    def raw_into(self, keys: Iterable[bytes], target: Array) -> list[int]:
        """Copy the bytes under each key, unverified, into `target`, uint8, one after the other; return where each ends.

        Raises RecordCorrupt where one is absent, or where `target` ends before it.
        """
        ends, end = [], 0
        for key in keys:
            view = self._view(key)
            start, end = end, end + len(view)
            if end > len(target):
                raise RecordCorrupt(f"record {key.hex()} is longer than it was a moment ago")
            target[start:end] = np.frombuffer(view, np.uint8)
            ends.append(end)
        return ends

    def checksums(self, keys: Iterable[bytes]) -> list[bytes]:
        """What the frame of each key says its checksum is, unverified; raises RecordCorrupt where one is absent."""
        return [frame_checksum(self._view(key)) for key in keys]

    def sizes_after(self, key: bytes | None, count: int) -> list[tuple[bytes, int]]:
        """The first `count` keys in order that come after `key`, or of all, with the bytes of their records."""
        with self._transaction.cursor() as cursor:
            found = cursor.first() if key is None else cursor.set_range(key)
            if found and cursor.key() == key:
                found = cursor.next()
            items = cursor.iternext(keys=True, values=True) if found else ()
            return [(bytes(each), len(view)) for each, view in itertools.islice(items, count)]

    def end(self) -> None:
        """End the transaction and let go of it: one kept alive keeps a reader's slot, which a fork would share."""
        self._transaction.abort()
        self._transaction = None

    def _view(self, key: bytes) -> memoryview:
        view: memoryview | None = self._transaction.get(key)
        if view is None:
            raise RecordCorrupt(f"record {key.hex()} is not in the store")
        return view
