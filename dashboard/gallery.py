"""Samples to look at: rows of a manifest with their captions, the linear preview of their latents, and their sources.

A sample is asked for by its id. Its latents are read by the key in its row; its source is looked for below the folders
that the build reads, through no link, and shown only if its bytes are those that were built (their digest is in the
row). What a browser gets is pixels that were decoded here and encoded anew, small.
"""

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dashboard.store_view import StoreView
from shared.beneath import read_beneath
from shared.errors import DataError, ManifestMismatch, RecordCorrupt
from shared.manifest import Manifest
from shared.manifest_rows import ManifestRow, ManifestSettings
from shared.manifest_shelf import Sealed
from shared.pictures import PixelLimits, PixelRules, decode_image
from shared.preview import preview_picture, read_preview
from shared.small_pictures import exact_png, small_jpeg
from shared.snapshot import Snapshot

PAGE = 24
KEPT_ROWS = 2048
MOST_CAPTIONS = 8
MOST_CAPTION = 2000  # characters
BOX_PX = 384
LIMITS = PixelLimits()
INSIDE = (".tar/", ".parquet/", ".jsonl/", ".csv/", ".tsv/")

Json = dict[str, Any]
Known = tuple[ManifestRow, ManifestSettings]


class Gallery:
    """Pages of samples, and their pictures."""

    def __init__(self, store: StoreView, roots: Callable[[], Sequence[Path]]) -> None:
        self._store, self._roots = store, roots
        self._known: OrderedDict[tuple[str, bytes], Known] = OrderedDict()
        self._orders: OrderedDict[tuple[Any, ...], np.ndarray[Any, np.dtype[np.int64]]] = OrderedDict()
        self._guard = threading.Lock()

    def page(self, name: str | None, bucket_hw: tuple[int, int] | None, split: str | None, number: int) -> Json:
        """One page of a manifest's samples, of all or of those of a bucket or split; raises ManifestMismatch."""
        sealed = self._store.current(name)
        manifest = sealed.open()
        order, settings = self._order(manifest, bucket_hw, split), manifest.settings
        number = max(0, min(number, (len(order) - 1) // PAGE))
        rows = manifest.rows(order[number * PAGE : (number + 1) * PAGE])
        for row in rows:
            self._remember(sealed.digest, row, settings)
        with self._store.reader().snapshot() as snapshot:
            cards = [_card(snapshot, row) for row in rows]
        return {
            "manifest": sealed.name,
            "digest": sealed.digest,
            "page": number,
            "pages": max(1, -(-len(order) // PAGE)),
            "samples": len(order),
            "has_preview": read_preview(self._store.path, settings.vae_digest) is not None,
            "has_sources": bool(self._roots()),
            "cards": cards,
        }

    def preview(self, digest: str, sample_id: bytes) -> bytes:
        """PNG of a sample's latents by the linear map of their VAE; raises DataError or a StoreError."""
        row, settings = self._row(digest, sample_id)
        preview = read_preview(self._store.path, settings.vae_digest)
        if preview is None:
            raise DataError("the store has no preview of its VAE's latents")
        with self._store.reader().snapshot() as snapshot:
            latents = snapshot.read(row.variants[0].latent_key).tensors["mean"]
        return exact_png(preview_picture(latents, preview))

    def source(self, digest: str, sample_id: bytes) -> bytes:
        """JPEG of the picture that a sample was built from; raises DataError where it is not to be had."""
        row, settings = self._row(digest, sample_id)
        if any(mark in row.path.lower() for mark in INSIDE):
            raise DataError("lies inside a table or an archive")
        why = "no folder is known to look in"
        for root in self._roots():
            try:
                data = read_beneath(root, row.path, LIMITS.max_bytes)
            except DataError:
                why = "is not there"
                continue
            if hashlib.blake2b(data, digest_size=32).digest() == row.image_digest:
                return small_jpeg(decode_image(data, _pixel_rules(settings, row.dataset), LIMITS), BOX_PX)
            why = "is another picture now"
        raise DataError(why)

    def _row(self, digest: str, sample_id: bytes) -> Known:
        with self._guard:
            known = self._known.get((digest, sample_id))
        return known or self._find(self._store.by_digest(digest), sample_id)

    def _find(self, sealed: Sealed, sample_id: bytes) -> Known:
        manifest = sealed.open()
        found = np.flatnonzero(manifest.all_sample_ids() == np.bytes_(sample_id))
        if not len(found):
            raise ManifestMismatch("no such sample")
        row, settings = manifest.rows(found[:1])[0], manifest.settings
        self._remember(sealed.digest, row, settings)
        return row, settings

    def _remember(self, digest: str, row: ManifestRow, settings: ManifestSettings) -> None:
        with self._guard:
            self._known[digest, row.sample_id] = (row, settings)
            while len(self._known) > KEPT_ROWS:
                self._known.popitem(last=False)

    def _order(
        self, manifest: Manifest, bucket_hw: tuple[int, int] | None, split: str | None
    ) -> np.ndarray[Any, np.dtype[np.int64]]:
        """Rows in the order of their sample ids, which mixes buckets and data sets."""
        asked = (manifest.digest, bucket_hw, split)
        with self._guard:
            if asked in self._orders:
                return self._orders[asked]
        splits: tuple[Any, ...] = (split,) if split in ("train", "eval") else ("train", "eval")
        buckets = [bucket for each in splits for bucket in manifest.buckets(each)]
        chosen = [bucket.rows for bucket in buckets if bucket_hw in (None, bucket.hw)]
        rows = np.concatenate([np.zeros(0, np.int64), *chosen])
        order = rows[np.argsort(manifest.all_sample_ids()[rows])]
        with self._guard:
            self._orders[asked] = order
            while len(self._orders) > 4:
                self._orders.popitem(last=False)
        return order


def _card(snapshot: Snapshot, row: ManifestRow) -> Json:
    captions = [_caption(snapshot, key) for key in row.text_keys[:MOST_CAPTIONS]]
    variant = row.variants[0]
    return {
        "id": row.sample_id.hex(),
        "dataset": row.dataset,
        "split": row.split,
        "captions": [caption for caption in captions if caption is not None],
        "more_captions": max(0, len(row.text_keys) - MOST_CAPTIONS),
        "original_hw": row.original_hw,
        "bucket_hw": row.bucket_hw,
        "crop_top_left": variant.crop_top_left,
        "crops": len(row.variants),
    }


def _caption(snapshot: Snapshot, key: bytes) -> str | None:
    try:
        return str(snapshot.read(key).meta.get("caption", ""))[:MOST_CAPTION]
    except RecordCorrupt:
        return None


def _pixel_rules(settings: ManifestSettings, dataset: str) -> PixelRules:
    """The colour under transparent pictures, where the build says it."""
    try:
        build = settings.build
        red, green, blue = build.get("datasets", {}).get(dataset, build)["images"]["background"]
        return PixelRules((int(red), int(green), int(blue)))
    except (AttributeError, KeyError, TypeError, ValueError):
        return PixelRules()
