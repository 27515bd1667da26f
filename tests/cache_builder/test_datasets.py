"""Several data sets in one build, each with rules of its own; what cannot be is said in one line."""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cache_builder.build import BuildOptions, build
from cache_builder.config import BuildConfig
from cache_builder.datasets import choose_datasets, open_sources
from cache_builder.report import BuildReport
from shared.config import load_config
from shared.errors import ConfigError, DataError
from shared.manifest import open_manifest
from shared.store import StoreReader
from tests.datasets import Item, jsonl, write_as, write_folder, write_parquet, write_tar
from tests.pictures import write_shapes
from trainer.data import BatchReader
from trainer.data_config import DataConfig
from trainer.sampler import MicroBatch
from trainer.view import view_of

TOML = """
[images]
resolution = 64
step = 16

[captions]
missing = "skip"

[[datasets]]
id = "shapes"
root = "shapes"

[[datasets]]
id = "scans"
root = "tables/scans.parquet"
images = {resolution = 96, background = [0, 0, 0]}
captions = {lines = "first"}
source = {meta_columns = ["score"]}

[[datasets]]
id = "shards"
root = "tar/{000..001}.tar"
source = {kind = "webdataset"}
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three data sets of the same six pictures, and the TOML that names them."""
    place = tmp_path_factory.mktemp("place")
    folder = write_shapes(place / "shapes", 6)
    items = [
        Item(path.name, path.read_bytes(), path.with_suffix(".txt").read_text().splitlines(), {"score": index})
        for index, path in enumerate(sorted(folder.glob("*.png")))
    ]
    write_parquet(place / "tables/scans.parquet", items)
    for shard in range(2):
        halves = [Item(i.name, i.data, i.captions, {"score": 0.5, "tags": ["a"]}) for i in items[shard::2]]
        write_tar(place / f"tar/00{shard}.tar", halves)
    (place / "sets.toml").write_text(TOML)
    return place


def run(config: BuildConfig, store: Path, model: Path, **options: Any) -> BuildReport:
    config = choose_datasets(config, None, None)
    return build(open_sources(config.datasets), model, config, BuildOptions(store, "main", "cpu", **options))


def test_each_data_set_has_its_own_rules(place: Path, tmp_path: Path, tiny_model: Path) -> None:
    config = load_config(BuildConfig, [place / "sets.toml"])
    report = run(config, tmp_path / "store", tiny_model)
    assert (report.seen, report.stored, report.reused) == (18, 12, 6)  # "shards" shares the records of "shapes"
    manifest = open_manifest(tmp_path / "store", "main")
    rows = manifest.rows(range(len(manifest)))
    of = {name: [row for row in rows if row.dataset == name] for name in ("shapes", "scans", "shards")}
    assert [len(found) for found in of.values()] == [6, 6, 6]
    assert all(row.bucket_hw[0] * row.bucket_hw[1] <= 64 * 64 * 1.3 for row in of["shapes"] + of["shards"])
    assert all(row.bucket_hw[0] * row.bucket_hw[1] > 64 * 64 * 1.3 for row in of["scans"])
    keys = [{row.variants[0].latent_key for row in of[name]} for name in ("shapes", "shards")]
    assert keys[0] == keys[1]
    assert all(len(row.text_keys) == 1 for row in of["scans"])
    assert {len(row.text_keys) for row in of["shapes"]} == {1, 2}
    assert manifest.settings.meta == {"score": "float", "tags": "strings"}
    assert [row.meta for row in of["shapes"]] == [{}] * 6
    assert sorted(row.meta["score"] for row in of["scans"]) == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]
    assert {type(row.meta["score"]) for row in of["scans"]} == {float}
    assert of["shards"][0].meta == {"score": 0.5, "tags": ("a",)}
    declared = manifest.settings.build["datasets"]
    assert {name: rules["source"]["kind"] for name, rules in declared.items()} == {
        "shapes": "folder", "scans": "table", "shards": "webdataset",
    }  # fmt: skip
    assert declared["scans"]["images"]["resolution"] == 96
    assert declared["shapes"]["captions"]["missing"] == "skip"
    again = run(config, tmp_path / "store", tiny_model)
    assert (again.stored, again.reused, again.encoded_captions, again.digest) == (0, 18, 0, report.digest)


