"""Equal pictures and captions give equal samples and equal keys, whatever source they come from."""

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from cache_builder.config import BuildConfig
from cache_builder.datasets import open_sources
from cache_builder.meta import meta_row, meta_types
from cache_builder.report import BuildReport
from cache_builder.scan import Scanner
from cache_builder.sources import Found
from shared.config import validate
from shared.store import StoreWriter
from tests.datasets import FORMS, Item, add, write_as

VAE = "ab" * 32
PICTURES = [io.BytesIO() for _ in range(12)]
for index, file in enumerate(PICTURES):
    size = [(70, 50), (50, 70), (64, 64), (90, 40)][index % 4]
    Image.new("RGB", size, (index * 20, 100, 200 - index * 10)).save(file, format=["PNG", "JPEG", "WEBP"][index % 3])

WORDS = st.text(st.characters(exclude_categories=("Cs", "Cc")), min_size=1, max_size=12)
CAPTIONS = st.lists(WORDS.filter(lambda text: bool(text.strip())), max_size=3)
META = st.fixed_dictionaries(
    {},
    optional={
        "score": st.floats(allow_nan=False, allow_infinity=False).map(lambda x: x if x % 1 else x + 0.5 or 0.5),
        "likes": st.integers(-(2**40), 2**40),
        "safe": st.booleans(),
        "artist": st.sampled_from(["Ann", "名 前", 'quote " and, comma', "007"]),
    },
)


def captions_in(form: str, root: Path, items: list[Item]) -> dict[str, tuple[str, ...]]:
    """What a source of this form says of each picture, by its name."""
    config = validate(BuildConfig, {"datasets": [{"id": "set", "root": str(write_as(form, root, items))}]})
    (source,) = open_sources(config.datasets)
    found = [item for item in source.scan() if isinstance(item, Found)]
    return {item.name: each.captions for item, each in zip(items, found, strict=True)}


@pytest.mark.parametrize("form", FORMS)
def test_no_caption_and_an_empty_one_are_told_apart(form: str, tmp_path: Path) -> None:
    """An empty field of CSV is none: there is no other way to leave one out."""
    blank = " " if form.endswith("csv") else ""
    captions = {"a.png": [], "b.png": [blank], "c.png": ["  "], "d.png": ["words"]}
    items = [Item(name, PICTURES[index].getvalue(), texts) for index, (name, texts) in enumerate(captions.items())]
    said = {"a.png": (), "b.png": ("",), "c.png": ("",), "d.png": ("words",)}
    assert captions_in(form, tmp_path, items) == said


@pytest.mark.parametrize(("text", "captions"), [("", ("",)), (None, ()), ([], ()), ([""], ("",)), ([None], ())])
def test_cells_that_hold_no_word(text: Any, captions: tuple[str, ...], tmp_path: Path) -> None:
    data = PICTURES[0].getvalue()
    (tmp_path / "a.png").write_bytes(data)
    (tmp_path / "t.jsonl").write_text(json.dumps({"file_name": "a.png", "text": text}) + "\n")
    with tarfile.open(tmp_path / "t.tar", "w") as archive:
        add(archive, "a.png", data)
        add(archive, "a.json", json.dumps({"text": text}).encode())
    for name in ("t.jsonl", "t.tar"):
        config = validate(BuildConfig, {"datasets": [{"id": "set", "root": str(tmp_path / name)}]})
        (item,) = open_sources(config.datasets)[0].scan()
        assert isinstance(item, Found)
        assert item.captions == captions


def samples_of(root: Path, store: StoreWriter, **source: Any) -> dict[Any, Any]:
    """All that a row holds but its path, by digest."""
    data = {
        "images": {"resolution": 64, "step": 16},
        "captions": {"missing": "empty"},
        "datasets": [{"id": "set", "root": str(root), "source": source}],
    }
    config, report = validate(BuildConfig, data), BuildReport()
    samples = Scanner(config, VAE, "float32", {}, report).scan(open_sources(config.datasets), store)
    assert report.seen == len(samples) + report.duplicate
    types = meta_types(samples)
    for sample in samples:
        assert sample.read() == sample.read()
    return {
        sample.digest: (sample.captions, sample.crops, sample.original_hw, meta_row(sample, types))
        for sample in samples
    }


@settings(max_examples=8)
@given(
    drawn=st.lists(st.tuples(st.integers(0, len(PICTURES) - 1), CAPTIONS, META), min_size=1, max_size=9),
)
def test_every_form_gives_the_same_samples(
    drawn: list[tuple[int, list[str], dict[str, Any]]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    items = []
    for index, (which, captions, meta) in enumerate(drawn):
        name = f"{'below/' if index % 2 else ''}{index:02}.{['png', 'jpg', 'webp'][which % 3]}"
        items.append(Item(name, PICTURES[which].getvalue(), captions, meta))
    items.sort(key=lambda item: item.name)  # as a folder is walked
    folder = tmp_path_factory.mktemp("forms")
    with StoreWriter(folder / "store") as store:
        found = {form: samples_of(write_as(form, folder / form, items), store) for form in FORMS}
    plain = {digest: row[:3] for digest, row in found["sidecars"].items()}
    for form, samples in found.items():
        assert {digest: row[:3] for digest, row in samples.items()} == plain, form
        if form != "sidecars":
            assert samples == found["metadata.jsonl"], form
