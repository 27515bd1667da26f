"""Members of a tar file by name, place and size, without unpacking it: headers alone are read, within limits.

tar -> members -> Member | DataError -> webdataset.py, which reads a member's bytes by its place

tarfile parses; what it must not do with a hostile archive (read a header of gigabytes, walk backwards, follow a link,
take zeros or garbage for the end) is refused around it.
"""

import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

from shared.errors import DataError

MAX_HEADER_BYTES = 1 << 20
_PADDING_BYTES = 64 << 10
_SUFFIXES = {b"\x1f\x8b": "gzip", b"BZ": "bzip2", b"\xfd7": "xz", b"\x28\xb5": "zstd"}


@dataclass(frozen=True)
class Member:
    """A regular file in an archive: `size` bytes from `start`; `name` is data."""

    name: str
    start: int
    size: int


@dataclass(frozen=True)
class Refused:
    """Something in an archive that is not read, and why."""

    name: str
    reason: str


def members(file: BinaryIO) -> Iterator[Member | Refused]:
    """Every file in the archive, in its order; raises DataError where it is damaged, with what came before given."""
    _check_beginning(file)
    end = file.seek(0, 2)
    file.seek(0)
    at = -1
    try:
        archive = tarfile.TarFile(fileobj=_Bounded(file), mode="r", errors="surrogateescape")  # type: ignore[arg-type]
        while (member := archive.next()) is not None:
            archive.members.clear()  # type: ignore[attr-defined]  # or it remembers every one
            if member.size < 0 or member.offset_data <= at or archive.offset <= at:
                raise DataError(f"damaged at byte {max(at, 0)}: a header that points backwards")
            at = member.offset_data
            if not member.isdir():
                yield _member(member, end)
            if member.isreg() and member.offset_data + member.size > end:
                return  # it is cut short, and the last
        _check_end(file, archive.offset, end)
    except (tarfile.TarError, RecursionError, ValueError, OverflowError) as error:
        said = str(error).splitlines() or [type(error).__name__]
        raise DataError(f"damaged after byte {max(at, 0)}: {said[0][:80]}") from None


def _member(member: tarfile.TarInfo, end: int) -> Member | Refused:
    if member.issym() or member.islnk():
        return Refused(member.name, "a link")
    if not member.isreg() or member.issparse():
        return Refused(member.name, "not a regular file")
    if member.offset_data + member.size > end:
        return Refused(member.name, "cut short")
    return Member(member.name, member.offset_data, member.size)


class _Bounded:
    """A file of which nothing longer than a header is read at once."""

    name = ""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.seek, self.tell = file.seek, file.tell

    def read(self, count: int) -> bytes:
        """At most `count` bytes; raises tarfile.ReadError where that is more than a header may have."""
        if not 0 <= count <= MAX_HEADER_BYTES:
            raise tarfile.ReadError(f"a header of {count} bytes")
        return self._file.read(count)


def _check_beginning(file: BinaryIO) -> None:
    beginning = file.read(512)
    file.seek(0)
    if kind := _SUFFIXES.get(beginning[:2]):
        raise DataError(f"compressed with {kind}; unpack it to a plain .tar, so that pictures can be read in place")
    if not beginning:
        raise DataError("it is empty")


def _check_end(file: BinaryIO, at: int, end: int) -> None:
    """Require that the archive ends where its members do: tarfile takes a damaged header for the end."""
    file.seek(at)
    if at > end or file.read(512).strip(b"\0"):
        raise DataError(f"damaged at byte {at}: what follows cannot be read")
    if file.read(_PADDING_BYTES).strip(b"\0"):
        raise DataError(f"goes on after its end at byte {at}: archives joined by cat are read up to there only")
