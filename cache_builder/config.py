"""What a build may be told; `--resolution N` is short for `--set images.resolution=N`."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from cache_builder.buckets import Crop, Measure
from cache_builder.captions import CaptionRules
from cache_builder.skip import SkipRules
from cache_builder.sources.rules import TABLE_SUFFIXES, SourceKind, SourceRules
from cache_builder.sources.trees import is_bucket, name_of
from shared.config import Config, merge
from shared.errors import ConfigError

Byte = Annotated[int, Field(ge=0, le=255)]
Edge = Annotated[int, Field(ge=8, le=8192, multiple_of=8)]


class ImageRules(Config):
    """How a picture becomes the pixels that are encoded."""

    resolution: int = Field(1024, ge=64, le=8192)
    """Size of the buckets, pixels; measured as resolution_type says."""
    resolution_type: Measure = "area"
    """How a size is measured: edge of the square of the same area, shorter edge ("edge"), or longer edge."""
    step: int = Field(64, ge=8, multiple_of=8)
    """Bucket edges are multiples of this, pixels."""
    max_aspect: float = Field(4.0, ge=1)
    """Longest bucket, as long edge over short edge."""
    buckets: tuple[tuple[Edge, Edge], ...] = ()
    """Sizes (height, width) to use in place of those made from resolution, step and max_aspect, pixels."""
    crop: Crop = "center"
    """Where the bucket is cut from the resized picture; "square" has one bucket, "off" a bucket for each picture."""
    variants: int = Field(1, ge=1, le=64)
    """Crops stored of each picture, for crop = "random" or "corner"; training draws one each time."""
    flip: Literal["off", "on", "force"] = "off"
    """"on" stores each crop mirrored too, save where a caption says left or right; "force" mirrors those too."""
    downsample_to: int | None = Field(None, ge=64)
    """Larger pictures are resized to this size, not to the least that covers, and then cut, pixels; unset: never."""
    background: tuple[Byte, Byte, Byte] = (255, 255, 255)
    """Colour (r, g, b) that transparent pictures are laid on."""
    resample: Literal["lanczos", "bicubic"] = "lanczos"
    """Filter that pictures are resized with."""
    max_pixels: int = Field(64_000_000, ge=1)
    """Pictures of more pixels are quarantined."""
    max_bytes: int = Field(256 << 20, ge=1)
    """Files of more bytes are quarantined."""
    skip: SkipRules = SkipRules()

    @model_validator(mode="after")
    def _crop_fits(self) -> "ImageRules":
        if self.variants > 1 and self.crop not in ("random", "corner"):
            raise ValueError(f'variants = {self.variants} would all be one crop: set crop to "random" or "corner"')
        if self.buckets and self.crop in ("square", "off"):
            raise ValueError(f'buckets are given, and crop = "{self.crop}" makes its own: leave one of them out')
        if len(set(self.buckets)) < len(self.buckets):
            raise ValueError("buckets: one of them is given twice")
        if self.downsample_to is not None and self.crop == "off":
            raise ValueError('downsample_to needs a crop to cut from what is larger; crop = "off" cuts nothing')
        if self.downsample_to is not None and self.downsample_to < self.resolution:
            raise ValueError(f"downsample_to {self.downsample_to} is below resolution {self.resolution}")
        return self


class TextRules(Config):
    """How captions are encoded."""

    chunks: int = Field(1, ge=1, le=3)
    """Stretches of 77 tokens a caption may fill; what is longer is cut and counted."""


def _decoders() -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(8, max(2, cores))  # two at least, so that one picture is decoded while another one is read


class EncodeRules(Config):
    """How the encoders run and what is stored."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Precision of the VAE; "auto" takes the fastest in which it does not overflow."""
    latents: Literal["moments", "mean"] = "moments"
    """"moments" lets each epoch draw a fresh posterior sample, "mean" takes half the bytes."""
    batch: int = Field(8, ge=1)
    """Pictures encoded at once."""
    text_batch: int = Field(32, ge=1)
    """Captions encoded at once."""
    threads: int = Field(default_factory=_decoders, ge=1)
    """Threads that decode pictures; by default one for each core this process may use, two to eight."""


class RayRules(Config):
    """How a build is spread over a Ray cluster (--runner ray); no record depends on it."""

    workers: int | None = Field(None, ge=1)
    """Encoders; by default one for each GPU of the cluster, or for each `cpus` CPUs where it has none."""
    cpus: int = Field(1, ge=1)
    """CPUs that each encoder takes; it decodes in as many threads."""
    chunk: int = Field(32, ge=1)
    """Pictures that are sent at once; what dies with a worker is done again, at most twice as many."""


