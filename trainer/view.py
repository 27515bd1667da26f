"""What one expert sees of a manifest: rows that its config keeps, each as often as its config says, caption by caption.

manifest + DataConfig -> pools -> trainer/sampler.py. Nothing is cached anew: two experts with two views read one store.
"""

import difflib
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from shared.errors import ConfigError
from shared.manifest import Manifest
from shared.manifest_rows import MetaValue
from shared.parts import part_of
from trainer.data_config import Between, DataConfig, MetaRule, Selection
from trainer.packed_rows import PackedRows
from trainer.sampler import Pool

Mask = np.ndarray[Any, np.dtype[np.bool_]]
Numbers = np.ndarray[Any, np.dtype[Any]]


def view_of(manifest: Manifest, config: DataConfig, partitions: Sequence[int] = (0,), count: int = 1) -> list[Pool]:
    """The pools that an expert trains on, smallest bucket first; those in `partitions` of `count`.

    Raises ConfigError where a data set or column is not in the manifest, where a rule does not fit what a column holds,
    or where nothing is left.
    """
    weights, buckets = _weights(manifest, config), manifest.buckets("train")
    pools: list[Pool] = []
    is_empty = True
    for bucket in buckets:
        rows = bucket.rows if weights is None else bucket.rows[weights[bucket.rows] > 0]
        is_empty = is_empty and not len(rows)
        numbers = None if count == 1 else part_of(manifest.sample_heads(rows), count)
        for partition in partitions:
            own = rows if numbers is None else rows[numbers == partition]
            if len(own):
                pools.append(_pool(manifest, config, bucket.hw, own, weights, partition))
    if buckets and is_empty:
        raise ConfigError(f"data leaves none of {_train_count(manifest)} samples: {_passed(manifest, config)}")
    return pools


def describe_view(manifest: Manifest, pools: Iterable[Pool]) -> str:
    """How much of the manifest an expert sees, for people."""
    seen, total = sum(row_count(pool) for pool in pools), _train_count(manifest)
    return f"{total} samples" if seen == total else f"{seen} of {total} samples"


def row_count(pool: Pool) -> int:
    """Rows of a pool, each counted once however many of its captions are shown."""
    return len(pool.rows) if isinstance(pool.rows, PackedRows) else int(np.count_nonzero(np.diff(pool.rows))) + 1


def _pool(
    manifest: Manifest, config: DataConfig, hw: tuple[int, int], rows: Numbers, weights: Numbers | None, partition: int
) -> Pool:
    captions = None
    if config.captions == "all":
        counts = manifest.caption_counts()[rows]
        captions = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        rows = np.repeat(rows, counts)
    own = None if weights is None else weights[rows]
    packed = PackedRows(rows) if captions is None else rows
    return Pool(hw, packed, captions, None if own is None or (own == 1).all() else own, partition)


def _weights(manifest: Manifest, config: DataConfig) -> Numbers | None:
    """How often each row comes in an epoch, float64 [rows]; None where each comes once."""
    if config.keep == Selection() and not config.weights:
        return None
    weights = select(manifest, config.keep, "data.keep").astype(np.float64)
    for number, rule in enumerate(config.weights):
        weights[select(manifest, rule.where, f"data.weights.{number}.where")] *= rule.weight
    return weights


def select(manifest: Manifest, selection: Selection, where: str) -> Mask:
    """Which rows pass every rule of `selection`, bool [rows]; `where` is what errors call it."""
    mask = np.ones(len(manifest), np.bool_)
    for _, passes in _rules(manifest, selection, where):
        mask &= passes
    return mask


def _rules(manifest: Manifest, selection: Selection, where: str) -> Iterable[tuple[str, Mask]]:
    """Each rule that is set, and the rows that pass it."""
    if selection.datasets:
        for name in selection.datasets:
            _known(name, manifest.settings.datasets, f"{where}.datasets: the manifest has no data set")
        yield "datasets", np.any([manifest.in_dataset(name) for name in selection.datasets], axis=0)
    for name, rule, of_size in (
        ("short_side_px", selection.short_side_px, np.minimum),
        ("area_px", selection.area_px, np.multiply),
        ("aspect", selection.aspect, lambda h, w: w / h),
    ):
        if rule is not None:
            yield name, _between(rule, of_size(*manifest.original_sizes().T))
    for name, meta_rule in selection.meta.items():
        _known(name, manifest.settings.meta, f"{where}.meta: the manifest has no column")
        yield f"meta.{name}", _meta_passes(manifest, name, meta_rule, where)


def _between(rule: Between, values: Any) -> Mask:
    low, high = (-np.inf if rule.min is None else rule.min), (np.inf if rule.max is None else rule.max)
    mask: Mask = (values >= low) & (values <= high)  # NaN, which stands for no value, passes nothing
    return mask


def _meta_passes(manifest: Manifest, name: str, rule: MetaRule, where: str) -> Mask:
    kind, values = manifest.settings.meta[name], manifest.meta(name)
    mask = np.array([value is not None for value in values])
    if rule.min is not None or rule.max is not None:
        if kind not in ("int", "float"):
            raise ConfigError(f"{where}.meta.{name}: min and max are for numbers; the column holds {kind}")
        numbers = np.array([np.nan if value is None else value for value in values], np.float64)
        mask &= _between(rule, numbers)
    for wanted, is_in in ((rule.one_of, True), (rule.none_of, False)):
        if wanted:
            _check_type(wanted, kind, f"{where}.meta.{name}")
            mask &= np.array([value is not None and _shares(value, wanted) == is_in for value in values])
    return mask


def _shares(value: MetaValue, wanted: tuple[MetaValue, ...]) -> bool:
    """Whether a value, or one of a list of them, is among the wanted."""
    return bool(set(value) & set(wanted)) if isinstance(value, tuple) else value in wanted


def _check_type(wanted: tuple[MetaValue, ...], kind: str, where: str) -> None:
    fits: dict[str, tuple[type, ...]] = {"bool": (bool,), "int": (int,), "float": (int, float)}
    for value in wanted:
        if type(value) not in fits.get(kind, (str,)):
            raise ConfigError(f"{where}: the column holds {kind}, which {value!r} is not")


def _known(name: str, names: Iterable[str], complaint: str) -> None:
    if name not in (known := sorted(names)):
        near = difflib.get_close_matches(name, known, n=1) or known
        raise ConfigError(f"{complaint} {name!r}; " + (f"there is: {', '.join(near)}" if near else "it has none"))


def _train_count(manifest: Manifest) -> int:
    return sum(map(len, manifest.buckets("train")))


def _passed(manifest: Manifest, config: DataConfig) -> str:
    """How many of the rows that could be trained on pass each rule by itself."""
    train = np.concatenate([bucket.rows for bucket in manifest.buckets("train")])
    counts = [f"{name} {mask[train].sum()}" for name, mask in _rules(manifest, config.keep, "data.keep")]
    return f"each rule of data.keep alone keeps {', '.join(counts)}" if counts else "every weight is 0"
