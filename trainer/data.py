"""Store to batch: one prefetch thread copies records straight into (pinned) tensors, a few micro-batches ahead.

Which of its crops and captions a sample shows are draws labelled by (epoch, position) like all others; they are made
here because they decide what is read.
"""

import functools
import itertools
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Literal

import torch

from shared.ahead import Ahead
from shared.conditioning import TEXT_LENGTH, MicroConditioning, PromptEmbeds
from shared.contract import NullPrompt
from shared.errors import DataError, RecordCorrupt
from shared.latents import LatentMoments
from shared.manifest import Manifest
from shared.manifest_shown import ShownCrop, ShownRows
from shared.record import Array
from shared.seeding import derive_seed
from shared.store import StoreReader
from trainer.batch import Batch
from trainer.packed_rows import row_after
from trainer.sampler import MicroBatch, Pool

AHEAD = 7  # micro-batches that wait, ready, for the UNet, at most
READ_AGAIN_AT = 3  # of them: read one by one, they would take the processor from every step
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

    @functools.cached_property
    def _shown(self) -> ShownRows:
        return self._manifest.shown_rows()  # waits until the manifest is verified

    def _fill(self, micro: MicroBatch, rows: Sequence[int]) -> Batch:
        mean, logvar, embeds, pooled = self._buffers(micro.bucket_hw, len(rows))
        latents = {"mean": mean.numpy()} | ({} if logvar is None else {"logvar": logvar.numpy()})
        text = {"prompt_embeds": embeds.numpy(), "pooled_prompt_embeds": pooled.numpy()}
        places = micro.places()
        crops = [self._crop(row, place) for row, place in zip(rows, places, strict=True)]
        captions = micro.captions or (None,) * len(rows)
        with self._store.snapshot() as snapshot:
            for i, (row, place) in enumerate(zip(rows, places, strict=True)):
                try:
                    snapshot.copy_into(crops[i].latent_key, _sample(latents, i))
                    snapshot.copy_into(self._text_key(row, place, captions[i]), _sample(text, i))
                except RecordCorrupt as error:
                    raise _CorruptSample(i, str(error)) from None
        sizes = [
            MicroConditioning(self._shown.original_hw(row), crop.crop_top_left, crop.target_hw)
            for row, crop in zip(rows, crops, strict=True)
        ]
        time_ids = self._empty(len(rows), 6, dtype=torch.float32)
        time_ids.numpy()[:] = [size.ids() for size in sizes]
        return Batch(LatentMoments(mean, logvar), PromptEmbeds(embeds, pooled), time_ids, places)

    def _crop(self, row: int, place: tuple[int, int]) -> ShownCrop:
        return self._shown.variant(row, self._draw("variant", place, self._shown.variant_count(row)))

    def _text_key(self, row: int, place: tuple[int, int], caption: int | None) -> bytes:
        """Key of the caption that is shown; one that was named may be of a row that this one stands in for."""
        count = self._shown.text_count(row)
        if caption is not None:
            which = caption % count
        else:
            which = 0 if self._captions == "first" else self._draw("caption", place, count)
        return self._shown.text_key(row, which)

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

    def _draw(self, what: str, place: tuple[int, int], count: int) -> int:
        """One of `count`, equally likely."""
        return int(derive_seed(self._seed, what, *place) / 2**63 * count) if count > 1 else 0

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
        path = self._manifest.rows([row])[0].path
        self._on_corrupt(path, error.reason)
        if len(self._corrupt) > max(1.0, MAX_CORRUPT_SHARE * len(self._manifest)):
            raise DataError(
                f"{len(self._corrupt)} samples of manifest {self._manifest.name!r} are corrupt, last {path}: "
                f"{error.reason}; cache-store verify --quarantine and the same cache-build mend the store"
            )


def _sample(arrays: Mapping[str, Array], i: int) -> dict[str, Array]:
    return {name: array[i] for name, array in arrays.items()}


class _CorruptSample(Exception):
    def __init__(self, index: int, reason: str) -> None:
        super().__init__(reason)
        self.index, self.reason = index, reason  # index: in its micro-batch


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
    with Ahead(map(read, itertools.count(start)), count=AHEAD, again_at=READ_AGAIN_AT) as ready:
        yield from ready
