"""The only door to the two CLIP towers: captions to SDXL-layout embeds, and which encoders and tokenizers they are."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shared.conditioning import TEXT_LENGTH
from shared.errors import DataError
from shared.weights import (
    bytes_digest,
    find_weights,
    read_component_config,
    read_json_object,
    weights_digest,
    weights_variant,
)

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from shared.conditioning import PromptEmbeds

_TOWERS = ("text_encoder", "text_encoder_2")
_TOKENIZERS = ("tokenizer", "tokenizer_2")

_SETTINGS = {
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
    "num_attention_heads": 12,
    "max_position_embeddings": 77,
    "eos_token_id": 2,  # the pooled vector is taken there
}


@dataclass(frozen=True)
class TextFacts:
    """What a store must know of the text encoders that filled it."""

    digests: dict[str, str]  # by folder of the model, blake2b-256, hex
    widths: tuple[int, int]  # columns that each tower gives to prompt_embeds
    pooled_width: int


@dataclass(frozen=True)
class TokenCount:
    """How long a caption is, in tokens without start and end marks, and whether it did not fit."""

    tokens: int
    truncated: bool


def read_text_facts(model: Path) -> TextFacts:
    """Facts of MODEL's encoders and tokenizers, without loading them.

    Raises DataError where one is missing, or a tokenizer is another model's.
    """
    digests = {name: weights_digest(_folder(model, name), _SETTINGS, "text_model.") for name in _TOWERS}
    digests |= {name: tokenizer_digest(_folder(model, name)) for name in _TOKENIZERS}
    first, second = (read_component_config(model / name) for name in _TOWERS)
    try:
        for tokenizer, config in zip(_TOKENIZERS, (first, second), strict=True):
            _require_embeddings(_folder(model, tokenizer), int(config["vocab_size"]))
        widths = (int(first["hidden_size"]), int(second["hidden_size"]))
        return TextFacts(digests, widths, int(second["projection_dim"]))
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{model}: text_encoder*/config.json are not those of CLIP text encoders: {error!r}") from None


def tokenizer_digest(folder: Path) -> str:
    """Digest of a tokenizer's vocabulary, merges and special tokens; how its files are laid out does not count."""
    try:
        vocabulary, merges = _vocabulary(folder)
        parts = [sorted(vocabulary.items()), merges, *_special_tokens(folder)]
    except (OSError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(f"{folder} is not a CLIP tokenizer: {error!r}") from None
    return bytes_digest(json.dumps(part).encode() for part in parts)


class TokenCounter:
    """Counts the tokens of captions, by the first tokenizer: no weights are loaded."""

    def __init__(self, model: Path, chunks: int = 1) -> None:
        from transformers import CLIPTokenizer

        self._tokenizer = CLIPTokenizer.from_pretrained(_folder(model, _TOKENIZERS[0]))
        self._chunks = chunks

    def count(self, captions: Sequence[str]) -> list[TokenCount]:
        """Tokens of each of `captions`, and whether it is longer than the chunks hold."""
        return [_token_count(self._tokenizer, caption, self._chunks) for caption in captions]


class TextEncoders:
    """Both towers and their tokenizers on one device, for inference only."""

    def __init__(self, model: Path, device: "torch.device | str", chunks: int = 1) -> None:
        import torch
        from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer
        from transformers.utils import logging

        logging.disable_progress_bar()  # its bars would tear ours
        logging.set_verbosity_error()  # and its tables of weights that do not fit our one line
        self.device = torch.device(device)
        self.chunks = chunks
        self._tokenizers = [CLIPTokenizer.from_pretrained(_folder(model, name)) for name in _TOKENIZERS]
        classes = (CLIPTextModel, CLIPTextModelWithProjection)
        self._towers = [_load_tower(cls, model / name, self.device) for cls, name in zip(classes, _TOWERS, strict=True)]

    def count(self, caption: str) -> TokenCount:
        """Tokens of `caption`, and whether it is longer than the chunks hold."""
        return _token_count(self._tokenizers[0], caption, self.chunks)

    def encode(self, captions: Sequence[str]) -> "PromptEmbeds":
        """Embeds of `captions`: prompt_embeds fp32 [B, chunks * 77, d1 + d2], pooled fp32 [B, p].

        Penultimate hidden states of both towers side by side, pooled from the second's projection (Podell et al. 2023,
        section 2.2). A caption longer than 75 tokens goes on in further chunks, each framed by its own start and end
        marks; pooled is the first chunk's, as it is what SDXL knows as the prompt.
        """
        import torch

        from shared.conditioning import PromptEmbeds

        with torch.inference_mode():
            first, _ = self._run(0, captions)
            second, pooled = self._run(1, captions)
            return PromptEmbeds(torch.cat([first, second], dim=-1), pooled)

    def _run(self, index: int, captions: Sequence[str]) -> "tuple[Tensor, Tensor]":
        ids = self._chunked_ids(self._tokenizers[index], captions)  # [B, chunks, 77]
        output = self._towers[index](ids.flatten(0, 1).to(self.device), output_hidden_states=True)
        hidden = output.hidden_states[-2].float()
        embeds = hidden.reshape(len(captions), self.chunks * TEXT_LENGTH, -1)
        return embeds, output[0].float().unflatten(0, (len(captions), self.chunks))[:, 0]

    def _chunked_ids(self, tokenizer: Any, captions: Sequence[str]) -> "Tensor":
        import torch

        inner = TEXT_LENGTH - 2
        rows = []
        for caption in captions:
            ids = _token_ids(tokenizer, caption)
            for chunk in range(self.chunks):
                piece = ids[chunk * inner : (chunk + 1) * inner]
                framed = [tokenizer.bos_token_id, *piece, tokenizer.eos_token_id]
                rows.append(framed + [tokenizer.pad_token_id] * (TEXT_LENGTH - len(framed)))
        return torch.tensor(rows, dtype=torch.int64).view(len(captions), self.chunks, TEXT_LENGTH)


def _token_count(tokenizer: Any, caption: str, chunks: int) -> TokenCount:
    tokens = len(_token_ids(tokenizer, caption))
    return TokenCount(tokens, tokens > chunks * (TEXT_LENGTH - 2))


def _token_ids(tokenizer: Any, caption: str) -> list[int]:
    ids: list[int] = tokenizer(caption, add_special_tokens=False, truncation=False, verbose=False)["input_ids"]
    return ids


def _load_tower(cls: Any, folder: Path, device: "torch.device") -> Any:
    import torch

    try:
        tower, report = cls.from_pretrained(
            folder,
            dtype=torch.float32,
            use_safetensors=True,
            variant=weights_variant(folder),
            output_loading_info=True,
        )
    except (ValueError, RuntimeError) as error:
        raise DataError(f"{folder} cannot be loaded: {error}") from None
    if report["missing_keys"]:
        raise DataError(f"{folder} lacks weights of {sorted(report['missing_keys'])[0]}: the folder is incomplete")
    return tower.to(device).eval().requires_grad_(False)


def _folder(model: Path, name: str) -> Path:
    folder = model / name
    if name in _TOWERS:
        find_weights(folder)
    elif not folder.is_dir():
        raise DataError(f"{model} has no folder {name}/: --model wants an SDXL-layout model with both tokenizers")
    return folder


def _vocabulary(folder: Path) -> tuple[dict[str, int], list[list[str]]]:
    if (folder / "tokenizer.json").exists():  # where there are both, this is the file that transformers 5 reads
        model = read_json_object(folder / "tokenizer.json")["model"]
        merges = [pair.split() if isinstance(pair, str) else list(pair) for pair in model["merges"]]
        return model["vocab"], merges
    if not ((folder / "vocab.json").exists() and (folder / "merges.txt").exists()):
        raise DataError(f"{folder} holds neither tokenizer.json nor vocab.json and merges.txt")
    lines = (folder / "merges.txt").read_text(encoding="utf-8").splitlines()
    merges = [line.split() for line in lines if line and not line.startswith("#version")]
    return read_json_object(folder / "vocab.json"), merges


def _require_embeddings(tokenizer: Path, embeddings: int) -> None:
    """Every token needs an embedding; a tokenizer that knows more is of another model."""
    highest = max(_vocabulary(tokenizer)[0].values(), default=0)
    if highest >= embeddings:
        raise DataError(f"{tokenizer} knows tokens up to {highest}, its text encoder {embeddings} of them: not its own")


def _special_tokens(folder: Path) -> list[str]:
    tokens = dict.fromkeys(("bos_token", "eos_token", "pad_token", "unk_token"), "<|endoftext|>")
    tokens["bos_token"] = "<|startoftext|>"
    for name in ("tokenizer_config.json", "special_tokens_map.json"):  # the second wins
        if (folder / name).exists():
            named = {key: value for key, value in read_json_object(folder / name).items() if key in tokens and value}
            tokens |= {key: str(t["content"] if isinstance(t, dict) else t) for key, t in named.items()}
    return list(tokens.values())
