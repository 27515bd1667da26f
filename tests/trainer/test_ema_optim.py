"""The average and AdamW's state: against a formula by hand, through a file, and when gradients are not finite."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from shared.errors import CheckpointError, DataError
from trainer.ema import Ema
from trainer.loop import train_expert
from trainer.optim import Optimizer
from trainer.optimizer_config import OptimizerConfig

BAD, GOOD = torch.tensor(1.0), torch.tensor(0.0)


def model_of(*values: float) -> nn.Linear:
    model = nn.Linear(len(values), 1)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([values]))
        model.bias.zero_()
    return model


def train(model: nn.Module, optimizer: Optimizer, steps: int, is_bad: Tensor = GOOD) -> None:
    for step in range(steps):
        for weight in model.parameters():
            generator = torch.Generator().manual_seed(step)
            weight.grad = torch.randn(weight.shape, generator=generator) if is_bad == GOOD else weight * float("nan")
        optimizer.step_unless_bad(is_bad)


def copies(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_the_average_by_hand() -> None:
    model = model_of(1.0, -2.0)
    ema = Ema(model, 0.5)
    first, second = 1.0, -2.0
    for step in range(12):
        with torch.no_grad():
            model.weight.add_(torch.tensor([[0.5, -1.0]]))
        ema.update()
        decay = min(0.5, (1 + step) / (10 + step))
        first = decay * first + (1 - decay) * (1.0 + 0.5 * (step + 1))
        second = decay * second + (1 - decay) * (-2.0 - 1.0 * (step + 1))
    assert ema.updates == 12
    assert ema.state_dict()["weight"][0].tolist() == pytest.approx([first, second], rel=1e-5)
    assert model.weight[0].tolist() == [7.0, -14.0]


def test_the_average_of_half_precision_weights_is_kept_in_full() -> None:
    model = model_of(1.0, 2.0).bfloat16()
    ema = Ema(model, 0.999)
    assert {tensor.dtype for tensor in ema.state_dict().values()} == {torch.float32}
    ema.update()


def test_the_average_goes_on_from_a_file(tmp_path: Path) -> None:
    model = model_of(1.0, 2.0)
    ema = Ema(model, 0.9)
    with torch.no_grad():
        model.weight.add_(3.0)
    ema.update()
    save_file(ema.state_dict(), tmp_path / "ema")
    again = Ema(model, 0.9, updates=1)
    again.load(load_file(tmp_path / "ema"))
    ema.update()
    again.update()
    assert same(ema.state_dict(), again.state_dict())


@pytest.mark.parametrize(
    "state", [{"weight": torch.zeros(1, 2)}, {"weight": torch.zeros(1, 2), "bias": torch.zeros(2)}]
)
def test_an_average_of_another_model_is_refused(state: dict[str, Tensor]) -> None:
    with pytest.raises(CheckpointError, match="no bias of shape"):
        Ema(model_of(1.0, 2.0), 0.9).load(state)


def test_optimizer_state_goes_through_a_file_bit_for_bit(tmp_path: Path) -> None:
    model, other = model_of(1.0, 2.0), model_of(1.0, 2.0)
    optimizer = Optimizer(model.parameters(), OptimizerConfig(learning_rate=0.1))
    train(model, optimizer, 3)
    save_file(optimizer.tensors(), tmp_path / "optimizer")
    other.load_state_dict(copies(model.state_dict()))
    # What may change when a run goes on stays as configured.
    resumed = Optimizer(other.parameters(), OptimizerConfig(learning_rate=0.1, eps=1e-8))
    resumed.load(load_file(tmp_path / "optimizer"))
    assert same(optimizer.tensors(), resumed.tensors())
    train(model, optimizer, 3)
    train(other, resumed, 3)
    assert same(model.state_dict(), other.state_dict())
    assert same(optimizer.tensors(), resumed.tensors())


def test_another_learning_rate_is_the_configured_one() -> None:
    model = model_of(1.0)
    optimizer = Optimizer(model.parameters(), OptimizerConfig(learning_rate=0.1))
    train(model, optimizer, 1)
    slower = Optimizer(model.parameters(), OptimizerConfig(learning_rate=0.01))
    slower.load(optimizer.tensors())
    assert slower.param_groups[0]["lr"] == 0.01


def test_an_optimizer_state_that_lacks_something_is_refused() -> None:
    model = model_of(1.0, 2.0)
    optimizer = Optimizer(model.parameters(), OptimizerConfig())
    train(model, optimizer, 1)
    state = optimizer.tensors()
    assert len(state) == 6
    for name in state:
        rest = {key: tensor for key, tensor in state.items() if key != name}
        with pytest.raises(CheckpointError, match="not that of 2 parameters"):
            Optimizer(model.parameters(), OptimizerConfig()).load(rest)
    with pytest.raises(CheckpointError):
        Optimizer(model.parameters(), OptimizerConfig()).load(state | {"2.step": GOOD})


def test_a_step_is_a_hand_worked_adamw_step() -> None:
    model = model_of(2.0)
    config = OptimizerConfig(learning_rate=0.1, beta1=0.9, beta2=0.99, eps=1e-8, weight_decay=0.5)
    optimizer = Optimizer(model.parameters(), config)
    weight, m, v = 2.0, 0.0, 0.0
    for step, gradient in enumerate((0.3, -0.7), start=1):
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, gradient)
        optimizer.step_unless_bad(GOOD)
        m, v = 0.9 * m + 0.1 * gradient, 0.99 * v + 0.01 * gradient**2
        weight -= 0.1 * 0.5 * weight
        weight -= 0.1 * (m / (1 - 0.9**step)) / ((v / (1 - 0.99**step)) ** 0.5 + 1e-8)
    assert model.weight.item() == pytest.approx(weight, rel=1e-5)


MUON = OptimizerConfig(name="muon", learning_rate=0.1, muon_rate=0.02, weight_decay=0.0)


def layers() -> nn.Module:
    """A convolution and a matrix for Muon, and for AdamW their biases and a last layer that is too narrow."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(16, 24, 3), nn.Linear(24, 32), nn.Linear(32, 4))


