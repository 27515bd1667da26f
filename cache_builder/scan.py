"""The first pass of a build: everything that is seen becomes a sample with its keys, or is counted with its reason.

source.scan() -> look.py: digest, size -> bucket -> crop plans -> latent keys; captions -> texts -> text keys
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from cache_builder.advice import caption_place, nothing_found
from cache_builder.buckets import CropPlan, Size, enlargement, make_buckets, nearest_bucket, own_bucket, plan_crop
from cache_builder.config import BuildConfig, ImageRules
from cache_builder.keys import KeyOf, crop_draw, latent_keys_of, subset_rank
from cache_builder.look import Looker, Seen, look_at
from cache_builder.report import BuildReport
from cache_builder.scan_cache import ScanCache, cache_path
from cache_builder.skip import reason_to_skip
from cache_builder.sources import Found, MetaValue, Remembering, Skipped, Source
from cache_builder.split import Thumbnail
from cache_builder.texts import filter_captions, says_a_side, write_texts
from shared.errors import DataError
from shared.pictures import PictureError, PixelLimits, PixelRules
from shared.progress import progress
from shared.store import Store
from shared.vae import EncodeDtype

SCANNED_AT_ONCE = 64  # pictures between two signs of life
MOST_PLANS = 4096  # whose keys are half made once for all pictures that are cut alike


@dataclass(slots=True)
class PlannedCrop:
    """One crop of a picture and the key of its latents."""

    plan: CropPlan
    latent_key: bytes


@dataclass(slots=True)
class Sample:
    """A picture of one data set with all that its row in the manifest needs."""

    dataset: str
    path: str
    digest: bytes
    read: Callable[[], bytes]
    captions: tuple[str, ...]
    original_hw: tuple[int, int]
    crops: tuple[PlannedCrop, ...]
    facts_key: bytes
    rules: PixelRules
    limits: PixelLimits
    meta: Mapping[str, MetaValue]
    thumbnail: Thumbnail | None = None
    """None until the picture has been decoded, in this build or an earlier one."""


@dataclass
class Scanner:
    """Turns sources into samples; the rules of a build and the identity of its VAE make the keys."""

    config: BuildConfig
    vae_digest: str
    encode_dtype: EncodeDtype
    report: BuildReport
    without_caption: list[str] = field(default_factory=list)
    caption_places: dict[str, None] = field(default_factory=dict)
    memory: Path | None = None
    """The store whose scan caches say which files need not be read again; None where every file is read."""
    rehash: bool = False
    """Whether every file is read all the same, and remembered."""
    remember: bool = True
    """Whether the scan caches are written; who only looks at a store leaves them as they are."""

    def __post_init__(self) -> None:
        images = self.config.images
        self.pixel_rules = PixelRules(images.background, images.resample)
        self.limits = PixelLimits(images.max_pixels, images.max_bytes)
        self.buckets = _buckets(images)
        self._nearest: dict[Size, Size] = {}
        self._sizes: dict[Size, Size] = {}  # each kept once for all pictures of it
        self._plans_of_size: dict[Size, list[CropPlan]] = {}
        self._keys_of: dict[CropPlan, KeyOf] = {}

    def scan(self, sources: Sequence[Source], store: Store) -> list[Sample]:
        """All samples of `sources`, in order; raises DataError where there is nothing to train on."""
        samples: list[Sample] = []
        nothing: list[str] = []
        for source in sources:
            own = replace(self, config=self.config.for_dataset(source.dataset_id), report=BuildReport())
            found = own._scan_source(source, store)
            self.report.add_scan(own.report)
            samples += found
            nothing += [] if found else [nothing_found(source, own.config.source, own.report)]
        self._require_captions()
        if nothing:
            raise DataError(nothing[0])
        return samples

    def _scan_source(self, source: Source, store: Store) -> list[Sample]:
        known: dict[bytes, Sample] = {}
        cache = ScanCache(self.memory and cache_path(self.memory, source.dataset_id), rehash=self.rehash)
        if isinstance(source, Remembering):
            source.cache = cache
        looker = Looker(self.pixel_rules, self.limits, store, cache)
        with progress(f"scan of {source.dataset_id}", None, "pictures") as advance:
            looks = look_at(looker, self._wanted(source), self.config.encode.threads)
            for number, ((item, captions), look) in enumerate(looks, 1):
                try:
                    self._add(known, source.dataset_id, item, captions, look())
                except DataError as error:
                    self.report.quarantined.append((item.path, str(error)))
                if not number % SCANNED_AT_ONCE:
                    advance(SCANNED_AT_ONCE)
        if self.remember:
            cache.save()
        samples = self._some(known)
        for sample in samples:
            self._mirror(sample)
            self._note_enlargement(enlargement(sample.original_hw, sample.crops[0].plan.target_hw))
        return samples

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

    def _add(
        self, known: dict[bytes, Sample], dataset: str, item: Found, captions: tuple[str, ...], seen: Seen
    ) -> None:
        digest, size_hw = seen.digest, seen.size_hw
        texts = write_texts(captions, self.config.captions, self.config.seed, digest)
        if digest in known:  # the same bytes under another name: one sample with the captions of both
            known[digest].captions = tuple(dict.fromkeys([*known[digest].captions, *texts]))
            known[digest].meta = {**item.meta, **known[digest].meta}
            self.report.duplicate += 1
            return
        bucket_hw = self._bucket(size_hw)
        if reason := self._reason_to_skip(size_hw, bucket_hw):
            self.report.skipped[reason] += 1
            return
        known[digest] = Sample(
            dataset=dataset,
            path=item.path,
            digest=digest,
            read=item.read,
            captions=texts,
            original_hw=self._sizes.setdefault(size_hw, size_hw),
            crops=tuple(self._planned(digest, plan) for plan in self._plans(digest, size_hw, bucket_hw)),
            facts_key=seen.facts_key,
            rules=self.pixel_rules,
            limits=self.limits,
            meta=item.meta,
            thumbnail=seen.thumbnail,
        )

    def _some(self, known: dict[bytes, Sample]) -> list[Sample]:
        """At most max_samples of one data set, in their order; always the same ones of the same pictures."""
        most = self.config.images.skip.max_samples
        if most is None or len(known) <= most:
            return list(known.values())
        chosen = set(sorted(known, key=lambda digest: subset_rank(self.config.seed, digest))[:most])
        self.report.skipped[f"beyond images.skip.max_samples = {most}"] += len(known) - most
        return [sample for digest, sample in known.items() if digest in chosen]

    def _mirror(self, sample: Sample) -> None:
        """Add the mirrored crops, unless a caption would lie of them: all captions are known by now."""
        flip = self.config.images.flip
        if flip == "off":
            return
        if any(says_a_side(caption) for caption in sample.captions):
            self.report.sided += 1
            if flip == "on":
                return
        sample.crops += tuple(self._planned(sample.digest, replace(crop.plan, flip=True)) for crop in sample.crops)

    def _note_enlargement(self, factor: float) -> None:
        self.report.enlarged += factor > 1
        self.report.most_enlarged = max(self.report.most_enlarged, factor)

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

    def _planned(self, digest: bytes, plan: CropPlan) -> PlannedCrop:
        if (keys := self._keys_of.get(plan)) is None:
            rules, latents = self.pixel_rules, self.config.encode.latents
            keys = latent_keys_of(plan, rules, self.vae_digest, self.encode_dtype, latents)
            if len(self._keys_of) < MOST_PLANS:  # random crops have plans of their own
                self._keys_of[plan] = keys
        return PlannedCrop(plan, keys(digest))

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
