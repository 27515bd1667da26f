"""Files of SDXL's original layout taken apart: settings read off shapes, and every name back, at the full sizes."""

from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from shared.errors import DataError
from shared.original_layout import original_big_g, original_clip_l, original_unet, original_vae
from shared.original_reading import foreign_names, read_parts
from shared.original_settings import fitted
from shared.tensor_file import LazyTensor
from trainer.unet import choose_layout

LEVELS: dict[str, Any] = {
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "block_out_channels": [320, 640, 1280],
    "attention_head_dim": [5, 10, 20],
    "layers_per_block": 2,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "cross_attention_dim": 2048,
    "projection_class_embeddings_input_dim": 2816,
    "use_linear_projection": True,
}
BASE = LEVELS | {"transformer_layers_per_block": [1, 2, 10], "mid_block_type": "UNetMidBlock2DCrossAttn"}
UNEVEN = {
    "transformer_layers_per_block": [[1, 1], [2, 2], [4, 4]],
    "reverse_transformer_layers_per_block": [[4, 4, 10], [2, 1, 1], [1, 1, 1]],
}
SSD_1B = LEVELS | UNEVEN | {"mid_block_type": None}
ONE_RESNET = LEVELS | UNEVEN | {"mid_block_type": "UNetMidBlock2D"}
REFINER = BASE | {
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "block_out_channels": [384, 768, 1536, 1536],
    "attention_head_dim": [6, 12, 24, 24],
    "transformer_layers_per_block": 4,
    "cross_attention_dim": 1280,
    "projection_class_embeddings_input_dim": 2560,
}
VAE: dict[str, Any] = {
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [128, 256, 512, 512],
    "layers_per_block": 2,
    "latent_channels": 4,
    "scaling_factor": 0.13025,
    "force_upcast": True,
    "sample_size": 1024,
}
IDS = {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1}
CLIP_L = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
BIG_G = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20}
CLIPS = {
    "text_encoder": (CLIPTextModel, CLIP_L | IDS | {"projection_dim": 768, "hidden_act": "quick_gelu"}),
    "text_encoder_2": (CLIPTextModelWithProjection, BIG_G | IDS | {"projection_dim": 1280, "hidden_act": "gelu"}),
}
Tensors = dict[str, LazyTensor]


def lazily(build: Any) -> Tensors:
    """A model's tensors without bytes: it is wanted for its names and shapes."""
    with torch.device("meta"):
        return {name: LazyTensor("F16", tuple(t.shape), lambda: b"") for name, t in build().state_dict().items()}


def clip(part: str) -> Tensors:
    cls, config = CLIPS[part]
    tensors = lazily(lambda: cls(CLIPTextConfig(**config)))
    return {
        n if n.startswith(("text_model.", "text_projection.")) else f"text_model.{n}": t for n, t in tensors.items()
    }


def shapes(tensors: Tensors) -> dict[str, tuple[int, ...]]:
    return {name: tensor.shape for name, tensor in tensors.items()}


def unet(config: dict[str, Any]) -> Tensors:
    return lazily(lambda: UNet2DConditionModel(**config))


@pytest.fixture(scope="module")
def rest() -> Tensors:
    """What a base checkpoint holds beside its UNet, and what programs leave in such files."""
    tensors = original_vae(lazily(lambda: AutoencoderKL(**VAE)), VAE)
    tensors |= original_clip_l(clip("text_encoder")) | original_big_g(clip("text_encoder_2"), 1)
    one = LazyTensor("F32", (), lambda: b"")
    prefix = "conditioner.embedders."
    tensors |= {f"{prefix}1.model.logit_scale": one, f"{prefix}0.transformer.text_model.embeddings.position_ids": one}
    return tensors


@pytest.mark.parametrize("config", [BASE, SSD_1B, ONE_RESNET, REFINER], ids=["base", "ssd-1b", "one-resnet", "refiner"])
def test_a_unets_settings_and_names_are_read_off_the_full_size_file(config: dict[str, Any]) -> None:
    tensors = unet(config)
    part = read_parts(original_unet(tensors, config))["unet"]
    assert shapes(part.tensors) == shapes(tensors)
    assert shapes(unet(part.settings)) == shapes(tensors)  # diffusers builds the same UNet of what was read
    different = {key for key in config if part.settings[key] != config[key]}
    assert different <= {"transformer_layers_per_block"}  # 4 or [4, 4, 4, 4]
    assert choose_layout(part.settings, (768, 1280), 1280) == ("sdxl-refiner" if config is REFINER else "sdxl")
    assert (
        fitted("unet", part.settings, config)["transformer_layers_per_block"] == config["transformer_layers_per_block"]
    )


