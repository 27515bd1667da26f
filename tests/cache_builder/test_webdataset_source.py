"""Tar shards as a data set: files of one key are a sample, read in place, shard after shard."""

import json
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from cache_builder.captions import CaptionRules
from cache_builder.sources import Found, Skipped
from cache_builder.sources.rules import SourceRules
from cache_builder.sources.webdataset import WebDatasetSource, expand_braces
from shared.errors import ConfigError, DataError
from tests.datasets import Item, add, write_tar


def make_source(root: Path, max_bytes: int = 1000, **rules: Any) -> WebDatasetSource:
    return WebDatasetSource(root, "set", SourceRules(**rules), CaptionRules(), max_bytes)


def found(source: WebDatasetSource) -> list[Found]:
    return [item for item in source.scan() if isinstance(item, Found)]


def reasons(source: WebDatasetSource) -> list[str]:
    return [item.reason for item in source.scan() if isinstance(item, Skipped)]


def write_members(path: Path, members: list[tuple[str, bytes]], **options: Any) -> Path:
    with tarfile.open(path, "w", **options) as archive:
        for name, data in members:
            add(archive, name, data)
    return path


def test_files_of_one_key_are_a_sample(tmp_path: Path) -> None:
    members = [
        ("./a.txt", b"one\ntwo"),
        ("./a.jpg", b"A"),
        ("./a.json", b'{"text": "not this", "score": 1.5, "tags": ["x"], "deep": {}}'),
        ("b/0001.left.png", b"L"),
        ("b/0001.right.png", b"R"),
        ("b/0001.caption", b"both eyes"),
        ("c.JPG", b"C"),
        ("c.json", b'{"caption": ["first", "second"]}'),
        ("d.png", b"D"),
        ("e.txt", b"no picture"),
        ("e.cls", b"5"),
        (".hidden.png", b"H"),
    ]
    source = make_source(write_members(tmp_path / "s.tar", members))
    items = found(source)
    assert {item.path: (item.read(), item.captions, item.meta) for item in items} == {
        "s.tar/a.jpg": (b"A", ("one", "two"), {"score": 1.5, "tags": ("x",)}),
        "s.tar/b/0001.left.png": (b"L", ("both eyes",), {}),
        "s.tar/b/0001.right.png": (b"R", ("both eyes",), {}),
        "s.tar/c.JPG": (b"C", ("first", "second"), {}),
        "s.tar/d.png": (b"D", (), {}),
    }
    assert source.passed_over == {".cls": 1, ".txt": 1, "(hidden)": 1}
    assert reasons(source) == []
    assert found(make_source(tmp_path / "s.tar", captions_from="name"))[0].captions == ("a",)


def test_shards_by_folder_and_by_pattern(tmp_path: Path) -> None:
    for index in range(12):
        write_tar(tmp_path / f"train/{index:03}.tar", [Item(f"{index}.png", bytes([index]), [str(index)])])
    (tmp_path / "train/notes.md").touch()
    whole = make_source(tmp_path / "train", kind="webdataset")
    assert [item.path for item in found(whole)] == [f"{index:03}.tar/{index}.png" for index in range(12)]
    assert whole.passed_over == {".md": 1}
    part = make_source(tmp_path / "train/{003..005,011}.tar")
    with pytest.raises(DataError, match=r"shard .*003\.\.005\.tar: No such file"):
        part.scan()
    part = make_source(tmp_path / "train/{003..005}.tar")
    assert [item.read() for item in found(part)] == [bytes([index]) for index in (3, 4, 5)]
    assert [item.path for item in found(make_source(tmp_path / "train/{00{1,2},011}.tar"))] == [
        "001.tar/1.png", "011.tar/11.png", "002.tar/2.png", "011.tar/11.png",
    ]  # fmt: skip
    with pytest.raises(DataError, match=r"data set set: shard .*012\.tar: No such file or directory"):
        make_source(tmp_path / "train/{011..012}.tar").scan()


def test_braces() -> None:
    assert expand_braces("a-{08..11}.tar") == ["a-08.tar", "a-09.tar", "a-10.tar", "a-11.tar"]
    assert expand_braces("{a,b}{0..1}") == ["a0", "a1", "b0", "b1"]
    assert expand_braces("plain.tar") == ["plain.tar"]
    assert expand_braces("{x}") == ["x"]
    assert expand_braces("{3..1}.tar") == []
    with pytest.raises(ConfigError, match="more than 100000 shards"):
        expand_braces("{0..99999999999999}.tar")


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_names_in_every_format(tmp_path: Path, form: int) -> None:
    name = "folder/" * 20 + "ü" * 40 + ".png"
    if form == tarfile.USTAR_FORMAT:
        name = "f" * 60 + "/" + "x" * 60 + ".png"
    path = write_members(tmp_path / "s.tar", [(name, b"A"), ("b.png", b"B")], format=form, encoding="utf-8")
    assert {item.path: item.read() for item in found(make_source(path))} == {f"s.tar/{name}": b"A", "s.tar/b.png": b"B"}


def test_pictures_are_read_from_any_thread(tmp_path: Path) -> None:
    items = [Item(f"{index}.png", bytes([index]) * 600) for index in range(50)]
    read = found(make_source(write_tar(tmp_path / "s.tar", items)))
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda item: item.read(), read * 3)) == [item.data for item in items] * 3
    (tmp_path / "s.tar").write_bytes(b"")
    with pytest.raises(DataError, match="cut short"):
        read[-1].read()


BAD_TEXTS: dict[str, tuple[str, bytes, str]] = {
    "not UTF-8": ("a.txt", b"\xff", "caption: not UTF-8 at byte 0"),
    "NUL": ("a.txt", b"a\0", "caption: holds a NUL byte"),
    "long": ("a.txt", b"x" * 70_000, "caption: 70000 bytes, more than 65536"),
    "no JSON": ("a.json", b"{", "its .json: not JSON"),
    "no object": ("a.json", b"[]", "its .json: not a JSON object"),
    "deep JSON": ("a.json", b"[" * 100_000, "its .json: not JSON"),
    "long JSON": ("a.json", b" " * 1_100_000, "its .json: 1100000 bytes, more than 1048576"),
    "half a pair": ("a.json", json.dumps({"text": "\ud800"}).encode(), "caption: holds half a surrogate pair"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_TEXTS)
def test_bad_texts_cost_their_picture(tmp_path: Path, name: str) -> None:
    file, data, reason = BAD_TEXTS[name]
    source = make_source(write_members(tmp_path / "s.tar", [("a.png", b"A"), (file, data), ("b.png", b"B")]))
    assert [item.path for item in found(source)] == ["s.tar/b.png"]
    (said,) = reasons(source)
    assert said.startswith(f"s.tar file a.png: {reason}")


def test_a_picture_that_is_too_large_is_the_builders_to_set_aside(tmp_path: Path) -> None:
    (item,) = found(make_source(write_members(tmp_path / "s.tar", [("a.png", b"x" * 1001)])))
    with pytest.raises(DataError, match="1001 bytes, more than 1000"):
        item.read()


def test_a_key_of_very_many_files_is_not_held_in_memory(tmp_path: Path) -> None:
    members = [(f"a.{index}.png", b"x") for index in range(2500)]
    assert len(found(make_source(write_members(tmp_path / "s.tar", members)))) == 2500


def test_a_root_that_is_not_there_is_said_at_once(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data set set: shard .*nowhere\.tar: No such file"):
        make_source(tmp_path / "nowhere.tar").scan()
