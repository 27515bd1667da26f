"""The data sets of a build, as sources that can be scanned: [[datasets]] of a TOML, or FOLDER on the command line.

config.py: DatasetConfig -> open_source -> Source -> scan.py
"""

import os
from collections.abc import Sequence

from cache_builder.config import BuildConfig, DatasetConfig
from cache_builder.sources import Source
from cache_builder.sources.folder import FolderSource
from cache_builder.sources.table import TableSource
from cache_builder.sources.trees import Root, name_of
from cache_builder.sources.webdataset import WebDatasetSource
from shared.errors import ConfigError


def choose_datasets(config: BuildConfig, folder: Root | None, dataset_id: str | None) -> BuildConfig:
    """`config` with its data sets, or with `folder` as the only one; raises ConfigError where it is both or neither."""
    if folder is None:
        if not config.datasets:
            raise ConfigError(
                "which pictures? Name a FOLDER, or write [[datasets]] into a file and give it as --config"
            )
        if dataset_id is not None:
            raise ConfigError("--dataset names the data set of a FOLDER; those of the configuration have an id")
        return config
    if dataset_id == "":
        raise ConfigError("--dataset: an empty name")
    if config.datasets:
        raise ConfigError(f"FOLDER {folder} and the configuration's [[datasets]]: give one of them")
    only = DatasetConfig(
        id=dataset_id if dataset_id is not None else _printable_name(folder),
        root=folder,
        source=config.source,
        images=config.images,
        captions=config.captions,
    )
    return config.model_copy(update={"datasets": (only,)})


def open_sources(datasets: Sequence[DatasetConfig]) -> list[Source]:
    """Each data set as a source; raises DataError where a root is not there."""
    sources = [open_source(dataset) for dataset in datasets]
    for source in sources:
        source.scan()  # looks at the root at once: a missing one is said before a model is looked for
    return sources


def open_source(dataset: DatasetConfig) -> Source:
    """A data set by its kind."""
    common = dataset.source, dataset.captions, dataset.images.max_bytes
    if dataset.kind == "table":
        return TableSource(dataset.root, dataset.id, *common)
    if dataset.kind == "webdataset":
        return WebDatasetSource(dataset.root, dataset.id, *common)
    rules, caption_rules, max_bytes = common
    return FolderSource(dataset.root, dataset.id, caption_rules, max_bytes, rules)


def _printable_name(folder: Root) -> str:
    """A folder's name as a data set's id, which is text."""
    if isinstance(folder, str):
        return name_of(folder)
    return os.fsencode(folder.resolve().name).decode("utf-8", "backslashreplace") or "root"
