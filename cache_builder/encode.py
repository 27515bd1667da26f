"""Pixels and captions to framed records: the part that needs a GPU. Never opens the store."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cache_builder.buckets import Size
from cache_builder.halving import Halving
from cache_builder.keys import text_facts_key
from cache_builder.split import THUMBNAIL_HWC, Thumbnail
from shared.progress import say
from shared.record import encode_record
from shared.vae import EncodeDtype, Vae

Pixels = np.ndarray[Any, np.dtype[np.uint8]]
Framed = tuple[bytes, bytes]  # key, framed record


@dataclass(frozen=True)
class Crop:
    """One picture ready to be encoded; all crops of a batch have one size."""

    key: bytes
    pixels: Pixels  # [h, w, 3]

    @property
    def size_hw(self) -> Size:
        """Of its pixels."""
        h, w, _ = self.pixels.shape
        return h, w


@dataclass(frozen=True)
class Captions:
    """Captions to be encoded together, and their keys."""

    texts: Sequence[str]
    keys: Sequence[bytes]


Job = Sequence[Crop] | Captions
Records = list[Framed | None]  # of a job: one for each crop, two for each caption


def facts_record(key: bytes, original_hw: Size, thumbnail: Thumbnail) -> Framed:
    """What is known of a picture once it has been decoded."""
    pixels = np.frombuffer(thumbnail, np.uint8).reshape(THUMBNAIL_HWC)
    return key, encode_record(key, "picture facts", {"thumbnail": pixels}, {"original_hw": list(original_hw)})


class SampleEncoder:
    """Encodes batches of crops and captions; loads each model when it is first needed.

    Where a batch does not fit the device's memory it goes on with smaller ones; raises ConfigError where one picture or
    caption alone does not fit.
    """

    def __init__(
        self,
        model: Path,
        device: str,
        dtype: EncodeDtype,
        latents: str,
        chunks: int,
        load_vae: Callable[..., Vae] = Vae,
    ) -> None:
        self.model, self.device, self.dtype, self.latents, self.chunks = model, device, dtype, latents, chunks
        self._load_vae = load_vae
        self._vae: Vae | None = None
        self._text: Any = None
        self._pictures = Halving(device, "lower images.resolution, or take another device (--device)")
        self._captions = Halving(device, "free some of it, or take another device (--device)")

    def encode(self, job: Job) -> Records:
        """The records of a batch of either kind."""
        if isinstance(job, Captions):
            return [*self.encode_captions(job.texts, job.keys)]
        return self.encode_crops(job)

    def encode_crops(self, crops: Sequence[Crop]) -> Records:
        """A record for each crop, fp16; None where the latents are not finite, which no store should hold."""
        h, w = crops[0].size_hw
        return self._pictures.run(f"pictures of {h} x {w} px", crops, self._encode_crops)

    def encode_captions(self, captions: Sequence[str], keys: Sequence[bytes]) -> list[Framed]:
        """Two records for each caption: its embeds, fp16, and how many tokens it has."""
        pairs = list(zip(captions, keys, strict=True))
        return self._captions.run("captions", pairs, self._encode_captions)

    def _encode_crops(self, crops: Sequence[Crop]) -> Records:
        import torch

        moments = self._loaded_vae().encode(torch.from_numpy(np.stack([crop.pixels for crop in crops])))
        named: dict[str, Any] = {"mean": moments.mean}
        if self.latents == "moments":
            named["logvar"] = moments.logvar
        arrays = {name: tensor.half().cpu().numpy() for name, tensor in named.items()}
        return [self._record(crop, {name: a[i] for name, a in arrays.items()}) for i, crop in enumerate(crops)]

    def _encode_captions(self, pairs: Sequence[tuple[str, bytes]]) -> list[Framed]:
        text = self._loaded_text()
        embeds = text.encode([caption for caption, _ in pairs])
        hidden = embeds.prompt_embeds.half().cpu().numpy()
        pooled = embeds.pooled_prompt_embeds.half().cpu().numpy()
        framed = []
        for i, (caption, key) in enumerate(pairs):
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

    def _loaded_vae(self) -> Vae:
        if self._vae is None:
            from shared.device import choose_device

            device = choose_device(self.device)
            say(f"loading the VAE of {self.model} on {device}, {self.dtype}")
            self._vae = self._load_vae(self.model, device, self.dtype)
        return self._vae

    def _loaded_text(self) -> Any:
        if self._text is None:
            from shared.device import choose_device
            from shared.text_encoders import TextEncoders

            device = choose_device(self.device)
            say(f"loading both text encoders of {self.model} on {device}")
            self._text = TextEncoders(self.model, device, self.chunks)
        return self._text
