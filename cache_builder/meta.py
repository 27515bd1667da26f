"""Columns that travel along: which meta_* a manifest has and of which type, from what its samples hold.

Sample.meta -> meta_types -> ManifestSettings.meta; meta_row gives a sample's values in those types
"""

from collections.abc import Mapping

import numpy as np

from cache_builder.sample import Sample
from cache_builder.samples import Samples
from cache_builder.sources import MetaValue
from shared.errors import DataError
from shared.manifest_rows import MetaType

MOST_COLUMNS = 256
_TYPES: dict[type, MetaType] = {bool: "bool", int: "int", float: "float", str: "string", tuple: "strings"}


def meta_types(samples: Samples) -> dict[str, MetaType]:
    """The type of each column; whole and other numbers together are float. Raises DataError where two types clash."""
    types: dict[str, MetaType] = {}
    first: dict[str, Sample] = {}
    for index in np.flatnonzero(samples.rows["has_meta"]).tolist():
        sample = samples[index]
        for name, value in sample.meta.items():
            kind = _TYPES[type(value)]
            if types.setdefault(name, kind) != kind:
                types[name] = _wider(name, first[name], sample, (types[name], kind))
            first.setdefault(name, sample)
    if len(types) > MOST_COLUMNS:
        raise DataError(
            f"{len(types)} columns to carry along, more than {MOST_COLUMNS}: source.meta_columns names some"
        )
    return dict(sorted(types.items()))


def meta_row(sample: Sample, types: Mapping[str, MetaType]) -> dict[str, MetaValue]:
    """The values of a sample in the types of their columns."""
    return {
        name: float(value) if types[name] == "float" and isinstance(value, int) else value
        for name, value in sample.meta.items()
    }


def _wider(name: str, one: Sample, other: Sample, kinds: tuple[MetaType, MetaType]) -> MetaType:
    if set(kinds) == {"int", "float"}:
        return "float"
    before, now = kinds
    raise DataError(
        f"column {name!r} holds {before} in data set {one.dataset} ({one.path}) and {now} in {other.dataset} "
        f"({other.path}): make them alike, or name the columns to carry along in source.meta_columns"
    )
