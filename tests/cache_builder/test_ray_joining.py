"""Joining a cluster without one: what is refused before Ray is asked, and when a head counts as gone."""

import socket
from pathlib import Path
from typing import Any

import pytest

from cache_builder import ray_joining
from cache_builder.ray_joining import Head, _connect, _tried
from cache_builder.ray_runner import RayCluster
from cache_builder.transfer.shard_output import ShardOutput
from shared.errors import ConfigError, ExpertsError, Stopped


class Refusing:
    """Ray where nobody can be joined, for reasons of its own."""

    def __init__(self, reason: str) -> None:
        self.reason = reason

    def init(self, **_: Any) -> None:
        try:
            raise RuntimeError(self.reason)
        except RuntimeError as error:
            raise ConnectionError("Failed to connect to Ray cluster at there:1") from error

    def shutdown(self) -> None:
        pass


@pytest.mark.parametrize(
    ("reason", "said"),
    [
        ("connection error: Traceback ... InvalidAuthToken: Authentication token is missing", "it asks for a token"),
        ("No node info found when trying to resolve node to connect to.", "this machine is none of it"),
        ("Version mismatch:\n  Ray: 2.1\n  Python: 3.10\nTraceback: a, b", "Version mismatch: Ray: 2.1 Python: 3.10"),
    ],
)
def test_what_ray_says_comes_to_one_line(reason: str, said: str) -> None:
    assert str(_tried(Refusing(reason), "there:1")).startswith(said)


def test_a_client_address_is_refused_before_anybody_is_asked() -> None:
    with pytest.raises(ConfigError, match=r"--ray-address ray://there:10001: name HOST:PORT of the cluster's head"):
        _connect(None, "ray://there:10001")


def test_a_head_is_gone_when_it_has_not_answered_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_joining, "LOOK_S", 0.0)
    with socket.create_server(("127.0.0.1", 0)) as server:
        head = Head(f"127.0.0.1:{server.getsockname()[1]}")
        assert not head.gone()
        monkeypatch.setattr(ray_joining, "GONE_S", 0.0)
        monkeypatch.setattr(ray_joining, "LOOK_S", 1000.0)
        assert head.gone().startswith(f"the head of the Ray cluster has not answered at {head.address} for 0 s")
        monkeypatch.setattr(ray_joining, "GONE_S", 1000.0)
        monkeypatch.setattr(ray_joining, "LOOK_S", 0.0)
    assert not head.gone()  # for a moment alone
    monkeypatch.setattr(ray_joining, "GONE_S", 0.0)
    assert head.gone()


class Gone(RayCluster):
    """One whose Ray is no more."""

    def __init__(self) -> None:
        self._gone = lambda: "Ray is gone"


def test_nobody_waits_for_a_ray_that_is_gone() -> None:
    with pytest.raises(Stopped, match=r"^Ray is gone; what was stored stays, and the same command goes on$"):
        Gone().wait([], 1)


def test_a_shard_that_is_not_seen_here_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shards = ShardOutput("here")
    assert shards.address == str(tmp_path / "here")  # workers are elsewhere
    with pytest.raises(
        ConfigError, match=r"a worker has written shards/0+.parquet there, and this machine does not see"
    ):
        shards.add({"digest": "0" * 64, "records": 1, "bytes": 10})


class Failing:
    """Ray whose workers raise `error`."""

    class exceptions:
        class RayError(Exception):
            actor_init_failed = False

        class RayTaskError(RayError):
            pass

    def __init__(self, error: Exception) -> None:
        self._error = error

    def get(self, call: Any) -> Any:
        raise self._error


class Answering(RayCluster):
    """One whose workers raise `error`."""

    def __init__(self, error: Exception) -> None:
        self._ray = Failing(error)


def test_what_a_worker_cannot_begin_with_or_fails_with_is_one_line() -> None:
    lost = Failing.exceptions.RayError("it died")
    assert Answering(lost).answer(None) is None
    lost.actor_init_failed = True
    lost.args = ("in its creation task\n  File\nModuleNotFoundError: No module named 'cache_builder'\n",)
    with pytest.raises(
        ConfigError, match=r"cannot begin; [^\n]*: ModuleNotFoundError: No module named 'cache_builder'$"
    ):
        Answering(lost).answer(None)
    failed = Failing.exceptions.RayTaskError("Traceback\n  File x\nRuntimeError: out of luck")
    with pytest.raises(
        ExpertsError, match=r"^a worker of the Ray cluster failed, what was stored stays: RuntimeError: out"
    ):
        Answering(failed).answer(None)
