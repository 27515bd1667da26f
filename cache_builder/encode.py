"""Pixels and captions to framed records: the part that needs a GPU. Never opens the store."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cache_builder.keys import text_facts_key
from shared.progress import say
from shared.record import encode_record
from shared.vae import EncodeDtype

Pixels = np.ndarray[Any, np.dtype[np.uint8]]
Framed = tuple[bytes, bytes]  # key, framed record


@dataclass(frozen=True)
class Crop:
    """One picture ready to be encoded; all crops of a batch have one size."""

    key: bytes
    pixels: Pixels  # [h, w, 3]


class SampleEncoder:
    """Encodes batches of crops and captions; loads each model when it is first needed."""

    def __init__(self, model: Path, device: str, dtype: EncodeDtype, latents: str, chunks: int) -> None:
        self._model, self._device, self._dtype = model, device, dtype
        self._latents, self._chunks = latents, chunks
        self._vae: Any = None
        self._text: Any = None

    def encode_crops(self, crops: Sequence[Crop]) -> list[Framed | None]:
        """A record for each crop, fp16; None where the latents are not finite, which no store should hold."""
        import torch

        moments = self._loaded_vae().encode(torch.from_numpy(np.stack([crop.pixels for crop in crops])))
        named = {"mean": moments.mean} | ({"logvar": moments.logvar} if self._latents == "moments" else {})
        arrays = {name: tensor.half().cpu().numpy() for name, tensor in named.items()}
        return [self._record(crop, {name: a[i] for name, a in arrays.items()}) for i, crop in enumerate(crops)]

    def encode_captions(self, captions: Sequence[str], keys: Sequence[bytes]) -> list[Framed]:
        """Two records for each caption: its embeds, fp16, and how many tokens it has."""
        text = self._loaded_text()
        embeds = text.encode(captions)
        hidden = embeds.prompt_embeds.half().cpu().numpy()
        pooled = embeds.pooled_prompt_embeds.half().cpu().numpy()
        framed = []
        for i, (caption, key) in enumerate(zip(captions, keys, strict=True)):
            count = text.count(caption)
            facts = {"tokens": count.tokens, "truncated": count.truncated}
            tensors = {"prompt_embeds": hidden[i], "pooled_prompt_embeds": pooled[i]}
            framed.append((key, encode_record(key, "text", tensors, {"caption": caption, **facts})))
            facts_key = text_facts_key(key)
            framed.append((facts_key, encode_record(facts_key, "text facts", {}, facts)))
        return framed

    def _record(self, crop: Crop, tensors: dict[str, Any]) -> Framed | None:
        if not all(np.isfinite(tensor).all() for tensor in tensors.values()):
            return None
        return crop.key, encode_record(crop.key, "latents", tensors, {})

    def _loaded_vae(self) -> Any:
        if self._vae is None:
            from shared.device import choose_device
            from shared.vae import Vae

            device = choose_device(self._device)
            say(f"loading the VAE of {self._model} on {device}, {self._dtype}")
            self._vae = Vae(self._model, device, self._dtype)
        return self._vae

    def _loaded_text(self) -> Any:
        if self._text is None:
            from shared.device import choose_device
            from shared.text_encoders import TextEncoders

            device = choose_device(self._device)
            say(f"loading both text encoders of {self._model} on {device}")
            self._text = TextEncoders(self._model, device, self._chunks)
        return self._text
