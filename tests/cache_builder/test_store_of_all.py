"""A store with everything in it at once: data sets with rules of their own, several crops, mirrors, prompts.

What looks after a store must know all that a manifest names, or it deletes or misses some of it.
"""

from pathlib import Path

import pytest

from cache_builder.build import BuildOptions, build
from cache_builder.config import BuildConfig
from cache_builder.datasets import open_sources
from cache_builder.diff import diff_folder
from cache_builder.gc import collect_garbage
from cache_builder.report import BuildReport
from cache_builder.verify import verify_store
from shared.config import load_config
from shared.store import StoreReader, StoreWriter
from tests.pictures import write_shapes

TOML = """
max_quarantined = 0

[images]
resolution = 64
step = 16

[[datasets]]
id = "plain"
root = "plain"

[[datasets]]
id = "cropped"
root = "cropped"
images = {crop = "corner", variants = 2, flip = "force", background = [0, 0, 0]}
captions = {lines = "first", prefix = "drawn: "}
"""
PROMPTS = ("a thing that no caption says", "another")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    place = tmp_path_factory.mktemp("all")
    write_shapes(place / "plain", 3)
    write_shapes(place / "cropped", 3)
    (place / "data.toml").write_text(TOML)
    built(place, tiny_model)
    return place


def built(place: Path, model: Path) -> BuildReport:
    config = load_config(BuildConfig, [place / "data.toml"])
    options = BuildOptions(place / "store", "main", "cpu", prompts=PROMPTS)
    return build(open_sources(config.datasets), model, config, options)


def keys_of(store: Path) -> set[bytes]:
    with StoreReader(store) as reader:
        return {key for page in reader.sizes() for key, _ in page}


def test_nothing_of_it_is_garbage_and_a_build_after_gc_encodes_nothing(place: Path, tiny_model: Path) -> None:
    keys = keys_of(place / "store")
    with StoreWriter(place / "store") as writer:
        writer.put_many([(b"0123456789abcdef", b"what nobody names")])
    report = collect_garbage(place / "store")
    assert (report.records, report.kept_records) == (1, len(keys))
    assert keys_of(place / "store") == keys
    again = built(place, tiny_model)
    assert (again.stored, again.encoded_captions, again.encoded_crops) == (0, 0, 0)


def test_a_lost_prompt_is_missed(place: Path, tiny_model: Path) -> None:
    from shared.manifest import open_manifest

    settings = open_manifest(place / "store", "main").settings
    with StoreWriter(place / "store") as writer:
        writer.delete_many([bytes.fromhex(settings.prompts[PROMPTS[0]])])
    (fault,) = verify_store(place / "store").faults
    assert fault.samples == [f"main: the prompt {PROMPTS[0]!r}"]
    assert built(place, tiny_model).encoded_captions == 1
    assert not verify_store(place / "store").faults


@pytest.mark.parametrize("dataset", ["plain", "cropped"])
def test_diff_reads_each_data_set_by_its_own_rules(place: Path, dataset: str) -> None:
    found = diff_folder(place / "store", place / dataset, "main", dataset)
    assert (found.same, found.new, found.changed, found.gone) == (3, [], {}, [])
    assert (found.pictures_to_encode, found.captions_to_encode) == (0, 0)


def test_diff_foretells_crops(place: Path, tmp_path: Path) -> None:
    folder = write_shapes(tmp_path / "cropped", 4)
    found = diff_folder(place / "store", folder, "main", "cropped")
    assert found.new == ["shape-00003.png"]
    assert found.pictures_to_encode == 4  # two corners, each mirrored too
