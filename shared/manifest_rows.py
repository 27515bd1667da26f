"""What stands in a manifest: the settings of its build, and a row for each sample, in Python and in Arrow."""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import msgpack
import pyarrow as pa
from pydantic import BaseModel, ConfigDict

MANIFEST_FORMAT = 1
Split = Literal["train", "eval"]
MetaType = Literal["bool", "int", "float", "string", "strings"]
MetaValue = bool | int | float | str | tuple[str, ...]
META = "meta_"
"""What the columns that a user's data set brought along begin with."""

_HW = pa.list_(pa.field("px", pa.int32(), nullable=False), 2)
_VARIANT = pa.struct(
    [
        pa.field("latent_key", pa.binary(16), nullable=False),
        pa.field("flip", pa.bool_(), nullable=False),
        pa.field("crop_top", pa.int32(), nullable=False),
        pa.field("crop_left", pa.int32(), nullable=False),
        pa.field("target_hw", _HW, nullable=False),
    ]
)
SCHEMA = pa.schema(
    [
        pa.field("dataset", pa.dictionary(pa.int32(), pa.string()), nullable=False),
        pa.field("sample_id", pa.binary(16), nullable=False),
        pa.field("path", pa.string(), nullable=False),
        pa.field("image_digest", pa.binary(32), nullable=False),
        pa.field("original_size_hw", _HW, nullable=False),
        pa.field("bucket_hw", _HW, nullable=False),
        pa.field("variants", pa.list_(pa.field("variant", _VARIANT, nullable=False)), nullable=False),
        pa.field("texts", pa.list_(pa.field("text_key", pa.binary(16), nullable=False)), nullable=False),
        pa.field("split", pa.dictionary(pa.int8(), pa.string()), nullable=False),
    ]
)


_META_TYPES: dict[MetaType, pa.DataType] = {
    "bool": pa.bool_(),
    "int": pa.int64(),
    "float": pa.float64(),
    "string": pa.string(),
    "strings": pa.list_(pa.field("item", pa.string(), nullable=False)),
}


class ManifestSettings(BaseModel):
    """What the build declared: all that a trainer must know of the records, and the rules they were made by."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)

    vae_digest: str
    """Digest of the VAE's weights, hex."""
    scaling_factor: float
    """The VAE's: x_0 = scaling_factor * z."""
    latent_channels: int
    """Channels of a latent."""
    downscale: int
    """Pixels per latent, along an edge."""
    latents: Literal["moments", "mean"]
    """What latent records hold: mean and log-variance, or the mean alone."""
    text_digests: dict[str, str]
    """Digest of each text encoder and tokenizer, by model folder, hex."""
    text_widths: tuple[int, int]
    """Columns of prompt_embeds that each text encoder gives."""
    pooled_width: int
    """Length of pooled_prompt_embeds."""
    text_chunks: int
    """Stretches of 77 tokens that captions are encoded in."""
    null_text_key: str
    """Key of the encoded empty prompt, hex."""
    zeros_for_empty_prompt: bool
    """Whether the model's pipeline gives zeros in place of an empty prompt (force_zeros_for_empty_prompt)."""
    datasets: tuple[str, ...]
    """Ids of the data sets whose samples stand in the manifest."""
    build: dict[str, Any]
    """The rules of the build: pixels, crops, buckets, captions, split, and those of each data set by its id."""
    meta: dict[str, MetaType] = {}
    """Columns that travel along, each as meta_NAME, and what they hold; where a sample has no value it is null."""
    prompts: dict[str, str] = {}
    """Key of the embeds of each further text that was asked for, by text, hex: prompts for validation."""

    def as_json(self) -> dict[str, Any]:
        """The settings as they are digested and written; without `meta` and `prompts` where there are none."""
        return self.model_dump(mode="json", exclude_defaults=True)


@dataclass(frozen=True, slots=True)
class Variant:
    """One crop of a sample: its record and its micro-conditioning; pixels of the resized picture, (h, w)."""

    latent_key: bytes
    flip: bool
    crop_top_left: tuple[int, int]
    target_hw: tuple[int, int]


@dataclass(frozen=True, slots=True)
class ManifestRow:
    """One sample: a picture of one data set with its variants and texts."""

    dataset: str
    sample_id: bytes
    path: str
    image_digest: bytes
    original_hw: tuple[int, int]
    bucket_hw: tuple[int, int]
    variants: tuple[Variant, ...]
    text_keys: tuple[bytes, ...]
    split: Split
    meta: Mapping[str, MetaValue] = field(default_factory=dict)
    """What travelled along, by column, without "meta_"; of the types that the settings name."""

    def order(self) -> tuple[str, tuple[int, int], bytes]:
        """What rows are sorted by."""
        return self.dataset, self.bucket_hw, self.sample_id


def schema_of(settings: ManifestSettings) -> pa.Schema:
    """SCHEMA and the columns that travel along, by name."""
    fields = [pa.field(META + name, _META_TYPES[kind]) for name, kind in sorted(settings.meta.items())]
    return pa.schema([*SCHEMA, *fields])


def column_value(row: ManifestRow, name: str) -> Any:
    """What column `name` of a manifest holds for `row`."""
    if name.startswith(META):
        return row.meta.get(name.removeprefix(META))
    if name == "variants":
        return [
            {
                "latent_key": v.latent_key,
                "flip": v.flip,
                "crop_top": v.crop_top_left[0],
                "crop_left": v.crop_top_left[1],
                "target_hw": v.target_hw,
            }
            for v in row.variants
        ]
    return getattr(row, {"original_size_hw": "original_hw", "texts": "text_keys"}.get(name, name))


def read_row(row: dict[str, Any]) -> ManifestRow:
    """The row that Arrow gives as {column: value}."""
    variants = tuple(
        Variant(v["latent_key"], v["flip"], (v["crop_top"], v["crop_left"]), _pair(v["target_hw"]))
        for v in row["variants"]
    )
    return ManifestRow(
        dataset=row["dataset"],
        sample_id=row["sample_id"],
        path=row["path"],
        image_digest=row["image_digest"],
        original_hw=_pair(row["original_size_hw"]),
        bucket_hw=_pair(row["bucket_hw"]),
        variants=variants,
        text_keys=tuple(row["texts"]),
        split=row["split"],
        meta={
            name.removeprefix(META): tuple(value) if isinstance(value, list) else value
            for name, value in row.items()
            if name.startswith(META) and value is not None
        },
    )


def manifest_digest(settings: ManifestSettings, ordered: Iterable[ManifestRow]) -> str:
    """blake2b-256, hex, over the format version, the settings and the rows in order."""
    digest = hashlib.blake2b(digest_size=32)
    digest.update(msgpack.packb([MANIFEST_FORMAT, json.dumps(settings.as_json(), sort_keys=True)]))
    for row in ordered:
        variants = [[v.latent_key, v.flip, *v.crop_top_left, *v.target_hw] for v in row.variants]
        fields = [row.dataset, row.sample_id, row.path, row.image_digest, row.original_hw, row.bucket_hw]
        meta = [[row.meta.get(name) for name in sorted(settings.meta)]] if settings.meta else []
        digest.update(msgpack.packb([*fields, variants, row.text_keys, row.split, *meta], use_bin_type=True))
    return digest.hexdigest()


def _pair(values: Sequence[int]) -> tuple[int, int]:
    return values[0], values[1]
