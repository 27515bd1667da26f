"""Looks at an LMDB data file before LMDB maps it: a file cut short would be a bus error there, not an exception."""

import struct
import time
from pathlib import Path

from shared.errors import StoreFormat, StoreMissing

_MAGIC = 0xBEEFC0DE
_DATA_VERSION = 1  # LMDB 0.9
_META = struct.Struct("<IIQQI")  # magic, version, address, map size, page size (md_pad of the free list's database)
_META_AT = 16  # after the page header
_LAST_PAGE_AT = 136
_TAIL = struct.Struct("<QQ")  # last page used, transaction id


def check_data_file(path: Path) -> None:
    """Require two sound meta pages and a file as long as they say; raises StoreFormat (exit 65) or StoreMissing."""
    try:
        _check(path)
    except StoreFormat:
        time.sleep(0.05)  # a commit may have been writing the meta page just then
        _check(path)


def _check(path: Path) -> None:
    try:
        with path.open("rb") as file:
            head = file.read(_LAST_PAGE_AT + _TAIL.size)
            page_size, first_end = _read_meta(path, head)
            file.seek(page_size)
            _, second_end = _read_meta(path, file.read(_LAST_PAGE_AT + _TAIL.size))
            length = file.seek(0, 2)
    except FileNotFoundError:
        raise StoreMissing(f"{path} is missing from its store") from None
    expected = max(first_end, second_end)
    if length < expected:
        raise StoreFormat(
            f"{path} is cut short: {length} bytes of at least {expected}; restore it from a copy, or remove the store "
            "and build it again"
        )


def _read_meta(path: Path, head: bytes) -> tuple[int, int]:
    if len(head) < _LAST_PAGE_AT + _TAIL.size:
        raise StoreFormat(f"{path} is cut short: no room for LMDB's meta pages")
    magic, version, _, _, page_size = _META.unpack_from(head, _META_AT)
    if magic != _MAGIC:
        other = struct.pack("<I", _MAGIC) in head[:64]
        reason = "an LMDB file of another format (1.0?)" if other else "not an LMDB file, or its meta page is damaged"
        raise StoreFormat(f"{path} is {reason}; this program reads LMDB 0.9 stores")
    if version != _DATA_VERSION:
        raise StoreFormat(f"{path} is of LMDB data format {version}; this program reads format {_DATA_VERSION}")
    if page_size not in (1 << bits for bits in range(9, 17)):
        raise StoreFormat(f"{path}: its meta page names a page size of {page_size}")
    last_page, _ = _TAIL.unpack_from(head, _LAST_PAGE_AT)
    return page_size, (last_page + 1) * page_size
