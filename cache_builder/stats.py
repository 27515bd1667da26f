"""What is in a store: `cache-store stats`. Records by kind, captions and how often each is used, buckets, manifests.

What a record is, its manifest says; only what no manifest names is read to find out.
"""

import contextlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from cache_builder.in_child import require_readable
from cache_builder.key_arrays import Keys, as_keys, each, is_in
from cache_builder.keys import text_facts_key
from cache_builder.named import facts_keys, latent_keys, text_keys, union
from shared.conditioning import TEXT_LENGTH
from shared.errors import RecordCorrupt
from shared.manifest import Manifest
from shared.manifest_shelf import Sealed, sealed_manifests
from shared.snapshot import Snapshot
from shared.store import StoreReader
from shared.store_card import read_card

UNNAMED = "unnamed "  # before the kind of records that no manifest names
FACTS_AT_ONCE = 1024  # read in one transaction
WORD_TOKENS = TEXT_LENGTH - 2  # of a stretch, without its start and end marks


@dataclass
class Tally:
    """How many, and how many bytes."""

    records: int = 0
    bytes: int = 0

    def add(self, size_bytes: int) -> None:
        """One more."""
        self.records += 1
        self.bytes += size_bytes


@dataclass
class ManifestStats:
    """One sealed manifest."""

    name: str
    digest: str
    is_current: bool
    sealed_at: str
    datasets: list[str]
    samples: dict[str, int] = field(default_factory=dict)
    """Samples by split."""
    crops: int = 0
    captions: int = 0
    different_captions: int = 0
    buckets: dict[str, dict[str, int]] = field(default_factory=dict)
    """Samples by split, by bucket ("H x W", pixels)."""


@dataclass
class StoreStats:
    """Everything that `cache-store stats` tells."""

    store: str
    file_bytes: int
    used_bytes: int
    record_bytes: int = 0
    kinds: dict[str, Tally] = field(default_factory=dict)
    manifests: list[ManifestStats] = field(default_factory=list)
    captions: int = 0
    different_captions: int = 0
    truncated_captions: int = 0
    caption_tokens: int = 0
    """Tokens that were encoded, of all texts that manifests name."""
    caption_slots: int = 0
    """Tokens that the embeds of those captions have room for: what they do not fill is padding."""
    previews: list[str] = field(default_factory=list)
    """Digests of the VAEs whose latents can be shown without them."""
    quarantined: int = 0

    def as_json(self) -> dict[str, Any]:
        """The figures for programs."""
        return asdict(self)


def store_stats(path: Path) -> StoreStats:
    """Count what is there; raises StoreMissing, StoreFormat or ManifestMismatch where that cannot be told."""
    with contextlib.closing(StoreReader(path)) as reader:
        require_readable(reader)
        stats = StoreStats(str(path), (path / "data.mdb").stat().st_size, reader.used_bytes())
        stats.previews = sorted(read_card(path).get("previews", {}))
        stats.quarantined = len(list((path / "quarantine").glob("*.record")))
        opened = [(sealed, sealed.open()) for sealed in sealed_manifests(path)]
        stats.manifests = [_manifest_stats(*item) for item in opened]
        manifests = [manifest for _, manifest in opened]
        by_kind = {
            "latents": union(latent_keys(manifest) for manifest in manifests),
            "texts": union(text_keys(manifest) for manifest in manifests),
            "facts": union(facts_keys(manifest) for manifest in manifests),
        }
        _tally(reader, by_kind, stats)
        _tally_captions(reader, opened, stats)
    return stats


def _manifest_stats(sealed: Sealed, manifest: Manifest) -> ManifestStats:
    seal = json.loads(sealed.seal_bytes())
    stats = ManifestStats(
        sealed.name,
        sealed.digest,
        sealed.is_current,
        str(seal.get("sealed_at", "")),
        list(manifest.settings.datasets),
    )
    texts = manifest.text_keys()
    stats.crops, stats.captions, stats.different_captions = len(manifest.latent_keys()), len(texts), len(set(texts))
    for split in ("train", "eval"):
        buckets = manifest.buckets(split)
        stats.samples[split] = sum(len(bucket.rows) for bucket in buckets)
        for bucket in buckets:
            label = f"{bucket.hw[0]} x {bucket.hw[1]}"
            stats.buckets.setdefault(label, {"train": 0, "eval": 0})[split] = len(bucket.rows)
    return stats


def _tally(reader: StoreReader, by_kind: dict[str, Keys], stats: StoreStats) -> None:
    tallies: dict[str, Tally] = {kind: Tally() for kind in by_kind}
    for page in reader.sizes():
        page = [(key if len(key) == 16 else bytes(16), size_bytes) for key, size_bytes in page]
        keys, sizes = as_keys([key for key, _ in page]), np.array([size_bytes for _, size_bytes in page])
        unnamed = np.ones(len(page), bool)
        for kind, known in by_kind.items():
            of_kind = is_in(keys, known) & unnamed
            unnamed &= ~of_kind
            tallies[kind].records += int(of_kind.sum())
            tallies[kind].bytes += int(sizes[of_kind].sum())
        for index in np.flatnonzero(unnamed):
            with reader.snapshot() as snapshot:
                kind = UNNAMED + _kind(snapshot, page[index][0])
            tallies.setdefault(kind, Tally()).add(page[index][1])
    stats.kinds = tallies
    stats.record_bytes = sum(tally.bytes for tally in tallies.values())


def _kind(snapshot: Snapshot, key: bytes) -> str:
    try:
        kind = snapshot.read(key).kind
    except RecordCorrupt:
        return "damaged"
    return {"text": "texts", "text facts": "facts", "picture facts": "facts"}.get(kind, kind)


def _tally_captions(reader: StoreReader, opened: list[tuple[Sealed, Manifest]], stats: StoreStats) -> None:
    """Uses of captions by the current manifests; tokens of every text that any manifest names."""
    current = [manifest.text_keys() for sealed, manifest in opened if sealed.is_current]
    stats.captions, stats.different_captions = sum(len(keys) for keys in current), len(union(current))
    for chunks in {manifest.settings.text_chunks for _, manifest in opened}:
        texts = union(manifest.text_keys() for _, manifest in opened if manifest.settings.text_chunks == chunks)
        keys = [text_facts_key(key) for key in each(texts)]
        for start in range(0, len(keys), FACTS_AT_ONCE):
            with reader.snapshot() as snapshot:
                for key in keys[start : start + FACTS_AT_ONCE]:
                    _count_tokens(snapshot, key, chunks, stats)


def _count_tokens(snapshot: Snapshot, key: bytes, chunks: int, stats: StoreStats) -> None:
    with contextlib.suppress(RecordCorrupt):  # a count for people; the embeds have a record of their own
        meta = snapshot.read(key).meta
        stats.caption_tokens += min(int(meta["tokens"]), chunks * WORD_TOKENS)
        stats.caption_slots += chunks * WORD_TOKENS
        stats.truncated_captions += bool(meta["truncated"])
