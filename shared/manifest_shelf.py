"""All sealed manifests of a store, old ones too; how one comes from another store, and how one is dropped: by nobody
while somebody has it open.

A manifest is here with `<digest>.json`, or as NAME's current one. Garbage collection keeps whatever any of them names.
"""

import fcntl
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shared.atomic import sync_folder, write_atomically
from shared.errors import ConfigError, ManifestMismatch, StoreLocked
from shared.manifest import Manifest, manifest_folder, map_manifest, open_manifest
from shared.parts import Part, joined_parts, parse_part

_SEAL = re.compile(r"([0-9a-f]{64})\.json")


@dataclass(frozen=True)
class Sealed:
    """One sealed manifest, not opened yet."""

    store: Path
    name: str
    digest: str
    is_current: bool

    def open(self) -> Manifest:
        """Verify and map it; raises ManifestMismatch."""
        manifest = open_manifest(self.store, self.name, self.digest if self._has_seal() else None)
        if manifest.digest != self.digest:
            raise ManifestMismatch(f"manifest {self.name!r} has just been sealed anew; run the same command again")
        return manifest

    def seal_bytes(self) -> bytes:
        """The seal as it stands on disk; of a current manifest, current.json, which is enough to open it."""
        return (self.folder / (f"{self.digest}.json" if self._has_seal() else "current.json")).read_bytes()

    def seal(self) -> dict[str, Any]:
        """What the seal says."""
        return dict(json.loads(self.seal_bytes()))

    @property
    def label(self) -> str:
        """Name and short digest, for messages."""
        return f"{self.name} {self.digest[:16]}"

    @property
    def folder(self) -> Path:
        """Where its files are."""
        return self.store / "manifests" / self.name

    def _has_seal(self) -> bool:
        """A current one whose seal was lost can be opened by current.json, which is a copy of it."""
        return (self.folder / f"{self.digest}.json").exists()


def sealed_manifests(store: Path) -> list[Sealed]:
    """Every sealed manifest, by name, the current one first; raises ManifestMismatch where it cannot be told."""
    found: list[Sealed] = []
    for folder in sorted((store / "manifests").glob("*/")):
        current = _current(folder)
        digests: set[str] = {match[1] for path in folder.iterdir() if (match := _SEAL.fullmatch(path.name))}
        ordered = [*([current] if current else []), *sorted(digests - {current})]
        found += [Sealed(store, folder.name, digest, digest == current) for digest in ordered]
    return found


def find_sealed(store: Path, digest: str) -> list[Sealed]:
    """The manifests whose digest begins with `digest`, one for each name that has it; raises ConfigError."""
    found = [sealed for sealed in sealed_manifests(store) if sealed.digest.startswith(digest)]
    if len(digest) < 8 or not found:
        raise ConfigError(
            f"no manifest of digest {digest!r} (8 digits or more) in {store}; cache-store stats lists them"
        )
    if len({sealed.digest for sealed in found}) > 1:
        raise ConfigError(f"several manifests of {store} begin with {digest!r}: write more of it")
    return found


def drop_manifest(sealed: Sealed) -> None:
    """Remove a manifest, its name first, as the store's writer; raises StoreLocked while a process has it open."""
    folder = sealed.folder
    arrow = folder / f"{sealed.digest}.arrow"
    try:
        lock = os.open(arrow, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        lock = -1
    try:
        if lock >= 0:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        names = [*(["current.json"] if sealed.is_current else []), f"{sealed.digest}.json", arrow.name]
        for name in names:  # in this order, so that a kill leaves nothing that is named and not there
            (folder / name).unlink(missing_ok=True)
        sync_folder(folder)
    except BlockingIOError:
        raise StoreLocked(
            f"manifest {sealed.label} is open in another process, perhaps a run that trains on it: stop that first"
        ) from None
    finally:
        if lock >= 0:
            os.close(lock)


def stage_manifest(store: Path, name: str, arrow: bytes, seal: Mapping[str, Any]) -> Manifest:
    """Put the file of another store's manifest in place, not sealed yet, and open it; raises ManifestMismatch."""
    path = manifest_folder(store, name) / f"{seal['digest']}.arrow"
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        return map_manifest(name, path, seal)
    except ManifestMismatch:  # absent or damaged
        write_atomically(path, arrow)
        return map_manifest(name, path, seal)


def seal_staged(store: Path, staged: Manifest, seal: Mapping[str, Any], part: Part | None, *, is_current: bool) -> None:
    """Seal what was staged once its records are stored: all of them, or those of `part`. As the store's writer.

    It becomes the current one of its name where `is_current`, unless one that was sealed later is.
    """
    folder, digest = manifest_folder(store, staged.name), staged.digest
    path = folder / f"{digest}.json"
    had = _parts_there(path)
    parts = () if part is None or had == () else joined_parts([*(had or ()), part])
    bare = {key: value for key, value in seal.items() if key != "parts"}
    whole = bare | ({"parts": [str(each) for each in parts]} if parts else {})
    data = json.dumps(whole, indent=1).encode() + b"\n"
    write_atomically(path, data)
    if is_current and (_current(folder) in (None, digest) or not _is_later(folder, bare)):
        write_atomically(folder / "current.json", data)


def _parts_there(path: Path) -> tuple[Part, ...] | None:
    """Which parts a seal says are here, () for all; None where there is no seal."""
    try:
        return joined_parts(parse_part(part) for part in json.loads(path.read_text()).get("parts", ()))
    except FileNotFoundError:
        return None


def _is_later(folder: Path, seal: Mapping[str, Any]) -> bool:
    """Whether the current manifest of a name was sealed after `seal`; of one second the greater digest."""
    current = json.loads((folder / "current.json").read_text())
    mine, other = ((str(each.get("sealed_at", "")), str(each["digest"])) for each in (seal, current))
    return other > mine


def _current(folder: Path) -> str | None:
    path = folder / "current.json"
    try:
        digest = str(json.loads(path.read_text())["digest"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ManifestMismatch(f"{path} is damaged: {error}; build it again") from None
    if not _SEAL.fullmatch(f"{digest}.json"):
        raise ManifestMismatch(f"{path} is damaged: it names no digest; build it again")
    return digest
