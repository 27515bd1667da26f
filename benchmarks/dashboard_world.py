"""What a page is shown in benchmarks and tests: a store of small records, sealed, and logs of runs that never ran."""

import hashlib
import json
import math
import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from shared.manifest import seal_manifest
from shared.manifest_rows import ManifestRow, Split, Variant
from shared.preview import Preview, write_preview
from shared.record import encode_record
from shared.store import StoreWriter
from tests.stores import key as key_of
from tests.stores import settings

BUCKETS = ((64, 64), (80, 48), (48, 80), (96, 40))
AT_ONCE = 2000
SETTINGS = settings(("pictures",), prompts={})
PREVIEW = Preview(np.full((4, 3), 0.1), np.full(3, 0.5), 64)


def write_store(
    store: Path, count: int, captions: Sequence[str] = (), pictures: Path | None = None, name: str = "main"
) -> None:
    """A store of `count` samples, with `captions` in turns, sealed as `name`; their sources go to `pictures`."""
    texts = list(captions) or [f"a caption, number {index}" for index in range(max(1, count // 2))]
    rows = []
    with StoreWriter(store) as writer:
        batch = [(key_of("text", text), _text_record(text)) for text in dict.fromkeys(texts)]
        for index in range(count):
            row, record = _sample(index, texts, pictures)
            rows.append(row)
            batch.append(record)
            if len(batch) >= AT_ONCE:
                writer.put_many(batch)
                batch = []
        writer.put_many(batch)
        write_preview(store, SETTINGS.vae_digest, PREVIEW)
        seal_manifest(store, name, SETTINGS, rows, allow_shrink=True)


def write_run(folder: Path, name: str, low: int, high: int, lines: int, steps: int | None = None) -> None:
    """A run folder as a trainer leaves it, with `lines` log points ten steps apart, one second each."""
    folder.mkdir(parents=True)
    steps = steps or 10 * lines
    (folder / "config.toml").write_text(
        f'name = "{name}"\nsteps = {steps}\n\n[timesteps]\nlow = {low}\nhigh = {high}\n', encoding="utf-8"
    )
    use = {"name": "main", "digest": "ee" * 32, "from_step": 0, "from_epoch": 0}
    facts = {"name": name, "low": low, "high": high, "manifests": [use]}
    (folder / "expert.json").write_text(json.dumps({"format": 1, "facts": facts}), encoding="utf-8")
    began_s, draw = 1_700_000_000.0, random.Random(name)
    with (folder / "events.jsonl").open("w", encoding="utf-8") as log:
        begin = {"time_s": began_s, "event": "begin", "name": name, "manifest": "main", "digest": "ee" * 32, "step": 0}
        log.write(json.dumps(begin) + "\n")
        for index in range(1, lines + 1):
            log.write(json.dumps(_step(index, began_s, low, high, draw)) + "\n")
            if index % 100 == 0:
                log.write(json.dumps({"time_s": began_s + index, "event": "checkpoint", "step": 10 * index}) + "\n")


def _step(index: int, began_s: float, low: int, high: int, draw: random.Random) -> dict[str, object]:
    loss = 0.5 + math.exp(-index / 2000) + draw.random() / 10
    bins = [[t, min(t + 50, high), round(loss * (1 + t / 1000), 6), 20] for t in range(low, high, 50)]
    return {
        "time_s": began_s + index,
        "event": "step",
        "step": 10 * index,
        "epoch": index // 100,
        "loss": loss,
        "grad_norm": 1 + draw.random(),
        "samples_per_s": 40 + draw.random(),
        "data_wait_share": 0.004,
        "learning_rate": 1e-5 * math.exp(-index / 50000),
        "skipped": 0,
        "bins": bins,
    }


def _text_record(text: str) -> bytes:
    tensors = {"prompt_embeds": np.zeros((1, 8), np.float16), "pooled_prompt_embeds": np.zeros(8, np.float16)}
    meta = {"caption": text, "tokens": len(text.split()), "truncated": False}
    return encode_record(key_of("text", text), "text", tensors, meta)


def _sample(index: int, texts: Sequence[str], pictures: Path | None) -> tuple[ManifestRow, tuple[bytes, bytes]]:
    bucket, key, path = BUCKETS[index % len(BUCKETS)], key_of("latents", index), f"part {index % 3}/{index:06d}.png"
    digest = hashlib.blake2b(str(index).encode(), digest_size=32).digest()
    if pictures is not None:
        file = pictures / path
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (2 * bucket[1], 2 * bucket[0]), (index * 37 % 256, index * 91 % 256, 120)).save(file)
        digest = hashlib.blake2b(file.read_bytes(), digest_size=32).digest()
    latents = np.random.default_rng(index).normal(size=(2, 4, bucket[0] // 8, bucket[1] // 8)).astype(np.float16)
    split: Split = "eval" if index % 25 == 0 else "train"
    row = ManifestRow(
        dataset="pictures",
        sample_id=key_of("sample", index),
        path=path,
        image_digest=digest,
        original_hw=(2 * bucket[0], 2 * bucket[1]),
        bucket_hw=bucket,
        variants=(Variant(key, False, (index % 5, 0), bucket),),
        text_keys=(key_of("text", texts[index % len(texts)]),),
        split=split,
    )
    return row, (key, encode_record(key, "latents", {"mean": latents[0], "logvar": latents[1]}, {}))
