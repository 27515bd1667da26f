"""Every optimizer: learns, keeps its state in tensors with names, goes on bit for bit, and stands still when told."""

import importlib.util
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from shared.errors import CheckpointError, ConfigError
from trainer import library_rules
from trainer.learning_rate import rate_share
from trainer.loop import train_expert
from trainer.optim import Optimizer
from trainer.optimizer_config import OptimizerConfig, RateConfig

BAD, GOOD = torch.tensor(1.0), torch.tensor(0.0)
FUSED = ("precision=bf16-lean", "optimizer.fused_backward=true", "optimizer.clip_norm=0")
OTHERS = ("adamw-8bit", "adafactor", "schedule-free", "bf16-lean")


def layers(channels_last: bool = False) -> nn.Module:
    """A convolution, matrices that are large enough for eight bits, and vectors."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(16, 24, 3), nn.Linear(24, 640), nn.Linear(640, 4))
    return model.to(memory_format=torch.channels_last) if channels_last else model


def optimizer_of(name: str, model: nn.Module, **settings: Any) -> Optimizer:
    if name == "bf16-lean":
        return Optimizer(model.bfloat16().parameters(), OptimizerConfig(**settings), is_lean=True)
    return Optimizer(model.parameters(), OptimizerConfig(name=name, **settings))


def train(model: nn.Module, optimizer: Optimizer, steps: int, is_bad: Tensor = GOOD, first: int = 0) -> None:
    for step in range(first, first + steps):
        generator = torch.Generator().manual_seed(step)
        for weight in model.parameters():
            gradient = torch.randn(weight.shape, generator=generator) if is_bad == GOOD else weight * float("nan")
            weight.grad = torch.empty_like(weight).copy_(gradient)
        optimizer.step_unless_bad(is_bad)


def copies(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def differing(a: dict[str, Tensor], b: dict[str, Tensor]) -> set[str]:
    assert a.keys() == b.keys()
    return {name for name in a if not torch.equal(a[name], b[name])}


@pytest.mark.parametrize("name", ["adamw", *OTHERS])
def test_it_finds_a_minimum(name: str) -> None:
    model, goal = layers(), layers()
    with torch.no_grad():
        for weight in goal.parameters():
            weight.add_(0.05)
    optimizer = optimizer_of(name, model, learning_rate=2e-3, weight_decay=0.0)

    def distance() -> Tensor:
        pairs = zip(optimizer.weights(), goal.parameters(), strict=True)
        return torch.stack([(ours.float() - theirs.detach()).square().sum() for ours, theirs in pairs]).sum()

    before = distance()
    for _ in range(60):
        for weight, wanted in zip(model.parameters(), goal.parameters(), strict=True):
            weight.grad = (weight.detach() - wanted.detach()).to(weight.dtype)
        optimizer.step_unless_bad(GOOD)
    assert distance() < 0.1 * before


@pytest.mark.parametrize("name", ["adamw", "muon", *OTHERS])
@pytest.mark.parametrize("channels_last", [False, True])
def test_its_state_goes_through_a_file_bit_for_bit(name: str, channels_last: bool, tmp_path: Path) -> None:
    model, other = layers(channels_last), layers(channels_last)
    optimizer = optimizer_of(name, model, learning_rate=0.1)
    train(model, optimizer, 3)
    save_file({key: tensor.contiguous() for key, tensor in optimizer.tensors().items()}, tmp_path / "optimizer")
    with optimizer.averaged():
        saved = copies(model.state_dict())
    resumed = optimizer_of(name, other, learning_rate=0.1)
    other.load_state_dict(saved)
    resumed.load(load_file(tmp_path / "optimizer"))
    assert not differing(optimizer.tensors(), resumed.tensors())
    train(model, optimizer, 3, first=3)
    train(other, resumed, 3, first=3)
    assert not differing(model.state_dict(), other.state_dict())
    assert not differing(optimizer.tensors(), resumed.tensors())


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("before", [0, 2])
def test_a_bad_step_moves_nothing(name: str, before: int) -> None:
    """But the count of steps that corrects for the beginning, where a library keeps it on the host."""
    model = layers()
    optimizer = optimizer_of(name, model, learning_rate=0.1)
    train(model, optimizer, before)
    weights, state = copies(model.state_dict()), copies(optimizer.tensors())
    train(model, optimizer, 1, BAD)
    assert not differing(weights, model.state_dict())
    after = optimizer.tensors()
    counts = {key for key in after if key.endswith("step") or key.startswith("all.")}
    if before:
        assert differing(state, after) <= counts
    else:
        zeros = {key for key in after if not key.endswith((".z", ".trained"))} - counts
        assert zeros
        assert not any(after[key].any() for key in zeros)
    train(model, optimizer, 1, first=7)
    assert differing(weights, model.state_dict()) == set(weights)
    assert all(tensor.isfinite().all() for tensor in optimizer.tensors().values())


@pytest.mark.parametrize("name", OTHERS)
def test_a_state_that_lacks_something_is_refused(name: str) -> None:
    model = layers()
    optimizer = optimizer_of(name, model)
    train(model, optimizer, 1)
    state = optimizer.tensors()
    for key in state:
        with pytest.raises(CheckpointError, match="not that of 6 parameters under"):
            optimizer_of(name, model).load({other: tensor for other, tensor in state.items() if other != key})
    with pytest.raises(CheckpointError, match=r"under AdamW$"):
        Optimizer(model.parameters(), OptimizerConfig()).load(state)


@pytest.mark.parametrize("name", OTHERS)
def test_it_is_the_same_in_chunks_and_channels_last(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, parted, last = layers(), layers(), layers(channels_last=True)
    train(whole, optimizer_of(name, whole, learning_rate=1e-3), 3)
    monkeypatch.setattr(library_rules, "CHUNK", 100)
    train(parted, optimizer_of(name, parted, learning_rate=1e-3), 3)
    train(last, optimizer_of(name, last, learning_rate=1e-3), 3)
    assert not differing(whole.state_dict(), parted.state_dict())
    assert last[0].weight.is_contiguous(memory_format=torch.channels_last)
    for key, tensor in whole.state_dict().items():  # rows and blocks of eight bits are cut elsewhere
        torch.testing.assert_close(last.state_dict()[key], tensor, atol=2e-3, rtol=0.02)


@pytest.mark.parametrize("name", ["adamw-8bit", "adafactor"])
def test_it_is_smaller_than_adamw(name: str) -> None:
    def state_bytes(optimizer: Optimizer, model: nn.Module) -> int:
        train(model, optimizer, 1)
        return sum(tensor.nbytes for tensor in optimizer.tensors().values())

    plain, small = (state_bytes(optimizer_of(n, model := layers()), model) for n in ("adamw", name))
    assert small < 0.5 * plain


def test_schedule_free_averages_what_it_trains() -> None:
    """x_t = (1 - 1/t) x_{t-1} + z_t / t and y = (1 - beta1) z + beta1 x, by hand, at a constant rate."""
    model = layers()
    z = x = y = model[2].bias.detach().double().clone()
    second = torch.zeros_like(z)
    optimizer = optimizer_of("schedule-free", model, learning_rate=0.01, weight_decay=0.0)
    for step in range(1, 5):
        for weight in model.parameters():
            weight.grad = torch.full_like(weight, 0.5) + weight.detach()
        gradient = 0.5 + y
        optimizer.step_unless_bad(GOOD)
        second = 0.999 * second + 0.001 * gradient**2
        z = z - 0.01 * gradient / ((second / (1 - 0.999**step)).sqrt() + 1e-8)
        x = (1 - 1 / step) * x + z / step
        y = 0.1 * z + 0.9 * x
    torch.testing.assert_close(model[2].bias.detach().double(), y, rtol=1e-5, atol=1e-6)
    with optimizer.averaged():
        torch.testing.assert_close(model[2].bias.detach().double(), x, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(list(optimizer.weights())[5].double(), x, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(x, y, atol=1e-4)


def test_leaving_the_average_gives_back_what_is_trained() -> None:
    model = layers()
    optimizer = optimizer_of("schedule-free", model, learning_rate=0.1)
    train(model, optimizer, 3)
    trained = copies(model.state_dict())
    with optimizer.averaged():
        assert differing(trained, model.state_dict()) == set(trained)
    assert not differing(trained, model.state_dict())


def test_bf16_lean_moves_weights_as_fp32_does_and_plain_bf16_does_not() -> None:
    """At the recipe's rate, 4e-7: after 300 steps of a drift in noise, how far along fp32's way, and how near it."""
    weights = (torch.randn(20_000, generator=torch.Generator().manual_seed(0)) * 0.03).bfloat16().float()
    drift = torch.randn(20_000, generator=torch.Generator().manual_seed(1)) * 5e-4
    settings = OptimizerConfig(learning_rate=4e-7)

    def moved(dtype: torch.dtype, is_lean: bool = False) -> Tensor:
        parameter = nn.Parameter(weights.to(dtype, copy=True))
        optimizer = Optimizer([parameter], settings, is_lean=is_lean)
        generator = torch.Generator().manual_seed(2)
        for _ in range(300):
            parameter.grad = (drift + torch.randn(20_000, generator=generator) * 1e-3).to(dtype)
            optimizer.step_unless_bad(GOOD)
        return next(iter(optimizer.weights())).double() - weights.double()

    def likeness(way: Tensor, reference: Tensor) -> tuple[float, float]:
        """Share of the way along the reference, and distance from it in its own length."""
        along = (way * reference).sum() / reference.square().sum()
        return float(along), float((way - reference).norm() / reference.norm())

    reference = moved(torch.float32)
    along, apart = likeness(moved(torch.bfloat16, is_lean=True), reference)
    assert along == pytest.approx(1, abs=0.002)
    assert apart < 0.02
    along, apart = likeness(moved(torch.bfloat16), reference)
    assert along < 0.02
    assert apart > 0.98


def test_bf16_lean_decays_weights_by_way_of_the_compensation() -> None:
    parameter = nn.Parameter(torch.full((4096,), 0.75, dtype=torch.bfloat16))
    optimizer = Optimizer([parameter], OptimizerConfig(learning_rate=1e-4, weight_decay=0.1), is_lean=True)
    for _ in range(50):
        parameter.grad = torch.zeros_like(parameter)
        optimizer.step_unless_bad(GOOD)
    assert next(iter(optimizer.weights()))[0].item() == pytest.approx(0.75 * (1 - 1e-5) ** 50, rel=2e-5)


@pytest.mark.parametrize(
    ("name", "package", "line"),
    [
        ("adamw-8bit", "bitsandbytes", r"sdxl-experts\[adamw-8bit\]"),
        ("schedule-free", "schedulefree", r"sdxl-experts\[schedule-free\]"),
        ("bf16-lean", "optimi", r"sdxl-experts\[lean\]"),
    ],
)
def test_a_library_that_is_not_installed_is_named(
    name: str, package: str, line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda asked, *rest: None if asked == package else real(asked))
    with pytest.raises(ConfigError, match=line):
        optimizer_of(name, layers())


def test_eight_bits_are_refused_where_there_are_no_kernels() -> None:
    with pytest.raises(ConfigError, match="runs on cuda and cpu, not on meta"):
        Optimizer(layers().to("meta").parameters(), OptimizerConfig(name="adamw-8bit"))


@pytest.mark.parametrize(
    ("sets", "line"),
    [
        (("precision=bf16",), "weights of bf16 alone do not move"),
        (("precision=bf16-lean", "optimizer.name=adafactor"), "'adafactor' would lose its steps to rounding"),
        (("optimizer.name=schedule-free", "optimizer.rate.shape=cosine"), "takes no falling rate"),
        (("optimizer.name=schedule-free", "optimizer.beta1=0"), "needs a beta1 above 0"),
        (("optimizer.fused_backward=true", "optimizer.clip_norm=0"), "it needs precision = 'bf16-lean'"),
        (("optimizer.fused_backward=true", "precision=bf16-lean"), "optimizer.clip_norm = 0"),
        ((*FUSED, "accumulation=2"), "accumulation = 1"),
    ],
)
def test_what_cannot_be_is_refused(world: Any, sets: tuple[str, ...], line: str) -> None:
    with pytest.raises(ConfigError, match=line):
        world.config(*sets)


# --- in a run ---


@pytest.mark.parametrize("name", OTHERS)
def test_a_run_goes_on_bit_for_bit(world: Any, files_of: Callable[..., Any], name: str, tmp_path: Path) -> None:
    choice = "precision=bf16-lean" if name == "bf16-lean" else f"optimizer.name={name}"
    sets = ("batch=1", choice, "checkpoint.every=3", "optimizer.rate.warmup_steps=2")
    train_expert(world.request(tmp_path / "unbroken", "steps=5", *sets))
    train_expert(world.request(tmp_path / "broken", "steps=2", *sets))
    train_expert(world.request(tmp_path / "broken", "steps=5", *sets))
    assert files_of(tmp_path / "broken", 5) == files_of(tmp_path / "unbroken", 5)
    unet = load_file(tmp_path / "broken/checkpoints/step-00000005/unet/diffusion_pytorch_model.safetensors")
    assert {tensor.dtype for tensor in unet.values()} == {torch.bfloat16 if name == "bf16-lean" else torch.float32}


def test_what_schedule_free_saves_is_the_average(world: Any, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train_expert(world.request(run, "steps=4", "batch=1", "optimizer.name=schedule-free"))
    checkpoint = run / "checkpoints" / "step-00000004"
    unet = load_file(checkpoint / "unet" / "diffusion_pytorch_model.safetensors")
    state = load_file(checkpoint / "optimizer.safetensors")
    assert sum("trained" in key for key in state) == len(unet)
    place = next(p for p in range(len(unet)) if state[f"{p}.trained"].numel() > 5000)
    average = torch.lerp(state[f"{place}.trained"], state[f"{place}.z"], 1 - 1 / 0.9)
    saved = [t for t in unet.values() if t.numel() == len(average) and torch.equal(t.flatten(), average)]
    assert len(saved) == 1


def test_steps_in_the_backward_pass_are_the_same_steps(
    world: Any, files_of: Callable[..., Any], events: Callable[..., Any], tmp_path: Path
) -> None:
    sets = ("steps=4", "batch=1", "optimizer.rate.warmup_steps=3")
    train_expert(world.request(tmp_path / "after", *sets, FUSED[0], FUSED[2]))
    train_expert(world.request(tmp_path / "within", *sets, *FUSED))
    within, after = (files_of(tmp_path / run, 4) for run in ("within", "after"))
    assert {name for name in within if within[name] != after[name]} == {"README.md"}  # which tells the setting
    norms = [[event["grad_norm"] for event in events(tmp_path / run, "step")] for run in ("within", "after")]
    assert norms[0] == pytest.approx(norms[1], rel=0.01)


def test_a_bad_gradient_in_the_backward_pass_leaves_its_weight_out() -> None:
    good, bad = (nn.Parameter(torch.ones(8, dtype=torch.bfloat16)) for _ in range(2))
    config = OptimizerConfig(learning_rate=0.1, fused_backward=True, clip_norm=0)
    optimizer = Optimizer([good, bad], config, is_lean=True)
    torch.autograd.backward((good + bad * float("nan")).sum())
    assert good.grad is None
    assert bad.grad is None
    assert not torch.isfinite(optimizer.clip(0))
    assert (good < 1).all()
    assert (bad == 1).all()
    assert all(tensor.isfinite().all() for tensor in optimizer.tensors().values())


# --- learning rates ---


def shares(steps: int, **rate: Any) -> list[float]:
    return [rate_share(step, steps, RateConfig(**rate)) for step in range(steps)]


def test_rates_by_hand() -> None:
    assert shares(3) == [1.0, 1.0, 1.0]
    assert shares(4, warmup_steps=2) == [0.5, 1.0, 1.0, 1.0]
    assert shares(6, shape="linear", warmup_steps=2) == pytest.approx([0.5, 1.0, 1.0, 0.75, 0.5, 0.25])
    assert shares(4, shape="linear", final_share=0.5) == pytest.approx([1.0, 0.875, 0.75, 0.625])
    assert shares(2, shape="cosine") == pytest.approx([1.0, 0.5])
    assert shares(4, shape="cosine", final_share=0.2)[2] == pytest.approx(0.6)
    assert shares(4, shape="polynomial", power=2) == pytest.approx([1.0, 0.5625, 0.25, 0.0625])


@pytest.mark.parametrize("shape", ["constant", "linear", "cosine", "polynomial"])
def test_rates_rise_then_never_rise_again(shape: str) -> None:
    known = shares(50, shape=shape, warmup_steps=10, final_share=0.1)
    assert known[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert all(later <= earlier for earlier, later in pairwise(known[10:]))
    assert rate_share(50, 50, RateConfig(shape="linear", final_share=0.1)) == pytest.approx(0.1)
    assert min(known) >= 0.1


def test_the_logged_rate_is_the_one_that_was_used(world: Any, events: Callable[..., Any], tmp_path: Path) -> None:
    """With decay alone to show it: AdamW's first step is the rate's length whatever the gradient."""
    run = tmp_path / "run"
    sets = ("batch=1", "checkpoint.every=1", "optimizer.rate.shape=linear", "optimizer.rate.warmup_steps=1")
    train_expert(world.request(run, "steps=3", *sets))
    assert [event["learning_rate"] for event in events(run, "step")] == pytest.approx([1e-3, 1e-3, 5e-4])
    train_expert(world.request(run, "steps=5", *sets))  # what is left is stretched, what was done stays
    assert [event["learning_rate"] for event in events(run, "step")][3:] == pytest.approx([5e-4, 2.5e-4])
    change = next(event for event in events(run, "config") if event["key"] == "steps")
    assert (change["before"], change["after"]) == (3, 5)


def test_a_rate_of_half_is_a_step_of_half(world: Any, tmp_path: Path) -> None:
    def moved(name: str, *sets: str) -> Tensor:
        train_expert(world.request(tmp_path / name, "steps=1", "batch=1", "optimizer.weight_decay=0", *sets))
        path = "unet/diffusion_pytorch_model.safetensors"
        after = load_file(tmp_path / name / "checkpoints" / "step-00000001" / path)
        before = load_file(world.model / path)
        return torch.cat([(after[key] - before[key]).flatten() for key in after])

    whole, half = moved("whole"), moved("half", "optimizer.rate.warmup_steps=2")
    torch.testing.assert_close(half, whole / 2, rtol=0.01, atol=1e-6)
