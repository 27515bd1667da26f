"""`cache-store export`: a store as Parquet shards in a folder or in a bucket, while others go on using it.

plan -> for each shard: digest, is it there? -> read and verify frames | write them -> manifests -> export.json

A shard's name is its content, so whoever runs the same command again after a kill finds what is whole and writes the
rest. Nothing that is there is changed before export.json is replaced, and nothing is ever deleted.
"""

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cache_builder.in_child import require_readable
from cache_builder.places import Place, open_place
from cache_builder.transfer.listing import ListedManifest, ListedShard, Listing, listed, shard_name, write_listing
from cache_builder.transfer.plan import SHARD_BYTES, plan_export
from cache_builder.transfer.shards import GROUP_ROWS, Row, ShardReader, row_groups, shard_digest, write_shard
from shared.ahead import Ahead
from shared.errors import ConfigError, DataError, RecordCorrupt, StoreFormat
from shared.manifest import Manifest
from shared.manifest_shelf import Sealed, sealed_manifests
from shared.progress import progress
from shared.record import verify_frame
from shared.store import StoreReader
from shared.store_card import read_card

GROUPS_AHEAD = 2


@dataclass
class ExportReport:
    """What an export holds, and how much of it had to be written."""

    store: str
    to: str
    records: int = 0
    bytes: int = 0
    shards: int = 0
    shards_kept: int = 0
    """Those that were there already."""
    manifests: int = 0
    seconds: float = 0.0

    def as_json(self) -> dict[str, Any]:
        """The report for programs."""
        return asdict(self)


def export_store(
    path: Path, address: str, *, manifest: str | None = None, shard_bytes: int = SHARD_BYTES
) -> ExportReport:
    """Export the store at `path` to `address`: all of it, or the current manifest of a name with what it needs.

    Raises StoreMissing, StoreFormat where the store is not sound, ConfigError for an address or a name that cannot be
    meant, StoreIO or StoreFull where it cannot be written: what is there stays, and the same command goes on.
    """
    started_s = time.monotonic()
    with contextlib.closing(StoreReader(path)) as reader:
        require_readable(reader)
        place = open_place(address)
        sealed = _chosen(path, manifest)
        manifests = [each.open() for each in sealed]  # held open, so that nobody drops them meanwhile
        for each in manifests:
            _require_whole(each)
        plan = plan_export(reader, manifests, named_only=manifest is not None, shard_bytes=shard_bytes)
        report = ExportReport(str(path), address, manifests=len(manifests), records=len(plan.keys))
        with progress("export", int(plan.sizes.sum()) >> 20, "MiB") as advance:
            shards = []
            for keys, sizes in plan.shards():
                shards.append(_export_shard(reader, place, keys, sizes, report))
                advance(sum(sizes) >> 20)
        listed = [_export_manifest(place, *item) for item in zip(sealed, manifests, strict=True)]
        card = {key: value for key, value in read_card(path).items() if key != "format"}
        write_listing(place, Listing(card=card, records=len(plan.keys), shards=tuple(shards), manifests=tuple(listed)))
    report.shards, report.bytes = len(shards), sum(shard.bytes for shard in shards)
    report.seconds = round(time.monotonic() - started_s, 3)
    return report


def _chosen(path: Path, manifest: str | None) -> list[Sealed]:
    found = sealed_manifests(path)
    if manifest is None:
        return found
    chosen = [sealed for sealed in found if sealed.name == manifest and sealed.is_current]
    if not chosen:
        known = sorted({sealed.name for sealed in found})
        raise ConfigError(f"no manifest {manifest!r} in {path}; there are: {', '.join(known) or 'none'}")
    return chosen


def _require_whole(manifest: Manifest) -> None:
    if manifest.parts:
        here = ", ".join(map(str, manifest.parts))
        raise ConfigError(
            f"manifest {manifest.name!r} is only in part in this store ({here}): export it from the store that has all"
        )


def _export_shard(
    reader: StoreReader, place: Place, keys: list[bytes], sizes: Sequence[int], report: ExportReport
) -> ListedShard:
    rows = _rows(reader, keys)
    digest = shard_digest(rows)
    name = shard_name(digest)
    if _is_there(place, name, digest):
        report.shards_kept += 1
    else:
        try:
            with Ahead(_read_groups(reader, keys, sizes), count=GROUPS_AHEAD) as groups, place.writing(name) as file:
                write_shard(file, rows, groups)
        except RecordCorrupt as error:
            raise StoreFormat(
                f"{reader.path} cannot be exported as a sound store: {error}; cache-store verify --quarantine sets bad "
                "records aside, and the same cache-build makes them anew"
            ) from None
    return listed(place, digest, len(keys))


def _rows(reader: StoreReader, keys: list[bytes]) -> list[Row]:
    rows: list[Row] = []
    for start in range(0, len(keys), GROUP_ROWS):
        some = keys[start : start + GROUP_ROWS]
        with reader.snapshot() as snapshot:
            rows += zip(some, snapshot.checksums(some), strict=True)
    return rows


def _is_there(place: Place, name: str, digest: str) -> bool:
    """Whether a shard is there with its digest; its frames are verified by whoever reads them."""
    if place.size(name) is None:
        return False
    try:
        with ShardReader(place, name, digest):
            return True
    except DataError:
        return False


def _read_groups(
    reader: StoreReader, keys: Sequence[bytes], sizes: Sequence[int]
) -> Iterator[list[tuple[bytes, bytes]]]:
    """Verified frames, as many at once as make a row group."""
    for group in row_groups(sizes):
        with reader.snapshot() as snapshot:
            frames = [(key, snapshot.raw(key)) for key in keys[group]]
        for key, frame in frames:
            verify_frame(key, frame)
        yield frames


def _export_manifest(place: Place, sealed: Sealed, manifest: Manifest) -> ListedManifest:
    seal = sealed.seal()
    found = ListedManifest(name=sealed.name, digest=sealed.digest, is_current=sealed.is_current, seal=seal)
    if place.size(found.file) != seal["bytes"]:
        place.write(found.file, manifest.path.read_bytes())
    return found