def test_an_edited_score_encodes_nothing_and_is_another_manifest(place: Path, tmp_path: Path, tiny_model: Path) -> None:
    items = [Item(p.name, p.read_bytes(), ["x"], {"score": 1}) for p in sorted((place / "shapes").glob("*.png"))]
    sets = ["images.resolution=64", "images.step=16", f'datasets=[{{id="t", root="{tmp_path}/t.parquet"}}]']
    config, reports = load_config(BuildConfig, sets=sets), []
    changed = replace(items[2], data=items[2].data + b"one byte more")
    for version in (items, [replace(items[0], meta={"score": 2}), *items[1:]], [*items[:2], changed, *items[3:]]):
        write_parquet(tmp_path / "t.parquet", version)
        reports.append(run(config, tmp_path / "store", tiny_model))
    assert [(report.stored, report.reused, report.encoded_captions) for report in reports] == [
        (6, 0, 2), (0, 6, 0), (1, 5, 0),
    ]  # fmt: skip
    assert len({report.digest for report in reports}) == 3


@pytest.mark.parametrize("form", ["sidecars", "metadata.csv", "paths.jsonl", "struct.parquet", "tar"])
def test_the_account_is_the_same_in_every_form(form: str, place: Path, tmp_path: Path, tiny_model: Path) -> None:
    """Three good pictures, one of them twice, one cut, one that is none, and one without a caption."""
    pictures = [path.read_bytes() for path in sorted((place / "shapes").glob("*.png"))]
    data = [pictures[0], pictures[1], pictures[0], pictures[2][:-60], b"no picture", pictures[3], pictures[4]]
    items = [Item(f"{i}.png", picture, [f"picture {i}"] if i < 6 else []) for i, picture in enumerate(data)]
    root = write_as(form, tmp_path / "set", items)
    sets = ["images.resolution=64", "images.step=16", "captions.missing=skip", "max_quarantined=0.5"]
    config = load_config(BuildConfig, sets=[*sets, f'datasets=[{{id="set", root="{root}"}}]'])
    report = run(config, tmp_path / "store", tiny_model)
    report.check()
    assert (report.seen, report.stored, report.reused, report.duplicate) == (7, 3, 0, 1)
    assert (len(report.quarantined), report.skipped) == (2, {"no caption": 1})
    stem = {"struct.parquet": "t.parquet/3", "tar": "shard-0.tar/3.png"}.get(form, "3.png")
    assert stem in dict(report.quarantined)


def test_a_trainer_reads_what_has_columns_of_its_own(place: Path, tmp_path: Path, tiny_model: Path) -> None:
    run(load_config(BuildConfig, [place / "sets.toml"], ["split.eval_fraction=0"]), tmp_path / "store", tiny_model)
    manifest = open_manifest(tmp_path / "store", "main")
    options: dict[str, Any] = {"seed": 0, "pin_memory": False}
    read = 0
    with StoreReader(tmp_path / "store") as store:
        pools = view_of(manifest, DataConfig())
        options |= {"captions": "random", "on_corrupt": lambda path, why: pytest.fail(f"{path}: {why}")}
        reader = BatchReader(store, manifest, pools, **options)
        for bucket in manifest.buckets():
            batch = reader.read(MicroBatch(bucket.hw, tuple(int(row) for row in bucket.rows), 0, 0))
            read += len(batch.time_ids)
    assert read == 18


def test_a_moved_data_set_is_the_same(place: Path, tmp_path: Path, tiny_model: Path) -> None:
    moved = tmp_path / "elsewhere"
    shutil.copytree(place, moved)
    configs = [load_config(BuildConfig, [folder / "sets.toml"]) for folder in (place, moved)]
    configs[1] = configs[1].model_copy(update={"datasets": configs[1].datasets[::-1]})
    digests = [run(config, tmp_path / "store", tiny_model).digest for config in configs]
    assert digests[0] == digests[1]


def test_a_folder_on_the_command_line_is_a_data_set_in_a_file(
    place: Path, tmp_path: Path, tiny_model: Path, commands: Any
) -> None:
    (tmp_path / "one.toml").write_text(f'[[datasets]]\nid = "shapes"\nroot = "{place / "shapes"}"\n')
    common = ["--model", tiny_model, "--device", "cpu", "--resolution", "64", "--set", "images.step=16", "--json"]
    one = commands.run(place / "shapes", "--store", tmp_path / "a", *common)
    other = commands.run("--config", tmp_path / "one.toml", "--store", tmp_path / "b", *common)
    assert json.loads(one.out)["digest"] == json.loads(other.out)["digest"]


def test_tables_and_shards_on_the_command_line(place: Path, tmp_path: Path, tiny_model: Path, commands: Any) -> None:
    for root, kind in (("tables/scans.parquet", ()), ("tables", ("--set", "source.kind=table")), ("tar/000.tar", ())):
        done = commands.build(place / root, tmp_path / "store", tiny_model, "--manifest", Path(root).stem, *kind)
        assert (done.code, done.errors) == (0, [])
    assert json.loads(done.out)["stored"] == 0


