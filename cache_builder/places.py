"""Folders and buckets alike: the door to Arrow's file systems.

    a folder, or s3://BUCKET/PREFIX -> Place -> transfer/, sources/

Credentials come from where AWS's own tools look: the environment, ~/.aws, the machine's role. AWS_ENDPOINT_URL_S3 or
AWS_ENDPOINT_URL names another server that speaks S3, AWS_REGION the region; else the bucket is asked for it.
"""

import errno
import os
import re
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pyarrow import fs

from cache_builder.direct_file import DirectFile
from shared.atomic import sync_file, sync_folder
from shared.errors import ConfigError, DataError, StoreFull, StoreIO, StoreMissing
from shared.page_cache import drop_cached

CONNECT_TIMEOUT_S = 10.0
REQUEST_TIMEOUT_S = 60.0
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+)://(.*)", re.DOTALL)
_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{1,254}")


@dataclass(frozen=True, slots=True)
class Placed:
    """Something in a folder of a place; asked as what os.scandir gives."""

    name: str
    path: str
    size: int
    mtime_ns: int
    is_folder: bool

    def is_file(self, *, follow_symlinks: bool = True) -> bool:
        """Whether it is a file; there are no links."""
        return not self.is_folder

    def is_dir(self, *, follow_symlinks: bool = True) -> bool:
        """Whether it is a folder."""
        return self.is_folder

    def is_symlink(self) -> bool:
        """It is none."""
        return False


class Place:
    """What lies under one address; names in it are relative, with "/"."""

    def __init__(self, address: str, file_system: Any, root: str, *, is_local: bool) -> None:
        self.address = address
        self.is_local = is_local
        self._files, self._root = file_system, root

    @property
    def everywhere(self) -> str:
        """Its address for a process in another folder."""
        return self._root if self.is_local else self.address

    def label(self, name: str) -> str:
        """What `name` is called in messages."""
        return f"{self.address.rstrip('/')}/{name}"

    @property
    def has_bucket(self) -> bool:
        """Whether its bucket is there, or may be, where that cannot be told; a folder needs none."""
        with suppress(OSError):
            return self.is_local or bool(
                self._files.get_file_info(self._root.partition("/")[0]).type != fs.FileType.NotFound
            )
        return True

    def size(self, name: str) -> int | None:
        """Bytes of a file; None where there is none. Raises StoreIO where that cannot be told."""
        with self._translated(name):
            info = self._files.get_file_info(self._path(name))
        return int(info.size) if info.type == fs.FileType.File else None

    def kind(self, name: str) -> Literal["file", "folder"] | None:
        """What `name` is, "" for the place itself; None where nothing is called so. Raises StoreIO."""
        with self._translated(name):
            kind = self._files.get_file_info(self._path(name)).type
        return "file" if kind == fs.FileType.File else "folder" if kind == fs.FileType.Directory else None

    def entries(self, folder: str) -> list[Placed]:
        """What is in a folder, in any order; raises StoreIO, DataError where there is none."""
        with self._translated(folder):
            found = self._files.get_file_info(fs.FileSelector(self._path(folder)))
        return [
            Placed(
                info.base_name, info.path, int(info.size or 0), info.mtime_ns or 0, info.type == fs.FileType.Directory
            )
            for info in found
        ]

    def open(self, name: str) -> Any:
        """A file that can be read at any place, as Arrow reads it; raises DataError where it is not there."""
        with self._translated(name):
            return self._files.open_input_file(self._path(name))

    def drop_cached(self, name: str, start: int, end: int) -> None:
        """Bytes [start, end) of a file here will not be read again (shared/page_cache)."""
        if self.is_local:
            with suppress(OSError):
                drop_cached(Path(self._path(name)), start, end)

    def read(self, name: str, max_bytes: int) -> bytes:
        """The bytes of a file; raises DataError where it is not there or larger than `max_bytes`."""
        with self._translated(name), self._files.open_input_file(self._path(name)) as file:
            size = file.size()
            if size > max_bytes:
                raise DataError(f"{self.label(name)} has {size} bytes, more than {max_bytes}")
            return bytes(file.read())

    @contextmanager
    def writing(self, name: str) -> Iterator[Any]:
        """A new file, to be written from its beginning; whole and durable under its name when the block ends.

        What a bucket has of a file that was broken off is never whole Parquet or JSON, and is written over.
        """
        with self._translated(name):
            if not self.is_local:
                with self._files.open_output_stream(self._path(name)) as file:
                    yield file
                return
            path = Path(self._path(name))
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
            try:
                with closing(DirectFile(temporary)) as file:
                    yield file
                    file.finish()
                sync_file(temporary)
                os.replace(temporary, path)
            except BaseException:
                with suppress(OSError):
                    temporary.unlink()
                raise
            sync_folder(path.parent)

    def write(self, name: str, data: bytes) -> None:
        """Put `data` under `name`, whole or not at all."""
        with self.writing(name) as file:
            file.write(data)

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}".rstrip("/")

    @contextmanager
    def _translated(self, name: str) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError:
            raise DataError(f"{self.label(name)} is not there") from None
        except OSError as error:
            raise explain_io(self.label(name), error) from None


