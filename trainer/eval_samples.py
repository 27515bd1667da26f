"""The held-out samples that a run is scored on, chosen once and pinned: the same after a resume and on a new manifest.

RUN/eval_samples.json    {"format": 1, "manifest": digest, "samples": [...]}: ids, record keys and sizes

The keys suffice to read a sample from the store, so the manifest that it was chosen from may go.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, ValidationError

from shared.atomic import write_atomically
from shared.conditioning import TEXT_LENGTH, MicroConditioning, PromptEmbeds
from shared.errors import CheckpointError, RecordCorrupt
from shared.latents import LatentMoments
from shared.manifest import Manifest
from shared.manifest_rows import ManifestRow, ManifestSettings
from shared.parts import PINNED_SAMPLES, eval_order
from shared.progress import say
from shared.store import StoreReader
from trainer.batch import Batch

FILE = "eval_samples.json"


class PinnedSample(BaseModel):
    """One held-out sample with its first caption and its first crop; keys and id are hex, sizes pixels (h, w)."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    sample_id: str
    """Id of the sample; its noise is drawn by it."""
    latent_key: str
    """Key of the latents of its first crop."""
    has_variance: bool
    """Whether that record holds a log-variance beside the mean; a later manifest may be built otherwise."""
    text_key: str
    """Key of its first caption."""
    bucket_hw: tuple[int, int]
    """Size of the crop."""
    original_hw: tuple[int, int]
    """Size of the picture as it came."""
    crop_top_left: tuple[int, int]
    """Where the crop was cut."""
    target_hw: tuple[int, int]
    """Size that the UNet is told."""


class _Pinned(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    format: Literal[1] = 1
    """Version of this file."""
    manifest: str
    """Digest of the manifest that they were chosen from, hex."""
    samples: tuple[PinnedSample, ...]
    """In the order of their draws."""


def pin_samples(run: Path, manifest: Manifest) -> list[PinnedSample]:
    """The samples that the run is scored on: those in its folder, or else chosen now and written there.

    At most 256, by a hash of their ids, so that two experts on one manifest are scored on the same ones. Says so where
    there are none, and where some are no longer held out. Raises CheckpointError where the file is damaged.
    """
    path = run / FILE
    if not path.exists():
        samples = choose_samples(manifest)
        if not samples:
            say(f"manifest {manifest.name!r} holds no sample out (split.eval_fraction): there is no eval loss")
            return []
        pinned = _Pinned(manifest=manifest.digest, samples=tuple(samples))
        write_atomically(path, pinned.model_dump_json(indent=1).encode() + b"\n")
    pinned = _read(path)
    if pinned.manifest != manifest.digest:
        _tell_released(pinned, manifest)
    return list(pinned.samples)


def choose_samples(manifest: Manifest, count: int = PINNED_SAMPLES, dataset: str | None = None) -> list[PinnedSample]:
    """Up to `count` held-out samples of a manifest, or of one of its data sets, by a hash of their ids."""
    rows = [int(row) for bucket in manifest.buckets("eval") for row in bucket.rows]
    if dataset is not None:
        is_in = manifest.in_dataset(dataset)
        rows = [row for row in rows if is_in[row]]
    ids = manifest.sample_ids(rows)
    ordered = eval_order(ids, count)
    has_variance = manifest.settings.latents == "moments"
    return [_pin(row, has_variance) for row in manifest.rows([rows[i] for i in ordered])]


def read_sample_batch(
    store: StoreReader, settings: ManifestSettings, samples: Sequence[PinnedSample]
) -> tuple[Batch | None, list[int]]:
    """Samples of one bucket as a batch, and which of them are in it: those whose records are there and sound."""
    h, w = (edge // settings.downscale for edge in samples[0].bucket_hw)
    mean = _half(len(samples), settings.latent_channels, h, w)
    logvar = torch.empty_like(mean) if samples[0].has_variance else None
    embeds = _half(len(samples), settings.text_chunks * TEXT_LENGTH, sum(settings.text_widths))
    pooled, kept = _half(len(samples), settings.pooled_width), []
    with store.snapshot() as snapshot:
        for i, sample in enumerate(samples):
            latents = {"mean": mean[i].numpy()} | ({} if logvar is None else {"logvar": logvar[i].numpy()})
            text = {"prompt_embeds": embeds[i].numpy(), "pooled_prompt_embeds": pooled[i].numpy()}
            try:
                snapshot.copy_into(bytes.fromhex(sample.latent_key), latents)
                snapshot.copy_into(bytes.fromhex(sample.text_key), text)
                kept.append(i)
            except RecordCorrupt:
                continue
    if not kept:
        return None, []
    sizes = [MicroConditioning(samples[i].original_hw, samples[i].crop_top_left, samples[i].target_hw) for i in kept]
    moments = LatentMoments(mean[kept], None if logvar is None else logvar[kept])
    time_ids = torch.stack([size.time_ids() for size in sizes])
    return Batch(moments, PromptEmbeds(embeds[kept], pooled[kept]), time_ids, [(0, i) for i in kept]), kept


def _half(*shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.float16)


def _pin(row: ManifestRow, has_variance: bool) -> PinnedSample:
    variant = row.variants[0]
    return PinnedSample(
        sample_id=row.sample_id.hex(),
        latent_key=variant.latent_key.hex(),
        has_variance=has_variance,
        text_key=row.text_keys[0].hex(),
        bucket_hw=row.bucket_hw,
        original_hw=row.original_hw,
        crop_top_left=variant.crop_top_left,
        target_hw=variant.target_hw,
    )


def _read(path: Path) -> _Pinned:
    try:
        return _Pinned.model_validate(json.loads(path.read_text()))
    except (OSError, ValueError, ValidationError) as error:
        raise CheckpointError(
            f"{path} is damaged: {str(error).splitlines()[0]}; without it samples are chosen anew"
        ) from None


def _tell_released(pinned: _Pinned, manifest: Manifest) -> None:
    """A sample that a later manifest trains on flatters the loss; one that is gone does no harm."""
    rows = [int(row) for bucket in manifest.buckets("train") for row in bucket.rows]
    trained = set(manifest.sample_ids(rows)) & {bytes.fromhex(sample.sample_id) for sample in pinned.samples}
    if trained:
        say(
            f"{len(trained)} of {len(pinned.samples)} samples of the eval loss are no longer held out by manifest "
            f"{manifest.name!r}: the loss will flatter"
        )