def test_roots_stand_beside_the_file_that_names_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a/x.toml").write_text('[[datasets]]\nid = "x"\nroot = "../pictures"\n')
    (tmp_path / "y.toml").write_text("seed = 1\n")
    config = load_config(BuildConfig, [tmp_path / "a/x.toml", tmp_path / "y.toml"])
    assert config.datasets[0].root.resolve() == tmp_path / "pictures"
    monkeypatch.chdir(tmp_path)
    assert load_config(BuildConfig, [Path("a/x.toml")]).datasets[0].root == Path("a/../pictures")
    absolute = load_config(BuildConfig, sets=['datasets=[{id="x", root="/p"}]'])
    assert absolute.datasets[0].root == Path("/p")


def test_rules_for_all_lie_under_those_of_each() -> None:
    datasets = 'datasets=[{id="a", root="x"}, {id="b", root="y", images={resolution=512}, captions={lines="first"}}]'
    config = load_config(BuildConfig, sets=[datasets, "images.resolution=256", "images.crop=top", "source.kind=table"])
    one, two = config.datasets
    assert (one.images.resolution, two.images.resolution) == (256, 512)
    assert (one.images.crop, two.images.crop) == ("top", "top")
    assert (one.captions.lines, two.captions.lines) == ("all", "first")
    assert (one.kind, two.kind) == ("table", "table")
    assert config.for_dataset("b").images == two.images
    assert config.for_dataset("unknown") == config


