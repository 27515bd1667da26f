"""A folder as a data set: everything seen is accounted for, nothing outside is read."""

import inspect
import os
import random
import socket
import sys
from pathlib import Path
from typing import Any

import pytest

from cache_builder.captions import CaptionRules
from cache_builder.sources import Found, Skipped, Source
from cache_builder.sources.folder import FolderSource
from shared.beneath import read_regular
from shared.errors import DataError


def make_source(root: Path, max_bytes: int = 1000, **rules: Any) -> FolderSource:
    return FolderSource(root, "set", CaptionRules(**rules), max_bytes)


def write(root: Path, files: dict[str, bytes]) -> None:
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)


def found(source: Source) -> dict[str, tuple[str, ...]]:
    return {item.path: item.captions for item in source.scan() if isinstance(item, Found)}


def skipped(source: Source) -> dict[str, str]:
    return {item.path: item.reason for item in source.scan() if isinstance(item, Skipped)}


def test_pictures_and_their_captions(tmp_path: Path) -> None:
    files = {"b/cat.PNG": b"cat", "b/cat.txt": b"a cat\na mammal", "a.jpg": b"a", "a.caption": b"an a", "c.webp": b"c"}
    write(tmp_path, files | {"b.d/e.f.gif": b"e", "b.d/e.f.txt": b" \n", "b.d/e.txt": b"not its caption"})
    source = make_source(tmp_path)
    assert found(source) == {"a.jpg": ("an a",), "b/cat.PNG": ("a cat", "a mammal"), "b.d/e.f.gif": ("",), "c.webp": ()}
    assert {item.path: item.read() for item in source.scan() if isinstance(item, Found)}["b/cat.PNG"] == b"cat"
    assert source.passed_over == {".txt": 1}
    assert source.dataset_id == "set"


def test_the_first_sidecar_that_exists_counts(tmp_path: Path) -> None:
    write(tmp_path, {"a.png": b"", "a.txt": b"text", "a.caption": b"caption", "b.png": b"", "b.caption": b"caption"})
    assert found(make_source(tmp_path)) == {"a.png": ("text",), "b.png": ("caption",)}
    assert found(make_source(tmp_path, extensions=(".caption", ".txt")))["a.png"] == ("caption",)
    assert found(make_source(tmp_path, extensions=())) == {"a.png": (), "b.png": ()}


def test_other_files_are_tallied(tmp_path: Path) -> None:
    write(
        tmp_path,
        {"a.json": b"", "sub/b.JSON": b"", "Makefile": b"", ".hidden.png": b"", ".git/x.png": b"", "n.txt": b""},
    )
    (tmp_path / "link").symlink_to("/etc")
    source = make_source(tmp_path)
    assert list(source.scan()) == []
    assert source.passed_over == {".json": 2, "(no suffix)": 1, "(hidden)": 2, ".txt": 1, "(symlink)": 1}
    assert list(source.scan()) == []
    assert source.passed_over[".json"] == 2


def test_order_depends_on_names_alone(tmp_path: Path) -> None:
    names = [
        "b.png",
        "B.png",
        "a/z.png",
        "a/b/c.png",
        "a.png",
        "a-.png",
        "é.png",
        "日.png",
        "a/a.png",
        "10.png",
        "9.png",
    ]
    for round_ in range(3):
        root = tmp_path / str(round_)
        write(root, dict.fromkeys(random.Random(round_).sample(names, len(names)), b""))
        paths = [item.path for item in make_source(root).scan()]
        assert paths == sorted(names, key=lambda name: [part.encode() for part in name.split("/")])


