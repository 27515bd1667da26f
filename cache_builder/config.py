"""What a build may be told; `--resolution N` is short for `--set images.resolution=N`."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from cache_builder.buckets import Crop, Measure
from cache_builder.captions import CaptionRules
from cache_builder.skip import SkipRules
from shared.config import Config

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
    threads: int = Field(2, ge=1)
    """Threads that decode pictures."""


class SplitRules(Config):
    """Which samples are held out of training; raising the fraction keeps what was held out."""

    eval_fraction: float = Field(0.02, ge=0, lt=1)
    """Share of the groups that is held out."""
    group: Literal["picture", "folder"] = "picture"
    """What stays on one side: a picture with its near copies, or all pictures of a folder."""
    salt: str = "eval"
    """Another salt holds out others."""


class BuildConfig(Config):
    """Everything a build is told."""

    seed: int = 0
    """Seed of random crops, of caption variants, and of the choice of max_samples."""
    images: ImageRules = ImageRules()
    captions: CaptionRules = CaptionRules()
    text: TextRules = TextRules()
    encode: EncodeRules = EncodeRules()
    split: SplitRules = SplitRules()
    max_quarantined: float = Field(0.1, ge=0, le=1)
    """Share of the pictures that may be unreadable; above it nothing is sealed and the build fails."""

    @model_validator(mode="after")
    def _step_fits(self) -> "BuildConfig":
        if self.images.step > self.images.resolution:
            raise ValueError(f"images.step {self.images.step} is above images.resolution {self.images.resolution}")
        return self
