"""What a build would change: `cache-store diff STORE FOLDER`. By bytes, as keys are; no model is loaded.

The folder is scanned by the rules that stand in the manifest, and its samples are compared with the manifest's rows.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from cache_builder.config import BuildConfig
from cache_builder.datasets import open_sources
from cache_builder.key_arrays import first_of_each, stored
from cache_builder.report import BuildReport
from cache_builder.sample import Sample
from cache_builder.samples import Samples
from cache_builder.scan import Scanner
from shared.errors import ConfigError, ManifestMismatch
from shared.manifest import Manifest, open_manifest
from shared.manifest_rows import ManifestRow
from shared.store import StoreReader

ROWS_AT_ONCE = 4096


@dataclass
class Difference:
    """A folder against a manifest; paths are relative to the folder."""

    store: str
    manifest: str
    digest: str
    dataset: str
    same: int = 0
    new: list[str] = field(default_factory=list)
    changed: dict[str, str] = field(default_factory=dict)
    """Path -> what of it: "picture", "captions", "crop"."""
    moved: dict[str, str] = field(default_factory=dict)
    """Path -> where the same picture was."""
    gone: list[str] = field(default_factory=list)
    duplicate: int = 0
    skipped: dict[str, int] = field(default_factory=dict)
    unreadable: dict[str, str] = field(default_factory=dict)
    pictures_to_encode: int = 0
    captions_to_encode: int = 0

    def as_json(self) -> dict[str, Any]:
        """The difference for programs."""
        return asdict(self)


def diff_folder(store: Path, folder: Path, name: str, dataset: str | None) -> Difference:
    """Compare `folder` with data set `dataset` of manifest `name`.

    Raises ConfigError where it is not clear which data set that is, DataError where the folder holds no pictures.
    """
    with contextlib.closing(StoreReader(store)) as reader:
        manifest = open_manifest(store, name)
        dataset = _choose(manifest, folder, dataset)
        config = _config(manifest, dataset, folder)
        sources = open_sources(config.datasets)
        report = BuildReport()
        encode = config.encode
        vae, dtype = manifest.settings.vae_digest, encode.dtype
        texts = manifest.settings.text_digests
        scanner = Scanner(config, vae, dtype, texts, report, memory=store, scratch=store, remember=False)  # type: ignore[arg-type]
        samples = scanner.scan(sources, reader)
        found = Difference(str(store), name, manifest.digest, dataset, duplicate=report.duplicate)
        found.skipped = dict(report.skipped)
        found.unreadable = dict(report.quarantined)
        _compare(samples, manifest, found)
        found.captions_to_encode, found.pictures_to_encode = (
            int((~stored(reader, keys[first_of_each(keys)])).sum())
            for keys in (samples.texts["key"], samples.crops["key"])
        )
    return found


def _choose(manifest: Manifest, folder: Path, dataset: str | None) -> str:
    known = manifest.settings.datasets
    wanted = dataset or (known[0] if len(known) == 1 else folder.resolve().name)
    if wanted not in known:
        raise ConfigError(
            f"manifest {manifest.name!r} has no data set {wanted!r}; it has {', '.join(known)}: name one by --dataset"
        )
    return wanted


def _config(manifest: Manifest, dataset: str, folder: Path) -> BuildConfig:
    """The rules of the build for one data set; a picture without a caption is skipped, for nothing is built here."""
    build = dict(manifest.settings.build)
    try:
        own = {**build.pop("datasets", {}).get(dataset, {}), "id": dataset, "root": str(folder)}
        config = BuildConfig.model_validate({**build, "datasets": [own]})
    except ValidationError as error:
        first = error.errors()[0]
        raise ManifestMismatch(
            f"manifest {manifest.name!r} was built by rules that this program does not know "
            f"({'.'.join(map(str, first['loc']))}: {first['msg']})"
        ) from None
    (only,) = config.datasets
    if only.captions.missing == "error":
        captions = only.captions.model_copy(update={"missing": "skip"})
        config = config.model_copy(update={"datasets": (only.model_copy(update={"captions": captions}),)})
    return config


def _rows(manifest: Manifest, dataset: str) -> Iterator[ManifestRow]:
    for start in range(0, len(manifest), ROWS_AT_ONCE):
        rows = manifest.rows(range(start, min(start + ROWS_AT_ONCE, len(manifest))))
        yield from (row for row in rows if row.dataset == dataset)


def _compare(samples: Samples, manifest: Manifest, found: Difference) -> None:
    here = {sample.digest: sample.index for sample in samples}
    paths = {sample.path for sample in samples}
    replaced: set[str] = set()  # paths whose picture is another one now
    known: set[bytes] = set()
    for row in _rows(manifest, found.dataset):
        index = here.get(row.image_digest)
        if index is not None:
            known.add(row.image_digest)
            _compare_sample(samples[index], row, found)
        elif row.path in paths:
            replaced.add(row.path)
        else:
            found.gone.append(row.path)
    for sample in samples:
        if sample.digest not in known:
            if sample.path in replaced:
                found.changed[sample.path] = "picture"
            else:
                found.new.append(sample.path)
    # A path that went over to a picture which stands in the manifest too: its old picture is gone.
    found.gone = sorted([*found.gone, *(replaced - found.changed.keys())])


def _compare_sample(sample: Sample, row: ManifestRow, found: Difference) -> None:
    what = []
    if [crop.latent_key for crop in sample.crops] != [variant.latent_key for variant in row.variants]:
        what.append("crop")  # decided by other rules than a build of today
    if sample.text_keys != row.text_keys:
        what.append("captions")
    if sample.path != row.path:
        found.moved[sample.path] = row.path
    if what:
        found.changed[sample.path] = ", ".join(what)
    elif sample.path == row.path:
        found.same += 1
