"""A folder is whole under its name or not there."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from shared.atomic import new_folder
from shared.errors import ConfigError


def test_a_folder_has_its_name_at_the_end(tmp_path: Path) -> None:
    with new_folder(tmp_path / "deep" / "out") as folder:
        (folder / "inside").mkdir()
        (folder / "inside" / "file").write_text("x")
        assert not (tmp_path / "deep" / "out").exists()
    assert (tmp_path / "deep" / "out" / "inside" / "file").read_text() == "x"
    assert os.listdir(tmp_path / "deep") == ["out"]


def test_what_fails_leaves_nothing(tmp_path: Path) -> None:
    def interrupted() -> None:
        with new_folder(tmp_path / "out") as folder:
            (folder / "file").write_text("x")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert os.listdir(tmp_path) == []


def test_what_somebody_was_killed_in_the_middle_of_is_removed(tmp_path: Path) -> None:
    dead = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True)
    left = tmp_path / f".out.{int(dead.stdout)}.writing"
    works = tmp_path / f".out.{os.getppid()}.writing"
    for folder in (left, works):
        folder.mkdir()
    with new_folder(tmp_path / "out"):
        pass
    assert sorted(os.listdir(tmp_path)) == sorted(["out", works.name])


def test_nothing_is_written_over(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("x")
    (tmp_path / "link").symlink_to("nowhere")
    for name in ("full", "link", "full/file"):
        with pytest.raises(ConfigError, match="is there already"), new_folder(tmp_path / name):
            raise AssertionError
    assert (tmp_path / "full" / "file").read_text() == "x"
