"""The store among processes that are killed, rival, fork, run out of room or damage it; each in store_worker.py."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

WORKER = [sys.executable, "-W", "error", str(Path(__file__).with_name("store_worker.py"))]
NAMESPACES = [["unshare", "--mount"], ["unshare", "--user", "--map-root-user", "--mount"]]


def start(*arguments: object, before: tuple[str, ...] = ()) -> "subprocess.Popen[str]":
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    return subprocess.Popen([*before, *WORKER, *map(str, arguments)], text=True, env=environment, **pipes)  # type: ignore[call-overload,no-any-return]


def work(*arguments: object, before: tuple[str, ...] = ()) -> Any:
    process = start(*arguments, before=before)
    out, err = process.communicate(timeout=500)
    assert process.returncode == 0, err
    assert "Traceback" not in err, err
    return json.loads(out)


# --- death ---


@pytest.mark.parametrize("kills", [25, pytest.param(500, marks=pytest.mark.slow)])
def test_kill_9_of_a_writer_loses_nothing_that_was_acknowledged(tmp_path: Path, kills: int) -> None:
    result = work("kill_loop", tmp_path / "store", kills, 11)
    assert (result["killed"], result["faults"]) == (kills, 0)
    assert result["acknowledged"] > kills


@pytest.mark.parametrize("kills", [25, pytest.param(500, marks=pytest.mark.slow)])
def test_kill_9_while_a_store_is_made(tmp_path: Path, kills: int) -> None:
    result = work("kill_creation", tmp_path, kills)
    assert result["faults"] == 0
    assert result["killed"] > 0


@pytest.mark.parametrize("rounds", [4, pytest.param(50, marks=pytest.mark.slow)])
def test_killed_readers_do_not_use_up_the_reader_table(tmp_path: Path, rounds: int) -> None:
    assert work("kill_readers", tmp_path / "store", rounds) == {"survivor": 0, "newcomers": 3}


def test_a_stalled_reader_hardly_makes_the_file_longer(tmp_path: Path) -> None:
    assert work("stalled_reader", tmp_path, 40)["ratio"] < 1.06  # pages of the tree, never payload


# --- rivals ---


@pytest.mark.parametrize("rivals", [3, pytest.param(50, marks=pytest.mark.slow)])
def test_a_rival_is_refused_at_once_and_told_who_writes(tmp_path: Path, rivals: int) -> None:
    holder = start("hold", tmp_path / "store")
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    for _ in range(rivals):
        begin_s = time.monotonic()
        rival = start("write_some", tmp_path / "store", 0, 1, 100, 0)
        _, err = rival.communicate(timeout=60)
        assert time.monotonic() - begin_s < 2
        assert rival.returncode == 73
        assert f"pid {holder.pid} on " in err
    waiting = start("write_some", tmp_path / "store", 0, 5, 100, 1)
    time.sleep(0.8)
    assert waiting.poll() is None
    holder.communicate(timeout=60)  # its stdin ends, and so does it
    out, err = waiting.communicate(timeout=60)
    assert json.loads(out) == {"new": 5}, err


def test_the_lease_is_free_when_its_holder_was_killed(tmp_path: Path) -> None:
    holder = start("hold", tmp_path / "store")
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    holder.kill()
    holder.communicate(timeout=60)
    assert work("write_some", tmp_path / "store", 0, 5, 100, 0) == {"new": 5}


# --- company ---


@pytest.mark.parametrize("seconds", [1.5, pytest.param(60.0, marks=pytest.mark.slow)])
def test_readers_and_preflight_beside_a_writer(tmp_path: Path, seconds: float) -> None:
    result = work("together", tmp_path / "store", seconds)
    assert result["right"] == result["processes"] == 4
    assert result["records"] > 50


@pytest.mark.parametrize("rounds", [5, pytest.param(100, marks=pytest.mark.slow)])
def test_a_map_that_is_too_small_grows_under_writer_and_readers(tmp_path: Path, rounds: int) -> None:
    assert work("fill_small_map", tmp_path, rounds) == {"grown": rounds, "recovered": rounds}


def test_a_fork_opens_its_own_and_leaves_the_parents_alone(tmp_path: Path) -> None:
    result = work("fork_under_way", tmp_path / "store")
    assert result == {"children_right": 6, "parent_right": 1, "rival_refused": 1}


def test_containers_that_are_all_pid_1_are_told_what_to_share(tmp_path: Path) -> None:
    namespace = _namespace(
        [["unshare", "--pid", "--fork"], ["unshare", "--user", "--map-root-user", "--pid", "--fork"]]
    )
    work("write_some", tmp_path / "store", 0, 1, 100, 0)
    first = start("open_snapshot", tmp_path / "store", before=namespace)
    assert first.stdout is not None
    assert first.stdout.readline() == "pid 1\n"
    second = start("open_snapshot", tmp_path / "store", before=namespace)
    out, _ = second.communicate(timeout=60)
    assert "share a PID namespace" in out
    assert json.loads(out.splitlines()[-1]) == {"exit_code": 75}
    out, _ = first.communicate(timeout=60)
    assert json.loads(out) == {"right": 1}


# --- room ---


@pytest.mark.parametrize("rounds", [3, pytest.param(50, marks=pytest.mark.slow)])
def test_a_file_size_limit_is_a_full_store(tmp_path: Path, rounds: int) -> None:
    result = work("file_limit", tmp_path / "store", rounds)
    assert (result["full"], result["kept"], result["went_on"]) == (rounds, rounds, rounds)


@pytest.mark.parametrize("margin_bytes", [0, 16 << 20])
def test_a_full_file_system(tmp_path: Path, margin_bytes: int) -> None:
    """With the margin the writer stops before the disk is full, without it LMDB runs into the end."""
    result = work("full_disk", tmp_path, margin_bytes, before=_namespace(NAMESPACES))
    assert (result["kept"], result["exit_code"]) == (3, 74)
    assert "refused_to_open" not in result
    assert 0 < result["records_40"] < result["records_56"] < result["records_0"]  # each time as room is made


def test_too_little_address_space_halves_the_map(tmp_path: Path) -> None:
    assert work("no_address_space", tmp_path / "store", 2048) == {"map_mib": 1024, "code": 0}


def _namespace(candidates: list[list[str]]) -> tuple[str, ...]:
    for command in candidates:
        if subprocess.run([*command, "true"], capture_output=True, check=False).returncode == 0:
            return tuple(command)
    pytest.skip("this machine gives no namespaces")


# --- damage ---


def test_no_commit_leaves_a_file_that_the_preflight_refuses(tmp_path: Path) -> None:
    result = work("preflight_after_commits", tmp_path / "store", 300)
    assert result.get("refused", 0) == 0
    assert result["sound"] > 300
    assert result["deleted"] > 100
    assert result["right"] == 1


@pytest.mark.parametrize("stores", [12, pytest.param(400, marks=pytest.mark.slow)])
def test_no_deletion_leaves_a_file_that_the_preflight_refuses(tmp_path: Path, stores: int) -> None:
    result = work("gc_of_fresh_stores", tmp_path, stores)
    assert (result.get("refused", 0), result["wrong"]) == (0, 0)
    assert result["sound"] > stores


@pytest.mark.parametrize("kind", ["payload", "tree", "anywhere", "meta", "zeroed", "swapped", "truncated"])
@pytest.mark.parametrize("count", [75, pytest.param(5000, marks=pytest.mark.slow)])
def test_damage_is_told_or_does_not_matter(tmp_path: Path, kind: str, count: int) -> None:
    """Each time a fresh process reads everything: the right bytes or an error of ours, never a silent bad tensor.

    LMDB follows page numbers in its tree before anything of ours can look: about one in a thousand flips there leads
    it past the end of the file, which is a bus error (7 of 35,000 damages of all kinds). Nowhere else is a signal.
    """
    result = work("damage", tmp_path / "store", kind, count, 9)
    assert result.pop("sound_after") == 1
    assert result.pop("tree_pages") > 5
    assert result.pop("pages") > 100
    assert sum(result.values()) == count
    bus_errors = result.pop(f"signal {signal.SIGBUS}", 0)
    assert bus_errors <= (count // 200 if kind in ("tree", "anywhere") else 0)
    assert result.keys() <= {"right", "refused"}, result
    if kind == "truncated":
        assert result == {"refused": count}
