"""Write a tiny model in SDXL's diffusers layout, with random weights: what tests need of a model, in a second.

`python -m demo.tiny_model OUT` writes what `cache-build` (VAE, text encoders) and `train-expert` (UNet) are given as
their model folder. Widths differ wherever SDXL lets them (32 and 64 columns of text, 48 of pooled text), so that a
mix-up of two tensors shows as a wrong shape. The model that draws is another one: demo/model, made by `train_tiny`.

Every tensor is a function of (seed, component, tensor name), so a refiner written with the base's seed shares its VAE
and its second text encoder.
"""

import hashlib
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from demo.model_files import (
    EOS,
    SDXL_BLOCKS,
    VAE_SCALING_FACTOR,
    base_index,
    make_vocabulary,
    refiner_index,
    text_name,
    text_settings,
    unet_settings,
    write_diffusers_model,
    write_json,
    write_scheduler,
    write_tokenizer,
    write_transformer,
)
from demo.shapes import OneLineParser

if TYPE_CHECKING:
    import torch

UnetLayout = Literal["sdxl", "sdxl-refiner"]
UNET_LAYOUTS: tuple[UnetLayout, ...] = ("sdxl", "sdxl-refiner")

TEXT_WIDTHS = (32, 64)
POOLED_WIDTH = 48
TIME_ID_WIDTH = 8

# The real VAE's latents spread with a far smaller posterior noise. The gain brings this random encoder there; the
# decoder's first layer takes it out again.
VAE_MEAN_GAIN = 45.0
VAE_LOGVAR = -10.0


def write_tiny_model(out: Path, seed: int = 0, unet_layout: UnetLayout = "sdxl") -> Path:
    """Write the model's folders into `out`, over those that are there.

    The layout "sdxl-refiner" is the stock refiner's: no first tokenizer and text encoder, five time ids, and a pipeline
    that encodes the empty prompt instead of zeroing it.
    """
    is_base = unet_layout == "sdxl"
    if is_base:
        write_tokenizer(out / "tokenizer", pad_token=EOS)
        _write_text_encoder(out / "text_encoder", seed)
    write_tokenizer(out / "tokenizer_2", pad_token="!")
    _write_text_encoder_2(out / "text_encoder_2", seed)
    _write_vae(out / "vae", seed)
    _write_unet(out / "unet", seed, _sdxl_unet() if is_base else _refiner_unet())
    write_scheduler(out / "scheduler", timestep_spacing="leading", prediction_type="epsilon")
    write_json(out / "model_index.json", base_index() if is_base else refiner_index())
    return out


def main(arguments: Sequence[str] | None = None) -> int:
    """The door of `python -m demo.tiny_model`."""
    parser = OneLineParser(prog="demo.tiny_model", description="Write a tiny SDXL-layout model with random weights.")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to write into; made if missing")
    parser.add_argument("--seed", type=int, default=0, help="another seed, other weights (default: %(default)s)")
    parser.add_argument("--unet-layout", choices=UNET_LAYOUTS, default="sdxl", help="default: %(default)s")
    options = parser.parse_args(arguments)
    try:
        write_tiny_model(options.out, options.seed, options.unet_layout)
    except OSError as error:
        parser.error(f"cannot write to {options.out}: {error.strerror or error}")
    print(f"tiny {options.unet_layout} model in {options.out}")
    return 0


def random_weights(seed: int, component: str, build: Callable[[], Any]) -> dict[str, "torch.Tensor"]:
    """Weights for the model that `build` makes: normalisations at one, biases at zero, the rest drawn."""
    import torch

    with torch.device("meta"):  # the model is wanted for its names and shapes alone
        empty = build().state_dict()
    return {name: _random_tensor(f"{seed} {component} {name}", tensor.shape) for name, tensor in empty.items()}


def _random_tensor(label: str, shape: "torch.Size") -> "torch.Tensor":
    import torch

    if len(shape) == 1:
        return torch.full(shape, 0.0 if label.endswith("bias") else 1.0)
    digest = hashlib.blake2b(label.encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)
    # Uniform, as torch's own layers begin; uniform draws also have the same bits on every processor, normal ones not.
    return (2 * torch.rand(shape, generator=generator) - 1) / math.sqrt(math.prod(shape[1:]))


def _write_text_encoder(folder: Path, seed: int) -> None:
    from transformers import CLIPTextModel

    _write_text_tower(folder, seed, CLIPTextModel, EOS, TEXT_WIDTHS[0], TEXT_WIDTHS[0], (2, 2), "quick_gelu")


def _write_text_encoder_2(folder: Path, seed: int) -> None:
    from transformers import CLIPTextModelWithProjection

    _write_text_tower(folder, seed, CLIPTextModelWithProjection, "!", TEXT_WIDTHS[1], POOLED_WIDTH, (3, 4), "gelu")


def _write_text_tower(
    folder: Path, seed: int, cls: Any, pad_token: str, width: int, projection: int, depth: tuple[int, int], act: str
) -> None:
    from transformers import CLIPTextConfig

    sizes = {"hidden_size": width, "intermediate_size": 2 * width, "projection_dim": projection}
    layers = {"num_hidden_layers": depth[0], "num_attention_heads": depth[1], "hidden_act": act}
    config = CLIPTextConfig(**text_settings(make_vocabulary()[0], pad_token), **sizes, **layers)
    weights = random_weights(seed, folder.name, lambda: cls(config))
    write_transformer(folder, cls.__name__, config, {text_name(name): tensor for name, tensor in weights.items()})


def _write_vae(folder: Path, seed: int) -> None:
    from diffusers import AutoencoderKL

    config = _vae_config()
    weights = random_weights(seed, "vae", lambda: AutoencoderKL(**config))
    channels = config["latent_channels"]
    weights["quant_conv.weight"][:channels] *= VAE_MEAN_GAIN
    weights["quant_conv.bias"][channels:] = VAE_LOGVAR
    weights["post_quant_conv.weight"] /= VAE_MEAN_GAIN
    write_diffusers_model(folder, "AutoencoderKL", config, weights)


def _write_unet(folder: Path, seed: int, config: dict[str, Any]) -> None:
    from diffusers import UNet2DConditionModel

    weights = random_weights(seed, "unet", lambda: UNet2DConditionModel(**config))
    write_diffusers_model(folder, "UNet2DConditionModel", config, weights)


def _vae_config() -> dict[str, Any]:
    return {
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "block_out_channels": (8, 16, 16, 32),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "latent_channels": 4,
        "sample_size": 128,
        "scaling_factor": VAE_SCALING_FACTOR,
        "force_upcast": True,
    }


def _sdxl_unet() -> dict[str, Any]:
    return {
        "sample_size": 16,
        "norm_num_groups": 8,
        **SDXL_BLOCKS,
        "block_out_channels": (16, 32, 48),
        "attention_head_dim": (1, 2, 3),
        "transformer_layers_per_block": (1, 1, 1),
        "cross_attention_dim": sum(TEXT_WIDTHS),
        **unet_settings(POOLED_WIDTH, TIME_ID_WIDTH, time_ids=6),
    }


def _refiner_unet() -> dict[str, Any]:
    return {
        "sample_size": 16,
        "norm_num_groups": 8,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "block_out_channels": (16, 24, 32, 32),
        "attention_head_dim": (2, 2, 2, 2),
        "transformer_layers_per_block": 1,
        "cross_attention_dim": TEXT_WIDTHS[1],
        **unet_settings(POOLED_WIDTH, TIME_ID_WIDTH, time_ids=5),
    }


if __name__ == "__main__":
    sys.exit(main())
