"""Store to batch: one prefetch thread copies records straight into (pinned) tensors, a few micro-batches ahead.

Which of its crops and captions a sample shows are draws labelled by (epoch, position) like all others; they are made
here because they decide what is read.
"""

import itertools
from collections.abc import Callable, Generator, Sequence
from typing import Literal

import torch

from shared.ahead import Ahead
from shared.conditioning import TEXT_LENGTH, MicroConditioning, PromptEmbeds
from shared.contract import NullPrompt
from shared.errors import DataError, RecordCorrupt
from shared.latents import LatentMoments
from shared.manifest import Manifest
from shared.manifest_rows import ManifestRow, Variant
from shared.seeding import derive_seed
from shared.store import StoreReader
from trainer.batch import Batch
from trainer.packed_rows import row_after
from trainer.sampler import MicroBatch, Pool

AHEAD = 3  # micro-batches that wait, ready, for the UNet
MAX_CORRUPT_SHARE = 0.001
TEXT_TENSORS = ("prompt_embeds", "pooled_prompt_embeds")


class BatchReader:
    """Reads micro-batches of one manifest; `on_corrupt` hears of each sample that had to be replaced."""

    def __init__(
        self,
        store: StoreReader,
        manifest: Manifest,
        pools: Sequence[Pool],
        *,
        captions: Literal["random", "first", "all"],
        seed: int,
        pin_memory: bool,
        on_corrupt: Callable[[str, str], None],
    ) -> None:
        self._store, self._manifest, self._settings = store, manifest, manifest.settings
        self._seed, self._captions = seed, captions
        self._pin, self._on_corrupt = pin_memory, on_corrupt
        self._rows_of = {(pool.partition, pool.hw): pool.rows for pool in pools}
        self._corrupt: set[int] = set()

    def read(self, micro: MicroBatch) -> Batch:
        """The batch of `micro`; a sample that cannot be read is replaced by the next of its bucket that can.

        Which one that is depends on the store and the place alone, not on what was met before: a resumed run replaces
        as an unbroken one does. Raises DataError once more than a thousandth of the manifest (and more than one sample)
        is corrupt.
        """
        indices = list(micro.rows)
        while True:
            try:
                return self._fill(micro, indices)
            except _CorruptSample as error:
                self._note(error, indices[error.index])
                indices[error.index] = self._next(micro, error.index, indices[error.index])

    def _fill(self, micro: MicroBatch, indices: list[int]) -> Batch:
        rows = self._manifest.rows(indices)
        mean, logvar, embeds, pooled = self._buffers(micro.bucket_hw, len(rows))
        variants = [self._variant(row, place) for row, place in zip(rows, micro.places(), strict=True)]
        captions = micro.captions or (None,) * len(rows)
        with self._store.snapshot() as snapshot:
            for i, (row, place) in enumerate(zip(rows, micro.places(), strict=True)):
                latents = {"mean": mean[i].numpy()} | ({} if logvar is None else {"logvar": logvar[i].numpy()})
                text = {"prompt_embeds": embeds[i].numpy(), "pooled_prompt_embeds": pooled[i].numpy()}
                try:
                    snapshot.copy_into(variants[i].latent_key, latents)
                    key = row.text_keys[self._choose(len(row.text_keys), place, captions[i])]
                    snapshot.copy_into(key, text)
                except RecordCorrupt as error:
                    raise _CorruptSample(i, row.path, str(error)) from None
        time_ids = self._empty(len(rows), 6, dtype=torch.float32)
        for i, (row, variant) in enumerate(zip(rows, variants, strict=True)):
            time_ids[i] = MicroConditioning(row.original_hw, variant.crop_top_left, variant.target_hw).time_ids()
        return Batch(LatentMoments(mean, logvar), PromptEmbeds(embeds, pooled), time_ids, micro.places())

    def _variant(self, row: ManifestRow, place: tuple[int, int]) -> Variant:
        return row.variants[int(self._uniform("variant", place) * len(row.variants))]

    def _choose(self, count: int, place: tuple[int, int], caption: int | None) -> int:
        """Which of `count` captions; one that was named may be of a row that this one stands in for."""
        if caption is not None:
            return caption % count
        return 0 if self._captions == "first" else int(self._uniform("caption", place) * count)

    def _buffers(
        self, bucket_hw: tuple[int, int], count: int
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor]:
        known = self._settings
        latent = (known.latent_channels, bucket_hw[0] // known.downscale, bucket_hw[1] // known.downscale)
        logvar = self._empty(count, *latent) if known.latents == "moments" else None
        embeds = self._empty(count, known.text_chunks * TEXT_LENGTH, sum(known.text_widths))
        return self._empty(count, *latent), logvar, embeds, self._empty(count, known.pooled_width)

    def _empty(self, *shape: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, pin_memory=self._pin)

    def _uniform(self, what: str, place: tuple[int, int]) -> float:
        return derive_seed(self._seed, what, *place) / 2**63

    def _next(self, micro: MicroBatch, index: int, row: int) -> int:
        """The row after `row` in its bucket, round to the one that sample `index` began with."""
        following = row_after(self._rows_of[micro.partition, micro.bucket_hw], row)
        if following == micro.rows[index]:
            h, w = micro.bucket_hw
            raise DataError(
                f"every sample of bucket {h} x {w} is corrupt; mend the store: cache-store verify --quarantine"
            )
        return following

    def _note(self, error: "_CorruptSample", row: int) -> None:
        if row in self._corrupt:
            return
        self._corrupt.add(row)
        self._on_corrupt(error.path, error.reason)
        if len(self._corrupt) > max(1.0, MAX_CORRUPT_SHARE * len(self._manifest)):
            raise DataError(
                f"{len(self._corrupt)} samples of manifest {self._manifest.name!r} are corrupt, last {error.path}: "
                f"{error.reason}; cache-store verify --quarantine and the same cache-build mend the store"
            )


class _CorruptSample(Exception):
    def __init__(self, index: int, path: str, reason: str) -> None:
        super().__init__(reason)
        self.index, self.path, self.reason = index, path, reason  # index: in its micro-batch


def read_null_text(
    store: StoreReader, manifest: Manifest, null_prompt: NullPrompt, device: torch.device
) -> PromptEmbeds | None:
    """The embeds of the empty prompt [1, ...] on `device`; None where zeros stand for it."""
    if null_prompt == "zeros":
        return None
    with store.snapshot() as snapshot:
        tensors = snapshot.read(bytes.fromhex(manifest.settings.null_text_key)).tensors
    # Copied, for what a record gives may not be written to.
    return PromptEmbeds(*(torch.from_numpy(tensors[name].copy())[None].to(device) for name in TEXT_TENSORS))


def prefetch(read: Callable[[int], Batch], start: int) -> Generator[Batch, None, None]:
    """read(start), read(start + 1), ... from one thread that stays AHEAD; its errors are raised here."""
    with Ahead(map(read, itertools.count(start)), count=AHEAD) as ready:
        yield from ready
