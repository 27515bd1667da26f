"""A data set in a bucket is the same as in a folder, in every form, and what has not changed is not read again."""

import io
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image
from pyarrow import fs

import cache_builder.places
from cache_builder.config import BuildConfig
from cache_builder.datasets import choose_datasets, open_source, open_sources
from cache_builder.places import open_place
from cache_builder.report import BuildReport
from cache_builder.scan_cache import ScanCache
from cache_builder.sources import Found, Skipped
from cache_builder.sources.folder import FolderSource
from shared.config import validate
from shared.errors import ConfigError, DataError
from shared.manifest import open_manifest
from tests.datasets import FORMS, Item, write_as, write_folder, write_tar

Build = Callable[..., BuildReport]


def picture(index: int) -> bytes:
    data = io.BytesIO()
    Image.new("RGB", [(70, 50), (64, 64)][index % 2], (index * 20, 100, 200)).save(data, "PNG")
    return data.getvalue()


ITEMS = [
    Item(f"{['', 'sub/', 'sub/deep er/'][index % 3]}{index:02}.png", picture(index), [f"caption {index}", "é 名前"])
    for index in range(9)
]


def upload(folder: Path, address: str) -> None:
    place = open_place(address)
    fs.copy_files(str(folder), place._root, source_filesystem=fs.LocalFileSystem(), destination_filesystem=place._files)


def scan(root: str) -> list[object]:
    config = validate(BuildConfig, {"datasets": [{"id": "set", "root": root}]})
    source = open_source(config.datasets[0])
    found = list(source.scan())
    seen = [(i.path, i.captions, i.read(), dict(i.meta)) if isinstance(i, Found) else i for i in found]
    return [*seen, dict(source.passed_over), source.containers]


@pytest.mark.parametrize("form", FORMS)
def test_every_form_reads_alike(bucket: str, tmp_path: Path, form: str) -> None:
    root = write_as(form, tmp_path / "here", ITEMS)
    (tmp_path / "here/notes.md").write_text("not a picture")
    (tmp_path / "here/.hidden.png").write_bytes(b"")
    address = f"{bucket}/{form.replace('.', '-')}"
    upload(tmp_path / "here", address)
    inside = root.relative_to(tmp_path / "here").as_posix().removeprefix(".")
    there = scan(f"{address}/{inside}".rstrip("/"))
    assert there == scan(str(root))
    assert sum(isinstance(item, tuple) for item in there) == len(ITEMS)


def test_shards_in_folders_and_by_patterns(bucket: str, tmp_path: Path) -> None:
    for number in range(3):
        write_tar(tmp_path / f"here/part/s-{number}.tar", ITEMS[3 * number : 3 * number + 3])
    (tmp_path / "here/part/s-3.tar").write_bytes(b"no archive")
    upload(tmp_path / "here", f"{bucket}/shards")

    def both(root: str) -> None:
        config = [
            validate(
                BuildConfig, {"datasets": [{"id": "set", "root": f"{at}/{root}", "source": {"kind": "webdataset"}}]}
            )
            for at in (tmp_path / "here", f"{bucket}/shards")
        ]
        here, there = (
            [(i.path, i.captions, i.read()) if isinstance(i, Found) else i for i in open_source(c.datasets[0]).scan()]
            for c in config
        )
        assert here == there
        assert len(here) >= 9

    both("part")
    both("part/s-{0..2}.tar")
    with pytest.raises(DataError, match=r"s-9\.tar: No such file"):
        scan(f"{bucket}/shards/part/s-{{0,9}}.tar")


def test_a_build_is_the_same(bucket: str, tmp_path: Path, tiny_model: Path, run_build: Build) -> None:
    write_folder(tmp_path / "pictures", ITEMS)
    upload(tmp_path / "pictures", f"{bucket}/build/pictures")
    here = run_build([tmp_path / "pictures"], tmp_path / "here", tiny_model)
    there = run_build([f"{bucket}/build/pictures"], tmp_path / "there", tiny_model, datasets=["pictures"])
    assert there.digest == here.digest == open_manifest(tmp_path / "there", "main").digest
    assert there.stored == len(ITEMS)
    again = run_build([f"{bucket}/build/pictures"], tmp_path / "here", tiny_model, datasets=["pictures"])
    assert (again.digest, again.stored) == (here.digest, 0)


def test_what_has_not_changed_is_not_read(bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_folder(tmp_path / "pictures", ITEMS)
    upload(tmp_path / "pictures", f"{bucket}/again")
    monkeypatch.setattr("cache_builder.scan_cache.SETTLED_NS", -(10**18))
    read: list[str] = []
    open_file = cache_builder.places.Place.open
    monkeypatch.setattr(
        cache_builder.places.Place, "open", lambda self, name: read.append(name) or open_file(self, name)
    )

    def captions() -> list[tuple[str, ...]]:
        read.clear()
        source = open_sources(config.datasets)[0]
        assert isinstance(source, FolderSource)
        source.cache = ScanCache(tmp_path / "known.scan")
        said = [item.captions for item in source.scan() if isinstance(item, Found)]
        source.cache.save()
        return said

    config = validate(BuildConfig, {"datasets": [{"id": "set", "root": f"{bucket}/again"}]})
    first = captions()
    assert len(read) == len(ITEMS)
    assert captions() == first
    assert read == []
    open_place(f"{bucket}/again").write("sub/01.txt", b"another caption of another length")
    changed = captions()
    assert read == ["sub/01.txt"]
    assert [now for was, now in zip(first, changed, strict=True) if was != now] == [
        ("another caption of another length",)
    ]


def test_what_cannot_be_read_is_said(bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for root, said in (
        ("nothing", "No such file"),
        ("nothing.parquet", "No such file"),
        ("nothing.tar", "No such file"),
    ):
        with pytest.raises(DataError, match=f"data set set: .*{root}.*{said}"):
            scan(f"{bucket}/{root}")
    with pytest.raises(DataError, match=r"^data set set: folder s3://nobodys/set: there is no such bucket$"):
        scan("s3://nobodys/set")
    write_folder(tmp_path / "pictures", ITEMS[:1])
    upload(tmp_path / "pictures", f"{bucket}/large")
    config = validate(
        BuildConfig, {"datasets": [{"id": "set", "root": f"{bucket}/large", "images": {"max_bytes": 10}}]}
    )
    (item,) = open_source(config.datasets[0]).scan()
    assert isinstance(item, Found)
    with pytest.raises(DataError, match=r"^\d+ bytes, more than 10$"):
        item.read()
    open_place(f"{bucket}/large").write("00.txt", b"x" * 70_000)
    (skipped,) = open_source(config.datasets[0]).scan()
    assert isinstance(skipped, Skipped)
    assert skipped.reason.startswith("caption: 70000 bytes, more than")
    with pytest.raises(ConfigError, match="cannot be watched"):
        _ = config.datasets[0].folder
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    with pytest.raises(DataError, match="cannot be reached"):
        scan(f"{bucket}/large")


def test_an_address_names_a_data_set() -> None:
    config = choose_datasets(validate(BuildConfig, {}), "s3://b/sets/cats.tar", None)
    assert (config.datasets[0].id, config.datasets[0].root) == ("cats.tar", "s3://b/sets/cats.tar")
    assert config.datasets[0].kind == "webdataset"
    located = BuildConfig.located({"datasets": [{"id": "a", "root": "s3://b/x"}, {"id": "c", "root": "d"}]}, Path("/e"))
    assert [each["root"] for each in located["datasets"]] == ["s3://b/x", "/e/d"]