class SplitRules(Config):
    """Which samples are held out of training; raising the fraction keeps what was held out."""

    eval_fraction: float = Field(0.02, ge=0, lt=1)
    """Share of the groups that is held out."""
    group: Literal["picture", "folder"] = "picture"
    """What stays on one side: a picture with its near copies, or all pictures of a folder."""
    salt: str = "eval"
    """Another salt holds out others."""


class DatasetConfig(Config):
    """One data set; what its tables do not say is as in the tables of the same name above all data sets."""

    id: str = Field(min_length=1)
    """Its name in the manifest, and part of each sample's identity."""
    root: Annotated[str, Field(pattern=r"^s3://")] | Path
    """Folder, table, or tar shards; relative to the folder of the file that names it, or s3://BUCKET/PREFIX."""
    source: SourceRules = SourceRules()
    images: ImageRules = ImageRules()
    captions: CaptionRules = CaptionRules()

    @property
    def folder(self) -> Path:
        """The root on a disk; raises ConfigError where it is in a bucket, which nobody can watch."""
        if isinstance(self.root, str):
            raise ConfigError(f"data set {self.id}: {self.root} cannot be watched; cache-build reads it when it is run")
        return self.root

    @property
    def kind(self) -> SourceKind:
        """What the root is: as it is set, or by its name."""
        if self.source.kind:
            return self.source.kind
        suffix = os.path.splitext(name_of(self.root))[1].lower()
        return "webdataset" if suffix == ".tar" else "table" if suffix in TABLE_SUFFIXES else "folder"


class BuildConfig(Config):
    """Everything a build is told."""

    seed: int = 0
    """Seed of random crops, of caption variants, and of the choice of max_samples."""
    images: ImageRules = ImageRules()
    captions: CaptionRules = CaptionRules()
    source: SourceRules = SourceRules()
    text: TextRules = TextRules()
    encode: EncodeRules = EncodeRules()
    ray: RayRules = RayRules()
    split: SplitRules = SplitRules()
    max_quarantined: float = Field(0.1, ge=0, le=1)
    """Share of the pictures that may be unreadable; above it nothing is sealed and the build fails."""
    datasets: tuple[DatasetConfig, ...] = ()
    """The data sets, where there are several or they have rules of their own; else the command line names one."""

    @classmethod
    def located(cls, table: Mapping[str, Any], folder: Path) -> Mapping[str, Any]:
        """`table` with the roots of its data sets under `folder`, whose file it is."""
        datasets = table.get("datasets")
        if not isinstance(datasets, list):
            return table
        return {**table, "datasets": [_with_root(dataset, folder) for dataset in datasets]}

    def for_dataset(self, dataset_id: str) -> "BuildConfig":
        """The same with the rules of one data set in place of those for all."""
        own = next((dataset for dataset in self.datasets if dataset.id == dataset_id), None)
        if own is None:
            return self
        source = own.source.model_copy(update={"kind": own.kind})
        return self.model_copy(update={"images": own.images, "captions": own.captions, "source": source})

    @model_validator(mode="before")
    @classmethod
    def _rules_for_all(cls, data: Any) -> Any:
        """Each data set's tables, over those for all."""
        if not isinstance(data, Mapping) or not isinstance(data.get("datasets"), list):
            return data
        common = {key: data[key] for key in ("source", "images", "captions") if isinstance(data.get(key), Mapping)}
        merged = [merge(common, dataset) if isinstance(dataset, Mapping) else dataset for dataset in data["datasets"]]
        return {**data, "datasets": merged}

    @model_validator(mode="after")
    def _ids_differ(self) -> "BuildConfig":
        ids = [dataset.id for dataset in self.datasets]
        if twice := next((name for name in ids if ids.count(name) > 1), None):
            raise ValueError(f"two data sets have the id {twice!r}; each needs its own")
        return self

    @model_validator(mode="after")
    def _step_fits(self) -> "BuildConfig":
        for images in (self.images, *(dataset.images for dataset in self.datasets)):
            if images.step > images.resolution:
                raise ValueError(f"images.step {images.step} is above images.resolution {images.resolution}")
        return self


def _with_root(dataset: Any, folder: Path) -> Any:
    if not isinstance(dataset, Mapping) or not isinstance(dataset.get("root"), str) or is_bucket(dataset["root"]):
        return dataset
    return {**dataset, "root": str(folder / Path(dataset["root"]).expanduser())}
