"""Which old manifests the service keeps: the newest of its name, pinned ones, and those that run folders name.

A manifest that a process has open is never dropped (shared/manifest_shelf.py); a later build asks again. Records stay
until `cache-store gc`, and manifests of other names are nobody's business here.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from shared.errors import ManifestMismatch, StoreLocked
from shared.manifest_shelf import Sealed, drop_manifest, sealed_manifests
from shared.store import StoreWriter


@dataclass(frozen=True)
class KeepRules:
    """What stays."""

    keep: Literal["all"] | int = "all"
    """How many of the name, the current one among them."""
    pinned: tuple[str, ...] = ()
    """Beginnings of digests."""
    runs: tuple[Path, ...] = ()
    """Run folders; one that does not exist yet names nothing."""
    runs_under: Path | None = None
    """Folder whose run folders count among them."""


@dataclass
class Kept:
    """What stayed, newest first, and what went; `remarks` say in a line each why something could not go."""

    kept: list[str] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)


def drop_old_manifests(store: Path, name: str, rules: KeepRules) -> Kept:
    """Drop the manifests of `name` that nothing keeps, as the store's writer; none while another one writes."""
    result = Kept()
    try:
        own = _newest_first([sealed for sealed in sealed_manifests(store) if sealed.name == name])
        named = set[str]().union(*(_named_by(run) for run in _run_folders(rules)))
    except ManifestMismatch as error:
        result.remarks.append(f"no old manifest was dropped: {error}")
        return result
    result.kept = [sealed.digest for sealed in own]
    newest = own if rules.keep == "all" else own[: rules.keep]
    going = [sealed for sealed in own if sealed not in newest and not _stays(sealed.digest, named, rules.pinned)]
    if not going:
        return result
    try:
        with StoreWriter(store):
            for sealed in going:
                _drop(sealed, result)
    except StoreLocked as error:
        result.remarks.append(f"no old manifest was dropped for now: {error}")
    return result


def _drop(sealed: Sealed, result: Kept) -> None:
    try:
        drop_manifest(sealed)
    except StoreLocked as error:
        result.remarks.append(f"kept for now: {error}")
    else:
        result.kept.remove(sealed.digest)
        result.dropped.append(sealed.digest)


def _stays(digest: str, named: set[str], pinned: Sequence[str]) -> bool:
    return digest in named or any(digest.startswith(beginning) for beginning in pinned)


def _newest_first(manifests: Sequence[Sealed]) -> list[Sealed]:
    return sorted(manifests, key=lambda sealed: (sealed.is_current, *_age(sealed)), reverse=True)


def _age(sealed: Sealed) -> tuple[str, int]:
    """When it was sealed, to the second as it says itself, and within that second as its file says."""
    path = sealed.folder / f"{sealed.digest}.json"
    try:
        return str(json.loads(path.read_text()).get("sealed_at", "")), path.stat().st_mtime_ns
    except (OSError, ValueError, AttributeError):
        return "", 0


def _run_folders(rules: KeepRules) -> list[Path]:
    below = rules.runs_under.glob("*/expert.json") if rules.runs_under else ()
    return [*rules.runs, *(card.parent for card in below)]


def _named_by(run: Path) -> set[str]:
    """Digests of the manifests that a run was trained on; raises ManifestMismatch where it does not tell."""
    path = run / "expert.json"
    try:
        return {str(use["digest"]) for use in json.loads(path.read_text())["facts"]["manifests"]}
    except FileNotFoundError:
        return set()
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ManifestMismatch(f"{path} does not say what {run} trains on ({error!r})") from None
