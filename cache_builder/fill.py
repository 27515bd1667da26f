"""The second pass of a build: what is missing is decoded, encoded and committed, batch by batch, side by side.

decoding.py (threads) -> runners.py (a thread, or a process for each device) -> here, in the one thread that writes
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import TypeVar

from cache_builder.config import BuildConfig
from cache_builder.decoding import DecodedCrop, Picture, crop_batches, incomplete
from cache_builder.encode import Captions, Framed, Job, Records
from cache_builder.keys import text_facts_key, text_key
from cache_builder.preview_fit import PreviewKeeper
from cache_builder.report import BuildReport
from cache_builder.runners import Runner
from cache_builder.scan import PlannedCrop, Sample
from cache_builder.split import Thumbnail
from shared.conditioning import TEXT_LENGTH
from shared.errors import RecordCorrupt, StoreFull
from shared.progress import progress
from shared.record import encode_record
from shared.store import Snapshot, StoreWriter, free_bytes
from shared.text_encoders import TextFacts
from shared.vae import VaeFacts

KEYS_AT_ONCE = 4096  # looked up in one read transaction
FP16_BYTES = 2

T = TypeVar("T")


@dataclass(frozen=True)
class Filler:
    """Fills a store with what the samples of one build lack, and keeps the account."""

    store: StoreWriter
    config: BuildConfig
    report: BuildReport
    runner: Runner
    preview: PreviewKeeper

    def encode_captions(self, samples: Sequence[Sample], text: TextFacts, prompts: Sequence[str] = ()) -> bytes:
        """Store the embeds of every caption and prompt that is not stored yet, and of the empty one; its key."""
        chunks = self.config.text.chunks
        captions = dict.fromkeys(caption for sample in samples for caption in sample.captions)
        self.report.captions = sum(len(sample.captions) for sample in samples)
        self.report.unique_captions = len(captions)
        keys = {caption: text_key(caption, chunks, text.digests) for caption in (*captions, *prompts, "")}
        missing = self._missing_captions(keys)
        self.report.encoded_captions = len(missing)
        size_bytes = (chunks * TEXT_LENGTH * sum(text.widths) + text.pooled_width) * FP16_BYTES
        self._check_space(len(missing) * size_bytes)
        batches = _batches(missing, self.config.encode.text_batch)
        jobs = ((len(batch), Captions(batch, [keys[caption] for caption in batch])) for batch in batches)
        with progress("captions", len(missing), "captions") as advance, closing(self.runner.run(jobs)) as done:
            for count, records in done:
                self.store.put_many([record for record in records if record is not None])
                advance(count)
        self.report.truncated = self._count_truncated([keys[caption] for caption in captions])
        self.report.prompts, self.report.truncated_prompts = (
            len(prompts),
            self._count_truncated([keys[p] for p in prompts]),
        )
        return keys[""]

    def encode_pictures(self, samples: Sequence[Sample], vae: VaeFacts) -> list[Sample]:
        """Store the latents of every crop that has none yet; returns the samples whose crops are all stored now."""
        crop_keys = {crop.latent_key for sample in samples for crop in sample.crops}
        stored = self._stored(crop_keys | {sample.facts_key for sample in samples})
        pictures = incomplete(samples, stored)
        sizes = {crop.latent_key: self._latent_bytes(crop, vae) for picture in pictures for crop in picture.crops}
        self._check_space(sum(sizes.values()))
        lost = self._encode_missing(pictures)
        self.preview.keep()
        return self._account(samples, {key for key in sizes if key not in lost}, lost)

    def _account(self, samples: Sequence[Sample], encoded: set[bytes], lost: dict[bytes, str]) -> list[Sample]:
        """What became of each sample: without one of its crops it is set aside, its other crops stay stored."""
        usable = []
        for sample in samples:
            keys = [crop.latent_key for crop in sample.crops]
            if reasons := [lost[key] for key in keys if key in lost]:
                self.report.quarantined.append((sample.path, reasons[0]))
                continue
            if encoded.isdisjoint(keys):  # or shared with a sample before it: the same picture in another data set
                self.report.reused += 1
            else:
                self.report.stored += 1
            encoded.difference_update(keys)
            self.report.crops += len(keys)
            usable.append(sample)
        return usable

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

    def _stored(self, keys: Iterable[bytes]) -> set[bytes]:
        found: set[bytes] = set()
        for batch in _batches(sorted(keys), KEYS_AT_ONCE):
            with self.store.snapshot() as snapshot:
                found.update(key for key in batch if snapshot.has(key))
        return found

    def _missing_captions(self, keys: dict[str, bytes]) -> list[str]:
        """Captions of which a record is missing."""
        stored, facts = self._stored(keys.values()), {c: text_facts_key(key) for c, key in keys.items()}
        stored_facts = self._stored(facts.values())
        return [c for c, key in keys.items() if key not in stored or facts[c] not in stored_facts]

    def _count_truncated(self, keys: Sequence[bytes]) -> int:
        count = 0
        for batch in _batches(keys, KEYS_AT_ONCE):
            with self.store.snapshot() as snapshot:
                count += sum(_is_truncated(snapshot, key) for key in batch)
        return count

    def _latent_bytes(self, crop: PlannedCrop, vae: VaeFacts) -> int:
        h, w = crop.plan.target_hw
        tensors = 2 if self.config.encode.latents == "moments" else 1
        return tensors * vae.latent_channels * (h // vae.downscale) * (w // vae.downscale) * FP16_BYTES

    def _check_space(self, needed_bytes: int) -> None:
        free = free_bytes(self.store.path)
        if needed_bytes > free:
            raise StoreFull(
                f"{self.store.path}: this build will write {needed_bytes >> 20} MiB and {free >> 20} are free; "
                "free some space or name another --store"
            )


def _facts_record(sample: Sample, thumb: Thumbnail) -> Framed:
    meta = {"original_hw": list(sample.original_hw)}
    return sample.facts_key, encode_record(sample.facts_key, "picture facts", {"thumbnail": thumb}, meta)


def _is_truncated(snapshot: Snapshot, key: bytes) -> bool:
    try:
        return bool(snapshot.read(text_facts_key(key)).meta["truncated"])
    except RecordCorrupt:
        return False  # a count for people; the embeds have a record of their own


def _batches(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    return (items[start : start + size] for start in range(0, len(items), size))
