"""Write-then-rename: a file or a folder is whole under its name or not there, whatever dies when."""

import glob
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from shared.errors import ConfigError


def write_atomically(path: Path, data: bytes | Iterable[bytes | memoryview]) -> None:
    """Put `data`, or its parts, at `path`: written under a temporary name, synced, renamed, the folder synced."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with temporary.open("wb") as file:
        file.writelines([data] if isinstance(data, bytes) else data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    sync_folder(path.parent)


def sync_file(path: Path) -> None:
    """Make the bytes of `path` durable."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """Make the names in a folder durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder to be filled beside `path`; synced and renamed to it at the end, removed where that does not come.

    Raises ConfigError where something is there already. What others were killed in the middle of is removed first.
    """
    require_nothing_at(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_left_behind(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.writing")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        for inside in (*(folder for folder in temporary.rglob("*") if folder.is_dir()), temporary):
            sync_folder(inside)
        os.rename(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    sync_folder(path.parent)


def require_nothing_at(path: Path) -> None:
    """Raises ConfigError where `path` is anything but an empty folder or nothing."""
    if path.is_dir() and not any(path.iterdir()):
        return
    if path.exists() or path.is_symlink():
        raise ConfigError(f"{path} is there already and is not an empty folder: name another, or remove it first")


def _remove_left_behind(path: Path) -> None:
    import psutil

    for left in path.parent.glob(f".{glob.escape(path.name)}.*.writing"):
        pid = left.name.split(".")[-2]
        if pid.isdigit() and not psutil.pid_exists(int(pid)):
            shutil.rmtree(left, ignore_errors=True)
