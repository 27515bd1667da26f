"""The scripts that measure on a GPU run on a CPU at tiny size, and tell what they would tell there."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu_cache, gpu_train, train_overhead
from benchmarks.train_world import SHAPES


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_training(tmp_path: Path) -> None:
    sets = ["--shapes", "tiny", "--device", "cpu", "--batches", "1", "--steps", "4", "--fp32"]
    sets += ["--no-compile", "--matmul", "64"]
    assert gpu_train.main([*sets, "--json", str(tmp_path / "out.json")]) == 0
    results = json.loads((tmp_path / "out.json").read_text())
    assert [one["checkpointing"] for one in results["tiny"]["sweep"]] == [False, True]
    reached = results["tiny"]["sweep"][0]["reached"]
    assert all(reached[name] > 0 for name in ("trainer_per_s", "resident_per_s", "peer_per_s"))
    assert reached["over_peer"] == pytest.approx(reached["trainer_per_s"] / reached["peer_per_s"])
    assert results["tiny"]["share_of_matmul"] > 0


@pytest.mark.parametrize(("name", "tflop"), [("ssd-1b", 12.4), pytest.param("sdxl", 20.3, marks=pytest.mark.slow)])
def test_the_flop_of_a_sample(name: str, tflop: float) -> None:
    assert gpu_train.flop_per_sample(SHAPES[name]) / 1e12 == pytest.approx(tflop, rel=0.03)


def test_encoding(tmp_path: Path) -> None:
    sets = ["--small", "--device", "cpu", "--dtype", "float32", "--size", "64", "--batches", "1,2", "--rounds", "1"]
    assert gpu_cache.main([*sets, "--count", "8", "--threads", "2", "--json", str(tmp_path / "out.json")]) == 0
    results = json.loads((tmp_path / "out.json").read_text())
    assert set(results["vae"]) == set(results["text"]) == {"1", "2"}
    assert results["build"]["per_s"] > 0
    assert 0 < results["build"]["busy_share"] <= 1


def test_overhead(tmp_path: Path) -> None:
    sets = ["--shapes", "tiny", "--rounds", "1", "--steps", "10", "--json", str(tmp_path / "out.json")]
    assert train_overhead.main(sets) == 0
    alone = json.loads((tmp_path / "out.json").read_text())["tiny"]["alone"]
    assert alone["ratio"] == pytest.approx(alone["trainer_step_s"] / alone["bare_step_s"])
    assert alone["cpu_ratio"] > 0
    assert 0 <= alone["data_wait_share"] < 1
