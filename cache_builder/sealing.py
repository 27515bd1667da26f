"""The last step of a build: its samples as rows of a manifest, in the manifest's order, each made when it is asked for.

samples, what is held out -> SampleRows -> shared/manifest.py: seal_manifest
"""

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from cache_builder.key_arrays import KEY_DTYPE, Flags, Indices, Keys
from cache_builder.keys import sample_ids_in
from cache_builder.meta import meta_row
from cache_builder.sample import Sample
from cache_builder.samples import Samples
from shared.manifest_rows import ManifestRow, MetaType, Variant
from shared.record import KEY_BYTES
from shared.scratch import Column


@dataclass(frozen=True)
class SampleRows:
    """Rows that can be gone through as often as one likes and are never all in memory."""

    samples: Samples
    held_out: Sequence[bool] | Flags
    meta: Mapping[str, MetaType]

    def __len__(self) -> int:
        return len(self.samples)

    def __iter__(self) -> Iterator[ManifestRow]:
        """The rows in the order of ManifestRow.order."""
        return (self._row(self.samples[int(index)]) for index in self._order)

    @functools.cached_property
    def _ids(self) -> Keys:
        """The id of each sample, outside of memory."""
        ids_in = [sample_ids_in(dataset.id) for dataset in self.samples.datasets]
        ids = Column(KEY_DTYPE, self.samples.folder)
        for row in self.samples.rows:
            ids.append(ids_in[row["source"]](row["digest"].tobytes()))
        return ids.array

    @functools.cached_property
    def _order(self) -> Indices:
        """Which sample each row is of."""
        names = sorted({dataset.id for dataset in self.samples.datasets})
        ranks = np.array([names.index(dataset.id) for dataset in self.samples.datasets], np.uint32)
        rows = self.samples.rows
        order: Indices = np.argsort(self._ids)
        height, width = self.samples.crops["target_hw"][rows["crops"]].T
        return order[np.lexsort((width[order], height[order], ranks[rows["source"]][order]))]

    def _row(self, sample: Sample) -> ManifestRow:
        crops, meta = sample.crops, sample.meta
        return ManifestRow(
            dataset=sample.dataset,
            sample_id=self._ids[sample.index].ljust(KEY_BYTES, b"\0"),
            path=sample.path,
            image_digest=sample.digest,
            original_hw=sample.original_hw,
            bucket_hw=crops[0].plan.target_hw,
            variants=tuple(
                Variant(crop.latent_key, crop.plan.flip, crop.plan.crop_top_left, crop.plan.target_hw) for crop in crops
            ),
            text_keys=sample.text_keys,
            split="eval" if self.held_out[sample.index] else "train",
            meta=meta_row(sample, self.meta) if meta else {},
        )
