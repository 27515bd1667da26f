"""The last step of a build: its samples as rows of a manifest, in the manifest's order, each made when it is asked for.

samples, what is held out, text keys -> SampleRows -> shared/manifest.py: seal_manifest
"""

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from cache_builder.keys import sample_ids_in
from cache_builder.meta import meta_row
from cache_builder.scan import Sample
from shared.manifest_rows import ManifestRow, MetaType, Variant


@dataclass(frozen=True)
class SampleRows:
    """Rows that can be gone through as often as one likes and are never all in memory."""

    samples: Sequence[Sample]
    held_out: Sequence[bool]
    text_keys: Mapping[str, bytes]
    """Of every caption."""
    meta: Mapping[str, MetaType]

    def __len__(self) -> int:
        return len(self.samples)

    def __iter__(self) -> Iterator[ManifestRow]:
        """The rows in the order of ManifestRow.order."""
        return (self._row(self.samples[index], self.held_out[index], sample_id) for sample_id, index in self._order)

    @functools.cached_property
    def _order(self) -> list[tuple[bytes, int]]:
        """Sample ids in their order, each with the index of its sample."""
        ids_in = {dataset: sample_ids_in(dataset) for dataset in {sample.dataset for sample in self.samples}}
        groups: dict[tuple[str, tuple[int, int]], list[tuple[bytes, int]]] = {}
        for index, sample in enumerate(self.samples):
            group = groups.setdefault((sample.dataset, sample.crops[0].plan.target_hw), [])
            group.append((ids_in[sample.dataset](sample.digest), index))
        return [item for _, group in sorted(groups.items()) for item in sorted(group)]

    def _row(self, sample: Sample, is_held_out: bool, sample_id: bytes) -> ManifestRow:
        return ManifestRow(
            dataset=sample.dataset,
            sample_id=sample_id,
            path=sample.path,
            image_digest=sample.digest,
            original_hw=sample.original_hw,
            bucket_hw=sample.crops[0].plan.target_hw,
            variants=tuple(
                Variant(crop.latent_key, crop.plan.flip, crop.plan.crop_top_left, crop.plan.target_hw)
                for crop in sample.crops
            ),
            text_keys=tuple(self.text_keys[caption] for caption in sample.captions),
            split="eval" if is_held_out else "train",
            meta=meta_row(sample, self.meta) if sample.meta else {},
        )
