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
from cache_builder.scan import Sample, Scanner
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
class Decoded:
    """What the encoder and the split need of one picture."""

    crop: Crop
    thumbnail: Thumbnail


@dataclass(frozen=True)
class Filler:
    """Fills a store with what the samples of one build lack, and keeps the account."""

    store: StoreWriter
    config: BuildConfig
    scanner: Scanner
    report: BuildReport
    encoder: SampleEncoder
    preview: PreviewKeeper

    def encode_captions(self, samples: Sequence[Sample], text: TextFacts) -> bytes:
        """Store the embeds of every caption that is not stored yet, and of the empty one; returns the latter's key."""
        chunks = self.config.text.chunks
        captions = dict.fromkeys(caption for sample in samples for caption in sample.captions)
        self.report.captions = sum(len(sample.captions) for sample in samples)
        self.report.unique_captions = len(captions)
        keys = {caption: text_key(caption, chunks, text.digests) for caption in (*captions, "")}
        missing = self._missing_captions(keys)
        self.report.encoded_captions = len(missing)
        size_bytes = (chunks * TEXT_LENGTH * sum(text.widths) + text.pooled_width) * FP16_BYTES
        self._check_space(len(missing) * size_bytes)
        with progress("captions", len(missing), "captions") as advance:
            for batch in _batches(missing, self.config.encode.text_batch):
                self.store.put_many(self.encoder.encode_captions(batch, [keys[caption] for caption in batch]))
                advance(len(batch))
        self.report.truncated = self._count_truncated([keys[caption] for caption in captions])
        return keys[""]

    def encode_pictures(self, samples: Sequence[Sample], vae: VaeFacts) -> list[Sample]:
        """Store the latents of every sample that has none yet; returns the samples that are stored now."""
        stored = self._stored({key for sample in samples for key in (sample.latent_key, sample.facts_key)})
        missing: dict[bytes, list[Sample]] = {}
        for sample in samples:
            if sample.latent_key in stored and sample.thumbnail is not None:
                self.report.reused += 1
            else:
                missing.setdefault(sample.latent_key, []).append(sample)
        self._check_space(sum(self._latent_bytes(group[0], vae) for group in missing.values()))
        lost = self._encode_missing(missing)
        self.preview.keep()
        return [sample for sample in samples if sample.latent_key not in lost]

    def _encode_missing(self, missing: dict[bytes, list[Sample]]) -> set[bytes]:
        """Decode in threads, encode by bucket, commit each batch; returns the keys that could not be made."""
        lost: set[bytes] = set()
        todo = sorted(missing.values(), key=lambda group: group[0].plan.target_hw)
        ahead = 2 * self.config.encode.batch + self.config.encode.threads
        with (
            ThreadPoolExecutor(self.config.encode.threads) as pool,
            progress("pictures", len(todo), "images") as advance,
        ):
            decoded = _in_order(pool, lambda group: self._decode(group[0]), todo, ahead)
            for batch in _same_size_batches(decoded, self.config.encode.batch):
                lost |= self._encode_batch(batch)
                advance(len(batch))
        return lost

    def _encode_batch(self, batch: Sequence[tuple[list[Sample], Decoded | DataError]]) -> set[bytes]:
        good = [(group, item) for group, item in batch if isinstance(item, Decoded)]
        lost = {self._lose(group, str(item)) for group, item in batch if isinstance(item, DataError)}
        framed = self.encoder.encode_crops([item.crop for _, item in good]) if good else []
        records: list[Framed] = []
        for (group, item), latents in zip(good, framed, strict=True):
            if latents is None:
                lost.add(self._lose(group, "its latents are not finite"))
                continue
            self.preview.add(item.crop.pixels, *latents)
            records += [latents, _facts_record(group[0], item.thumbnail)]
            self.report.stored += 1
            self.report.reused += len(group) - 1  # the same picture in another data set shares the record
            for sample in group:
                sample.thumbnail = item.thumbnail
        self.store.put_many(records)
        return lost

    def _decode(self, sample: Sample) -> Decoded | DataError:
        rules = self.scanner.pixel_rules
        try:
            data = sample.read()
            if image_digest(data) != sample.digest:
                return DataError("changed while it was being built; run the same command again")
            pixels = decode(data, rules, self.scanner.limits)
            if pixels.shape[:2] != sample.original_hw:
                return DataError("its size is not what its header says")
            return Decoded(Crop(sample.latent_key, crop(pixels, sample.plan, rules)), thumbnail(pixels))
        except DataError as error:
            return error

    def _lose(self, group: Sequence[Sample], reason: str) -> bytes:
        self.report.quarantined += [(sample.path, reason) for sample in group]
        return group[0].latent_key

    def _stored(self, keys: Iterable[bytes]) -> set[bytes]:
        found: set[bytes] = set()
        for batch in _batches(sorted(keys), KEYS_AT_ONCE):
            with self.store.snapshot() as snapshot:
                found.update(key for key in batch if snapshot.has(key))
        return found

    def _missing_captions(self, keys: dict[str, bytes]) -> list[str]:
        """Captions of which a record is missing."""
        wanted = {key for text in keys.values() for key in (text, text_facts_key(text))}
        stored = self._stored(wanted)
        return [c for c, key in keys.items() if key not in stored or text_facts_key(key) not in stored]

    def _count_truncated(self, keys: Sequence[bytes]) -> int:
        count = 0
        for batch in _batches(keys, KEYS_AT_ONCE):
            with self.store.snapshot() as snapshot:
                count += sum(_is_truncated(snapshot, key) for key in batch)
        return count

    def _latent_bytes(self, sample: Sample, vae: VaeFacts) -> int:
        h, w = sample.plan.target_hw
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


def _same_size_batches(items: Iterable[tuple[list[Sample], R]], size: int) -> Iterator[list[tuple[list[Sample], R]]]:
    """Consecutive items of one bucket, at most `size` at once."""
    batch: list[tuple[list[Sample], R]] = []
    for group, result in items:
        if batch and (len(batch) == size or batch[0][0][0].plan.target_hw != group[0].plan.target_hw):
            yield batch
            batch = []
        batch.append((group, result))
    if batch:
        yield batch
