"""What makes training faster changes nothing else: memory format, compiled blocks, and no waiting for the device."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from shared.device import choose_device
from shared.errors import ConfigError
from shared.seeding import derive_seed, make_generator
from trainer.compiled import RECOMPILE_LIMIT, compile_blocks, recompiling_is_an_error
from trainer.loop import at_a_stretch, train_expert
from trainer.loss import place_noise
from trainer.trained import seed_layers
from trainer.unet import load_unet

UNET = "checkpoints/step-00000002/unet/diffusion_pytorch_model.safetensors"

dynamo_looks = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")


@pytest.fixture
def dynamo() -> Any:
    """torch.compile's settings and what it compiled, as they were."""
    import torch._dynamo.config as settings

    with settings.patch(recompile_limit=settings.recompile_limit, fail_on_recompile_limit_hit=False):
        yield
    torch._dynamo.reset()


def trained(world: Any, run: Path, *sets: str) -> dict[str, Tensor]:
    train_expert(world.request(run, "steps=2", "batch=2", *sets))
    return load_file(run / UNET)


def assert_alike(ours: dict[str, Tensor], reference: dict[str, Tensor], start: dict[str, Tensor]) -> None:
    """The same names, and moved the same way but for rounding."""
    assert ours.keys() == reference.keys()
    way, theirs = (torch.cat([(t[k] - start[k]).flatten() for k in start]) for t in (ours, reference))
    assert float((way - theirs).norm() / theirs.norm()) < 0.05


def test_channels_last_learns_the_same_and_goes_on_bit_for_bit(
    world: Any, files_of: Callable[..., Any], tmp_path: Path
) -> None:
    start = load_file(world.model / "unet" / "diffusion_pytorch_model.safetensors")
    plain = trained(world, tmp_path / "plain")
    last = trained(world, tmp_path / "last", "channels_last=true")
    assert_alike(last, plain, start)
    train_expert(world.request(tmp_path / "last", "steps=4", "batch=2", "channels_last=true"))
    train_expert(world.request(tmp_path / "unbroken", "steps=4", "batch=2", "channels_last=true"))
    assert files_of(tmp_path / "last", 4) == files_of(tmp_path / "unbroken", 4)


def call(unet: Any, h: int, w: int) -> Tensor:
    ids = {"text_embeds": torch.zeros(1, unet.config.projection_class_embeddings_input_dim - 48)}
    states = torch.zeros(1, 77, unet.config.cross_attention_dim)
    added = ids | {"time_ids": torch.zeros(1, 6)}
    output: Tensor = unet(torch.zeros(1, 4, h, w), torch.tensor([3]), states, added_cond_kwargs=added)[0]
    return output


@dynamo_looks
def test_compiled_blocks_give_the_same_under_the_same_names(world: Any, dynamo: Any) -> None:
    plain = load_unet(world.model / "unet", choose_device("cpu"))
    compiled = load_unet(world.model / "unet", choose_device("cpu"))
    compile_blocks(compiled, backend="eager")
    assert compiled.state_dict().keys() == plain.state_dict().keys()
    for size in ((8, 8), (8, 16), (16, 8), (8, 8)):
        torch.testing.assert_close(call(compiled, *size), call(plain, *size))


@dynamo_looks
def test_past_the_limit_of_compiling_is_an_error(world: Any, dynamo: Any) -> None:
    unet = load_unet(world.model / "unet", choose_device("cpu"))
    compile_blocks(unet, backend="eager", limit=1)

    def call_all() -> None:
        with recompiling_is_an_error(True):
            for size in ((8, 8), (8, 16), (16, 8)):
                call(unet, *size)

    with pytest.raises(ConfigError, match="set compile = false"):
        call_all()
    assert RECOMPILE_LIMIT > 8  # torch's own, past which it says nothing


@dynamo_looks
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch.*")
@pytest.mark.slow
def test_a_compiled_run_learns_the_same(world: Any, dynamo: Any, tmp_path: Path) -> None:
    start = load_file(world.model / "unet" / "diffusion_pytorch_model.safetensors")
    plain = trained(world, tmp_path / "plain")
    compiled = trained(world, tmp_path / "compiled", "compile=true", "gradient_checkpointing=true")
    assert_alike(compiled, plain, start)


class Waits(TorchDispatchMode):
    """Notes what would make the host wait for a GPU, by the line of ours that asked for it."""

    ASKING = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal.default", "is_nonzero")

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(name in str(func) for name in self.ASKING):
            self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "sets",
    [
        ("precision=bf16-mixed", "loss.min_snr_gamma=5", "loss.offset_noise=0.1", "loss.type=huber"),
        ("optimizer.name=muon",),
        ("optimizer.name=adafactor",),
        ("optimizer.name=schedule-free",),
        ("loss.timestep_bias={strategy='later'}", "gradient_checkpointing=true"),
    ],
    ids=str,
)
def test_nobody_waits_between_log_points(world: Any, tmp_path: Path, sets: tuple[str, ...]) -> None:
    """Eight steps more between two log points ask the device for nothing more: what is read, is read there."""

    def asked(steps: int) -> list[str]:
        every = ("log.every=100", "checkpoint.every=100", "eval.every=100", "eval.samples=0")
        with Waits() as waits:
            train_expert(world.request(tmp_path / str(steps), f"steps={steps}", "batch=1", *every, *sets))
        return waits.seen

    few, many = asked(2), asked(4)
    assert few  # the last step is a log point
    assert len(many) == len(few), many


@pytest.mark.parametrize("first", [0, 5, 16])
def test_what_is_drawn_at_a_stretch_is_what_each_step_would_draw(first: int) -> None:
    asked: list[int] = []

    def draw(step: int) -> Tensor:
        asked.append(step)
        return torch.tensor(step)

    at = at_a_stretch(draw, steps=4)
    assert [int(at(step)) for step in range(first, first + 20)] == list(range(first, first + 20))
    assert len(asked) == len(set(asked)) <= 24


@pytest.mark.parametrize("seed", [0, 7])
def test_layers_draw_what_they_would_after_torchs_own_seeding(seed: int) -> None:
    seed_layers(seed, (3, 8), torch.device("cpu"))
    ours = torch.rand(20)
    torch.manual_seed(derive_seed(seed, "layers", 3, 8))
    assert torch.equal(ours, torch.rand(20))


def test_noise_is_torchs_of_each_places_generator() -> None:
    like = torch.zeros(3, 4, 6, 5, dtype=torch.float16)
    places = [(0, 1), (0, 2), (4, 1)]
    for noise, place in zip(place_noise(3, "eps", places, like), places, strict=True):
        assert torch.equal(noise, torch.randn(4, 6, 5, generator=make_generator(3, "eps", *place)))
