"""How far experts have moved: against weights that were moved on purpose, and of experts that were trained."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from shared.manifest import open_manifest
from trainer.checkpoint import UNET_FILE, open_expert
from trainer.drift import Move, by_block, layer_moves
from trainer.lineup import Candidate, line_up
from trainer.loop import train_expert


def candidates(world: Any, *runs: Path) -> list[Candidate]:
    """The start model and the experts."""
    known = open_manifest(world.store, "main").settings
    return line_up([open_expert(run) for run in runs], world.model, None, known, is_whole=False).candidates


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_it_is_what_was_done(world: Any, pair: tuple[Path, Path], tmp_path: Path, dtype: torch.dtype) -> None:
    start, *_ = candidates(world, *pair)
    own = load_file(world.model / "unet" / UNET_FILE)
    moved = dict(own)
    for name in ("conv_in.weight", "conv_in.bias"):
        moved[name] = own[name] * 1.5
    (tmp_path / "unet").mkdir()
    save_file({name: tensor.to(dtype) for name, tensor in moved.items()}, tmp_path / "unet" / UNET_FILE)
    moves = layer_moves(start, replace(start, folder=tmp_path / "unet"))
    assert moves is not None
    drifts = {one.layer: one.drift for one in moves}
    assert drifts["conv_in"] == pytest.approx(0.5, rel=1e-3)
    rest = max(drift for layer, drift in drifts.items() if layer != "conv_in")
    assert rest == 0 if dtype == torch.float32 else rest < 1e-3
    assert len(drifts) == len({name.rpartition(".")[0] for name in own})
    assert layer_moves(start, start) == [Move(one.layer, 0.0, one.start) for one in moves]


def test_blocks_add_their_layers_up() -> None:
    moves = [
        Move("down_blocks.1.attentions.0.proj_in", 3.0, 6.0),
        Move("down_blocks.1.attentions.1.proj_in", 4.0, 8.0),
        Move("down_blocks.1.resnets.0.conv1", 1.0, 4.0),
        Move("mid_block.resnets.0.conv1", 1.0, 2.0),
        Move("conv_in", 1.0, 0.0),
        Move("time_embedding.linear_1", 0.0, 0.0),
    ]
    blocks = {one.layer: one.drift for one in by_block(moves)}
    assert list(blocks) == [
        "down_blocks.1 attentions", "down_blocks.1 resnets", "mid_block resnets", "conv_in", "time_embedding",
    ]  # fmt: skip
    assert list(blocks.values()) == pytest.approx([0.5, 0.25, 0.5, float("inf"), 0.0])


def test_an_adapter_moves_its_own_layers_alone(world: Any, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    sets = (
        "steps=2",
        "adapter.rank=4",
        "adapter.alpha=4",
        'adapter.targets=["attention"]',
        "optimizer.learning_rate=1e-1",
    )
    train_expert(world.request(tmp_path / "run", *sets))
    start, expert = candidates(world, tmp_path / "run")
    moves = layer_moves(start, expert)
    assert moves is not None
    moved = {one.layer for one in moves if one.moved > 0}
    assert moved
    assert all(".attn" in layer for layer in moved)


def test_trained_experts_have_moved(world: Any, pair: tuple[Path, Path]) -> None:
    start, *experts = candidates(world, *pair)
    for expert in experts:
        moves = layer_moves(start, expert)
        assert moves is not None
        assert 0 < sum(one.moved > 0 for one in moves) <= len(moves)
        assert max(one.drift for one in by_block(moves) if one.start) < 1


def test_the_page_says_it_block_by_block(pair: tuple[Path, Path], judge_in: Any, tmp_path: Path) -> None:
    report = judge_in(tmp_path / "out")
    (base, refiner) = report.rounds[0].drift
    assert (base.candidate, refiner.candidate) == ("base", "refiner")
    assert all(start is not None and start >= 0 for _, _, start in base.layers)
    page = (tmp_path / "out" / "report.html").read_text()
    section = page[page.index("How far they have moved") :]
    for word in ("mid_block", "up_blocks.0 resnets", "base, most of all", "<td class=text>all</td>"):
        assert word in section
