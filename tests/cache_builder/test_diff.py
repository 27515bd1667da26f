"""cache-store diff foretells what a build does, and loads no model for it."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cache_builder.diff import diff_folder
from cache_builder.report import BuildReport
from shared.errors import ConfigError, DataError
from tests.pictures import write_shapes

Build = Callable[..., BuildReport]


@pytest.fixture(scope="module")
def before(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, run_build: Build) -> Path:
    place = tmp_path_factory.mktemp("before")
    run_build([write_shapes(place / "set", 6)], place / "store", tiny_model)
    return place


def append(path: Path, data: bytes) -> None:
    path.write_bytes(path.read_bytes() + data)


def rename(folder: Path) -> None:
    for path in list(folder.glob("shape-00001.*")):
        path.rename(folder / f"renamed{path.suffix}")


def swap(folder: Path) -> None:
    one, other = folder / "shape-00001.png", folder / "shape-00002.png"
    first, second = one.read_bytes(), other.read_bytes()
    one.write_bytes(second)
    other.write_bytes(first)


def touch(folder: Path) -> None:
    for path in folder.iterdir():
        os.utime(path, (1, 1))


def edit_keeping_times(folder: Path) -> None:
    path = folder / "shape-00001.txt"
    times, text = path.stat(), path.read_text()
    path.write_text("b" + text[1:])
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


ONE, TWO = "shape-00001.png", "shape-00002.png"
# change -> what differs from an empty difference
CHANGES: dict[str, tuple[Callable[[Path], Any], dict[str, Any]]] = {
    "nothing": (lambda f: None, {}),
    "times": (touch, {}),
    "one more": (lambda f: write_shapes(f / "more", 1, seed=9), {"new": ["more/shape-00000.png"]}),
    "one less": (lambda f: (f / ONE).unlink(), {"gone": [ONE]}),
    "another picture": (lambda f: append(f / ONE, b"\0"), {"changed": {ONE: "picture"}}),
    "caption more": (lambda f: append(f / "shape-00001.txt", b"new\n"), {"changed": {ONE: "captions"}}),
    "caption edited, same size and time": (edit_keeping_times, {"changed": {ONE: "captions"}}),
    "white space": (lambda f: append(f / "shape-00001.txt", b"\n \n"), {}),
    "renamed": (rename, {"moved": {"renamed.png": ONE}}),
    "swapped": (
        swap,
        {"moved": {ONE: TWO, TWO: ONE}, "changed": {ONE: "captions", TWO: "captions"}},
    ),
    "one over another": (
        lambda f: shutil.copy(f / ONE, f / TWO),
        {"gone": [TWO], "duplicate": 1, "changed": {ONE: "captions"}},
    ),
    "unreadable": (
        lambda f: (f / "bad.png").write_bytes(b"x") and (f / "bad.txt").write_text("a"),
        {"unreadable": {"bad.png"}},
    ),
    "without caption": (
        lambda f: (f / "shape-00001.txt").unlink(),
        {"gone": [ONE], "skipped": {"no caption": 1}},
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_difference_foretells_the_build(
    name: str, before: Path, tmp_path: Path, tiny_model: Path, run_build: Build
) -> None:
    change, expected = CHANGES[name]
    store, folder = shutil.copytree(before / "store", tmp_path / "store"), tmp_path / "set"
    shutil.copytree(before / "set", folder)
    change(folder)
    found = diff_folder(store, folder, "main", None)
    told = {"new": found.new, "changed": found.changed, "moved": found.moved, "gone": found.gone}
    told |= {"duplicate": found.duplicate, "skipped": found.skipped, "unreadable": set(found.unreadable)}
    empty: dict[str, Any] = {"new": [], "changed": {}, "moved": {}, "gone": [], "duplicate": 0, "skipped": {}}
    assert told == empty | {"unreadable": set()} | expected
    sets = ["captions.missing=skip", "max_quarantined=1"]
    report = run_build([folder], store, tiny_model, *sets, allow_shrink=True)
    assert found.pictures_to_encode == report.stored
    assert found.captions_to_encode == report.encoded_captions
    after = diff_folder(store, folder, "main", None)
    assert (after.new, after.changed, after.moved, after.gone) == ([], {}, {}, [])
    assert after.same == report.stored + report.reused


def test_no_model_is_loaded_and_nothing_is_written(before: Path) -> None:
    program = (
        "import sys\n"
        "from cache_builder.cli import cache_store\n"
        "try:\n    cache_store()\nfinally:\n"
        "    print([name for name in ('torch', 'diffusers', 'transformers') if name in sys.modules])\n"
    )
    times = {path: path.stat().st_mtime_ns for path in (before / "store").rglob("*") if path.name != "lock.mdb"}
    command = [sys.executable, "-c", program, "diff", str(before / "store"), str(before / "set"), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    report, modules = done.stdout.rsplit("\n", 2)[0], done.stdout.splitlines()[-1]
    assert (json.loads(report)["same"], modules) == (6, "[]")
    assert {path: path.stat().st_mtime_ns for path in times} == times


def test_which_data_set_a_folder_is(before: Path, tmp_path: Path, tiny_model: Path, run_build: Build) -> None:
    store = shutil.copytree(before / "store", tmp_path / "store")
    elsewhere = shutil.copytree(before / "set", tmp_path / "elsewhere")
    assert diff_folder(store, elsewhere, "main", None).same == 6  # the only one there is
    more = write_shapes(tmp_path / "more", 2, seed=3)
    run_build([before / "set", more], store, tiny_model, manifest="both")
    assert diff_folder(store, more, "both", None).same == 2
    assert diff_folder(store, elsewhere, "both", "set").same == 6
    with pytest.raises(ConfigError, match="has no data set 'elsewhere'; it has more, set: name one by --dataset"):
        diff_folder(store, elsewhere, "both", None)
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(DataError, match="no pictures in"):  # an unmounted disk is not a data set without pictures
        diff_folder(store, empty, "both", "set")
