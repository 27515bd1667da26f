"""Settings that meet: adapters and parts under every optimizer, layout, launcher and on what another expert learned."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from demo.tiny_model import write_tiny_model
from shared.errors import CheckpointError
from tests.trainer.test_processes import start_two
from trainer.adapter import ADAPTER_FILE, load_adapter, merge_adapter
from trainer.checkpoint import UNET_FILE, open_expert
from trainer.drawing import GenerateRequest
from trainer.ensemble import DrawSettings
from trainer.generate import generate
from trainer.loop import train_expert
from trainer.unet import load_unet

Events = Callable[..., list[dict[str, Any]]]
LORA = ("adapter.rank=4", "adapter.alpha=8.0", "optimizer.learning_rate=1e-2", "ema.decay=0.5")
PART = ("trainable=['attention', 'biases']",)
CPU = torch.device("cpu")


def kept(run: Path, folder: str = "unet") -> dict[str, Tensor]:
    path = open_expert(run).path / folder
    return load_file(path / (ADAPTER_FILE if (path / ADAPTER_FILE).exists() else UNET_FILE))


def assert_equal(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


def draw(experts: tuple[Path, Path], model: Path, out: Path) -> Any:
    settings = DrawSettings(6, 3.0)
    request = GenerateRequest(experts, model, ("a red circle",), out, settings, device="cpu", height=64, width=64)
    return np.asarray(Image.open(next(iter(generate(request)))), np.int16)


@pytest.mark.parametrize("what", [LORA, PART], ids=["lora", "part"])
@pytest.mark.parametrize(
    "more",
    [
        ("optimizer.name=muon",),
        ("optimizer.name=adamw-8bit",),
        ("optimizer.name=adafactor", "channels_last=true"),
        ("optimizer.name=schedule-free", "precision=bf16-mixed"),
    ],
    ids=str,
)
def test_it_goes_on_bit_for_bit(world: Any, tmp_path: Path, what: tuple[str, ...], more: tuple[str, ...]) -> None:
    sets = (*what, *more, "batch=1", "checkpoint.every=10")
    train_expert(world.request(tmp_path / "unbroken", *sets, "steps=3"))
    train_expert(world.request(tmp_path / "broken", *sets, "steps=1"))
    before = kept(tmp_path / "broken")
    train_expert(world.request(tmp_path / "broken", *sets, "steps=3"))
    for folder in ("unet", "ema"):
        assert_equal(kept(tmp_path / "broken", folder), kept(tmp_path / "unbroken", folder))
    assert any(not torch.equal(before[name], tensor) for name, tensor in kept(tmp_path / "broken").items())


@pytest.mark.parametrize("what", [(*LORA, "adapter.dropout=0.3"), PART], ids=["lora", "part"])
def test_two_processes_train_what_one_would(
    world: Any, start: Callable[..., Any], events: Events, tmp_path: Path, what: tuple[str, ...]
) -> None:
    sets = (*what, "batch=1", "accumulation=2", "steps=3")
    train_expert(world.request(tmp_path / "one", *sets))
    for command in start_two(start, world.arguments(tmp_path / "two", *sets)):
        assert command.wait() == 0, command.errors()
    one, two = ([event["loss"] for event in events(tmp_path / run, "step")] for run in ("one", "two"))
    assert two == pytest.approx(one, rel=1e-4)
    ours, theirs = kept(tmp_path / "two", "ema"), kept(tmp_path / "one", "ema")
    # Adam makes a step of what is nearly no gradient too, so a rounding may turn a single weight's step round.
    ours_flat, theirs_flat = (torch.cat([each[name].flatten() for name in theirs]) for each in (ours, theirs))
    assert (ours_flat - theirs_flat).norm() < 0.02 * theirs_flat.norm()


def test_a_pair_of_adapters_draws_what_merged_experts_draw(world: Any, tmp_path: Path) -> None:
    runs = []
    for expert in ("base", "refiner"):
        train_expert(world.request(tmp_path / expert, *LORA, "batch=1", "steps=3", expert=expert))
        checkpoint = open_expert(tmp_path / expert)
        merged = load_unet(world.model / "unet", CPU)
        assert checkpoint.card.facts.adapter is not None
        load_adapter(merged, checkpoint.card.facts.adapter, "own", checkpoint.weights("ema"))
        merge_adapter(merged)
        # A whole expert of that range, its weights put in place of what it learned.
        train_expert(world.request(tmp_path / f"{expert}-whole", "batch=1", "steps=1", "ema.decay=0", expert=expert))
        runs.append((tmp_path / expert, tmp_path / f"{expert}-whole"))
        put_weights(open_expert(tmp_path / f"{expert}-whole").path, merged.state_dict())
    (base, base_whole), (refiner, refiner_whole) = runs
    adapted = draw((base, refiner), world.model, tmp_path / "adapted")
    whole = draw((base_whole, refiner_whole), world.model, tmp_path / "whole")
    assert np.abs(adapted - whole).max() <= 1
    crossed = draw((base, refiner_whole), world.model, tmp_path / "crossed")
    assert np.abs(crossed - whole).max() <= 1


def put_weights(checkpoint: Path, weights: dict[str, Tensor]) -> None:
    """Save other weights in a checkpoint, and their sum."""
    import hashlib
    import json

    from safetensors.torch import save_file

    file = checkpoint / "unet" / UNET_FILE
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, file)
    sums = json.loads((checkpoint / "checksums.json").read_text())
    sums[f"unet/{UNET_FILE}"] = {"bytes": file.stat().st_size, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
    (checkpoint / "checksums.json").write_text(json.dumps(sums))


def test_an_adapter_on_the_stock_refiner_draws_with_a_base(world: Any, pair: tuple[Path, Path], tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path / "refiner-model", unet_layout="sdxl-refiner")
    sets = (*LORA, "batch=1", "loss.null_prompt=encoded", "loss.caption_dropout=0.5")
    for steps in (2, 4):
        request = world.request(tmp_path / "run", *sets, f"steps={steps}", expert="refiner")
        train_expert(replace(request, model=model))
    facts = open_expert(tmp_path / "run").card.facts
    assert facts.layout == "sdxl-refiner"
    assert facts.adapter is not None
    request = GenerateRequest(
        (pair[0], tmp_path / "run"),
        world.model,
        ("a red circle",),
        tmp_path / "out",
        DrawSettings(6, 3.0),
        device="cpu",
        height=64,
        width=64,
        base=model,
    )
    assert np.asarray(Image.open(next(iter(generate(request))))).std() > 0


def test_a_run_stands_on_its_own_weights_when_what_it_started_from_is_gone(world: Any, tmp_path: Path) -> None:
    train_expert(world.request(tmp_path / "first", "batch=1", "steps=2"))
    for name, sets in (("whole", ()), ("adapter", LORA)):
        started = replace(
            world.request(tmp_path / name, *sets, "batch=1", "steps=2", expert="refiner"), start=tmp_path / "first"
        )
        train_expert(started)
    train_expert(world.request(tmp_path / "first", "batch=1", "steps=4", "checkpoint.keep=2"))
    train_expert(world.request(tmp_path / "first", "batch=1", "steps=8", "checkpoint.keep=2"))
    assert not (tmp_path / "first" / "checkpoints" / "step-00000002").exists()  # rotated away

    unbroken = shutil.copytree(tmp_path / "whole", tmp_path / "unbroken")
    config = world.config("batch=1", "steps=4", expert="refiner")
    assert train_expert(replace(world.request(unbroken), config=config, start=tmp_path / "first")) == 4
    adapted = world.config(*LORA, "batch=1", "steps=4", expert="refiner")
    with pytest.raises(CheckpointError, match=r"no longer holds step 2 of base, which .*adapter started from"):
        train_expert(replace(world.request(tmp_path / "adapter"), config=adapted, start=tmp_path / "first"))
