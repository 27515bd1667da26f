"""Digests of large weights: worked out once while their files are as they were, never trusted a byte too far."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from shared import weights_memory
from shared.weights import weights_digest
from shared.weights_memory import remembered_digest


@pytest.fixture
def memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A memory of its own, that remembers small files too."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(weights_memory, "REMEMBERED_FROM_BYTES", 1)
    return tmp_path / "cache" / "sdxl-experts" / "weights.json"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "weights"
    path.write_bytes(b"some weights")
    settle(path)
    return path


def settle(path: Path) -> None:
    os.utime(path, (1_000_000_000, 1_000_000_000))


@pytest.fixture(autouse=True)
def later(monkeypatch: pytest.MonkeyPatch) -> None:
    """ctime cannot be set back, so the clock is set forward."""
    now = weights_memory.time.time
    monkeypatch.setattr(weights_memory.time, "time", lambda: now() + 10)


def counted(path: Path) -> tuple[list[int], Callable[[], str]]:
    calls: list[int] = []

    def work_out() -> str:
        calls.append(1)
        return path.read_bytes().hex()

    return calls, work_out


def test_it_is_worked_out_once(memory: Path, file: Path) -> None:
    calls, work_out = counted(file)
    digests = {remembered_digest("what", [file], work_out) for _ in range(3)}
    assert digests == {b"some weights".hex()}
    assert len(calls) == 1
    assert remembered_digest("else", [file], work_out)
    assert len(calls) == 2
    assert len(json.loads(memory.read_text())) == 2


def test_an_edit_that_keeps_size_and_mtime_is_seen(memory: Path, file: Path) -> None:
    _, work_out = counted(file)
    remembered_digest("what", [file], work_out)
    file.write_bytes(b"more weights")
    settle(file)
    assert remembered_digest("what", [file], work_out) == b"more weights".hex()


def test_a_file_in_the_place_of_another_is_seen(memory: Path, file: Path) -> None:
    _, work_out = counted(file)
    remembered_digest("what", [file], work_out)
    other = file.with_name("other")
    other.write_bytes(b"MORE WEIGHTS")
    settle(other)
    os.replace(other, file)
    assert remembered_digest("what", [file], work_out) == b"MORE WEIGHTS".hex()


def test_what_was_just_written_is_not_remembered(memory: Path, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights_memory, "SETTLED_S", 3600.0)
    calls, work_out = counted(file)
    for _ in range(2):
        remembered_digest("what", [file], work_out)
    assert len(calls) == 2
    assert not memory.exists()


def test_what_changes_while_it_is_hashed_is_not_remembered(memory: Path, file: Path) -> None:
    def work_out() -> str:
        file.write_bytes(b"new weights!")
        return "half of each"

    remembered_digest("what", [file], work_out)
    assert not memory.exists()


@pytest.mark.parametrize("content", ["", "[]", '{"a": 1}', "{", "[" * 100_000, "\x00"])
def test_a_damaged_memory_is_no_memory(memory: Path, file: Path, content: str) -> None:
    memory.parent.mkdir(parents=True)
    memory.write_text(content)
    calls, work_out = counted(file)
    for _ in range(2):
        assert remembered_digest("what", [file], work_out) == b"some weights".hex()
    assert len(calls) == 1


def test_a_home_that_cannot_be_written_costs_nothing_but_time(memory: Path, file: Path) -> None:
    memory.parent.parent.write_text("a file where the folder should be")
    calls, work_out = counted(file)
    for _ in range(2):
        assert remembered_digest("what", [file], work_out) == b"some weights".hex()
    assert len(calls) == 2


def test_weights_are_asked_for_by_all_that_their_digest_covers(memory: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    save_file({"x.a": torch.ones(3)}, folder / "model.safetensors")
    settle(folder / "model.safetensors")

    def digests(**config: object) -> list[str]:
        (folder / "config.json").write_text(json.dumps(config))
        return [weights_digest(folder, {"depth": 2}, prefix) for prefix in ("", "x.") for _ in range(2)]

    plain, changed = digests(), digests(depth=3)
    assert plain[0] == plain[1] != plain[2] == plain[3]
    assert not set(plain) & set(changed)
    assert digests() == plain
    assert len(json.loads(memory.read_text())) == 4
