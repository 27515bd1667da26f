"""The first pass of a build: everything that is seen becomes a sample with its keys, or is counted with its reason.

source.scan() -> read -> digest -> size -> bucket -> crop plan -> latent key; captions -> text keys
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from cache_builder.buckets import CropPlan, make_buckets, nearest_bucket, plan_crop
from cache_builder.config import BuildConfig
from cache_builder.keys import crop_draw, facts_key, image_digest, latent_key
from cache_builder.pixels import EXTENSIONS, PictureError, PixelLimits, PixelRules, read_size
from cache_builder.report import BuildReport
from cache_builder.sources import Found, Skipped, Source
from cache_builder.split import Thumbnail
from shared.errors import DataError, RecordCorrupt
from shared.store import Snapshot, Store
from shared.vae import EncodeDtype


@dataclass
class Sample:
    """A picture of one data set with all that its row in the manifest needs."""

    dataset: str
    path: str
    digest: bytes
    read: Callable[[], bytes]
    captions: list[str]
    original_hw: tuple[int, int]
    plan: CropPlan
    latent_key: bytes
    facts_key: bytes
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

    def __post_init__(self) -> None:
        images = self.config.images
        self.pixel_rules = PixelRules(images.background, images.resample)
        self.limits = PixelLimits(images.max_pixels, images.max_bytes)
        self.buckets = make_buckets(images.resolution, images.step, images.max_aspect)

    def scan(self, sources: Sequence[Source], store: Store) -> list[Sample]:
        """All samples of `sources`, in order; raises DataError where there is nothing to train on."""
        samples = [sample for source in sources for sample in self._scan_source(source, store)]
        self._require_captions()
        if not samples:
            raise DataError(_nothing_found(sources, self.report))
        return samples

    def _scan_source(self, source: Source, store: Store) -> list[Sample]:
        known: dict[bytes, Sample] = {}
        for item in source.scan():
            self.report.seen += 1
            if isinstance(item, Skipped):
                self.report.skipped[item.reason] += 1
                continue
            captions = self._captions(item)
            if captions is None:
                continue
            try:
                self._add(known, source.dataset_id, item, captions, store)
            except DataError as error:
                self.report.quarantined.append((item.path, str(error)))
        return list(known.values())

    def _captions(self, item: Found) -> list[str] | None:
        policy = self.config.captions.missing
        if item.captions or policy == "empty":
            return list(item.captions) or [""]
        if policy == "error":
            self.without_caption.append(item.path)
        self.report.skipped["no caption"] += 1
        return None

    def _add(self, known: dict[bytes, Sample], dataset: str, item: Found, captions: list[str], store: Store) -> None:
        data = item.read()
        digest = image_digest(data)
        if digest in known:  # the same bytes under another name: one sample with the captions of both
            merged = dict.fromkeys([*known[digest].captions, *captions])
            known[digest].captions = list(merged)
            self.report.duplicate += 1
            return
        with store.snapshot() as snapshot:
            size_hw, thumbnail = self._facts(digest, data, snapshot)
        plan = self._plan(digest, size_hw)
        keys = (
            latent_key(digest, plan, self.pixel_rules, self.vae_digest, self.encode_dtype, self.config.encode.latents),
            facts_key(digest, self.pixel_rules),
        )
        known[digest] = Sample(dataset, item.path, digest, item.read, captions, size_hw, plan, *keys, thumbnail)

    def _facts(self, digest: bytes, data: bytes, snapshot: Snapshot) -> tuple[tuple[int, int], Thumbnail | None]:
        key = facts_key(digest, self.pixel_rules)
        if snapshot.has(key):
            try:
                record = snapshot.read(key)
                height, width = record.meta["original_hw"]
                return (height, width), record.tensors["thumbnail"]
            except RecordCorrupt:
                pass  # it can be found out again
        return read_size(data, self.limits), None

    def _plan(self, digest: bytes, size_hw: tuple[int, int]) -> CropPlan:
        height, width = size_hw
        if max(height, width) > 64 * min(height, width):
            raise PictureError(f"{height} x {width} px is too long and thin for any bucket")
        bucket = nearest_bucket(size_hw, self.buckets)
        return plan_crop(size_hw, bucket, self.config.images.crop, crop_draw(self.config.seed, digest, 0))

    def _require_captions(self) -> None:
        if self.without_caption:
            names = ", ".join(self.without_caption[:3]) + (" ..." if len(self.without_caption) > 3 else "")
            extensions = " or ".join(self.config.captions.extensions)
            raise DataError(
                f"{len(self.without_caption)} of {self.report.seen} pictures have no caption ({names}): write each "
                f"one beside its picture as {extensions}, or --set captions.missing=skip (leave them out), or =empty"
            )


def _nothing_found(sources: Sequence[Source], report: BuildReport) -> str:
    names = ", ".join(source.dataset_id for source in sources)
    if report.seen:
        reasons = [f"{count} {reason}" for reason, count in report.skipped.most_common()]
        reasons += [f"{path}: {reason}" for path, reason in report.quarantined[:3]]
        return f"no picture of {names} can be used: {report.seen} seen; {'; '.join(reasons)}"
    others = sum((source.passed_over for source in sources), start=type(report.skipped)())
    kinds = ", ".join(f"{count} {suffix}" for suffix, count in others.most_common(8))
    seen = f"{others.total()} files seen, none of them pictures by name ({kinds})" if others else "it holds no files"
    return f"no pictures in {names}: {seen}; pictures end in {', '.join(sorted(EXTENSIONS))}"
