"""Garbage collection: `cache-store gc` deletes the records that no sealed manifest of the store names.

What is named stays, by old manifests too, and so do the facts of named pictures and captions. Manifests go only when
they are named (--drop), and never while a process has one open: a run that trains on it has (shared/manifest.py).
So nothing that a trainer may read is ever deleted. A build holds the writer's lease, which this takes.
"""

import contextlib
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from cache_builder.in_child import require_readable
from cache_builder.key_arrays import Keys, as_keys, is_in
from cache_builder.named import facts_keys, latent_keys, text_keys, union
from shared.errors import ConfigError, StoreBusy
from shared.manifest_shelf import Sealed, drop_manifest, find_sealed, sealed_manifests
from shared.progress import progress
from shared.store import Store, StoreReader, StoreWriter

KEYS_AT_ONCE = 1024  # deleted in one commit
READERS_WAIT_S = 10.0  # trainers read a batch in milliseconds; who reads for longer hangs
POLL_S = 0.01


@dataclass
class GcReport:
    """What went, or would go, and what stays."""

    dry_run: bool
    records: int = 0
    bytes: int = 0
    kept_records: int = 0
    kept_manifests: list[str] = field(default_factory=list)
    dropped_manifests: list[str] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """The report for programs."""
        return asdict(self)


def collect_garbage(
    path: Path, *, dry_run: bool = False, drop: Sequence[str] = (), even_current: bool = False
) -> GcReport:
    """Delete what no manifest names, after dropping the manifests of digests `drop`; `dry_run` only counts.

    Raises ConfigError where a digest is unknown, is a name's current one without `even_current`, or nothing would stay;
    ManifestMismatch where any manifest cannot be read, for then nobody knows what it names; StoreLocked while a build
    writes or a process has a dropped manifest open; StoreBusy while one stays in a read transaction.
    """
    with contextlib.closing(StoreReader(path)) as reader:  # never makes a store
        source: Store = reader if dry_run else StoreWriter(path)
        with contextlib.closing(source):
            require_readable(source)
            going = [sealed for digest in dict.fromkeys(drop) for sealed in find_sealed(path, digest)]
            _require_said(going, even_current)
            staying = [sealed for sealed in sealed_manifests(path) if sealed not in going]
            if not staying and not going:
                raise ConfigError(
                    f"{path} has no manifest, so every record would go: let the build complete (the same cache-build "
                    "command goes on), or remove the folder"
                )
            named = union(keys for sealed in staying for keys in _named(sealed))
            report = GcReport(dry_run, kept_manifests=[sealed.label for sealed in staying])
            report.dropped_manifests = [sealed.label for sealed in going]
            garbage = _unnamed(source, named, report)
            if isinstance(source, StoreWriter):
                _wait_for_readers(source)
                for sealed in going:
                    drop_manifest(sealed)  # before its records: a kill leaves none that names what is gone
                _delete(source, garbage)
    return report


def _require_said(going: Sequence[Sealed], even_current: bool) -> None:
    for sealed in going:
        if sealed.is_current and not even_current:
            raise ConfigError(
                f"manifest {sealed.label} is the current one of {sealed.name!r}: new runs begin with it. If it is to "
                "go all the same, --even-current"
            )


def _named(sealed: Sealed) -> tuple[Keys, Keys, Keys]:
    manifest = sealed.open()
    return latent_keys(manifest), text_keys(manifest), facts_keys(manifest)


def _unnamed(source: Store, named: Keys, report: GcReport) -> list[bytes]:
    garbage: list[bytes] = []
    for page in source.sizes():
        odd = [item for item in page if len(item[0]) != 16]  # no key of ours: verify's business
        page = [item for item in page if len(item[0]) == 16]
        stays = is_in(as_keys([key for key, _ in page]), named)
        report.kept_records += int(stays.sum()) + len(odd)
        for (key, size_bytes), is_named in zip(page, stays, strict=True):
            if not is_named:
                garbage.append(key)
                report.bytes += size_bytes
    report.records = len(garbage)
    return garbage


def _delete(writer: StoreWriter, garbage: list[bytes]) -> None:
    with progress("garbage", len(garbage), "records") as advance:
        for start in range(0, len(garbage), KEYS_AT_ONCE):
            _wait_for_readers(writer)
            advance(writer.delete_many(garbage[start : start + KEYS_AT_ONCE]))


def _wait_for_readers(writer: StoreWriter) -> None:
    """Wait for a moment in which nobody reads: pages that a reader still sees are not free, and the file would grow."""
    end_s = time.monotonic() + READERS_WAIT_S
    while readers := writer.readers():
        if time.monotonic() > end_s:
            pids = ", ".join(map(str, readers))
            raise StoreBusy(f"{writer.path} is being read by pid {pids} without a pause: stop that, or try again later")
        time.sleep(POLL_S)
