"""Settings of SDXL's parts, read off the shapes in a file of the original layout, which holds tensors and no settings.

Shapes give widths, depths and blocks. What they cannot give (heads, groups of the norms) is the same in SDXL, its
refiner, SSD-1B and whatever was trained from them; `fitted` takes it from somebody's config.json where it is not.
"""

import re
from collections.abc import Mapping
from typing import Any

from shared.errors import DataError

HEAD_WIDTH = 64  # channels of an attention head, in every UNet and text encoder of the family
Shapes = Mapping[str, tuple[int, ...]]  # by original name, without the part's prefix
_CROSS = "CrossAttn"
# What shapes do tell of each part, and a config.json must agree with.
_TOLD = {
    "unet": (
        "in_channels", "out_channels", "block_out_channels", "layers_per_block", "down_block_types", "up_block_types",
        "mid_block_type", "cross_attention_dim", "projection_class_embeddings_input_dim", "addition_embed_type",
        "use_linear_projection",
    ),
    "vae": ("block_out_channels", "layers_per_block", "latent_channels", "in_channels", "out_channels"),
    "text_encoder": ("hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size", "max_position_embeddings"),
    "text_encoder_2": (
        "hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size", "max_position_embeddings",
        "projection_dim",
    ),
}  # fmt: skip


