"""`cache-store import`: an export, or one part of it, into a store; killed at any time, the same command goes on.

export.json -> manifests, staged -> which records are wanted and not there -> shards: keys, then the row groups that
hold any -> each frame verified -> committed -> manifests sealed

Records are put under their content keys where there is none, so imports may overlap, come in any order and be repeated.
"""

import itertools
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cache_builder.in_child import require_readable
from cache_builder.key_arrays import Keys, as_keys, each, is_in, stored
from cache_builder.named import facts_keys, latent_keys, text_keys, union
from cache_builder.places import Place, open_place
from cache_builder.transfer.listing import ListedManifest, ListedShard, Listing, read_listing
from cache_builder.transfer.shards import GROUP_BYTES, Frame, ShardReader
from shared.ahead import Ahead, Dealt
from shared.errors import ConfigError, DataError, ManifestMismatch
from shared.manifest import Manifest, check_data_sets
from shared.manifest_shelf import seal_staged, stage_manifest
from shared.parts import Part
from shared.progress import progress
from shared.room import require_room
from shared.store import StoreReader, StoreWriter
from shared.store_card import read_card, refuse_foreign_folder, write_card

COMMIT_BYTES = 64 << 20  # a commit waits for the disk twice, however much it writes
GROUPS_AHEAD = COMMIT_BYTES // GROUP_BYTES  # read and verified while a commit goes on
READERS, BUCKET_READERS = 2, 4  # shards that are read at once: a server takes its time to answer
MAX_MANIFEST_BYTES = 64 << 30


@dataclass
class ImportReport:
    """What was asked for, and how much of it had to be stored."""

    source: str
    store: str
    part: str
    """Which part of the samples, i/n; "" for all."""
    records: int = 0
    """Those that were wanted."""
    new: int = 0
    bytes: int = 0
    """Of the new ones."""
    shards: int = 0
    shards_read: int = 0
    """Those that had a record that was wanted and not there."""
    manifests: int = 0
    seconds: float = 0.0

    def as_json(self) -> dict[str, Any]:
        """The report for programs."""
        return asdict(self)


def import_store(
    address: str,
    store: Path,
    *,
    part: Part | None = None,
    manifest: str | None = None,
    replace: bool = False,
    wait: bool = False,
) -> ImportReport:
    """Import the export at `address` into `store`, made where absent: all, one manifest's or one part's records.

    Raises StoreMissing or DataError where the export is not there, not whole, or not what it says; ManifestMismatch
    where a manifest's name is of other data sets here, unless `replace`; StoreLocked, StoreFull and StoreIO as a build.
    What is stored stays, and the same command goes on.
    """
    started_s = time.monotonic()
    if store.exists():
        refuse_foreign_folder(store)
    if (store / "store.json").exists():
        with StoreReader(store) as reader:
            require_readable(reader)
    place = open_place(address)
    listing = read_listing(place)
    chosen = _chosen(listing, address, manifest, part)
    with StoreWriter(store, wait=wait) as writer:
        staged = [_stage(store, place, listed) for listed in chosen]
        for listed, one in zip(chosen, staged, strict=True):
            check_data_sets(store, listed.name, one.settings.datasets, replace=replace or not listed.is_current)
        wanted = None if manifest is None and part is None else union(_wanted(one, part) for one in staged)
        report = ImportReport(address, str(store), str(part or ""), shards=len(listing.shards))
        report.records = listing.records if wanted is None else len(wanted)
        _import_records(writer, place, listing, wanted, report)
        for listed, one in zip(chosen, staged, strict=True):
            _require_all(writer, one, part, address)
            seal_staged(store, one, listed.seal, part, is_current=listed.is_current)
        _merge_card(store, listing.card)
    report.manifests = len(staged)
    report.seconds = round(time.monotonic() - started_s, 3)
    return report


def _chosen(listing: Listing, address: str, name: str | None, part: Part | None) -> list[ListedManifest]:
    known = sorted({listed.name for listed in listing.manifests})
    if name is not None and name not in known:
        raise ConfigError(f"no manifest {name!r} in {address}; there are: {', '.join(known) or 'none'}")
    if part is not None and not known:
        raise ConfigError(f"{address} holds no manifest, so nothing says which part of it a record belongs to")
    return [listed for listed in listing.manifests if name is None or (listed.name == name and listed.is_current)]


