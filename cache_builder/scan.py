"""The first pass of a build: everything that is seen becomes a sample with its keys, or is counted with its reason.

source.scan() -> look.py: digest, size -> bucket -> crop plans -> latent keys; captions -> texts -> text keys
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from cache_builder.advice import caption_place, nothing_found
from cache_builder.buckets import CropPlan, Size, make_buckets, nearest_bucket, own_bucket, plan_crop
from cache_builder.config import BuildConfig, ImageRules
from cache_builder.key_arrays import Indices, as_keys
from cache_builder.keys import KeyOf, crop_draw, latent_keys_of, subset_rank, text_keys_for
from cache_builder.look import Look, Looker, Unusable, look_at
from cache_builder.report import BuildReport
from cache_builder.sample_rows import DataSet, packed
from cache_builder.samples import MOST_PLANS, Samples
from cache_builder.scan_cache import ScanCache, cache_path
from cache_builder.skip import reason_to_skip
from cache_builder.sources import Found, Remembering, Skipped, Source
from cache_builder.texts import filter_captions, says_a_side, write_texts
from shared.errors import DataError
from shared.pictures import PictureError, PixelLimits, PixelRules, quiet
from shared.progress import progress
from shared.store import Store
from shared.vae import EncodeDtype

SCANNED_AT_ONCE = 64  # pictures between two signs of life


@dataclass
class Scanner:
    """Turns sources into samples; the rules of a build and the identity of its model make the keys."""

    config: BuildConfig
    vae_digest: str
    encode_dtype: EncodeDtype
    text_digests: Mapping[str, str]
    report: BuildReport
    without_caption: list[str] = field(default_factory=list)
    caption_places: dict[str, None] = field(default_factory=dict)
    memory: Path | None = None
    """The store whose scan caches say which files need not be read again; None where every file is read."""
    rehash: bool = False
    """Whether every file is read all the same, and remembered."""
    remember: bool = True
    """Whether the scan caches are written; who only looks at a store leaves them as they are."""
    scratch: Path | None = None
    """Where the samples' unnamed files lie: on the disk of the store, which has room for them if it has for a build."""

    def __post_init__(self) -> None:
        images = self.config.images
        self.pixel_rules = PixelRules(images.background, images.resample)
        self.limits = PixelLimits(images.max_pixels, images.max_bytes)
        self.buckets = _buckets(images)
        self._nearest: dict[Size, Size] = {}
        self._plans_of_size: dict[Size, list[CropPlan]] = {}
        self._cuts: dict[CropPlan, tuple[KeyOf, bytes]] = {}

    def scan(self, sources: Sequence[Source], store: Store) -> Samples:
        """All samples of `sources`, in order; raises DataError where there is nothing to train on."""
        text_key = text_keys_for(self.config.text.chunks, self.text_digests)
        samples = Samples(text_key, self.scratch)
        kept: list[Indices] = []
        nothing: list[str] = []
        for source in sources:
            own = replace(self, config=self.config.for_dataset(source.dataset_id), report=BuildReport())
            kept.append(own._scan_source(source, store, samples))
            self.report.add_scan(own.report)
            nothing += [] if len(kept[-1]) else [nothing_found(source, own.config.source, own.report)]
        self._require_captions()
        if nothing:
            raise DataError(nothing[0])
        count = sum(map(len, kept))
        return samples if count == len(samples) else samples.only(np.concatenate(kept))

    def _scan_source(self, source: Source, store: Store, samples: Samples) -> Indices:
        """Add the pictures of one source; which of `samples` are its samples."""
        first = len(samples)
        samples.datasets.append(DataSet(source.dataset_id, self.pixel_rules, self.limits))
        cache = ScanCache(
            self.memory and cache_path(self.memory, source.dataset_id), rehash=self.rehash, remember=self.remember
        )
        if isinstance(source, Remembering):
            source.cache = cache
        looker = Looker(self.pixel_rules, self.limits, store, cache)
        with progress(f"scan of {source.dataset_id}", None, "pictures") as advance, quiet():
            looks = look_at(looker, self._wanted(source), self.config.encode.threads)
            for number, ((item, captions), look) in enumerate(looks, 1):
                try:
                    self._add(samples, item, captions, look)
                except DataError as error:
                    self.report.quarantined.append((item.path, str(error)))
                if not number % SCANNED_AT_ONCE:
                    advance(SCANNED_AT_ONCE)
        cache.save()
        return self._settle(samples, first)

    def _wanted(self, source: Source) -> Iterator[tuple[Found, tuple[str, ...]]]:
        """The pictures that are to be read, with their captions; the others are counted."""
        for item in source.scan():
            self.report.seen += 1
            if isinstance(item, Skipped):
                self.report.skipped[item.reason] += 1
            elif (captions := self._captions(item)) is not None:
                yield item, captions

    def _captions(self, item: Found) -> tuple[str, ...] | None:
        """The captions that the rules leave, ("",) for the empty one; None where the picture is left out."""
        rules = self.config.captions
        captions = tuple(caption for caption in filter_captions(item.captions, rules) if caption)
        policy = rules.missing if not item.captions or rules.empty == "missing" else rules.empty
        if captions or policy == "empty":
            return captions or ("",)
        if policy == "error":
            self.without_caption.append(item.path)
            self.caption_places[caption_place(self.config)] = None
        self.report.skipped["no caption" if not item.captions else "empty caption"] += 1
        return None

    def _add(self, samples: Samples, item: Found, captions: tuple[str, ...], look: Look) -> None:
        if isinstance(look, Unusable):
            raise DataError(look.reason)
        digest, size_hw = look.digest, look.size_hw
        texts = write_texts(captions, self.config.captions, self.config.seed, digest)
        bucket_hw = self._bucket(size_hw)
        if reason := self._reason_to_skip(size_hw, bucket_hw):
            self.report.skipped[reason] += 1
            return
        flip = self.config.images.flip
        is_sided = flip != "off" and any(says_a_side(text) for text in texts)
        plans = self._plans(digest, size_hw, bucket_hw)
        if flip == "force" or (flip == "on" and not is_sided):  # or a caption would lie of them
            plans = [*plans, *(replace(plan, flip=True) for plan in plans)]
        crops = [self._packed(digest, plan) for plan in plans]
        samples.add(item, digest, look.facts_key, size_hw, look.thumbnail, texts, crops, is_sided=is_sided)

    def _settle(self, samples: Samples, first: int) -> Indices:
        """Which of the samples from `first` on stay: one for equal pictures, with the captions of all of them."""
        is_first = np.ones(len(samples) - first, bool)
        for one, *others in _equal(samples.rows["digest"][first:]):
            self._merge(samples, first + one, [first + other for other in others])
            is_first[others] = False
        self.report.duplicate += int((~is_first).sum())
        kept = self._some(samples, first + np.flatnonzero(is_first))
        self.report.sided += int(samples.rows["is_sided"][kept].sum())
        grown = enlargements(samples, kept)
        self.report.enlarged += int((grown > 1).sum())
        self.report.most_enlarged = max(self.report.most_enlarged, float(grown.max(initial=1)))
        return kept

    def _merge(self, samples: Samples, one: int, others: Sequence[int]) -> None:
        before = samples.rows[one].copy()
        samples.merge(one, others)
        if self.config.images.flip == "on" and samples.rows["is_sided"][one] and not before["is_sided"]:
            samples.keep_crops(one, int(before["crop_count"]) // 2)  # without the mirrored ones

    def _some(self, samples: Samples, kept: Indices) -> Indices:
        """At most max_samples of one data set, in their order; always the same ones of the same pictures."""
        most = self.config.images.skip.max_samples
        if most is None or len(kept) <= most:
            return kept
        digests = samples.rows["digest"]
        ranks = as_keys(subset_rank(self.config.seed, digests[index].tobytes()) for index in kept)
        self.report.skipped[f"beyond images.skip.max_samples = {most}"] += len(kept) - most
        return kept[np.sort(np.argsort(ranks)[:most])]

    def _bucket(self, size_hw: Size) -> Size:
        if self.config.images.crop == "off":
            return own_bucket(size_hw, self.config.images.resolution, self.config.images.resolution_type)
        if size_hw not in self._nearest:
            self._nearest[size_hw] = nearest_bucket(size_hw, self.buckets)
        return self._nearest[size_hw]

    def _reason_to_skip(self, size_hw: Size, bucket_hw: Size) -> str | None:
        images = self.config.images
        if images.crop == "off" and max(size_hw) > images.max_aspect * min(size_hw):
            return f'longer than images.max_aspect = {images.max_aspect}, and crop = "off" cuts nothing'
        return reason_to_skip(size_hw, bucket_hw, images.skip, images.resolution_type)

    def _plans(self, digest: bytes, size_hw: Size, bucket_hw: Size) -> list[CropPlan]:
        """The crops of a picture, each once: small pictures have fewer different ones than `variants`."""
        height, width = size_hw
        if max(height, width) > 64 * min(height, width):
            raise PictureError(f"{height} x {width} px is too long and thin for any bucket")
        images = self.config.images
        if images.crop not in ("random", "corner"):  # one plan for all pictures of a size
            if size_hw not in self._plans_of_size:
                plan = plan_crop(
                    size_hw, bucket_hw, images.crop, downsample_px=images.downsample_to, measure=images.resolution_type
                )
                self._plans_of_size[size_hw] = [plan]
            return self._plans_of_size[size_hw]
        plans = [
            plan_crop(
                size_hw,
                bucket_hw,
                images.crop,
                crop_draw(self.config.seed, digest, 0 if images.crop == "corner" else variant),
                variant=variant,
                downsample_px=images.downsample_to,
                measure=images.resolution_type,
            )
            for variant in range(images.variants)
        ]
        return list(dict.fromkeys(plans))

    def _packed(self, digest: bytes, plan: CropPlan) -> bytes:
        """A crop as its row among the crops of the samples."""
        if (cut := self._cuts.get(plan)) is None:
            rules, latents = self.pixel_rules, self.config.encode.latents
            cut = latent_keys_of(plan, rules, self.vae_digest, self.encode_dtype, latents), packed(plan)
            if len(self._cuts) < MOST_PLANS:  # random crops have plans of their own
                self._cuts[plan] = cut
        key, numbers = cut
        return key(digest) + numbers

    def _require_captions(self) -> None:
        if self.without_caption:
            names = ", ".join(self.without_caption[:3]) + (" ..." if len(self.without_caption) > 3 else "")
            raise DataError(
                f"{len(self.without_caption)} of {self.report.seen} pictures have no caption ({names}): "
                f"{', or '.join(self.caption_places)}, or --set captions.missing=skip (leave them out), or =empty"
            )


def _buckets(images: ImageRules) -> tuple[Size, ...]:
    """The buckets that pictures are sorted into; () where each has its own."""
    if images.crop == "off":
        return ()
    max_aspect = 1.0 if images.crop == "square" else images.max_aspect
    return images.buckets or make_buckets(images.resolution, images.step, max_aspect, images.resolution_type)


def enlargements(samples: Samples, kept: Indices) -> np.ndarray[Any, np.dtype[np.float64]]:
    """By what factor each picture grows to cover its bucket, as buckets.py: enlargement says of one."""
    target_hw = samples.crops["target_hw"][samples.rows["crops"][kept]]
    factors: np.ndarray[Any, np.dtype[np.float64]] = (target_hw / samples.rows["original_hw"][kept]).max(axis=1)
    return factors


def _equal(digests: np.ndarray[Any, np.dtype[np.uint64]]) -> list[list[int]]:
    """The groups of equal ones among digests [N, 4], by their indices; found by their first words, told by all."""
    order = np.argsort(digests[:, 0])
    heads = digests[order, 0]
    is_alike = heads[1:] == heads[:-1]
    groups: dict[bytes, list[int]] = {}
    for index in np.union1d(order[1:][is_alike], order[:-1][is_alike]).tolist():
        groups.setdefault(digests[index].tobytes(), []).append(index)
    return [group for group in groups.values() if len(group) > 1]
