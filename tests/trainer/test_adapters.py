"""An expert as an adapter, or as a part of its UNet: what is trained, kept, gone on with and drawn with."""

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from shared.errors import CheckpointError, ConfigError, ContractError
from tests.trainer.unet_answer import answer
from trainer.adapter import ADAPTER_FILE, load_adapter, merge_adapter
from trainer.checkpoint import open_expert
from trainer.drawing import GenerateRequest
from trainer.drawn import find_bases, load_experts
from trainer.ensemble import DrawSettings
from trainer.generate import generate
from trainer.loop import train_expert
from trainer.unet import load_unet

CPU = torch.device("cpu")
LORA = ("adapter.rank=4", "adapter.alpha=8.0", "optimizer.learning_rate=1e-2", "batch=1", "ema.decay=0.5")


def tensors(run: Path, folder: str, file: str) -> dict[str, Tensor]:
    return load_file(open_expert(run).path / folder / file)


@pytest.fixture(scope="module")
def adapters(world: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A LoRA base and a DoRA refiner that have begun to learn."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("adapters")
    train_expert(world.request(folder / "base", "steps=3", *LORA))
    train_expert(world.request(folder / "refiner", "steps=3", *LORA, "adapter.kind=dora", expert="refiner"))
    return folder / "base", folder / "refiner"


@pytest.mark.parametrize("index", [0, 1], ids=["lora", "dora"])
def test_diffusers_loads_it_with_its_alpha(adapters: tuple[Path, Path], world: Any, index: int) -> None:
    checkpoint = open_expert(adapters[index])
    ours, theirs, plain = (load_unet(world.model / "unet", CPU) for _ in range(3))
    assert checkpoint.card.facts.adapter is not None
    load_adapter(ours, checkpoint.card.facts.adapter, "ours", checkpoint.weights("ema"))
    theirs.load_lora_adapter(checkpoint.path / "ema", prefix="unet", weight_name=ADAPTER_FILE)
    assert torch.equal(answer(ours), answer(theirs))
    assert not torch.allclose(answer(ours), answer(plain), atol=1e-4)


def test_only_the_adapter_is_kept(adapters: tuple[Path, Path]) -> None:
    path = open_expert(adapters[0]).path
    assert sorted(file.name for file in (path / "unet").iterdir()) == [ADAPTER_FILE]
    raw, averaged = load_file(path / "unet" / ADAPTER_FILE), load_file(path / "ema" / ADAPTER_FILE)
    assert raw.keys() == averaged.keys()
    assert all(".attn" in name and tensor.dtype == torch.float32 for name, tensor in raw.items())
    assert any(not torch.equal(raw[name], averaged[name]) for name in raw)
    moments = load_file(path / "optimizer.safetensors")
    assert len({name.partition(".")[0] for name in moments}) == len(raw)


def test_two_adapters_draw_on_one_unet_as_two_merged_ones(
    adapters: tuple[Path, Path], world: Any, tmp_path: Path
) -> None:
    checkpoints = [open_expert(run) for run in adapters]
    experts = load_experts(checkpoints, find_bases(checkpoints, world.model, None), 64, CPU)
    assert experts[0].model.unet is experts[1].model.unet
    for expert, checkpoint in zip(experts, checkpoints, strict=True):
        merged = load_unet(world.model / "unet", CPU)
        assert checkpoint.card.facts.adapter is not None
        load_adapter(merged, checkpoint.card.facts.adapter, "own", checkpoint.weights("ema"))
        merge_adapter(merged)
        assert not any("lora" in name for name in merged.state_dict())
        from trainer.adapter import use_adapter

        assert expert.model.adapter is not None
        use_adapter(expert.model.unet, expert.model.adapter)
        assert torch.allclose(answer(expert.model.unet), answer(merged), atol=1e-5)
    request = GenerateRequest(
        adapters, world.model, ("a red circle",), tmp_path, DrawSettings(4, 3.0), device="cpu", height=64, width=64
    )
    assert next(iter(generate(request))).exists()


def test_an_adapter_draws_with_a_whole_expert(
    adapters: tuple[Path, Path], pair: tuple[Path, Path], world: Any, tmp_path: Path
) -> None:
    for experts in ((pair[0], adapters[1]), (adapters[0], pair[1])):
        request = GenerateRequest(
            experts, world.model, ("a red circle",), tmp_path, DrawSettings(3, 3.0), device="cpu", height=64, width=64
        )
        assert next(iter(generate(request))).exists()


def test_killed_with_dropout_it_goes_on_bit_for_bit(
    world: Any, start: Callable[..., Any], files_of: Any, events: Any, tmp_path: Path
) -> None:
    sets = (*LORA, "steps=10", "adapter.dropout=0.5", "accumulation=2", "checkpoint.every=3")
    train_expert(world.request(tmp_path / "whole", *sets))
    command = start("train-expert", world.arguments(tmp_path / "broken", *sets))
    command.wait_for(lambda: any(event["step"] >= 4 for event in events(tmp_path / "broken", "step")))
    command.signal(signal.SIGKILL)
    command.wait()
    train_expert(world.request(tmp_path / "broken", *sets, "gradient_checkpointing=false"))
    whole, broken = (files_of(tmp_path / run, 10) for run in ("whole", "broken"))
    differ = {name for name in whole if whole[name] != broken[name]}
    assert differ <= {"unet/pytorch_lora_weights.safetensors", "ema/pytorch_lora_weights.safetensors"}
    for name in differ:  # safetensors writes two entries of metadata in either order
        ours, theirs = (
            load_file(tmp_path / run / "checkpoints" / "step-00000010" / name) for run in ("whole", "broken")
        )
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert events(tmp_path / "broken", "resume")


@pytest.mark.parametrize("sets", [(*LORA, "adapter.dropout=0.5"), ("trainable=['attention']",)], ids=["lora", "part"])
def test_checkpointing_activations_changes_no_loss(world: Any, events: Any, tmp_path: Path, sets: Any) -> None:
    for name, on in (("plain", "false"), ("again", "true")):
        train_expert(world.request(tmp_path / name, *sets, "steps=2", f"gradient_checkpointing={on}"))
    plain, again = ([e["loss"] for e in events(tmp_path / name, "step")] for name in ("plain", "again"))
    assert plain == again


def test_what_is_frozen_stays_and_the_folder_is_whole(world: Any, tmp_path: Path) -> None:
    train_expert(world.request(tmp_path / "run", "steps=2", "batch=1", "trainable=['biases', 'mid_block.*.norm*']"))
    path = open_expert(tmp_path / "run").path
    before = load_file(next((world.model / "unet").glob("*.safetensors")))
    for folder in ("unet", "ema"):
        after = load_file(path / folder / "diffusion_pytorch_model.safetensors")
        assert after.keys() == before.keys()
        moved = {name for name in before if not torch.equal(before[name].float(), after[name])}
        assert "conv_in.bias" in moved
        assert all(name.endswith(".bias") or ".norm" in name for name in moved)
        assert load_unet(path / folder, CPU) is not None


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        ("trainable=['atention']", "trainable: 'atention' names nothing in this UNet; near it: attention"),
        ("trainable=['mid_blok.*']", "near it: mid_block"),
        ("adapter.targets=['biases']", r"adapter\.targets: 'biases' names nothing"),
    ],
)
def test_a_pattern_that_names_nothing_is_refused_first(world: Any, tmp_path: Path, sets: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        train_expert(world.request(tmp_path / "run", sets))
    assert not (tmp_path / "run").exists()


def test_settings_that_exclude_each_other_are_refused(world: Any) -> None:
    with pytest.raises(ConfigError, match="adapter and trainable exclude each other"):
        world.config("adapter.rank=4", "trainable=['biases']")
    with pytest.raises(ConfigError, match="an adapter has fp32 weights"):
        world.config("adapter.rank=4", "precision=bf16-lean")


def test_an_adapter_is_not_dropped_in_going_on(world: Any, adapters: tuple[Path, Path]) -> None:
    with pytest.raises(ConfigError, match=r"adapter\.rank was 4"):
        train_expert(world.request(adapters[0], "steps=4", "batch=1", "ema.decay=0.5", "optimizer.learning_rate=1e-2"))


@pytest.mark.parametrize("weights", ["ema", "raw"])
def test_an_expert_starts_from_another(world: Any, pair: tuple[Path, Path], tmp_path: Path, weights: str) -> None:
    from dataclasses import replace

    sets = ("steps=1", f"start.weights={weights}", "optimizer.learning_rate=1e-12", "optimizer.weight_decay=0")
    request = replace(world.request(tmp_path / "run", *sets), start=pair[1])
    train_expert(request)
    folder = {"ema": "ema", "raw": "unet"}[weights]
    own = tensors(tmp_path / "run", "unet", "diffusion_pytorch_model.safetensors")
    theirs = tensors(pair[1], folder, "diffusion_pytorch_model.safetensors")
    assert all(torch.allclose(own[name], theirs[name], atol=1e-9) for name in own)
    facts = open_expert(tmp_path / "run").card.facts
    assert facts.start is not None
    assert (facts.start.name, facts.start.step, facts.start.weights) == ("refiner", 2, folder)
    train_expert(replace(request, config=world.config(*sets, "steps=2")))
    with pytest.raises(ConfigError, match="name it with --start"):
        train_expert(replace(request, config=world.config(*sets, "steps=3"), start=None))
    with pytest.raises(ContractError, match=r"--start: experts .* differ in prediction_type"):
        train_expert(
            replace(request, output=tmp_path / "eps", config=world.config(*sets, "schedule.prediction_type=sample"))
        )


def test_an_adapter_goes_on_or_is_merged(world: Any, adapters: tuple[Path, Path], tmp_path: Path) -> None:
    from dataclasses import replace

    still = ("steps=1", "optimizer.learning_rate=1e-12", "optimizer.weight_decay=0", "batch=1")
    on = replace(world.request(tmp_path / "on", *LORA, *still), start=adapters[0])
    train_expert(on)
    own, theirs = (tensors(run, "ema", ADAPTER_FILE) for run in (tmp_path / "on", adapters[0]))
    assert all(torch.allclose(own[name], theirs[name], atol=1e-9) for name in own)
    train_expert(replace(world.request(tmp_path / "merged", *still), start=adapters[0]))
    merged = load_unet(open_expert(tmp_path / "merged").path / "unet", CPU)
    checkpoint = open_expert(adapters[0])
    with_adapter = load_unet(world.model / "unet", CPU)
    assert checkpoint.card.facts.adapter is not None
    load_adapter(with_adapter, checkpoint.card.facts.adapter, "own", checkpoint.weights("ema"))
    assert torch.allclose(answer(merged), answer(with_adapter), atol=1e-5)
    with pytest.raises(ConfigError, match="an adapter with other settings"):
        train_expert(replace(on, output=tmp_path / "other", config=world.config(*LORA, "adapter.rank=2")))


def test_an_adapter_on_an_expert_draws_from_that_expert(world: Any, pair: tuple[Path, Path], tmp_path: Path) -> None:
    from dataclasses import replace

    train_expert(replace(world.request(tmp_path / "run", *LORA, "steps=1"), start=pair[0]))
    checkpoint = open_expert(tmp_path / "run")
    with pytest.raises(ContractError, match="name it with --base"):
        find_bases([checkpoint], world.model, None)
    assert find_bases([checkpoint], world.model, pair[0]) == [open_expert(pair[0]).path / "ema"]


def test_a_card_stands_in_every_checkpoint(adapters: tuple[Path, Path]) -> None:
    path = open_expert(adapters[0]).path
    card = (path / "README.md").read_text()
    assert "README.md" in json.loads((path / "checksums.json").read_text())
    for said in (
        "LoRA adapter (rank 4, alpha 8",
        "[350, 1000)",
        "`shapes`",
        "load_lora_weights",
        "unknown: see the base",
    ):
        assert said in card
    (path / "README.md").write_text(card + "!")
    with pytest.raises(CheckpointError, match=r"README\.md is damaged"):
        open_expert(path)
    (path / "README.md").write_text(card)
