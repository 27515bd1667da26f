"""Small stores with sealed manifests, made in milliseconds without a model: real records of random numbers."""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np

from cache_builder.keys import facts_key, text_facts_key
from shared.errors import ExpertsError
from shared.manifest import Manifest, seal_manifest
from shared.manifest_rows import ManifestRow, ManifestSettings, Variant
from shared.pictures import PixelRules
from shared.record import encode_record
from shared.store import StoreReader, StoreWriter

NULL, PROMPT = "the empty prompt", "a prompt"


def key(*parts: object, size: int = 16) -> bytes:
    """A key or an id, of what it stands for."""
    return hashlib.blake2b(repr(parts).encode(), digest_size=size).digest()


def settings(datasets: tuple[str, ...] = ("set",), **others: Any) -> ManifestSettings:
    """What a build declares; `others` in place of what stands here."""
    declared: dict[str, Any] = {
        "vae_digest": "aa" * 32,
        "scaling_factor": 0.13025,
        "latent_channels": 4,
        "downscale": 8,
        "latents": "moments",
        "text_digests": {"text_encoder": "bb", "tokenizer": "cc"},
        "text_widths": (8, 8),
        "pooled_width": 8,
        "text_chunks": 1,
        "null_text_key": key("text", NULL).hex(),
        "zeros_for_empty_prompt": True,
        "datasets": datasets,
        "build": {"images": {"background": [255, 255, 255], "resample": "lanczos"}},
        "prompts": {PROMPT: key("text", PROMPT).hex()},
    }
    return ManifestSettings(**declared | others)


def row(index: int, dataset: str = "set") -> ManifestRow:
    """One sample: a crop or two, a caption of its own and one of five that others have too, every fifth held out."""
    variants = tuple(Variant(key("latents", index, v), bool(v), (v, 0), (64, 64)) for v in range(1 + index % 2))
    return ManifestRow(
        dataset=dataset,
        sample_id=key(dataset, index),
        path=f"{index}.png",
        image_digest=key("picture", index, size=32),
        original_hw=(100, 100),
        bucket_hw=(64, 64),
        variants=variants,
        text_keys=(key("text", index), key("text", "shared", index % 5)),
        split="eval" if index % 5 == 0 else "train",
    )


def records_of(rows: list[ManifestRow]) -> dict[bytes, bytes]:
    """Every record that rows need, with the facts of pictures and captions."""
    texts = {text for row in rows for text in row.text_keys} | {key("text", NULL), key("text", PROMPT)}
    made = {}
    for latent in {variant.latent_key for row in rows for variant in row.variants}:
        made[latent] = encode_record(latent, "latents", {"mean": numbers(latent), "logvar": numbers(latent)}, {})
    for text in texts:
        made[text] = encode_record(text, "text", {"prompt_embeds": numbers(text)}, {"caption": text.hex()})
        facts = text_facts_key(text)
        made[facts] = encode_record(facts, "text facts", {}, {"tokens": 3, "truncated": False})
    for digest in {row.image_digest for row in rows}:
        facts = facts_key(digest, PixelRules())
        made[facts] = encode_record(facts, "picture facts", {}, {"original_hw": [100, 100]})
    return made


def numbers(of: bytes) -> np.ndarray[tuple[int, ...], np.dtype[np.float16]]:
    """float16 [4, 8, 8] that are each record's own."""
    return np.random.default_rng(list(of)).standard_normal((4, 8, 8)).astype(np.float16)


def write_store(
    store: Path, rows: list[ManifestRow], name: str = "main", datasets: tuple[str, ...] = ("set",)
) -> Manifest:
    """Put what `rows` need into a store and seal them as NAME's current manifest."""
    with StoreWriter(store) as writer:
        writer.put_many(sorted(records_of(rows).items()))
    return seal_manifest(store, name, settings(datasets), rows, allow_shrink=True)


def stored(store: Path) -> int:
    """Records so far; 0 where there is no store yet."""
    try:
        with StoreReader(store) as reader:
            return reader.count()
    except ExpertsError:
        return 0


def records(store: Path) -> dict[bytes, bytes]:
    """Everything that a store holds."""
    with StoreReader(store) as reader:
        keys = [key for page in reader.sizes() for key, _ in page]
        with reader.snapshot() as snapshot:
            return {key: snapshot.raw(key) for key in keys}
