"""What wakes the service, and what does not; where no system tells, a look at the folder does."""

import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import watchfiles

from cache_builder.config import DatasetConfig
from cache_builder.watch import Watch

PATIENCE_S = 30
Begin = Callable[..., Watch]


@pytest.fixture
def begin() -> Iterator[Begin]:
    """Watches roots until the end of the test."""
    begun: list[Watch] = []

    def watch(*roots: Path, ignored: tuple[Path, ...] = (), look_s: float = 1000, poll_s: float = 1000) -> Watch:
        datasets = [DatasetConfig(id=str(number), root=root) for number, root in enumerate(roots)]
        begun.append(Watch(datasets, ignored, look_s, poll_s))
        return begun[-1]

    yield watch
    for each in begun:
        each.close()


def awake(watch: Watch, *folders: Path) -> Watch:
    """The same, once the system tells of what happens in `folders`."""
    for folder in folders:
        probe, seen, end_s = folder / "probe", set[str](), time.monotonic() + PATIENCE_S
        while str(probe) not in seen:
            assert time.monotonic() < end_s, seen
            probe.write_text(str(time.monotonic()))
            time.sleep(0.1)
            seen |= watch.take()
    time.sleep(0.3)
    watch.take()
    return watch


def wait_for(watch: Watch, *paths: Path) -> set[str]:
    """All that has changed by the time that `paths` have."""
    seen, end_s = set[str](), time.monotonic() + PATIENCE_S
    while not {str(path) for path in paths} <= seen:
        assert time.monotonic() < end_s, seen
        seen |= watch.take()
        time.sleep(0.02)
    return seen


def test_a_change_anywhere_below_a_root_is_told_and_nothing_else(tmp_path: Path, begin: Begin) -> None:
    root, store = tmp_path / "data", tmp_path / "data/store"
    (root / "deep/er").mkdir(parents=True)
    store.mkdir()
    watch = awake(begin(root, ignored=(store,)), root)
    for name in (".hidden.png", "deep/.trash", "store/data.mdb"):
        (root / name).write_text("x")
    shown = [root / "a.png", root / "deep/er/b.png"]
    for path in shown:
        path.write_text("x")
    assert wait_for(watch, *shown) <= {*map(str, shown), str(root / "deep/er"), str(root / "deep")}
    os.unlink(shown[0])
    wait_for(watch, shown[0])
    (root / "new").mkdir()
    time.sleep(0.2)
    (root / "new/c.png").write_text("x")
    wait_for(watch, root / "new/c.png")


def test_what_lies_beside_a_shard_is_nothing_to_it_but_beside_a_table_it_is(tmp_path: Path, begin: Begin) -> None:
    for name in ("shards", "tables"):
        (tmp_path / name / "pictures").mkdir(parents=True)
    (tmp_path / "shards/a.tar").touch()
    (tmp_path / "tables/t.csv").touch()
    watch = awake(begin(tmp_path / "shards/a.tar", tmp_path / "tables/t.csv"), tmp_path / "shards", tmp_path / "tables")
    for name in ("shards", "tables"):
        (tmp_path / name / "pictures/x.png").write_text("x")
    wait_for(watch, tmp_path / "tables/pictures/x.png")
    os.replace(tmp_path / "tables/pictures/x.png", tmp_path / "shards/a.tar")
    assert str(tmp_path / "shards/pictures/x.png") not in wait_for(watch, tmp_path / "shards/a.tar")


def test_a_root_that_vanishes_and_comes_back_is_watched_again(tmp_path: Path, begin: Begin) -> None:
    root = tmp_path / "disk"
    root.mkdir()
    watch = awake(begin(root), root)
    shutil.move(root, tmp_path / "away")
    wait_for(watch, root)
    time.sleep(0.7)
    watch.take()
    shutil.move(tmp_path / "away", root)
    wait_for(watch, root)
    awake(watch, root)
    (root / "a.png").write_text("x")
    wait_for(watch, root / "a.png")


def test_where_there_are_no_watches_left_the_folder_is_looked_through(
    tmp_path: Path, begin: Begin, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: Any, **__: Any) -> Iterator[Any]:
        raise OSError("OS file watch limit reached")
        yield

    monkeypatch.setattr(watchfiles, "watch", refuse)
    (tmp_path / "data").mkdir()
    watch = begin(tmp_path / "data", poll_s=0.2)
    (tmp_path / "data/a.png").write_text("x")
    wait_for(watch, tmp_path / "data")
    said = f"{tmp_path}/data cannot be watched (OS file watch limit reached): it is looked through every 0.2 s\n"
    assert capsys.readouterr().err == said
    assert watch.take() == set()


def test_what_comes_before_the_system_tells_is_not_lost(tmp_path: Path, begin: Begin) -> None:
    watch = begin(tmp_path)
    (tmp_path / "a.png").write_text("x")
    seen, end_s = set[str](), time.monotonic() + PATIENCE_S
    while not seen & {str(tmp_path), str(tmp_path / "a.png")}:
        assert time.monotonic() < end_s
        seen |= watch.take()


def test_what_the_system_does_not_tell_a_look_finds(
    tmp_path: Path, begin: Begin, monkeypatch: pytest.MonkeyPatch
) -> None:
    def deaf(*_: Any, stop_event: Any, **__: Any) -> Iterator[Any]:
        while not stop_event.wait(0.05):
            yield set()

    monkeypatch.setattr(watchfiles, "watch", deaf)
    (tmp_path / "data/deep").mkdir(parents=True)
    picture = tmp_path / "data/deep/a.png"
    picture.write_text("one")
    watch = begin(tmp_path / "data", look_s=0.2)
    assert watch.take() == set()
    picture.write_text("two")
    wait_for(watch, tmp_path / "data")
    picture.rename(picture.with_name("b.png"))
    wait_for(watch, tmp_path / "data")
    (tmp_path / "data/.hidden").write_text("x")
    time.sleep(0.5)
    assert watch.take() == set()
