"""What of a build is not in the store yet, and how many bytes it will be there; reads a store, changes nothing.

samples of scan.py -> Todo -> dry_run.py tells it, rehearsal.py times a sample of it
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from cache_builder.config import BuildConfig
from cache_builder.keys import text_facts_key, text_key
from cache_builder.scan import PlannedCrop, Sample
from shared.conditioning import TEXT_LENGTH
from shared.errors import RecordCorrupt
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
class Todo:
    """The captions and crops that a build will encode."""

    captions: list[str]
    pictures: list[tuple[Sample, list[PlannedCrop]]]
    """A picture by the first of its samples, with its crops that are missing; each picture once."""

    @property
    def crops(self) -> list[tuple[Sample, PlannedCrop]]:
        """Every crop on its own."""
        return [(sample, crop) for sample, crops in self.pictures for crop in crops]

    def without(self, lost: Mapping[bytes, str]) -> "Todo":
        """The same without the pictures of these facts keys."""
        return Todo(self.captions, [picture for picture in self.pictures if picture[0].facts_key not in lost])

    def bytes_to_write(self, config: BuildConfig, text: TextFacts, vae: VaeFacts) -> int:
        """How much the store will grow, about: records lie on pages of their own."""
        width = config.text.chunks * TEXT_LENGTH * sum(text.widths) + text.pooled_width
        texts = len(self.captions) * (_pages(width * FP16_BYTES) + FACTS_BYTES)
        tensors = 2 if config.encode.latents == "moments" else 1
        areas = [crop.plan.target_hw[0] * crop.plan.target_hw[1] // vae.downscale**2 for _, crop in self.crops]
        latents = sum(_pages(tensors * vae.latent_channels * area * FP16_BYTES) for area in areas)
        return texts + latents + len(self.pictures) * FACTS_BYTES


def find_todo(
    store: Store, samples: Sequence[Sample], prompts: Sequence[str], config: BuildConfig, text: TextFacts
) -> Todo:
    """What `store` lacks of `samples` and `prompts`, in the order in which a build meets it."""
    texts = dict.fromkeys([*(caption for sample in samples for caption in sample.captions), *prompts, ""])
    keys = {caption: text_key(caption, config.text.chunks, text.digests) for caption in texts}
    wanted = {key for caption in keys.values() for key in (caption, text_facts_key(caption))}
    wanted |= {crop.latent_key for sample in samples for crop in sample.crops}
    stored = _stored(store, wanted)
    captions = [c for c, key in keys.items() if not {key, text_facts_key(key)} <= stored]
    return Todo(captions, _incomplete(samples, stored))


def token_counts(
    store: Store, captions: Sequence[str], keys: Mapping[str, bytes], count: Callable[[Sequence[str]], list[TokenCount]]
) -> dict[str, TokenCount]:
    """How long each of `captions` is: as the store says where it knows, else by `count`."""
    known: dict[str, TokenCount] = {}
    for batch in _batches(captions):
        with store.snapshot() as snapshot:
            found = {caption: _known_count(snapshot, text_facts_key(keys[caption])) for caption in batch}
        known |= {caption: tokens for caption, tokens in found.items() if tokens is not None}
        unknown = [caption for caption in batch if caption not in known]
        known |= dict(zip(unknown, count(unknown), strict=True)) if unknown else {}
    return known


def _incomplete(samples: Sequence[Sample], stored: set[bytes]) -> list[tuple[Sample, list[PlannedCrop]]]:
    """All crops of a picture where its thumbnail is unknown, else those that are missing."""
    pictures: dict[bytes, tuple[Sample, list[PlannedCrop]]] = {}
    for sample in samples:
        _, crops = pictures.setdefault(sample.facts_key, (sample, []))
        missing = [c for c in sample.crops if sample.thumbnail is None or c.latent_key not in stored]
        crops += [crop for crop in missing if crop not in crops]
    return [picture for picture in pictures.values() if picture[1]]


def _stored(store: Store, keys: Iterable[bytes]) -> set[bytes]:
    found: set[bytes] = set()
    for batch in _batches(sorted(keys)):
        with store.snapshot() as snapshot:
            found.update(key for key in batch if snapshot.has(key))
    return found


def _known_count(snapshot: Snapshot, key: bytes) -> TokenCount | None:
    try:
        meta = snapshot.read(key).meta
        return TokenCount(int(meta["tokens"]), bool(meta["truncated"]))
    except RecordCorrupt:
        return None


def _pages(tensor_bytes: int) -> int:
    return -(-(tensor_bytes + FRAME_BYTES) // PAGE_BYTES) * PAGE_BYTES


def _batches(items: Sequence[T]) -> Iterator[Sequence[T]]:
    return (items[start : start + KEYS_AT_ONCE] for start in range(0, len(items), KEYS_AT_ONCE))
