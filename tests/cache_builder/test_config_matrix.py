"""Every field of a build's configuration, changed alone: what is encoded again is what depends on it, and no more.

The fields are taken from the classes, so that a new one without an entry here fails. Counts alone could lie where a
picture happens to have the same crop: each change is one that moves what depends on it, on pictures made for it.
"""

import dataclasses
import functools
import shutil
import typing
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pydantic import BaseModel

from cache_builder.build import BuildOptions, build
from cache_builder.config import BuildConfig
from cache_builder.datasets import choose_datasets, open_sources
from cache_builder.report import BuildReport
from shared.config import load_config
from shared.manifest import open_manifest
from shared.store import StoreReader

PICTURES = 3
Built = Callable[..., tuple[Path, BuildReport]]
SIZES_HW = ((72, 150), (150, 72), (130, 100))
BASE = {
    "images.resolution": "64",
    "images.step": "16",
    "images.crop": "random",
    "captions.trigger": "sks",
    "captions.variants": "{count = 2, keep_first = 0, shuffle = true}",
    "captions.missing": "empty",
    "captions.empty": "empty",
}


@dataclasses.dataclass(frozen=True)
class Change:
    """A value for one field, and what has to be encoded for it: so many, or None for some, as many as moved."""

    value: str
    crops: int | None = 0
    texts: int | None = 0  # ALL: whatever the build has
    below: dict[str, str] = dataclasses.field(default_factory=dict)  # settings it needs, on both sides


LATENTS, ALL = PICTURES, -1
CHANGES: dict[str, Change] = {
    "seed": Change("1", crops=None, texts=None),
    "images.resolution": Change("96", crops=LATENTS),
    "images.resolution_type": Change("edge", crops=LATENTS),
    "images.step": Change("64", crops=None),
    "images.max_aspect": Change("1", crops=None),
    "images.buckets": Change("[[40, 96], [96, 40]]", crops=LATENTS),
    "images.crop": Change("center", crops=LATENTS),
    "images.variants": Change("2", crops=LATENTS),
    "images.flip": Change("force", crops=LATENTS),
    "images.downsample_to": Change("80", crops=LATENTS),
    "images.background": Change("[0, 0, 0]", crops=LATENTS),
    "images.resample": Change("bicubic", crops=LATENTS),
    "images.max_pixels": Change("63000000"),
    "images.max_bytes": Change("200000000"),
    "images.skip.min_size": Change("65"),
    "images.skip.max_size": Change("8000"),
    "images.skip.min_aspect": Change("0.1"),
    "images.skip.max_aspect": Change("9"),
    "images.skip.max_upscale": Change("7"),
    "images.skip.max_samples": Change("2"),
    "captions.missing": Change("skip"),
    "captions.empty": Change("skip"),
    "captions.remove": Change('["red"]', texts=None),
    "captions.remove_patterns": Change('["r.d"]', texts=None),
    "captions.trigger": Change("other", texts=None),
    "captions.prefix": Change("of ", texts=None),
    "captions.suffix": Change(".", texts=None),
    "captions.lines": Change("first"),
    "captions.extensions": Change('[".txt"]'),
    "captions.variants.count": Change("3", texts=None),
    "captions.variants.split_on": Change(";", texts=None),
    "captions.variants.keep_first": Change("2", texts=None),
    "captions.variants.shuffle": Change("false", texts=None, below={"captions.variants.drop": "0.4"}),
    "captions.variants.drop": Change("0.9", texts=None),
    "source.kind": Change("folder"),
    "source.image_columns": Change('["image"]'),
    "source.caption_columns": Change('["text"]'),
    "source.meta_columns": Change("[]"),
    "source.captions_from": Change("name", texts=None),
    "source.metadata": Change("[]"),
    "text.chunks": Change("2", texts=ALL),
    "encode.dtype": Change("bfloat16", crops=LATENTS),
    "encode.latents": Change("mean", crops=LATENTS),
    "encode.batch": Change("3"),
    "encode.text_batch": Change("2"),
    "encode.threads": Change("1"),
    "ray.workers": Change("2"),
    "ray.cpus": Change("2"),
    "ray.chunk": Change("8"),
    "split.eval_fraction": Change("0.6"),
    "split.group": Change("folder"),
    "split.salt": Change("other"),
    "max_quarantined": Change("0.5"),
}
OF_A_DATASET = "datasets."  # the same tables again; id and root are no rules, and tests of data sets change them


