"""Write a tiny model in SDXL's diffusers layout, with random weights: the start model of the small world.

`python -m demo.tiny_model OUT` writes what `cache-build` (VAE, text encoders) and `train-expert` (UNet) are given as
their model folder. Widths differ wherever SDXL lets them (32 and 64 columns of text, 48 of pooled text), so that a
mix-up of two tensors shows as a wrong shape.

Every tensor is a function of (seed, component, tensor name), so a refiner written with the base's seed shares its VAE
and its second text encoder. The heavy libraries are imported where they are used, to keep `--help` quick.
"""

import hashlib
import json
import math
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from demo.captions import WORDS
from demo.shapes import OneLineParser

if TYPE_CHECKING:
    import torch

UnetLayout = Literal["sdxl", "sdxl-refiner"]
UNET_LAYOUTS: tuple[UnetLayout, ...] = ("sdxl", "sdxl-refiner")

BOS, EOS = "<|startoftext|>", "<|endoftext|>"
TEXT_LENGTH = 77
TEXT_WIDTHS = (32, 64)
POOLED_WIDTH = 48
TIME_ID_WIDTH = 8

# The real VAE's latents, before its scaling factor, spread by about 1/0.13025 with a far smaller posterior noise.
# The gain brings this random encoder there; the decoder's first layer takes it out again.
VAE_SCALING_FACTOR = 0.13025
VAE_MEAN_GAIN = 45.0
VAE_LOGVAR = -10.0


def write_tiny_model(out: Path, seed: int = 0, unet_layout: UnetLayout = "sdxl") -> Path:
    """Write the model's folders into `out`, over those that are there.

    The layout "sdxl-refiner" is the stock refiner's: no first tokenizer and text encoder, five time ids, and a pipeline
    that encodes the empty prompt instead of zeroing it.
    """
    is_base = unet_layout == "sdxl"
    vocabulary, merges = make_vocabulary()
    if is_base:
        _write_tokenizer(out / "tokenizer", vocabulary, merges, pad_token=EOS)
        _write_text_encoder(out / "text_encoder", seed, vocabulary, pad_token=EOS)
    _write_tokenizer(out / "tokenizer_2", vocabulary, merges, pad_token="!")
    _write_text_encoder_2(out / "text_encoder_2", seed, vocabulary, pad_token="!")
    _write_vae(out / "vae", seed)
    _write_unet(out / "unet", seed, _sdxl_unet() if is_base else _refiner_unet())
    _write_scheduler(out / "scheduler")
    _write_json(out / "model_index.json", _base_index() if is_base else _refiner_index())
    return out


def make_vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """A byte-level vocabulary in CLIP's order ("!" is 0, EOS last), where each word of the shapes is one token."""
    letters = [chr(code) for code in _byte_alphabet()]
    merges = _learn_merges(WORDS)
    tokens = [*letters, *(letter + "</w>" for letter in letters), *("".join(pair) for pair in merges), BOS, EOS]
    return {token: number for number, token in enumerate(dict.fromkeys(tokens))}, merges


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


