"""What the benchmark of inference counts and measures: the figures at SSD-1B's size, and both ways at tiny size."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from benchmarks import inference
from benchmarks.inference_memory import compare, count_stages
from benchmarks.inference_world import write_pair


def test_the_figures_at_the_size_of_ssd_1b() -> None:
    counted = compare("ssd-1b")
    most = {"pair": 0.65, "adapters": 0.35, "offload": 0.35}
    for kind, one in counted.items():
        assert one["ratio_fp16"] < one["ratio_bf16"] <= most[kind], kind
        assert one["peak"] == max(one["encode"], one["draw"], one["decode"])


def test_weights_are_counted_as_published() -> None:
    stages = count_stages("ssd-1b", torch.bfloat16, torch.float32)
    assert stages.unet / 2 == pytest.approx(1.300e9, rel=1e-3)
    assert stages.text / 4 == pytest.approx(0.8177e9, rel=1e-3)
    assert stages.vae / 4 == pytest.approx(83.65e6, rel=1e-3)


@pytest.mark.parametrize("is_adapter", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_both_ways_draw_the_same_pair(tmp_path: Path, is_adapter: bool) -> None:
    """Not the same picture to the bit: the second pipeline begins UniPC's history anew."""
    pair = write_pair(tmp_path, "tiny", is_adapter)
    pictures = {}
    for way, draw in inference.WAYS.items():
        assert len(list(draw(inference.Job(pair, tmp_path / way, 1, 20, "cpu", "fp32")))) == 1
        with Image.open(next((tmp_path / way).glob("*.png"))) as image:
            pictures[way] = torch.frombuffer(bytearray(image.convert("RGB").tobytes()), dtype=torch.uint8).float()
    assert float((pictures["ours"] - pictures["script"]).abs().mean()) < 4
    assert pictures["ours"].std() > 4


@pytest.mark.slow
def test_the_command_tells_numbers(tmp_path: Path) -> None:
    file = tmp_path / "out.json"
    sets = ["--shape", "tiny", "--steps", "4", "--count", "2", "--rounds", "1", "--json", str(file)]
    assert inference.main(sets) == 0
    results = json.loads(file.read_text())
    assert set(results["measured"]) == {"pair", "adapters"}
    for one in results["measured"].values():
        assert one["ours"]["peak_mib"] > 0
        assert one["ratio"].keys() == one["ours"].keys()