WRONG = {
    "two of one id": ('{id="a", root="x"}, {id="a", root="y"}', r"two data sets have the id 'a'"),
    "no id": ('{root="x"}', r"datasets\.0\.id: field required"),
    "an empty id": ('{id="", root="x"}', r"datasets\.0\.id: .*at least 1 character"),
    "no root": ('{id="a"}', r"datasets\.0\.root: field required"),
    "an unknown kind": (
        '{id="a", root="x", source={kind="sqlite"}}',
        r"datasets\.0\.source\.kind: .*'folder', 'table' or 'webdataset'",
    ),
    "an unknown key": (
        '{id="a", root="x", images={resoluton=64}}',
        r"unknown config key 'datasets\.0\.images\.resoluton'; did you mean 'datasets\.images\.resolution'",
    ),
    "an unknown table": ('{id="a", root="x", colour=1}', "unknown config key 'datasets.0.colour'"),
    "a step that does not fit": (
        '{id="a", root="x", images={resolution=64, step=128}}',
        "images.step 128 is above images.resolution 64",
    ),
    "no table": ("1", r"datasets\.0: "),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_data_sets_are_said(name: str) -> None:
    datasets, pattern = WRONG[name]
    with pytest.raises(ConfigError, match=pattern):
        load_config(BuildConfig, sets=[f"datasets=[{datasets}]"])


def refused(done: Any, code: int, pattern: str) -> None:
    assert (done.out, len(done.errors)) == ("", 1), done.err
    assert re.search(pattern, done.errors[0]), done.errors[0]
    assert done.code == code


def test_which_pictures(place: Path, tmp_path: Path, tiny_model: Path, commands: Any) -> None:
    common = ["--store", tmp_path / "store", "--model", tiny_model]
    sets = ["--config", place / "sets.toml"]
    refused(commands.run(*common), 64, r"which pictures\? Name a FOLDER, or write \[\[datasets\]\]")
    refused(commands.run(place / "shapes", *common, *sets), 64, r"FOLDER .*shapes and the .*\[\[datasets\]\]: give one")
    refused(commands.run(*common, *sets, "--dataset", "x"), 64, "--dataset names the data set of a FOLDER")
    refused(commands.run(place / "shapes", *common, "--dataset", ""), 64, "--dataset")
    (tmp_path / "gone.toml").write_text('[[datasets]]\nid = "gone"\nroot = "nowhere"\n')
    refused(commands.run(*common, "--config", tmp_path / "gone.toml"), 65, "data set gone: folder .*nowhere: No such")
    assert not (tmp_path / "store").exists()


EMPTY: dict[str, tuple[Callable[[Path], Any], str, str]] = {
    "folder": (lambda p: None, "folder", "no pictures in set: it holds no files; pictures end in .avif, "),
    "folder of shards": (
        lambda p: write_tar(p / "a.tar", []),
        "folder",
        r"none of them pictures by name \(1 .tar\);.*; to read its .tar files: --set source.kind=webdataset",
    ),
    "folder of tables": (
        lambda p: write_parquet(p / "a.parquet", [Item("a.png", b"")]),
        "folder",
        r"to read its .parquet files: --set source.kind=table",
    ),
    "table": (
        lambda p: write_folder(p, [Item("a.png", b"")]),
        "table",
        r"no pictures in set: 1 files seen, none of them tables by name \(1 .png\); tables end in .csv, .jsonl, .parq",
    ),
    "table without rows": (lambda p: (p / "a.jsonl").touch(), "table", "no pictures in set: its tables have no rows"),
    "table of addresses": (
        lambda p: (p / "a.csv").write_text("url,text\nhttp://x/a.png,a\n"),
        "table",
        "no picture of set can be used: 1 seen; 1 a.csv: no column of pictures: its columns are url, text; .*not fetch",
    ),
    "table without pictures": (
        lambda p: (p / "a.jsonl").write_bytes(jsonl([Item(f"{i}.png", b"", ["x"]) for i in range(9)])),
        "table",
        r"9 seen; 0.png: cannot be read: No such file or directory; 1.png",
    ),
    "shards": (
        lambda p: write_folder(p, [Item("a.png", b"")]),
        "webdataset",
        r"1 files seen, none of them shards by name \(1 .png\); shards end in .tar and hold key.jpg with key.txt",
    ),
    "shards without pictures": (
        lambda p: write_tar(p / "a.tar", [Item("a.npy", b"x", ["x"])]),
        "webdataset",
        r"2 files seen, none of them pictures by name \(1 .npy, 1 .txt\); ",
    ),
    "empty shards": (lambda p: write_tar(p / "a.tar", []), "webdataset", "its shards hold no files"),
}


@pytest.mark.parametrize("name", EMPTY)
def test_nothing_found_says_why_and_what_to_do(name: str, tmp_path: Path, tiny_model: Path, commands: Any) -> None:
    write, kind, pattern = EMPTY[name]
    (tmp_path / "set").mkdir()
    write(tmp_path / "set")
    done = commands.build(tmp_path / "set", tmp_path / "store", tiny_model, "--set", f"source.kind={kind}")
    refused(done, 65, pattern)


def test_one_empty_data_set_among_others_is_said(place: Path, tmp_path: Path, tiny_model: Path, commands: Any) -> None:
    """An unmounted disk must not pass for a data set."""
    (tmp_path / "empty").mkdir()
    toml = f'[[datasets]]\nid = "shapes"\nroot = "{place / "shapes"}"\n[[datasets]]\nid = "empty"\nroot = "empty"\n'
    (tmp_path / "two.toml").write_text(toml)
    done = commands.run("--config", tmp_path / "two.toml", "--store", tmp_path / "store", "--model", tiny_model)
    refused(done, 65, "no pictures in empty: it holds no files")


@pytest.mark.parametrize(
    ("kind", "pattern"),
    [
        ("table", r"source.caption_columns names their column \(now text or caption or captions or prompt\)"),
        ("webdataset", "write each one into the shard beside its picture as .txt or .caption or .json"),
        ("folder", "write each one beside its picture as .txt or .caption, or all of them into a metadata.csv"),
    ],
)
def test_pictures_without_captions(kind: str, pattern: str, tmp_path: Path, tiny_model: Path, commands: Any) -> None:
    items = [Item("a.png", (write_shapes(tmp_path / "shapes", 1) / "shape-00000.png").read_bytes())]
    {"table": write_parquet, "webdataset": write_tar, "folder": write_folder}[kind](
        tmp_path / "set" / {"table": "a.parquet", "webdataset": "a.tar", "folder": ""}[kind], items
    )
    done = commands.build(tmp_path / "set", tmp_path / "store", tiny_model, "--set", f"source.kind={kind}")
    refused(done, 65, f"1 of 1 pictures have no caption .*: {pattern}, or --set captions.missing=skip")


def test_columns_of_two_types_are_named(place: Path, tmp_path: Path, tiny_model: Path) -> None:
    items = [Item("a.png", (place / "shapes/shape-00000.png").read_bytes(), ["x"], {"score": "high"})]
    write_parquet(tmp_path / "t.parquet", items)
    datasets = (
        f'datasets=[{{id="one", root="{place}/tables/scans.parquet"}}, {{id="two", root="{tmp_path}/t.parquet"}}]'
    )
    config = load_config(BuildConfig, sets=["images.resolution=64", "images.step=16", datasets])
    message = (
        r"column 'score' holds int in data set one \(scans.parquet/0\) and string in two \(t.parquet/0\): .*"
        r"source.meta_columns"
    )
    with pytest.raises(DataError, match=message):
        run(config, tmp_path / "store", tiny_model)
    assert not (tmp_path / "store/manifests").exists()
