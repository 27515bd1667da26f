"""What the benchmarks of training are run on: a store of random records, its manifest, and a UNet of a given shape.

No picture is encoded: trainers see a store alone, and its records are as large as encoded ones would be.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.full_size import BASE, SSD_1B
from shared.config import load_config
from shared.manifest import seal_manifest
from shared.manifest_rows import ManifestRow, ManifestSettings, Variant
from shared.record import encode_record
from shared.store import StoreWriter
from tests.stores import settings
from trainer.config import ExpertConfig
from trainer.run import Request

DOWNSCALE = 8
QUIET = ("log.trackers=[]", "eval.samples=0", "checkpoint.every=1000000", "checkpoint.keep_best=0")
RECIPE = ("name=bench", "timesteps={low=350, high=1000}", *QUIET)


@dataclass(frozen=True)
class Shape:
    """A UNet, the text that it takes, and the size of the pictures."""

    unet: Mapping[str, Any]
    text_widths: tuple[int, int]
    pooled_width: int
    size_px: int


def _unet(channels: tuple[int, ...], heads: tuple[int, ...], text_width: int, pooled_width: int) -> dict[str, Any]:
    return {
        "sample_size": 16,
        "norm_num_groups": 8,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "block_out_channels": channels,
        "attention_head_dim": heads,
        "transformer_layers_per_block": (1, 1, 1),
        "use_linear_projection": True,
        "cross_attention_dim": text_width,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": pooled_width + 6 * 8,
    }


SHAPES = {
    "tiny": Shape(_unet((16, 32, 48), (1, 2, 3), 56, 32), (24, 32), 32, 64),
    "20M": Shape(_unet((64, 128, 224), (1, 2, 4), 192, 128), (64, 128), 128, 128),
    "ssd-1b": Shape(SSD_1B, (768, 1280), 1280, 1024),
    "sdxl": Shape(BASE, (768, 1280), 1280, 1024),
}


@dataclass(frozen=True)
class World:
    """Where a store and a model lie."""

    folder: Path
    shape: Shape

    def request(self, output: Path, device: str, *sets: str) -> Request:
        """A run of the whole schedule's upper part on it."""
        config = load_config(ExpertConfig, [], [*RECIPE, *sets])
        return Request(config, self.folder / "store", "main", self.folder / "model", output, device)


def write_world(folder: Path, shape: Shape, count: int) -> World:
    """A store of `count` samples of one bucket, and a UNet with random weights."""
    edge, rng = shape.size_px // DOWNSCALE, np.random.default_rng(0)
    with StoreWriter(folder / "store") as store:
        null = _key("null")
        store.put_many([(null, _text(shape, null, rng))])
        for index in range(count):
            latents, text = _key("latents", index), _key("text", index)
            tensors = {name: _normal(rng, 4, edge, edge) for name in ("mean", "logvar")}
            records = [(latents, encode_record(latents, "latents", tensors, {})), (text, _text(shape, text, rng))]
            store.put_many(records)
    seal_manifest(folder / "store", "main", _settings(shape, null), [_row(shape, index) for index in range(count)])
    write_unet(folder / "model" / "unet", shape.unet)
    return World(folder, shape)


def write_unet(folder: Path, config: Mapping[str, Any]) -> None:
    """A UNet with the weights that its layers begin with."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    UNet2DConditionModel(**config).save_pretrained(folder, safe_serialization=True)


def _key(*parts: object) -> bytes:
    return blake2b(repr(parts).encode(), digest_size=16).digest()


def _normal(rng: np.random.Generator, *shape: int) -> Any:
    return rng.standard_normal(shape, np.float32).astype(np.float16)


def _text(shape: Shape, key: bytes, rng: np.random.Generator) -> bytes:
    embeds, pooled = _normal(rng, 77, sum(shape.text_widths)), _normal(rng, shape.pooled_width)
    return encode_record(key, "text", {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}, {"caption": "noise"})


def _settings(shape: Shape, null: bytes) -> ManifestSettings:
    widths = {"text_widths": shape.text_widths, "pooled_width": shape.pooled_width}
    return settings(("noise",), null_text_key=null.hex(), prompts={}, **widths)


def _row(shape: Shape, index: int) -> ManifestRow:
    size = (shape.size_px, shape.size_px)
    return ManifestRow(
        dataset="noise",
        sample_id=_key("sample", index),
        path=f"{index}.png",
        image_digest=blake2b(repr(index).encode(), digest_size=32).digest(),
        original_hw=size,
        bucket_hw=size,
        variants=(Variant(_key("latents", index), False, (0, 0), size),),
        text_keys=(_key("text", index),),
        split="train",
    )
