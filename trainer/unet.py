"""The only door to UNet2DConditionModel: loads an expert's UNet, tells its layout, and feeds it in that layout."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shared.conditioning import Layout, PromptEmbeds, layout_embeds, layout_time_ids
from shared.errors import ContractError, DataError
from shared.weights import find_weights, read_component_config, weights_digest, weights_variant
from trainer.adapter import use_adapter

# Settings that change what the same tensors compute, with the defaults of versions that do not write them.
_SETTINGS = {
    "act_fn": "silu",
    "attention_head_dim": 8,
    "num_attention_heads": None,
    "addition_time_embed_dim": None,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "norm_eps": 1e-5,
    "norm_num_groups": 32,
    "down_block_types": None,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "up_block_types": None,
    "resnet_time_scale_shift": "default",
}


def read_unet_config(folder: Path) -> dict[str, Any]:
    """The settings in a UNet's folder; raises DataError where it is not a UNet2DConditionModel in safetensors."""
    find_weights(folder)
    config = read_component_config(folder)
    if config.get("_class_name") != "UNet2DConditionModel":
        raise DataError(f"{folder} is a {config.get('_class_name')}, not a UNet2DConditionModel")
    return config


def unet_digest(folder: Path) -> str:
    """Digest of a UNet's weights, hex."""
    return weights_digest(folder, _SETTINGS)


def choose_layout(config: dict[str, Any], text_widths: tuple[int, int], pooled_width: int) -> Layout:
    """The layout in which this UNet takes embeds of these widths; raises ContractError where it takes none."""
    if config.get("addition_embed_type") != "text_time":
        raise ContractError("the UNet takes no size conditioning (addition_embed_type is not 'text_time'): not SDXL")
    id_width = int(config.get("addition_time_embed_dim") or 0)
    takes = (config.get("cross_attention_dim"), config.get("projection_class_embeddings_input_dim"))
    layouts: dict[Layout, tuple[int, int]] = {
        "sdxl": (sum(text_widths), pooled_width + 6 * id_width),
        "sdxl-refiner": (text_widths[1], pooled_width + 5 * id_width),
    }
    for layout, needs in layouts.items():
        if takes == needs:
            return layout
    raise ContractError(
        f"the UNet takes text {takes[0]} wide (and {takes[1]} of pooled text and sizes); the store holds text "
        f"{text_widths[0]} + {text_widths[1]} wide, pooled {pooled_width}: they are of different models"
    )


def load_unet(folder: Path, device: torch.device, dtype: torch.dtype = torch.float32) -> Any:
    """The UNet in `folder` on `device`, in evaluation mode; raises DataError where tensors are missing."""
    from diffusers import UNet2DConditionModel

    variant = weights_variant(folder)
    unet, report = UNet2DConditionModel.from_pretrained(
        folder, use_safetensors=True, variant=variant, dtype=dtype, output_loading_info=True
    )
    if report["missing_keys"]:
        raise DataError(f"{folder} lacks weights of {sorted(report['missing_keys'])[0]}: the folder is incomplete")
    return unet.to(device).eval()


def unet_on_meta(config: dict[str, Any], dtype: torch.dtype = torch.float32) -> Any:
    """A UNet of these settings without weights, to be counted and measured."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        return UNet2DConditionModel.from_config(config).to(dtype)


@dataclass(frozen=True)
class ConditionedUnet:
    """A UNet behind SDXL-layout inputs: text and time_ids are cut to what its own layout takes."""

    unet: Any
    layout: Layout
    refiner_width: int  # columns of prompt_embeds that are the second text encoder's
    adapter: str | None = None  # of several on one UNet, the one that is meant

    @cached_property  # asked in every step, and looked for in the tree of layers
    def dtype(self) -> torch.dtype:
        """The dtype of its weights."""
        dtype: torch.dtype = next(iter(self.unet.parameters())).dtype
        return dtype

    def __call__(self, x: Tensor, t: Tensor, text: PromptEmbeds, time_ids: Tensor, aesthetic_score: float) -> Tensor:
        """Output [B, 4, h, w] at x [B, 4, h, w] and t [B], for SDXL-layout text and time_ids [B, 6].

        Text goes in the dtype of x: under autocast the layers choose, elsewhere it is the weights' own.
        """
        added = {
            "text_embeds": text.pooled_prompt_embeds.to(x.dtype),
            "time_ids": layout_time_ids(self.layout, time_ids, aesthetic_score),
        }
        if self.adapter is not None:
            use_adapter(self.unet, self.adapter)
        states = layout_embeds(self.layout, text.prompt_embeds, self.refiner_width).to(x.dtype)
        output: Tensor = self.unet(x, t, encoder_hidden_states=states, added_cond_kwargs=added, return_dict=False)[0]
        return output