def test_muon_takes_matrices_and_convolutions_and_turns_them_by_a_whole_rate() -> None:
    """A first step is the gradient with all its singular values brought near 1, times the rate (and tall ones more)."""
    model = layers()
    before = copies(model.state_dict())
    optimizer = Optimizer(model.parameters(), MUON)
    train(model, optimizer, 1)
    for name, tall in (("0.weight", 1.0), ("1.weight", (32 / 24) ** 0.5)):
        turned = (before[name] - model.state_dict()[name]).flatten(1) / (0.02 * tall)
        singular = torch.linalg.svdvals(turned)
        assert 0.5 < singular.min() < singular.max() < 1.3
    state = optimizer.tensors()
    assert {key for key in state if key.endswith("momentum_buffer")} == {"0.momentum_buffer", "2.momentum_buffer"}
    assert {key.partition(".")[0] for key in state if key.endswith("exp_avg")} == {"1", "3", "4", "5"}


@pytest.mark.parametrize("before", [0, 2])
@pytest.mark.parametrize("config", [OptimizerConfig(learning_rate=0.1), MUON], ids=["adamw", "muon"])
def test_a_bad_step_changes_nothing(before: int, config: OptimizerConfig) -> None:
    model, unbroken = layers(), layers()
    optimizer, other = Optimizer(model.parameters(), config), Optimizer(unbroken.parameters(), config)
    train(model, optimizer, before)
    weights, state = copies(model.state_dict()), copies(optimizer.tensors())
    train(model, optimizer, 1, BAD)
    assert same(weights, model.state_dict())
    after = optimizer.tensors()
    assert same(state, after) if before else all((tensor == 0).all() for tensor in after.values())
    train(model, optimizer, 2)
    train(unbroken, other, before)
    train(unbroken, other, 2)
    assert same(model.state_dict(), unbroken.state_dict())