def test_links_and_specials_are_not_opened(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    write(outside, {"secret.png": b"secret", "secret.txt": b"secret"})
    root = tmp_path / "root"
    write(root, {"good.png": b"good", "linked.png": b"", "piped.png": b"", "folder.png/inner.png": b"inner"})
    (root / "file.png").symlink_to(outside / "secret.png")
    (root / "dangling.png").symlink_to("nowhere")
    (root / "dir").symlink_to(outside)
    (root / "up.png").symlink_to("..")
    (root / "linked.txt").symlink_to(outside / "secret.txt")
    os.mkfifo(root / "fifo.png")
    os.mkfifo(root / "piped.txt")
    with socket.socket(socket.AF_UNIX) as listener:
        old = Path.cwd()
        os.chdir(root)  # a socket's path is short
        try:
            listener.bind("socket.png")
        finally:
            os.chdir(old)
    source = make_source(root)
    assert found(source) == {"folder.png/inner.png": (), "good.png": ()}
    assert skipped(source) == {
        "dangling.png": "symlink",
        "fifo.png": "not a regular file",
        "file.png": "symlink",
        "linked.png": "caption: symlink",
        "piped.png": "caption: not a regular file",
        "socket.png": "not a regular file",
        "up.png": "symlink",
    }


def test_what_changes_after_the_scan_is_not_followed(tmp_path: Path) -> None:
    write(tmp_path / "root", {"a.png": b"a", "b.png": b"b", "c.png": b"c", "d.png": b"d"})
    (tmp_path / "secret").write_bytes(b"secret")
    read = {item.path: item.read for item in make_source(tmp_path / "root").scan() if isinstance(item, Found)}
    for name in ("a.png", "b.png", "c.png"):
        (tmp_path / "root" / name).unlink()
    (tmp_path / "root/a.png").symlink_to("../secret")
    os.mkfifo(tmp_path / "root/b.png")
    for name in ("a.png", "b.png", "c.png"):
        with pytest.raises(DataError, match=r"^(cannot be read: .*|not a regular file)$"):
            read[name]()
    (tmp_path / "root/d.png").write_bytes(b"x" * 1001)
    with pytest.raises(DataError, match="1001 bytes, more than 1000"):
        read["d.png"]()


def test_bad_captions_are_reasons(tmp_path: Path) -> None:
    bad = {"nul.txt": b"\0", "latin.txt": b"caf\xe9", "long.txt": b"x" * 70_000}
    write(tmp_path, bad | {name.replace("txt", "png"): b"" for name in bad})
    assert skipped(make_source(tmp_path)) == {
        "latin.png": "caption: not UTF-8 at byte 3",
        "long.png": "caption: 70000 bytes, more than 65536",
        "nul.png": "caption: holds a NUL byte; is it UTF-16? UTF-8 is read",
    }


def test_names_are_data(tmp_path: Path) -> None:
    hostile = [
        "a\nb.png",
        "<img src=x>.png",
        "--help.png",
        "%s{0}.png",
        "'; drop.png",
        "\u202egnp.png",
        "..png.png",
        " .png",
    ]
    write(tmp_path, dict.fromkeys(hostile, b""))
    with open(os.fsencode(tmp_path) + b"/caf\xe9.png", "wb"):
        pass
    os.mkdir(os.fsencode(tmp_path) + b"/dir\xff")
    with open(os.fsencode(tmp_path) + b"/dir\xff/x.png", "wb"):
        pass
    with open(os.fsencode(tmp_path) + b"/x.\xff", "wb"):
        pass
    source = make_source(tmp_path)
    assert set(found(source)) == {name for name in hostile if not name.startswith(".")}
    assert skipped(source) == {r"caf\xe9.png": "name is not UTF-8", r"dir\xff/x.png": "name is not UTF-8"}
    assert source.passed_over == {"(hidden)": 1, r".\xff": 1}


def test_a_tree_deeper_than_pythons_stack_is_walked(tmp_path: Path) -> None:
    deep = tmp_path.joinpath(*["d"] * 300)
    deep.mkdir(parents=True)
    (deep / "x.png").touch()
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(len(inspect.stack()) + 150)  # a tree of 1,000 would stop pytest's own cleaning
    try:
        found = [item.path for item in make_source(tmp_path).scan()]
    finally:
        sys.setrecursionlimit(limit)
    assert found == [f"{deep.relative_to(tmp_path)}/x.png"]


def test_an_unreadable_folder_is_accounted_for(tmp_path: Path) -> None:
    write(tmp_path, {"a.png": b"", "gone/b.png": b"", "z.png": b""})
    items = make_source(tmp_path).scan()
    assert next(items).path == "a.png"
    (tmp_path / "gone/b.png").unlink()
    (tmp_path / "gone").rmdir()
    assert next(items) == Skipped("gone/", "folder cannot be read: No such file or directory")
    assert [item.path for item in items] == ["z.png"]


@pytest.mark.parametrize(("name", "reason"), [("missing", "No such file"), ("file", "Not a directory")])
def test_a_root_that_is_no_folder_is_said_at_once(tmp_path: Path, name: str, reason: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=rf"data set set: folder .*{name}: {reason}"):
        make_source(tmp_path / name).scan()


def test_a_device_is_not_a_picture() -> None:
    with pytest.raises(DataError, match="not a regular file"):
        read_regular("/dev/zero", 1000)