def _byte_alphabet() -> list[int]:
    """Code points that stand for the 256 bytes in CLIP's vocabulary: printable ones as they are, the rest from 256."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    return [*printable, *range(256, 256 + 256 - len(printable))]


def _learn_merges(words: Sequence[str]) -> list[tuple[str, str]]:
    """Byte-pair encoding as it was meant: join the most frequent pair until every word is one token."""
    spellings = [(*word[:-1], word[-1] + "</w>") for word in words]
    merges = []
    while pairs := Counter(pair for spelling in spellings for pair in pairwise(spelling)):
        best = max(sorted(pairs), key=pairs.__getitem__)
        merges.append(best)
        spellings = [_joined(spelling, best) for spelling in spellings]
    return merges


def _joined(spelling: tuple[str, ...], pair: tuple[str, str]) -> tuple[str, ...]:
    parts: list[str] = []
    for part in spelling:
        if parts and (parts[-1], part) == pair:
            parts[-1] += part
        else:
            parts.append(part)
    return tuple(parts)


def _write_tokenizer(
    folder: Path, vocabulary: Mapping[str, int], merges: Sequence[tuple[str, str]], pad_token: str
) -> None:
    # Written by hand: transformers 5 saves tokenizer.json alone, which transformers 4 cannot read back.
    special = {"bos_token": BOS, "eos_token": EOS, "unk_token": EOS, "pad_token": pad_token}
    settings = {"add_prefix_space": False, "do_lower_case": True, "errors": "replace", "model_max_length": TEXT_LENGTH}
    _write_json(folder / "vocab.json", vocabulary)
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    _write_json(folder / "special_tokens_map.json", special)
    _write_json(folder / "tokenizer_config.json", {**settings, **special, "tokenizer_class": "CLIPTokenizer"})


def _text_config(vocabulary: Mapping[str, int], pad_token: str, **settings: object) -> dict[str, Any]:
    # The ids are named because the library's default for EOS is CLIP's 49407: with that, every prompt would be pooled
    # at the same place and look the same.
    ids = {"bos_token_id": vocabulary[BOS], "eos_token_id": vocabulary[EOS], "pad_token_id": vocabulary[pad_token]}
    return {"vocab_size": len(vocabulary), "max_position_embeddings": TEXT_LENGTH, **ids, **settings}


def _write_text_encoder(folder: Path, seed: int, vocabulary: Mapping[str, int], pad_token: str) -> None:
    from transformers import CLIPTextConfig, CLIPTextModel

    width = TEXT_WIDTHS[0]
    sizes = {"hidden_size": width, "intermediate_size": 2 * width, "projection_dim": width}
    depth = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_act": "quick_gelu"}
    config = CLIPTextConfig(**_text_config(vocabulary, pad_token, **sizes, **depth))
    _write_transformer(folder, seed, CLIPTextModel, config)


def _write_text_encoder_2(folder: Path, seed: int, vocabulary: Mapping[str, int], pad_token: str) -> None:
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    width = TEXT_WIDTHS[1]
    sizes = {"hidden_size": width, "intermediate_size": 2 * width, "projection_dim": POOLED_WIDTH}
    depth = {"num_hidden_layers": 3, "num_attention_heads": 4, "hidden_act": "gelu"}
    config = CLIPTextConfig(**_text_config(vocabulary, pad_token, **sizes, **depth))
    _write_transformer(folder, seed, CLIPTextModelWithProjection, config)


def _write_transformer(folder: Path, seed: int, model_class: Any, config: Any) -> None:
    config.architectures = [model_class.__name__]
    config.save_pretrained(folder)
    # transformers 5 drops the prefix of these names, transformers 4 needs it (it would keep random weights and only
    # warn), and both read the prefixed ones, which are also the published model's.
    weights = _random_weights(seed, folder.name, lambda: model_class(config))
    _write_weights(folder / "model.safetensors", {_prefixed(name): tensor for name, tensor in weights.items()})


def _prefixed(name: str) -> str:
    return name if name.startswith(("text_model.", "text_projection.")) else f"text_model.{name}"


def _write_vae(folder: Path, seed: int) -> None:
    from diffusers import AutoencoderKL

    config = _vae_config()
    weights = _random_weights(seed, "vae", lambda: AutoencoderKL(**config))
    channels = config["latent_channels"]
    weights["quant_conv.weight"][:channels] *= VAE_MEAN_GAIN
    weights["quant_conv.bias"][channels:] = VAE_LOGVAR
    weights["post_quant_conv.weight"] /= VAE_MEAN_GAIN
    _write_diffusers_model(folder, "AutoencoderKL", config, weights)


def _write_unet(folder: Path, seed: int, config: dict[str, Any]) -> None:
    from diffusers import UNet2DConditionModel

    weights = _random_weights(seed, "unet", lambda: UNet2DConditionModel(**config))
    _write_diffusers_model(folder, "UNet2DConditionModel", config, weights)


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
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "block_out_channels": (16, 32, 48),
        "attention_head_dim": (1, 2, 3),
        "transformer_layers_per_block": (1, 1, 1),
        "cross_attention_dim": sum(TEXT_WIDTHS),
        **_both_unets(time_ids=6),
    }


def _refiner_unet() -> dict[str, Any]:
    return {
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "block_out_channels": (16, 24, 32, 32),
        "attention_head_dim": (2, 2, 2, 2),
        "transformer_layers_per_block": 1,
        "cross_attention_dim": TEXT_WIDTHS[1],
        **_both_unets(time_ids=5),
    }


def _both_unets(time_ids: int) -> dict[str, Any]:
    return {
        "sample_size": 16,
        "layers_per_block": 1,
        "norm_num_groups": 8,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": TIME_ID_WIDTH,
        "projection_class_embeddings_input_dim": POOLED_WIDTH + time_ids * TIME_ID_WIDTH,
    }


def _write_scheduler(folder: Path) -> None:
    from diffusers import EulerDiscreteScheduler

    betas = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    steps = {"timestep_spacing": "leading", "steps_offset": 1, "prediction_type": "epsilon"}
    EulerDiscreteScheduler(**betas, **steps).save_config(folder)


def _base_index() -> dict[str, object]:
    return {
        "_class_name": "StableDiffusionXLPipeline",
        "force_zeros_for_empty_prompt": True,
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        **_shared_index(),
    }


def _refiner_index() -> dict[str, object]:
    return {
        "_class_name": "StableDiffusionXLImg2ImgPipeline",
        "force_zeros_for_empty_prompt": False,
        "requires_aesthetics_score": True,
        "text_encoder": [None, None],
        "tokenizer": [None, None],
        **_shared_index(),
    }


def _shared_index() -> dict[str, object]:
    return {
        "scheduler": ["diffusers", "EulerDiscreteScheduler"],
        "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
        "tokenizer_2": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }


def _random_weights(seed: int, component: str, build: Callable[[], Any]) -> dict[str, "torch.Tensor"]:
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


def _write_diffusers_model(
    folder: Path, class_name: str, config: Mapping[str, Any], weights: "dict[str, torch.Tensor]"
) -> None:
    _write_json(folder / "config.json", {"_class_name": class_name, **config})
    _write_weights(folder / "diffusion_pytorch_model.safetensors", weights)


def _write_weights(path: Path, weights: "dict[str, torch.Tensor]") -> None:
    from safetensors.torch import save

    # Written as bytes because the library's save_file (0.8) makes files that their owner alone may read. The "pt" is
    # what the model libraries themselves write.
    path.write_bytes(save(weights, metadata={"format": "pt"}))


def _write_json(path: Path, content: Mapping[str, object]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
