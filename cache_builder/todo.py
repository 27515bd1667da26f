"""What of a build is not in the store yet, and how many bytes it will be there; reads a store, changes nothing.

samples of scan.py -> what is missing -> fill.py encodes it; dry_run.py tells it, rehearsal.py times a sample of it
"""

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, overload

import numpy as np

from cache_builder.config import BuildConfig
from cache_builder.key_arrays import Indices, Keys, as_keys, begins_another, each, first_of_each, is_in, stored
from cache_builder.keys import text_facts_key
from cache_builder.report import BuildReport
from cache_builder.sample import Sample
from cache_builder.sample_rows import PlannedCrop
from cache_builder.samples import Samples
from shared.conditioning import TEXT_LENGTH
from shared.errors import RecordCorrupt, StoreFull
from shared.snapshot import Snapshot
from shared.store import Store
from shared.text_encoders import TextFacts, TokenCount
from shared.vae import VaeFacts

FP16_BYTES = 2
FRAME_BYTES = 256  # of a record's frame and header, about
FACTS_BYTES = 512  # of the two small records beside a picture and a caption, about
SMALL = np.uint32  # counts of samples and of crops, where as many of them are in memory at once
PAGE_BYTES = 4096  # what a record of LMDB ends on

T = TypeVar("T")


@dataclass(frozen=True)
class Picture:
    """One picture with what its samples lack: it is decoded once for all of its crops and all data sets it is in."""

    samples: list[Sample]
    crops: list[PlannedCrop]


class Pictures(Sequence[Picture]):
    """The pictures that lack something, those of one bucket together; each is made when it is asked for."""

    def __init__(self, samples: Samples, crops: Indices) -> None:
        """Of `samples`, which lack `crops`, ascending."""
        self.samples, self._lacking = samples, samples.outside(crops)
        del crops
        of_crops = samples.of_crop(self._lacking).astype(SMALL)
        is_first = np.diff(of_crops, prepend=SMALL(len(samples))) != 0  # of its sample
        lack, first_crops = of_crops[is_first], self._lacking[is_first].astype(SMALL)
        del of_crops, is_first
        by_picture = np.argsort(samples.rows["facts_key"][lack], kind="stable").astype(SMALL)
        self._members = samples.outside(lack[by_picture])
        begins = np.flatnonzero(begins_another(samples.rows["facts_key"], self._members)).astype(SMALL)
        first = by_picture[begins]  # samples are in order, and so are those of a picture
        del by_picture, lack
        height, width = samples.crops["target_hw"][first_crops[first]].T
        order = np.lexsort((first, width, height)).astype(SMALL)
        del height, width, first, first_crops
        self._begins = samples.outside(begins[order])
        self._ends = samples.outside(np.append(begins[1:], SMALL(len(self._members)))[order])

    @functools.cached_property
    def crops(self) -> Indices:
        """Which crops are lacking, ascending, each key once."""
        first = first_of_each(self.samples.crops["key"][self._lacking])
        return self.samples.outside(self._lacking[first].astype(SMALL))

    @property
    def most_crops(self) -> int:
        """No picture lacks more of them, as far as one data set goes."""
        return int(self.samples.rows["crop_count"].max(initial=1))

    def without(self, lost: Mapping[bytes, str]) -> "Pictures":
        """The same without the pictures of these facts keys."""
        if not lost:
            return self
        keys = self.samples.rows["facts_key"][self.samples.of_crop(self._lacking)]
        return Pictures(self.samples, self._lacking[~is_in(keys, np.sort(as_keys(lost)))])

    def __len__(self) -> int:
        return len(self._begins)

    @overload
    def __getitem__(self, index: int) -> Picture: ...
    @overload
    def __getitem__(self, index: slice) -> list[Picture]: ...
    def __getitem__(self, index: int | slice) -> Picture | list[Picture]:
        if isinstance(index, slice):
            return [self[each] for each in range(len(self))[index]]
        members = self._members[self._begins[index] : self._ends[index]].tolist()
        crops = (self.samples.crop(crop) for member in members for crop in self._crops_of(member))
        return Picture([self.samples[member] for member in members], [*dict.fromkeys(crops)])

    def __iter__(self) -> Iterator[Picture]:
        return (self[index] for index in range(len(self)))

    def _crops_of(self, member: int) -> list[int]:
        row = self.samples.rows[member]
        first, last = np.searchsorted(self._lacking, (row["crops"], row["crops"] + row["crop_count"]))
        return [int(crop) for crop in self._lacking[first:last]]


@dataclass(frozen=True)
class Todo:
    """The texts and pictures that a build will encode."""

    texts: Indices
    pictures: Pictures

    def without(self, lost: Mapping[bytes, str]) -> "Todo":
        """The same without the pictures of these facts keys."""
        return Todo(self.texts, self.pictures.without(lost))

    def bytes_to_write(self, config: BuildConfig, text: TextFacts, vae: VaeFacts) -> int:
        """How much the store will grow, about."""
        return text_bytes(len(self.texts), config, text) + picture_bytes(self.pictures, config, vae)


