"""How a small model lies on disk: SDXL's diffusers layout, readable by old and new versions of the libraries.

A model folder holds tokenizer*/, text_encoder*/, vae/, unet/, scheduler/ and model_index.json. The heavy libraries are
imported where they are used, to keep `--help` quick.
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from demo.captions import WORDS

if TYPE_CHECKING:
    import torch

BOS, EOS = "<|startoftext|>", "<|endoftext|>"
TEXT_LENGTH = 77
SDXL_BLOCKS = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
}
BETAS = (0.00085, 0.012)  # SDXL's first and last
VAE_SCALING_FACTOR = 0.13025  # SDXL's: its latents spread by about 1/0.13025


def make_vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """A byte-level vocabulary in CLIP's order ("!" is 0, EOS last), where each word of the shapes is one token."""
    letters = [chr(code) for code in _byte_alphabet()]
    merges = _learn_merges(WORDS)
    tokens = [*letters, *(letter + "</w>" for letter in letters), *("".join(pair) for pair in merges), BOS, EOS]
    return {token: number for number, token in enumerate(dict.fromkeys(tokens))}, merges


def text_settings(vocabulary: Mapping[str, int], pad_token: str) -> dict[str, Any]:
    """What every text tower's config says of the vocabulary."""
    # The ids are named because the library's default for EOS is CLIP's 49407: with that, every prompt would be pooled
    # at the same place and look the same.
    ids = {"bos_token_id": vocabulary[BOS], "eos_token_id": vocabulary[EOS], "pad_token_id": vocabulary[pad_token]}
    return {"vocab_size": len(vocabulary), "max_position_embeddings": TEXT_LENGTH, **ids}


def write_tokenizer(folder: Path, pad_token: str) -> None:
    """The tokenizer of `make_vocabulary`."""
    # Written by hand: transformers 5 saves tokenizer.json alone, which transformers 4 cannot read back.
    vocabulary, merges = make_vocabulary()
    special = {"bos_token": BOS, "eos_token": EOS, "unk_token": EOS, "pad_token": pad_token}
    settings = {"add_prefix_space": False, "do_lower_case": True, "errors": "replace", "model_max_length": TEXT_LENGTH}
    write_json(folder / "vocab.json", vocabulary)
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    write_json(folder / "special_tokens_map.json", special)
    write_json(folder / "tokenizer_config.json", {**settings, **special, "tokenizer_class": "CLIPTokenizer"})


def write_transformer(folder: Path, class_name: str, config: Any, weights: "Mapping[str, torch.Tensor]") -> None:
    """A model of transformers: its config, and weights by the names that versions 4 and 5 both read."""
    config.architectures = [class_name]
    config.save_pretrained(folder)
    write_weights(folder / "model.safetensors", weights)


def text_name(name: str) -> str:
    """The published name of a text tower's tensor.

    transformers 5 drops the prefix, transformers 4 needs it (it would keep random weights and only warn), and both read
    the prefixed ones.
    """
    return name if name.startswith(("text_model.", "text_projection.")) else f"text_model.{name}"


def write_diffusers_model(
    folder: Path, class_name: str, config: Mapping[str, Any], weights: "Mapping[str, torch.Tensor]"
) -> None:
    """A model of diffusers: its config and weights."""
    write_json(folder / "config.json", {"_class_name": class_name, **config})
    write_weights(folder / "diffusion_pytorch_model.safetensors", weights)


def write_weights(path: Path, weights: "Mapping[str, torch.Tensor]") -> None:
    """A safetensors file."""
    from safetensors.torch import save

    # Written as bytes because the library's save_file (0.8) makes files that their owner alone may read. The "pt" is
    # what the model libraries themselves write.
    path.write_bytes(save(dict(weights), metadata={"format": "pt"}))


def write_scheduler(folder: Path, **settings: object) -> None:
    """SDXL's schedule; `settings` say what is predicted and how steps are placed."""
    from diffusers import EulerDiscreteScheduler

    betas = {"beta_schedule": "scaled_linear", "beta_start": BETAS[0], "beta_end": BETAS[1]}
    EulerDiscreteScheduler(**betas, **{"steps_offset": 1, **settings}).save_config(folder)


def write_json(path: Path, content: Mapping[str, object]) -> None:
    """A JSON file, its folder made if missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def unet_settings(pooled_width: int, id_width: int, time_ids: int) -> dict[str, Any]:
    """What UNets of the SDXL family have in common, at one layer a block."""
    return {
        "layers_per_block": 1,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": id_width,
        "projection_class_embeddings_input_dim": pooled_width + time_ids * id_width,
    }


def base_index() -> dict[str, object]:
    """model_index.json of SDXL base."""
    return {
        "_class_name": "StableDiffusionXLPipeline",
        "force_zeros_for_empty_prompt": True,
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        **_shared_index(),
    }


def refiner_index() -> dict[str, object]:
    """model_index.json of the stock refiner."""
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
