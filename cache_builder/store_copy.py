"""`cache-store copy`: a store of its own at a new place, compact and verified, then renamed there whole.

The copy is LMDB's own, of one moment; a file copy of a live store would be torn. Builds and trainers go on meanwhile.
"""

import contextlib
import os
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cache_builder.in_child import in_child
from cache_builder.verify import verify_store
from shared.atomic import sync_folder, write_atomically
from shared.errors import ConfigError, StoreFormat, StoreFull
from shared.manifest_shelf import sealed_manifests
from shared.store import StoreReader, free_bytes
from shared.store_card import read_card, write_card


@dataclass
class CopyReport:
    """What was copied."""

    store: str
    copy: str
    records: int
    manifests: int
    bytes_before: int
    bytes_after: int
    seconds: float

    def as_json(self) -> dict[str, Any]:
        """The report for programs."""
        return asdict(self)


def copy_store(path: Path, to: Path) -> CopyReport:
    """Copy the store at `path` to the new folder `to`; whole there, or not at all.

    Raises ConfigError where `to` is taken, StoreFull where it has no room, StoreFormat where the copy is not sound.
    """
    started_s = time.monotonic()
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise ConfigError(f"{to} is there already: name a new folder with --to")
    to.parent.mkdir(parents=True, exist_ok=True)
    building = to.with_name(f".{to.name}.{os.getpid()}.tmp")
    with contextlib.closing(StoreReader(path)) as reader:
        _check_room(reader, to)
        building.mkdir()
        try:
            _fill(reader, building)
            verdict = verify_store(building, deep=True)
            if verdict.faults:
                raise StoreFormat(
                    f"{path} cannot be copied as a sound store: {verdict.faults[0].why} "
                    f"({len(verdict.faults)} faults); "
                    "cache-store verify --deep lists them, --quarantine sets bad records aside"
                )
            os.rename(building, to)
            sync_folder(to.parent)
        finally:
            shutil.rmtree(building, ignore_errors=True)
    sizes = [(folder / "data.mdb").stat().st_size for folder in (path, to)]
    seconds = round(time.monotonic() - started_s, 3)
    return CopyReport(str(path), str(to), verdict.records, verdict.manifests, sizes[0], sizes[1], seconds)


def _check_room(reader: StoreReader, to: Path) -> None:
    needed, free = reader.used_bytes(), free_bytes(to.parent)
    if needed > free:
        raise StoreFull(f"{to}: the copy will take {needed >> 20} MiB and {free >> 20} are free; free some space first")


def _fill(reader: StoreReader, building: Path) -> None:
    """Manifests first, then records: what a manifest names was stored before it was sealed."""
    write_card(building, read_card(reader.path))
    for sealed in sealed_manifests(reader.path):
        folder = building / "manifests" / sealed.name
        folder.mkdir(parents=True, exist_ok=True)
        manifest = sealed.open()
        write_atomically(folder / f"{sealed.digest}.arrow", manifest.path.read_bytes())
        seal = sealed.seal_bytes()
        write_atomically(folder / f"{sealed.digest}.json", seal)
        if sealed.is_current:
            write_atomically(folder / "current.json", seal)
    reader.close_environment()
    in_child(reader.path, lambda: reader.copy_to(building))