def _stage(store: Path, place: Place, listed: ListedManifest) -> Manifest:
    size = place.size(listed.file)
    if size is None or size != listed.seal.get("bytes"):
        raise DataError(
            f"{place.label(listed.file)} has {size} bytes, not {listed.seal.get('bytes')}: run the same cache-store "
            "export again"
        )
    try:
        return stage_manifest(store, listed.name, place.read(listed.file, MAX_MANIFEST_BYTES), listed.seal)
    except ManifestMismatch:
        raise DataError(
            f"{place.label(listed.file)} is damaged: remove it and run the same cache-store export again"
        ) from None


def _wanted(manifest: Manifest, part: Part | None) -> Keys:
    rows = None if part is None else manifest.rows_in([part])
    return union(keys(manifest, rows) for keys in (latent_keys, text_keys, facts_keys))


def _import_records(
    writer: StoreWriter, place: Place, listing: Listing, wanted: Keys | None, report: ImportReport
) -> None:
    """Every record that is wanted and not there."""
    _check_room(writer, listing, wanted)
    todo, count = Dealt(listing.shards), READERS if place.is_local else BUCKET_READERS
    readers = [_read_shards(writer, place, todo, wanted) for _ in range(count)]
    waiting: list[Frame] = []
    with progress("import", report.records, "records") as advance, Ahead(*readers, count=GROUPS_AHEAD) as ready:
        for passed, frames, is_shard_read in ready:
            waiting += frames
            advance(passed + len(frames))
            report.shards_read += is_shard_read
            if sum(len(frame) for _, frame in waiting) >= COMMIT_BYTES:
                _commit(writer, waiting, report)
        _commit(writer, waiting, report)


def _commit(writer: StoreWriter, waiting: list[Frame], report: ImportReport) -> None:
    if waiting:
        waiting.sort()
        report.new += writer.put_many(waiting, cached=False)
        report.bytes += sum(len(frame) for _, frame in waiting)
        waiting.clear()


def _read_shards(
    writer: StoreWriter, place: Place, todo: Iterable[ListedShard], wanted: Keys | None
) -> Iterator[tuple[int, list[Frame], bool]]:
    """Of each row group how many records were there already, and the frames of those that are missing; then whether
    any of the shard's was."""
    for listed in todo:
        size = place.size(listed.name)
        if size != listed.bytes:
            there = "is not there" if size is None else f"has {size} bytes, not {listed.bytes}"
            raise DataError(f"{place.label(listed.name)} {there}: run the same cache-store export again")
        with ShardReader(place, listed.name, listed.digest) as shard:
            is_read = False
            for group, rows in enumerate(shard.groups()):
                keys = [key for key, _ in rows]
                mine = keys if wanted is None else list(itertools.compress(keys, is_in(as_keys(keys), wanted)))
                missing = {*each(as_keys(mine)[~stored(writer, as_keys(mine))])}
                frames = [frame for frame in shard.frames(group) if frame[0] in missing] if missing else []
                is_read |= bool(missing)
                yield len(mine) - len(missing), frames, False
        yield 0, [], is_read


def _check_room(writer: StoreWriter, listing: Listing, wanted: Keys | None) -> None:
    """As much as the records that are missing take if each is as large as the mean."""
    missing = max(0, listing.records - writer.count()) if wanted is None else int((~stored(writer, wanted)).sum())
    mean_bytes = sum(shard.bytes for shard in listing.shards) / max(1, listing.records)
    require_room(writer.path, int(missing * mean_bytes), "what is imported")


def _require_all(writer: StoreWriter, manifest: Manifest, part: Part | None, address: str) -> None:
    """Nothing is sealed that could not be trained on."""
    rows = None if part is None else manifest.rows_in([part])
    for named in (latent_keys(manifest, rows), text_keys(manifest, rows)):
        if not stored(writer, named).all():
            raise DataError(
                f"{address} does not hold every record that manifest {manifest.name!r} needs: run the same cache-store "
                "export again"
            )


def _merge_card(store: Path, card: dict[str, Any]) -> None:
    """Previews that the store does not have; other keys are of formats that this program does not know."""
    here = read_card(store)
    previews, foreign = here.get("previews", {}), card.get("previews", {})
    if isinstance(foreign, dict) and foreign.keys() - previews.keys():
        write_card(store, here | {"previews": foreign | previews})