def test_muons_state_goes_through_a_file_bit_for_bit(tmp_path: Path) -> None:
    model, other = layers(), layers()
    optimizer = Optimizer(model.parameters(), MUON)
    train(model, optimizer, 3)
    save_file(optimizer.tensors(), tmp_path / "optimizer")
    other.load_state_dict(copies(model.state_dict()))
    resumed = Optimizer(other.parameters(), MUON)
    resumed.load(load_file(tmp_path / "optimizer"))
    train(model, optimizer, 3)
    train(other, resumed, 3)
    assert same(model.state_dict(), other.state_dict())
    assert same(optimizer.tensors(), resumed.tensors())
    with pytest.raises(CheckpointError, match=r"6 parameters under AdamW$"):
        Optimizer(other.parameters(), OptimizerConfig()).load(optimizer.tensors())


def test_rates_are_scaled_from_what_is_configured() -> None:
    optimizer = Optimizer(layers().parameters(), MUON)
    for share in (0.5, 0.25, 1.0):
        optimizer.scale_rates(share)
        assert [group["lr"] for group in optimizer.param_groups] == [0.1 * share, 0.02 * share]


def spoil(world: Any, folder: Path) -> Any:
    """The same world with a UNet in which one weight is not a number, so that every gradient is not."""
    import dataclasses
    import shutil

    shutil.copytree(world.model, folder)
    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    weights["conv_in.bias"][0] = float("nan")
    save_file(weights, path, {"format": "pt"})
    return dataclasses.replace(world, model=folder)


def test_a_run_skips_and_counts_and_gives_up(
    world: Any, events: Callable[..., list[dict[str, Any]]], tmp_path: Path
) -> None:
    bad = spoil(world, tmp_path / "model")
    run = tmp_path / "run"
    with pytest.raises(DataError, match="3 steps had gradients that were not finite: giving up at 3"):
        train_expert(bad.request(run, "steps=6", "optimizer.max_skipped=2", "checkpoint.every=2"))
    logged = events(run, "step")
    assert [event["skipped"] for event in logged] == [1, 2, 3]
    assert all(event["loss"] is None for event in logged)
    kept = load_file(run / "checkpoints" / "step-00000002" / "unet" / "diffusion_pytorch_model.safetensors")
    start = load_file(bad.model / "unet" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(kept[name], start[name]) for name in start if name != "conv_in.bias")
    moments = load_file(run / "checkpoints" / "step-00000002" / "optimizer.safetensors")
    assert all((tensor == 0).all() for tensor in moments.values())
    # The count goes on where it stood.
    with pytest.raises(DataError, match="giving up at 3"):
        train_expert(bad.request(run, "steps=6", "optimizer.max_skipped=2", "checkpoint.every=2"))


def test_an_average_in_the_background_is_the_same_average() -> None:
    model = layers()
    beside, behind = Ema(model, 0.9), Ema(model, 0.9, in_background=True)
    for step in range(5):
        with torch.no_grad():
            for weight in model.parameters():
                weight.add_(0.1 * step)
        beside.update()
        behind.update()
        with torch.no_grad():  # what comes after an update is not part of it
            for weight in model.parameters():
                weight.mul_(1.01)
    assert same(beside.state_dict(), behind.state_dict())
    again = Ema(model, 0.9, updates=5, in_background=True)
    again.load(copies(behind.state_dict()))
    for ema in (beside, again):
        ema.update()
    assert same(beside.state_dict(), again.state_dict())


def test_what_goes_wrong_in_the_background_is_raised() -> None:
    ema = Ema(model_of(1.0, 2.0), 0.9, in_background=True)
    ema.update()
    ema.state_dict()["weight"].resize_(7)
    ema.update()
    with pytest.raises(RuntimeError):
        ema.update()
