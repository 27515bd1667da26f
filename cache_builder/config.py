"""What a build may be told; `--resolution N` is short for `--set images.resolution=N`."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from cache_builder.captions import CaptionRules
from shared.config import Config

Byte = Annotated[int, Field(ge=0, le=255)]


class ImageRules(Config):
    """How a picture becomes the pixels that are encoded."""

    resolution: int = Field(1024, ge=64, le=8192)
    """Edge of the square that has the area of every bucket, pixels."""
    step: int = Field(64, ge=8, multiple_of=8)
    """Bucket edges are multiples of this, pixels."""
    max_aspect: float = Field(4.0, ge=1)
    """Longest bucket, as long edge over short edge."""
    crop: Literal["center", "random", "top"] = "center"
    """Where the bucket is cut from the resized picture."""
    background: tuple[Byte, Byte, Byte] = (255, 255, 255)
    """Colour (r, g, b) that transparent pictures are laid on."""
    resample: Literal["lanczos", "bicubic"] = "lanczos"
    """Filter that pictures are resized with."""
    max_pixels: int = Field(64_000_000, ge=1)
    """Pictures of more pixels are quarantined."""
    max_bytes: int = Field(256 << 20, ge=1)
    """Files of more bytes are quarantined."""


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
    """Seed of random crops."""
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
