"""The second pass of a build: what is missing is decoded, encoded and committed, batch by batch, side by side.

decoding.py (threads) -> runners.py (a thread, or a process for each device) -> here, in the one thread that writes
"""

from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass

from cache_builder.config import BuildConfig
from cache_builder.decoding import DecodedCrop, Encoded, crop_batches, cut, decode_sample
from cache_builder.encode import Captions, Framed, Job, Pixels, facts_record
from cache_builder.key_arrays import Indices, Keys, each, parts
from cache_builder.preview_fit import PreviewKeeper
from cache_builder.report import BuildReport
from cache_builder.runners import PictureRunner, Runner
from cache_builder.samples import Samples
from cache_builder.todo import (
    Pictures,
    account_for,
    add_prompts,
    missing_pictures,
    missing_texts,
    picture_bytes,
    require_space,
    sealing_bytes,
    text_bytes,
)
from cache_builder.truncated import count_texts, tell_truncated
from shared.errors import DataError
from shared.progress import progress
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
    elsewhere: Keys | None = None
    """Where embeds and latents go to shards: the keys of those that are there."""

    def encode_captions(self, samples: Samples, text: TextFacts, prompts: Sequence[str] = ()) -> None:
        """Store the embeds of every caption and prompt that is not stored yet, and of the empty one."""
        add_prompts(samples, prompts)
        missing = missing_texts(self.store, samples, self.elsewhere)
        self.report.encoded_captions = len(missing)
        self._require_space(samples, text_bytes(len(missing), self.config, text))
        batches = parts(missing, self.config.encode.text_batch)
        jobs = ((len(batch), _captions(samples, batch)) for batch in batches)
        with progress("captions", len(missing), "captions") as advance, closing(self.runner.run(jobs)) as done:
            for count, records in done:
                self.store.put_many([record for record in records if record is not None])
                advance(count)
        keys = samples.texts["key"]
        count_texts(self.report, samples, lambda texts: tell_truncated(self.store, keys[texts], remember=True))

    def encode_pictures(self, samples: Samples, vae: VaeFacts) -> Samples:
        """Store the latents of every crop that has none yet; returns the samples whose crops are all stored now."""
        pictures = missing_pictures(self.store, samples, self.elsewhere)
        self._require_space(samples, picture_bytes(pictures, self.config, vae))
        lost = self._encode_missing(pictures)
        self.preview.keep()
        usable = account_for(self.report, samples, pictures.crops, lost)
        return samples if len(usable) == len(samples) else samples.only(usable)

    def _encode_missing(self, pictures: Pictures) -> dict[bytes, str]:
        """Decode, encode and commit side by side, batch by batch; returns why what key could not be made."""
        unreadable: dict[bytes, str] = {}  # filled by the thread that decodes, looked at when it has ended
        broken: dict[bytes, str] = {}
        with progress("pictures", len(pictures.crops), "crops") as advance:
            with closing(self._encoded(pictures, unreadable)) as done:
                for batch in done:
                    broken |= self._commit(pictures.samples, batch)
                    advance(len(batch))
            advance(len(unreadable))
        return unreadable | broken

    def _encoded(self, pictures: Pictures, unreadable: dict[bytes, str]) -> Generator[list[Encoded]]:
        if isinstance(self.runner, PictureRunner):
            yield from self.runner.run_pictures(pictures, self.config.encode, unreadable)
            return
        with closing(self.runner.run(self._picture_jobs(pictures, unreadable))) as done:
            for batch, records in done:
                yield [
                    Encoded(item.picture, item.crop.key, item.thumbnail, framed, item.crop.pixels)
                    for item, framed in zip(batch, records, strict=True)
                ]

    def _picture_jobs(
        self, pictures: Pictures, unreadable: dict[bytes, str]
    ) -> Iterator[tuple[list[DecodedCrop], Job]]:
        with closing(crop_batches(pictures, self.config.encode, unreadable)) as batches:
            for batch in batches:
                yield batch, [item.crop for item in batch]

    def _commit(self, samples: Samples, batch: Sequence[Encoded]) -> dict[bytes, str]:
        lost: dict[bytes, str] = {}
        records: dict[bytes, bytes] = {}
        for item in batch:
            if item.framed is None and not item.is_elsewhere:
                lost[item.key] = "its latents are not finite"
                continue
            if item.framed is not None:
                self._learn_preview(item, item.framed)
                records |= [item.framed]
            first = item.picture.samples[0]
            records |= [facts_record(first.facts_key, first.original_hw, item.thumbnail)]
            for sample in item.picture.samples:
                samples.learn(sample.index, item.thumbnail)
            self.report.encoded_crops += 1
        self.store.put_many(list(records.items()))
        return lost

    def _learn_preview(self, item: Encoded, framed: Framed) -> None:
        if not self.preview.is_learning:
            return
        pixels = _cut_again(item) if item.pixels is None else item.pixels
        if pixels is not None:
            self.preview.add(pixels, *framed)

    def _require_space(self, samples: Samples, needed_bytes: int) -> None:
        if self.elsewhere is None:
            require_space(self.store.path, needed_bytes, free_bytes(self.store.path), sealing_bytes(samples))


def _captions(samples: Samples, texts: Indices) -> Captions:
    return Captions([samples.text(index) for index in texts.tolist()], [*each(samples.texts["key"][texts])])


def _cut_again(item: Encoded) -> Pixels | None:
    """The pixels of a crop that another machine encoded, for the few that a preview is fitted on."""
    sample = item.picture.samples[0]
    try:
        decoded = decode_sample(sample)
    except DataError:  # gone by now; another picture will do
        return None
    return cut(decoded, [crop for crop in item.picture.crops if crop.latent_key == item.key], sample.rules)[0].pixels