def open_place(address: str | os.PathLike[str]) -> Place:
    """The place that an address names; raises ConfigError where it cannot be meant, StoreIO where nobody answers."""
    address = os.fspath(address)
    scheme, rest = found.groups() if (found := _SCHEME.match(address)) else ("", address)
    if scheme == "s3":
        return _open_bucket(address, rest)
    if scheme not in ("", "file"):
        raise ConfigError(f"{address}: name a folder, or s3://BUCKET/PREFIX")
    if not rest:
        raise ConfigError(f"{address or 'an empty address'}: name a folder, or s3://BUCKET/PREFIX")
    return Place(address, fs.LocalFileSystem(), os.path.abspath(rest), is_local=True)


def require_there(place: Place, name: str, way_out: str) -> None:
    """Raises StoreMissing where `name` is not at a place."""
    if place.size(name) is None:
        if not place.has_bucket:
            raise StoreMissing(f"{place.address}: there is no such bucket")
        raise StoreMissing(f"{place.address} holds no {name}: {way_out}")


def explain_io(label: str, error: OSError) -> StoreIO | StoreFull:
    """What to say of a disk or a server that did not do as asked."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return StoreFull(f"{label}: no space left; free some and run the same command again")
    said = (error.strerror if error.strerror and "AWS" not in error.strerror else str(error)).splitlines()[0]
    return StoreIO(f"{label}: {_way_out(said)}")


def _way_out(said: str) -> str:
    for sign, hint in _SIGNS.items():
        if sign in said:
            return f"{hint} ({said[max(0, said.find('AWS Error')) :][:160]})"
    return said[:300]


_SIGNS = {
    "ACCESS_DENIED": "access denied: are the credentials in the environment (AWS_ACCESS_KEY_ID, AWS_PROFILE), and may "
    "they read and write there?",
    "INVALID_ACCESS_KEY_ID": "the server does not know these credentials (AWS_ACCESS_KEY_ID, AWS_PROFILE)",
    "SIGNATURE": "the server does not take these credentials (AWS_SECRET_ACCESS_KEY)",
    "NO_SUCH_BUCKET": "there is no such bucket; make it first",
    "NETWORK_CONNECTION": "the server cannot be reached (AWS_ENDPOINT_URL names another than Amazon's); the same "
    "command goes on when it can",
}


def _open_bucket(address: str, rest: str) -> Place:
    bucket, _, prefix = rest.partition("/")
    if not _BUCKET.fullmatch(bucket):
        raise ConfigError(f"{address}: {bucket!r} is no bucket's name; write s3://BUCKET/PREFIX")
    if any(part in ("..", ".") for part in prefix.split("/")):
        raise ConfigError(f"{address}: write the prefix without . and ..")
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    try:
        if region is None and endpoint is None:
            region = fs.resolve_s3_region(bucket)
        options: dict[str, Any] = {"region": region or "us-east-1"}
        if endpoint is not None:
            scheme, _, host = endpoint.rpartition("://")
            options |= {"endpoint_override": host.rstrip("/"), "scheme": scheme or "https"}
        files = fs.S3FileSystem(**options, connect_timeout=CONNECT_TIMEOUT_S, request_timeout=REQUEST_TIMEOUT_S)
    except OSError as error:
        raise explain_io(address, error) from None
    parts = [bucket, *(part for part in prefix.split("/") if part)]
    return Place(address, files, "/".join(parts), is_local=False)
