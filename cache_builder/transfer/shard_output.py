"""`cache-build --output shards`: the workers of a cluster write records into shards, and export.json lists them last.

    before    which shards are whole, and which records are in them -> what is missing
    worker    records of a chunk -> one shard, named by what is in it -> its row in the listing
    after     manifest -> export.json, as an export has it: `cache-store import` takes it in

A shard that nobody lists does not count, whoever wrote it: a chunk may be encoded twice.
"""

import json
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from cache_builder.encode import Framed
from cache_builder.key_arrays import Keys, as_keys
from cache_builder.places import Place, open_place
from cache_builder.transfer.listing import (
    FILE,
    ListedManifest,
    ListedShard,
    Listing,
    listed,
    read_listing,
    shard_name,
    write_listing,
)
from cache_builder.transfer.shard_writer import joined, writing_shard
from cache_builder.transfer.shards import ShardReader, row_groups, shard_digest
from shared.errors import ConfigError, DataError
from shared.manifest import Manifest
from shared.progress import say
from shared.record import frame_checksum
from shared.store_card import read_card

LOOKED_AT_ONCE = 32  # shards whose keys are read together: a server takes its time to answer


def write_records(place: Place, records: Sequence[Framed]) -> ListedShard:
    """One shard of `records`, sorted by key; one that is there under its name already is written again as it was."""
    ordered = sorted(records)
    rows = [(key, frame_checksum(frame)) for key, frame in ordered]
    digest = shard_digest(rows)
    with place.writing(shard_name(digest)) as file, writing_shard(file, rows) as shard:
        for group in row_groups([len(frame) for _, frame in ordered]):
            shard.write(joined(ordered[group]))
    return listed(place, digest, len(rows))


class ShardOutput:
    """What an address holds, and what a build adds to it."""

    def __init__(self, address: str) -> None:
        """Look at every shard there; those that are not whole, or not what their name says, are passed over."""
        self._place = open_place(address)
        self.address = self._place.everywhere
        self._shards: dict[str, ListedShard] = {}
        self._broken: set[str] = set()
        self.keys: Keys = as_keys([])
        """Of all records there as the build begins, sorted."""
        self._look()

    def add(self, row: dict[str, Any]) -> None:
        """List a shard that a worker has written; raises ConfigError where it is not seen here."""
        shard = ListedShard.model_validate(row)
        if self._place.size(shard.name) != shard.bytes:
            raise ConfigError(
                f"--to {self.address}: a worker has written {shard.name} there, and this machine does not see it: name "
                "a bucket, or a folder that all machines share"
            )
        self._shards[shard.digest] = shard

    def finish(self, store: Path, name: str, seal: Callable[[Path], Manifest]) -> str:
        """Put the manifest that `seal` makes in a folder, and then the listing, in force; returns its digest."""
        before = read_listing(self._place) if self._place.size(FILE) is not None else None
        with tempfile.TemporaryDirectory(dir=store, prefix=".sealing-") as folder:
            manifest = seal(Path(folder))
            told = json.loads(manifest.path.with_suffix(".json").read_bytes())
            sealed = ListedManifest(name=name, digest=manifest.digest, is_current=True, seal=told)
            self._place.write(sealed.file, manifest.path.read_bytes())
        others = [
            other.model_copy(update={"is_current": other.is_current and other.name != name})
            for other in (before.manifests if before else ())
            if (other.name, other.digest) != (name, sealed.digest)
        ]
        for shard in before.shards if before else ():  # of another build too, that ended in the meantime
            if shard.name not in self._broken:
                self._shards.setdefault(shard.digest, shard)
        shards = tuple(sorted(self._shards.values(), key=lambda shard: shard.digest))
        card = {key: value for key, value in read_card(store).items() if key != "format"}
        records = sum(shard.records for shard in shards)
        write_listing(self._place, Listing(card=card, records=records, shards=shards, manifests=(*others, sealed)))
        return sealed.digest

    def _look(self) -> None:
        if self._place.kind("shards") != "folder":
            return
        names = sorted(entry.name for entry in self._place.entries("shards") if entry.name.endswith(".parquet"))
        known: set[bytes] = set()
        with ThreadPoolExecutor(LOOKED_AT_ONCE) as pool:
            for name, found in zip(names, pool.map(self._whole, names), strict=True):
                if found is None:
                    self._broken.add(f"shards/{name}")
                elif not known.issuperset(found[1]):  # else what a second try has made
                    self._shards[found[0].digest] = found[0]
                    known.update(found[1])
        self.keys = np.sort(as_keys(known))
        say(f"{self._place.address} holds {len(self._shards)} whole shards, {len(known)} records")

    def _whole(self, name: str) -> tuple[ListedShard, list[bytes]] | None:
        path = f"shards/{name}"
        try:
            with ShardReader(self._place, path, None) as shard:
                size = self._place.size(path)
                if size is None or shard_name(shard.digest) != path:
                    return None
                keys = [key for key, _ in shard.rows]
                return ListedShard(digest=shard.digest, records=len(keys), bytes=size), keys
        except DataError:
            return None