def fields(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Every field below `model`, by its dotted name; tables are gone into."""
    for name, field in model.model_fields.items():
        inner = [kind for kind in (field.annotation, *typing.get_args(field.annotation)) if _is_table(kind)]
        if inner:
            yield from fields(inner[0], f"{prefix}{name}.")
        else:
            yield prefix + name


def _is_table(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def test_every_field_has_an_entry() -> None:
    known = {name for name in fields(BuildConfig) if not name.startswith(OF_A_DATASET)}
    assert known == CHANGES.keys()
    tables = {name.split(".", 1)[1] for name in fields(BuildConfig) if name.startswith(OF_A_DATASET)}
    assert {name for name in tables if "." in name} <= known
    assert {name for name in tables if "." not in name} == {"id", "root"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures with grain and a hole, of sizes that no bucket has; tags, two lines, one sidecar of the other suffix."""
    folder = tmp_path_factory.mktemp("matrix") / "set"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for index, size_hw in enumerate(SIZES_HW):
        pixels = rng.integers(0, 256, (*size_hw, 4), dtype=np.uint8)
        pixels[..., 3] = 255
        pixels[20:40, 20:40, 3] = 0
        Image.fromarray(pixels).save(folder / f"{index}.png")
    (folder / "0.txt").write_text("red, cat, sofa, lamp, window\na red cat; it sleeps, or not, who knows\n")
    (folder / "1.caption").write_text("dog, lawn; tree, bird\n")
    (folder / "2.txt").write_text("")
    return folder


def build_set(folder: Path, store: Path, model: Path, sets: Mapping[str, str]) -> BuildReport:
    config = load_config(BuildConfig, sets=[f"{key}={value}" for key, value in sets.items()])
    config = choose_datasets(config, folder, None)
    return build(open_sources(config.datasets), model, config, BuildOptions(store, "main", "cpu", allow_shrink=True))


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory, folder: Path, tiny_model: Path) -> Built:
    """A store of the settings that a change needs on both sides, made once for all that need the same."""

    @functools.cache
    def built(*below: tuple[str, str]) -> tuple[Path, BuildReport]:
        store = tmp_path_factory.mktemp("built") / "store"
        return store, build_set(folder, store, tiny_model, BASE | dict(below))

    return built


def keys_of(store: Path) -> tuple[set[bytes], set[bytes]]:
    manifest = open_manifest(store, "main")
    rows = manifest.rows(range(len(manifest)))
    texts = {key for row in rows for key in row.text_keys} | {bytes.fromhex(manifest.settings.null_text_key)}
    return {variant.latent_key for row in rows for variant in row.variants}, texts


@pytest.mark.parametrize("name", CHANGES)
def test_a_field_costs_what_depends_on_it(
    name: str, folder: Path, built: Built, tmp_path: Path, tiny_model: Path
) -> None:
    change, store = CHANGES[name], tmp_path / "store"
    origin, before = built(*change.below.items())
    assert before.encoded_crops == PICTURES
    shutil.copytree(origin, store)
    old_crops, old_texts = keys_of(store)
    report = build_set(folder, store, tiny_model, BASE | change.below | {name: change.value})
    report.check()
    crops, texts = keys_of(store)
    assert report.encoded_crops == len(crops - old_crops)
    assert report.encoded_captions == len(texts - old_texts)
    for encoded, expected, everything in (
        (report.encoded_crops, change.crops, crops),
        (report.encoded_captions, change.texts, texts),
    ):
        assert encoded > 0 if expected is None else encoded == (len(everything) if expected == ALL else expected)
    with StoreReader(store) as reader, reader.snapshot() as snapshot:
        for key in crops | texts:
            snapshot.read(key)
    again = build_set(folder, store, tiny_model, BASE | change.below)
    assert (again.encoded_crops, again.encoded_captions, again.digest) == (0, 0, before.digest)
