"""The second pass of a build: what is missing is decoded, encoded and committed, batch by batch, side by side.

decoding.py (threads) -> runners.py (a thread, or a process for each device) -> here, in the one thread that writes
"""

from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass

import numpy as np

from cache_builder.config import BuildConfig
from cache_builder.decoding import DecodedCrop, crop_batches
from cache_builder.encode import Captions, Framed, Job, Records
from cache_builder.preview_fit import PreviewKeeper
from cache_builder.report import BuildReport
from cache_builder.runners import Runner
from cache_builder.scan import Sample
from cache_builder.split import THUMBNAIL_HWC, Thumbnail
from cache_builder.todo import (
    Picture,
    account_for,
    batches,
    missing_captions,
    missing_pictures,
    picture_bytes,
    require_space,
    text_bytes,
    text_keys,
)
from cache_builder.truncated import count_truncated
from shared.progress import progress
from shared.record import encode_record
from shared.store import StoreWriter, free_bytes
from shared.text_encoders import TextFacts
from shared.vae import VaeFacts


@dataclass(frozen=True)
class Filler:
    """Fills a store with what the samples of one build lack, and keeps the account."""

    store: StoreWriter
    config: BuildConfig
    report: BuildReport
    runner: Runner
    preview: PreviewKeeper

    def encode_captions(
        self, samples: Sequence[Sample], text: TextFacts, prompts: Sequence[str] = ()
    ) -> dict[str, bytes]:
        """Store the embeds of every caption and prompt that is not stored yet, and of the empty one; all their keys."""
        keys = text_keys(samples, prompts, self.config, text)
        captions = {caption for sample in samples for caption in sample.captions}
        self.report.captions = sum(len(sample.captions) for sample in samples)
        self.report.unique_captions = len(captions)
        missing = missing_captions(self.store, keys)
        self.report.encoded_captions = len(missing)
        self._require_space(text_bytes(len(missing), self.config, text))
        jobs = ((len(b), Captions(b, [keys[c] for c in b])) for b in batches(missing, self.config.encode.text_batch))
        with progress("captions", len(missing), "captions") as advance, closing(self.runner.run(jobs)) as done:
            for count, records in done:
                self.store.put_many([record for record in records if record is not None])
                advance(count)
        self.report.truncated = count_truncated(self.store, [keys[caption] for caption in captions])
        self.report.prompts = len(prompts)
        self.report.truncated_prompts = count_truncated(self.store, [keys[prompt] for prompt in prompts])
        return keys

    def encode_pictures(self, samples: Sequence[Sample], vae: VaeFacts) -> list[Sample]:
        """Store the latents of every crop that has none yet; returns the samples whose crops are all stored now."""
        pictures = missing_pictures(self.store, samples)
        self._require_space(picture_bytes(pictures, self.config, vae))
        lost = self._encode_missing(pictures)
        self.preview.keep()
        wanted = {crop.latent_key for picture in pictures for crop in picture.crops}
        return account_for(self.report, samples, wanted - lost.keys(), lost)

    def _encode_missing(self, pictures: Sequence[Picture]) -> dict[bytes, str]:
        """Decode, encode and commit side by side, batch by batch; returns why what key could not be made."""
        unreadable: dict[bytes, str] = {}  # filled by the thread that decodes, looked at when it has ended
        broken: dict[bytes, str] = {}
        jobs = self._picture_jobs(pictures, unreadable)
        total = sum(len(picture.crops) for picture in pictures)
        with progress("pictures", total, "crops") as advance:
            with closing(self.runner.run(jobs)) as done:
                for batch, records in done:
                    broken |= self._commit(batch, records)
                    advance(len(batch))
            advance(len(unreadable))
        return unreadable | broken

    def _picture_jobs(
        self, pictures: Sequence[Picture], unreadable: dict[bytes, str]
    ) -> Iterator[tuple[list[DecodedCrop], Job]]:
        with closing(crop_batches(pictures, self.config.encode, unreadable)) as batches:
            for batch in batches:
                yield batch, [item.crop for item in batch]

    def _commit(self, batch: Sequence[DecodedCrop], made: Records) -> dict[bytes, str]:
        lost: dict[bytes, str] = {}
        records: dict[bytes, bytes] = {}
        for item, latents in zip(batch, made, strict=True):
            if latents is None:
                lost[item.crop.key] = "its latents are not finite"
                continue
            self.preview.add(item.crop.pixels, *latents)
            records |= [latents, _facts_record(item.picture.samples[0], item.thumbnail)]
            for sample in item.picture.samples:
                sample.thumbnail = item.thumbnail
            self.report.encoded_crops += 1
        self.store.put_many(list(records.items()))
        return lost

    def _require_space(self, needed_bytes: int) -> None:
        require_space(self.store.path, needed_bytes, free_bytes(self.store.path))


def _facts_record(sample: Sample, thumb: Thumbnail) -> Framed:
    meta = {"original_hw": list(sample.original_hw)}
    pixels = np.frombuffer(thumb, np.uint8).reshape(THUMBNAIL_HWC)
    return sample.facts_key, encode_record(sample.facts_key, "picture facts", {"thumbnail": pixels}, meta)
