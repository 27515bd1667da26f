"""Who holds a lease is told without taking it."""

import fcntl
import os
from pathlib import Path

import pytest

from shared.lease import Lease, holder, listed_holder


@pytest.mark.parametrize("tell", [holder, listed_holder])
def test_the_holder_is_named_while_it_holds(tell: object, tmp_path: Path) -> None:
    path = tmp_path / "lock"
    assert tell(path) is None
    lease = Lease(path, "it is held", "wait")
    said = tell(path)
    assert said is not None
    assert said.startswith("pid ")
    lease.release()
    assert tell(path) is None


def test_looking_takes_no_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lease = Lease(tmp_path / "lock", "it is held", "wait")
    monkeypatch.setattr(fcntl, "flock", lambda *_: pytest.fail("a lock was tried"))
    assert listed_holder(tmp_path / "lock") is not None
    monkeypatch.undo()
    lease.release()


def test_where_the_kernel_lists_no_locks_whoever_is_named_and_lives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "lock"
    lease = Lease(path, "it is held", "wait")
    read = Path.read_text

    def refuse(self: Path, *arguments: object, **options: object) -> str:
        if str(self) == "/proc/locks":
            raise FileNotFoundError
        return read(self, *arguments, **options)

    monkeypatch.setattr(Path, "read_text", refuse)
    assert listed_holder(path) is not None
    path.write_text("pid 4194304 on nowhere\n")
    assert listed_holder(path) is None
    lease.release()


def test_a_pipe_in_a_locks_place_is_held_by_nobody(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "lock")
    assert listed_holder(tmp_path / "lock") is None  # and is not waited for