def unet_settings(shapes: Shapes) -> dict[str, Any]:
    """config.json of a UNet; raises DataError where it is none of the SDXL family."""
    if "label_emb.0.0.weight" not in shapes:
        raise DataError("its UNet takes no sizes and no pooled text (label_emb): not SDXL's")
    ends = [n for n in _numbers(shapes, "input_blocks") if f"input_blocks.{n}.0.op.weight" in shapes]
    if not ends:
        raise DataError("its UNet has one level: not SDXL's")
    depth, levels = ends[0] - 1, len(ends) + 1
    downs = [
        [_layers(shapes, f"input_blocks.{1 + b * (depth + 1) + n}.1") for n in range(depth)] for b in range(levels)
    ]
    ups = [[_layers(shapes, f"output_blocks.{b * (depth + 1) + n}.1") for n in range(depth + 1)] for b in range(levels)]
    widths = [shapes[f"input_blocks.{1 + b * (depth + 1)}.0.out_layers.3.weight"][0] for b in range(levels)]
    attention = next(name for name in shapes if name.endswith(".attn2.to_k.weight"))
    return {
        "_class_name": "UNet2DConditionModel",
        "act_fn": "silu",
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "attention_head_dim": [width // HEAD_WIDTH for width in widths],
        "block_out_channels": widths,
        "cross_attention_dim": shapes[attention][1],
        "down_block_types": [f"{_CROSS if any(own) else ''}DownBlock2D" for own in downs],
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "in_channels": shapes["input_blocks.0.0.weight"][1],
        "layers_per_block": depth,
        "mid_block_type": _mid_block(shapes),
        "norm_eps": 1e-05,
        "norm_num_groups": 32,
        "out_channels": shapes["out.2.weight"][0],
        "projection_class_embeddings_input_dim": shapes["label_emb.0.0.weight"][1],
        "resnet_time_scale_shift": "default",
        "sample_size": 128,
        "up_block_types": [f"{_CROSS if any(own) else ''}UpBlock2D" for own in ups],
        "use_linear_projection": len(shapes[attention.partition("transformer_blocks.")[0] + "proj_in.weight"]) == 2,
        **_transformer_layers(downs, ups, _layers(shapes, "middle_block.1")),
    }


def vae_settings(shapes: Shapes) -> dict[str, Any]:
    """config.json of a VAE."""
    levels = len(_numbers(shapes, "encoder.down"))
    return {
        "_class_name": "AutoencoderKL",
        "act_fn": "silu",
        "block_out_channels": [shapes[f"encoder.down.{level}.block.0.conv2.weight"][0] for level in range(levels)],
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "force_upcast": True,
        "in_channels": shapes["encoder.conv_in.weight"][1],
        "latent_channels": shapes["decoder.conv_in.weight"][1],
        "layers_per_block": len(_numbers(shapes, "encoder.down.0.block")),
        "mid_block_add_attention": "encoder.mid.attn_1.q.weight" in shapes,
        "norm_num_groups": 32,
        "out_channels": shapes["decoder.conv_out.weight"][0],
        "sample_size": 1024,
        "scaling_factor": 0.13025,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "use_post_quant_conv": "post_quant_conv.weight" in shapes,
        "use_quant_conv": "quant_conv.weight" in shapes,
    }


def clip_settings(shapes: Shapes) -> dict[str, Any]:
    """config.json of a text encoder, from shapes by transformers' names: the second has a projection."""
    vocabulary, width = shapes["text_model.embeddings.token_embedding.weight"]
    projection = shapes.get("text_projection.weight")
    return {
        "architectures": ["CLIPTextModelWithProjection" if projection else "CLIPTextModel"],
        "bos_token_id": 0,
        "eos_token_id": 2,  # as published: the libraries then pool at the highest id, which is the end's
        "hidden_act": "gelu" if projection else "quick_gelu",
        "hidden_size": width,
        "intermediate_size": shapes["text_model.encoder.layers.0.mlp.fc1.weight"][0],
        "layer_norm_eps": 1e-05,
        "max_position_embeddings": shapes["text_model.embeddings.position_embedding.weight"][0],
        "model_type": "clip_text_model",
        "num_attention_heads": width // HEAD_WIDTH,
        "num_hidden_layers": len(_numbers(shapes, "text_model.encoder.layers")),
        "pad_token_id": 1,
        "projection_dim": projection[0] if projection else width,
        "vocab_size": vocabulary,
    }


def fitted(part: str, read: Mapping[str, Any], given: Mapping[str, Any] | None) -> dict[str, Any]:
    """The settings of a part: as `read` off its shapes, in all else as somebody's config.json has them.

    Raises DataError where that is of another model, or is needed: heads of other widths than SDXL's are in no shape.
    """
    if given is None:
        widths = read.get("block_out_channels", [read.get("hidden_size", 0)])
        if part != "vae" and any(width % HEAD_WIDTH for width in widths):
            raise DataError(
                f"its {part} is {widths} wide, so its heads are not SDXL's: name its settings, --model-config"
            )
        return dict(read)
    for key in _TOLD[part]:
        if key in given and _plain(given[key]) != _plain(read[key]):
            raise DataError(f"its {part} has {key} {read[key]}, the settings that it shall have {given[key]}")
    if part == "unet" and attention_counts(dict(read) | dict(given)) != attention_counts(read):
        raise DataError("its unet has other transformer_layers_per_block than the settings that it shall have")
    return dict(read) | dict(given)


def _transformer_layers(downs: list[list[int]], ups: list[list[int]], mid: int) -> dict[str, Any]:
    """How many transformer layers each block has, as short as diffusers has it: by level where levels are even."""
    is_even = all(len(set(own)) == 1 for own in downs)
    is_even = is_even and ups == [[own[0]] * len(ups[0]) for own in reversed(downs)]
    downs = [[max(count, 1) for count in own] for own in downs[:-1]] + [[count or mid or 1 for count in downs[-1]]]
    if mid not in (0, downs[-1][0]):  # the middle has as many as the last level's first
        raise DataError(
            f"its UNet has {mid} transformer layers in the middle, {downs[-1][0]} before: no settings say that"
        )
    if is_even:
        return {"transformer_layers_per_block": [own[0] for own in downs]}
    return {
        "transformer_layers_per_block": downs,
        "reverse_transformer_layers_per_block": [[max(count, 1) for count in own] for own in ups],
    }


def attention_counts(config: Mapping[str, Any]) -> tuple[list[list[int]], list[list[int]]]:
    """Transformer layers of every block of a UNet, on the way down and up, 0 where it has no attention."""
    depth, downs = int(config["layers_per_block"]), config.get("transformer_layers_per_block", 1)
    downs = [downs] * len(config["down_block_types"]) if isinstance(downs, int) else downs
    ups = config.get("reverse_transformer_layers_per_block") or downs[::-1]

    def spread(counts: Any, kinds: Any, layers: int) -> list[list[int]]:
        each = [list(own) if isinstance(own, list | tuple) else [own] * layers for own in counts]
        return [own if kind.startswith(_CROSS) else [0] * layers for own, kind in zip(each, kinds, strict=True)]

    return spread(downs, config["down_block_types"], depth), spread(ups, config["up_block_types"], depth + 1)


def _mid_block(shapes: Shapes) -> str | None:
    """SSD-1B has none, its kin a middle of one resnet."""
    if _layers(shapes, "middle_block.1"):
        return "UNetMidBlock2DCrossAttn"
    return "UNetMidBlock2D" if "middle_block.0.in_layers.0.weight" in shapes else None


def _layers(shapes: Shapes, block: str) -> int:
    return len(_numbers(shapes, f"{block}.transformer_blocks"))


def _numbers(shapes: Shapes, path: str) -> list[int]:
    """The numbers that stand after a path, in order."""
    pattern = re.compile(re.escape(path) + r"\.(\d+)\.")
    return sorted({int(found[1]) for name in shapes if (found := pattern.match(name))})


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