def find_todo(store: Store, samples: Samples) -> Todo:
    """What `store` lacks of `samples`, in the order in which a build meets it."""
    return Todo(missing_texts(store, samples), missing_pictures(store, samples))


def add_prompts(samples: Samples, prompts: Sequence[str]) -> None:
    """Put `prompts`, and the empty one, among the texts of `samples`."""
    for text in (*prompts, ""):
        samples.add_text(text)


def missing_texts(store: Store, samples: Samples, elsewhere: Keys | None = None) -> Indices:
    """The texts, each once, of which a record is missing; their embeds may be `elsewhere`, in place of the store."""
    texts = first_of_each(samples.texts["key"])
    keys = samples.texts["key"][texts]
    is_whole = stored(store, keys) if elsewhere is None else is_in(keys, elsewhere)
    is_whole &= stored(store, as_keys(text_facts_key(key) for key in each(keys)))
    return texts[~is_whole]


def missing_pictures(store: Store, samples: Samples, elsewhere: Keys | None = None) -> Pictures:
    """The pictures that lack something, each with its missing crops, or all of them where its facts are missing.

    Latents may be `elsewhere`, in place of the store.
    """
    has_facts = samples.facts["is_known"].copy()  # a scan cache may have more of them than the store
    has_facts &= stored(store, samples.rows["facts_key"])
    crops = samples.crops["key"]
    is_there = stored(store, crops) if elsewhere is None else is_in(crops, elsewhere)
    is_there &= np.repeat(has_facts, samples.rows["crop_count"])
    return Pictures(samples, np.flatnonzero(~is_there))


def text_bytes(count: int, config: BuildConfig, text: TextFacts) -> int:
    """How much the store grows by `count` captions, about: records lie on pages of their own."""
    width = config.text.chunks * TEXT_LENGTH * sum(text.widths) + text.pooled_width
    return int(count * (_pages(width * FP16_BYTES) + FACTS_BYTES))


def picture_bytes(pictures: Pictures, config: BuildConfig, vae: VaeFacts) -> int:
    """How much the store grows by the crops of `pictures`, about."""
    tensors = 2 if config.encode.latents == "moments" else 1
    edges = pictures.samples.crops["target_hw"][pictures.crops].astype(np.int64)
    areas, counts = np.unique(edges.prod(axis=1) // vae.downscale**2, return_counts=True)
    latents = _pages(tensors * vae.latent_channels * areas * FP16_BYTES)
    return int((latents * counts).sum()) + len(pictures) * FACTS_BYTES


def sealing_bytes(samples: Samples) -> int:
    """What sealing writes beside records, about: the manifest in unnamed files twice, and under its name.

    Its rows are somewhat smaller than the samples are without their thumbnails.
    """
    return 3 * (samples.nbytes - samples.facts.nbytes)


def require_space(store: Path, needed_bytes: int, free_bytes: int, passing_bytes: int) -> None:
    """Raise StoreFull where a build would write more than is free, with what goes again at its end.

    Where there is nothing to encode there may be nothing to seal either, which asks for no room.
    """
    needed_bytes += passing_bytes if needed_bytes else 0
    if needed_bytes > free_bytes:
        raise StoreFull(
            f"{store}: this build will write {needed_bytes >> 20} MiB and {free_bytes >> 20} are free; "
            "free some space or name another --store"
        )


def account_for(report: BuildReport, samples: Samples, crops: Indices, lost: Mapping[bytes, str]) -> Indices:
    """Count what becomes of each sample, by the `crops` that it lacked and the latent keys that could not be made.

    Returns which are usable. Without one of its crops a sample is set aside; its other crops stay stored.
    """
    is_usable = np.ones(len(samples), bool)
    if lost:
        is_usable[samples.of_crop(np.flatnonzero(is_in(samples.crops["key"], np.sort(as_keys(lost)))))] = False
    for sample in map(samples.__getitem__, np.flatnonzero(~is_usable).tolist()):
        reason = next(lost[crop.latent_key] for crop in sample.crops if crop.latent_key in lost)
        report.quarantined.append((sample.path, reason))
    is_new = np.zeros(len(samples), bool)  # not of others that share its crops: the same picture in another data set
    is_new[samples.of_crop(crops)] = True
    usable, count = np.flatnonzero(is_usable), int((is_new & is_usable).sum())
    report.stored += count
    report.reused += len(usable) - count
    report.crops += int(samples.rows["crop_count"][usable].sum())
    return usable


def known_count(snapshot: Snapshot, key: bytes) -> TokenCount | None:
    """How long the caption of text key `key` is; None where the store does not say."""
    try:
        meta = snapshot.read(text_facts_key(key)).meta
        return TokenCount(int(meta["tokens"]), bool(meta["truncated"]))
    except RecordCorrupt:
        return None


def batches(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    """`items` in order, at most `size` at once."""
    return (items[start : start + size] for start in range(0, len(items), size))


def _pages(tensor_bytes: Any) -> Any:
    return -(-(tensor_bytes + FRAME_BYTES) // PAGE_BYTES) * PAGE_BYTES