def test_vae_and_text_encoders_come_back_with_their_settings(rest: Tensors) -> None:
    parts = read_parts(original_unet(unet(SSD_1B), SSD_1B) | rest)
    assert parts.keys() == {"unet", "vae", "text_encoder", "text_encoder_2"}
    assert shapes(parts["vae"].tensors) == shapes(lazily(lambda: AutoencoderKL(**VAE)))
    assert VAE.items() <= parts["vae"].settings.items()
    for part, (cls, config) in CLIPS.items():
        read = parts[part]
        assert shapes(read.tensors) == shapes(clip(part))
        assert config.items() <= read.settings.items()
        defaults = CLIPTextConfig(**config)
        assert all(getattr(defaults, key) == value for key, value in read.settings.items() if key != "architectures")
        assert read.settings["architectures"] == [cls.__name__]


def test_a_refiners_text_encoder_is_the_second() -> None:
    tensors = original_unet(unet(REFINER), REFINER) | original_big_g(clip("text_encoder_2"), 0)
    parts = read_parts(tensors)
    assert parts.keys() == {"unet", "text_encoder_2"}
    assert shapes(parts["text_encoder_2"].tensors) == shapes(clip("text_encoder_2"))


def test_what_is_no_part_of_sdxl_is_told(rest: Tensors) -> None:
    one = LazyTensor("F32", (), lambda: b"")
    assert foreign_names(rest | {"v_pred": one, "ztsnr": one}) == []
    assert foreign_names(rest | {"model_ema.decay": one}) == ["model_ema.decay"]


ONE = LazyTensor("F32", (1, 1), lambda: b"")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model.diffusion_model.label_emb.0.0.weight": None}, "takes no sizes"),
        (
            {"model.diffusion_model.input_blocks.0.0.weight": LazyTensor("F16", (320, 9, 3, 3), bytes)},
            "takes 9 channels",
        ),
        ({"model.diffusion_model.time_machine.weight": ONE}, "time_machine.weight is no tensor of SDXL's"),
        ({"model.diffusion_model.input_blocks.1.0.out_layers.3.weight": None}, "its unet is not SDXL's: KeyError"),
        ({"first_stage_model.nonsense": ONE}, "its vae is not SDXL's|nonsense is no tensor"),
        ({"edm_mean": ONE}, "EDM's schedule"),
    ],
)
def test_another_model_is_one_line(change: dict[str, LazyTensor | None], words: str) -> None:
    tensors: dict[str, LazyTensor | None] = {**original_unet(unet(SSD_1B), SSD_1B), **change}
    with pytest.raises(DataError, match=words) as refused:
        read_parts({name: tensor for name, tensor in tensors.items() if tensor is not None})
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("name", ["lora_unet_input_blocks_4_1.lora_up.weight", "down_blocks.0.resnets.0.conv1.weight"])
def test_a_lora_or_a_unet_by_other_names_is_no_checkpoint(name: str) -> None:
    with pytest.raises(DataError, match=r"no tensor of it is called model\.diffusion_model\."):
        read_parts({name: ONE})


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"cross_attention_dim": 1280}, "cross_attention_dim 2048, the settings that it shall have 1280"),
        ({"transformer_layers_per_block": [1, 2, 10]}, "other transformer_layers_per_block"),
    ],
)
def test_settings_of_another_model_are_refused(given: dict[str, Any], words: str) -> None:
    read = read_parts(original_unet(unet(SSD_1B), SSD_1B))["unet"].settings
    with pytest.raises(DataError, match=words):
        fitted("unet", read, BASE | {"mid_block_type": None} | given)


def test_heads_of_other_widths_need_settings() -> None:
    read = {"hidden_size": 32}
    with pytest.raises(DataError, match="--model-config"):
        fitted("text_encoder", read, None)
    assert fitted("text_encoder", read, {"hidden_size": 32, "num_attention_heads": 2})["num_attention_heads"] == 2
