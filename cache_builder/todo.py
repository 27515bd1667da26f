"""What of a build is not in the store yet, and how many bytes it will be there; reads a store, changes nothing.

samples of scan.py -> what is missing -> fill.py encodes it; dry_run.py tells it, rehearsal.py times a sample of it
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from cache_builder.config import BuildConfig
from cache_builder.keys import text_facts_key, text_keys_for
from cache_builder.report import BuildReport
from cache_builder.scan import PlannedCrop, Sample
from shared.conditioning import TEXT_LENGTH
from shared.errors import RecordCorrupt, StoreFull
from shared.store import Snapshot, Store
from shared.text_encoders import TextFacts, TokenCount
from shared.vae import VaeFacts

KEYS_AT_ONCE = 4096  # looked up in one read transaction
FP16_BYTES = 2
FRAME_BYTES = 256  # of a record's frame and header, about
FACTS_BYTES = 512  # of the two small records beside a picture and a caption, about
PAGE_BYTES = 4096  # what a record of LMDB ends on

T = TypeVar("T")


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
class Todo:
    """The captions and crops that a build will encode."""

    captions: list[str]
    pictures: list[Picture]

    @property
    def crops(self) -> list[tuple[Sample, PlannedCrop]]:
        """Every crop on its own, with one of the samples that it is of."""
        return [(picture.samples[0], crop) for picture in self.pictures for crop in picture.crops]

    def without(self, lost: Mapping[bytes, str]) -> "Todo":
        """The same without the pictures of these facts keys."""
        return Todo(self.captions, [picture for picture in self.pictures if picture.facts_key not in lost])

    def bytes_to_write(self, config: BuildConfig, text: TextFacts, vae: VaeFacts) -> int:
        """How much the store will grow, about."""
        return text_bytes(len(self.captions), config, text) + picture_bytes(self.pictures, config, vae)


def find_todo(
    store: Store, samples: Sequence[Sample], prompts: Sequence[str], config: BuildConfig, text: TextFacts
) -> Todo:
    """What `store` lacks of `samples` and `prompts`, in the order in which a build meets it."""
    return Todo(missing_captions(store, text_keys(samples, prompts, config, text)), missing_pictures(store, samples))


def text_keys(
    samples: Sequence[Sample], prompts: Sequence[str], config: BuildConfig, text: TextFacts
) -> dict[str, bytes]:
    """Every caption and prompt once, and the empty one, each with its key."""
    captions = (caption for sample in samples for caption in sample.captions)
    texts = dict.fromkeys(itertools.chain(captions, prompts, [""]))
    key = text_keys_for(config.text.chunks, text.digests)
    return {caption: key(caption.encode()) for caption in texts}


def missing_captions(store: Store, keys: Mapping[str, bytes]) -> list[str]:
    """Captions of which a record is missing."""
    stored, facts = stored_keys(store, keys.values()), {c: text_facts_key(key) for c, key in keys.items()}
    stored_facts = stored_keys(store, facts.values())
    return [c for c, key in keys.items() if key not in stored or facts[c] not in stored_facts]


def missing_pictures(store: Store, samples: Sequence[Sample]) -> list[Picture]:
    """The pictures that lack something, each with its missing crops, or all of them where its facts are missing."""
    wanted = {crop.latent_key for sample in samples for crop in sample.crops}
    wanted.update(sample.facts_key for sample in samples if sample.thumbnail is not None)
    stored = stored_keys(store, wanted)
    pictures: dict[bytes, Picture] = {}
    for sample in samples:
        has_facts = sample.thumbnail is not None and sample.facts_key in stored  # a scan cache may have more of them
        missing = [crop for crop in sample.crops if not has_facts or crop.latent_key not in stored]
        if missing:  # which a rebuild finds of hardly any
            picture = pictures.setdefault(sample.facts_key, Picture([], []))
            picture.samples.append(sample)
            picture.crops.extend(crop for crop in missing if crop not in picture.crops)
    return list(pictures.values())


def stored_keys(store: Store, keys: Iterable[bytes]) -> set[bytes]:
    """Those of `keys` that the store has a record of."""
    found: set[bytes] = set()
    for batch in batches(sorted(keys), KEYS_AT_ONCE):
        with store.snapshot() as snapshot:
            found.update(snapshot.present(batch))
    return found


def text_bytes(count: int, config: BuildConfig, text: TextFacts) -> int:
    """How much the store grows by `count` captions, about: records lie on pages of their own."""
    width = config.text.chunks * TEXT_LENGTH * sum(text.widths) + text.pooled_width
    return count * (_pages(width * FP16_BYTES) + FACTS_BYTES)


def picture_bytes(pictures: Sequence[Picture], config: BuildConfig, vae: VaeFacts) -> int:
    """How much the store grows by the crops of `pictures`, about."""
    tensors = 2 if config.encode.latents == "moments" else 1
    sizes = [crop.plan.target_hw for picture in pictures for crop in picture.crops]
    areas = (h * w // vae.downscale**2 for h, w in sizes)
    latents = sum(_pages(tensors * vae.latent_channels * area * FP16_BYTES) for area in areas)
    return latents + len(pictures) * FACTS_BYTES


def require_space(store: Path, needed_bytes: int, free_bytes: int) -> None:
    """Raise StoreFull where a build would write more than is free."""
    if needed_bytes > free_bytes:
        raise StoreFull(
            f"{store}: this build will write {needed_bytes >> 20} MiB and {free_bytes >> 20} are free; "
            "free some space or name another --store"
        )


def account_for(
    report: BuildReport, samples: Sequence[Sample], encoded: set[bytes], lost: Mapping[bytes, str]
) -> list[Sample]:
    """Count what becomes of each sample, by the latent keys that were made and lost; returns those that are usable.

    Without one of its crops a sample is set aside; its other crops stay stored.
    """
    usable, left = [], set(encoded)
    for sample in samples:
        keys = [crop.latent_key for crop in sample.crops]
        if reasons := [lost[key] for key in keys if key in lost]:
            report.quarantined.append((sample.path, reasons[0]))
            continue
        if left.isdisjoint(keys):  # or shared with a sample before it: the same picture in another data set
            report.reused += 1
        else:
            report.stored += 1
        left.difference_update(keys)
        report.crops += len(keys)
        usable.append(sample)
    return usable


def token_counts(
    store: Store, captions: Sequence[str], keys: Mapping[str, bytes], count: Callable[[Sequence[str]], list[TokenCount]]
) -> dict[str, TokenCount]:
    """How long each of `captions` is: as the store says where it knows, else by `count`."""
    known: dict[str, TokenCount] = {}
    for batch in batches(captions, KEYS_AT_ONCE):
        with store.snapshot() as snapshot:
            found = {caption: known_count(snapshot, keys[caption]) for caption in batch}
        known |= {caption: tokens for caption, tokens in found.items() if tokens is not None}
        unknown = [caption for caption in batch if caption not in known]
        known |= dict(zip(unknown, count(unknown), strict=True)) if unknown else {}
    return known


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


def _pages(tensor_bytes: int) -> int:
    return -(-(tensor_bytes + FRAME_BYTES) // PAGE_BYTES) * PAGE_BYTES
