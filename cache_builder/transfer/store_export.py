"""`cache-store export`: a store as Parquet shards in a folder or in a bucket, while others go on using it.

plan -> for each shard: digest, is it there? -> read and verify frames | write them -> manifests -> export.json

A shard's name is its content, so whoever runs the same command again after a kill finds what is whole and writes the
rest. Nothing that is there is changed before export.json is replaced, and nothing is ever deleted.
"""

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cache_builder.in_child import require_readable
from cache_builder.places import Place, open_place
from cache_builder.transfer.listing import ListedManifest, ListedShard, Listing, listed, shard_name, write_listing
from cache_builder.transfer.plan import SHARD_BYTES, Plan, plan_export
from cache_builder.transfer.shard_writer import Bytes, Group, writing_shard
from cache_builder.transfer.shards import GROUP_ROWS, Row, ShardReader, row_groups, shard_digest
from shared.ahead import Ahead, Dealt
from shared.errors import ConfigError, DataError, RecordCorrupt, StoreFormat
from shared.manifest import Manifest
from shared.manifest_shelf import Sealed, sealed_manifests
from shared.progress import progress
from shared.record import verify_frame
from shared.store import StoreReader
from shared.store_card import read_card

SHARDS_AT_ONCE = 4


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
            shards = _export_shards(reader, place, plan, report, advance)
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


def _export_shards(
    reader: StoreReader, place: Place, plan: Plan, report: ExportReport, advance: Callable[[int], object]
) -> list[ListedShard]:
    """All shards, several at once: one is encoded while another waits for the disk or a server."""
    todo = Dealt(enumerate(plan.shards()))
    found: dict[int, ListedShard] = {}
    done_bytes = 0
    threads = (_export_some(reader, place, todo) for _ in range(SHARDS_AT_ONCE))
    with Ahead(*threads, count=SHARDS_AT_ONCE) as steps:
        for step in steps:
            if step.shard:
                found[step.number] = step.shard
                report.shards_kept += step.is_kept
            advance((done_bytes + step.bytes >> 20) - (done_bytes >> 20))
            done_bytes += step.bytes
    return [found[number] for number in sorted(found)]


@dataclass(frozen=True)
class _Step:
    """A row group written, or a shard that is there now."""

    number: int
    bytes: int = 0
    shard: ListedShard | None = None
    is_kept: bool = False


def _export_some(
    reader: StoreReader, place: Place, todo: Iterable[tuple[int, tuple[list[bytes], list[int]]]]
) -> Iterator[_Step]:
    buffer = np.empty(0, np.uint8)  # kept from one row group to the next: fresh memory is half of the work
    for number, (keys, sizes) in todo:
        try:
            rows = _rows(reader, keys)
            digest = shard_digest(rows)
            name = shard_name(digest)
            if is_kept := _is_there(place, name, digest):
                yield _Step(number, bytes=sum(sizes))
            else:
                with place.writing(name) as file, writing_shard(file, rows) as shard:
                    for group in row_groups(sizes):
                        needed = sum(sizes[group])
                        if len(buffer) < needed:
                            buffer = np.empty(needed, np.uint8)
                        shard.write(_read_group(reader, keys[group], buffer))
                        yield _Step(number, bytes=needed)
            yield _Step(number, shard=listed(place, digest, len(keys)), is_kept=is_kept)
        except RecordCorrupt as error:
            raise StoreFormat(
                f"{reader.path} cannot be exported as a sound store: {error}; cache-store verify --quarantine sets bad "
                "records aside, and the same cache-build makes them anew"
            ) from None


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


def _read_group(reader: StoreReader, keys: Sequence[bytes], buffer: Bytes) -> Group:
    """Verified frames, copied into `buffer`: what is written is what was verified."""
    with reader.snapshot() as snapshot:
        ends = snapshot.raw_into(keys, buffer)
    group = Group(keys, ends, buffer)
    for key, frame in group.frames():
        verify_frame(key, frame)
    return group


def _export_manifest(place: Place, sealed: Sealed, manifest: Manifest) -> ListedManifest:
    seal = sealed.seal()
    found = ListedManifest(name=sealed.name, digest=sealed.digest, is_current=sealed.is_current, seal=seal)
    if place.size(found.file) != seal["bytes"]:
        place.write(found.file, manifest.path.read_bytes())
    return found
