"""The second pass of a build: what is missing is decoded in threads, encoded by bucket and committed batch by batch."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

from cache_builder.config import BuildConfig
from cache_builder.encode import Crop, Framed, SampleEncoder
from cache_builder.keys import image_digest, text_facts_key, text_key
from cache_builder.pixels import crop, decode, thumbnail
from cache_builder.preview_fit import PreviewKeeper
from cache_builder.report import BuildReport
from cache_builder.scan import PlannedCrop, Sample
from cache_builder.split import Thumbnail
from shared.conditioning import TEXT_LENGTH
from shared.errors import DataError, RecordCorrupt, StoreFull
from shared.progress import progress
from shared.record import encode_record
from shared.store import Snapshot, StoreWriter, free_bytes
from shared.text_encoders import TextFacts
from shared.vae import VaeFacts

KEYS_AT_ONCE = 4096  # looked up in one read transaction
FP16_BYTES = 2

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class Picture:
    """One picture with what its samples lack: it is decoded once for all of its crops and all data sets it is in."""

    samples: list[Sample]
    crops: list[PlannedCrop]

    @property
    def facts_key(self) -> bytes:
        """What tells it from others: the digest of its bytes, under the rules for pixels."""
        return self.samples[0].facts_key


@dataclass(frozen=True)
class Decoded:
    """What the encoder and the split need of one crop of a picture."""

    crop: Crop
    thumbnail: Thumbnail


@dataclass(frozen=True)
class Filler:
    """Fills a store with what the samples of one build lack, and keeps the account."""

    store: StoreWriter
    config: BuildConfig
    report: BuildReport
    encoder: SampleEncoder
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
        with progress("captions", len(missing), "captions") as advance:
            for batch in _batches(missing, self.config.encode.text_batch):
                self.store.put_many(self.encoder.encode_captions(batch, [keys[caption] for caption in batch]))
                advance(len(batch))
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
        pictures = _incomplete(samples, stored)
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
        """Decode in threads, encode by bucket, commit each batch; returns why what key could not be made."""
        lost: dict[bytes, str] = {}
        todo = sorted(pictures, key=lambda picture: picture.crops[0].plan.target_hw)
        most_crops = max((len(picture.crops) for picture in todo), default=1)
        ahead = 2 * self.config.encode.batch // most_crops + self.config.encode.threads
        with (
            ThreadPoolExecutor(self.config.encode.threads) as pool,
            progress("pictures", sum(len(picture.crops) for picture in todo), "crops") as advance,
        ):
            decoded = _each_crop(_in_order(pool, self._decode, todo, ahead))
            for batch in _same_size_batches(decoded, self.config.encode.batch):
                lost |= self._encode_batch(batch)
                advance(len(batch))
        return lost

    def _encode_batch(self, batch: Sequence[tuple[Picture, PlannedCrop, Decoded | DataError]]) -> dict[bytes, str]:
        good = [(picture, item) for picture, _, item in batch if isinstance(item, Decoded)]
        lost = {planned.latent_key: str(item) for _, planned, item in batch if isinstance(item, DataError)}
        framed = self.encoder.encode_crops([item.crop for _, item in good]) if good else []
        records: dict[bytes, bytes] = {}
        for (picture, item), latents in zip(good, framed, strict=True):
            if latents is None:
                lost[item.crop.key] = "its latents are not finite"
                continue
            self.preview.add(item.crop.pixels, *latents)
            records |= [latents, _facts_record(picture.samples[0], item.thumbnail)]
            for sample in picture.samples:
                sample.thumbnail = item.thumbnail
            self.report.encoded_crops += 1
        self.store.put_many(list(records.items()))
        return lost

    def _decode(self, picture: Picture) -> list[Decoded] | DataError:
        sample = picture.samples[0]
        rules = sample.rules
        try:
            data = sample.read()
            if image_digest(data) != sample.digest:
                return DataError("changed while it was being built; run the same command again")
            pixels = decode(data, rules, sample.limits)
            if pixels.shape[:2] != sample.original_hw:
                return DataError("its size is not what its header says")
            thumb = thumbnail(pixels)
            return [Decoded(Crop(c.latent_key, crop(pixels, c.plan, rules)), thumb) for c in picture.crops]
        except DataError as error:
            return error

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


def _incomplete(samples: Sequence[Sample], stored: set[bytes]) -> list[Picture]:
    """The pictures of which something is missing, each with its missing crops; all of them where its facts are."""
    pictures: dict[bytes, Picture] = {}
    for sample in samples:
        picture = pictures.setdefault(sample.facts_key, Picture([], []))
        picture.samples.append(sample)
        missing = [c for c in sample.crops if sample.thumbnail is None or c.latent_key not in stored]
        picture.crops.extend(crop for crop in missing if crop not in picture.crops)
    return [picture for picture in pictures.values() if picture.crops]


def _each_crop(
    decoded: Iterable[tuple[Picture, list[Decoded] | DataError]],
) -> Iterator[tuple[Picture, PlannedCrop, Decoded | DataError]]:
    for picture, items in decoded:
        for index, planned in enumerate(picture.crops):
            yield picture, planned, items if isinstance(items, DataError) else items[index]


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


def _in_order(
    pool: ThreadPoolExecutor, work: Callable[[T], R], items: Iterable[T], ahead: int
) -> Iterator[tuple[T, R]]:
    """(item, work(item)) in order, at most `ahead` items begun before they are asked for."""
    begun: deque[tuple[T, Future[R]]] = deque()
    for item in items:
        begun.append((item, pool.submit(work, item)))
        if len(begun) > ahead:
            first, future = begun.popleft()
            yield first, future.result()
    yield from ((item, future.result()) for item, future in begun)


def _same_size_batches(
    items: Iterable[tuple[Picture, PlannedCrop, R]], size: int
) -> Iterator[list[tuple[Picture, PlannedCrop, R]]]:
    """Consecutive crops of one bucket, at most `size` at once."""
    batch: list[tuple[Picture, PlannedCrop, R]] = []
    for item in items:
        if batch and (len(batch) == size or batch[0][1].plan.target_hw != item[1].plan.target_hw):
            yield batch
            batch = []
        batch.append(item)
    if batch:
        yield batch
