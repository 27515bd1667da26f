"""Both experts train from one store at the same time while it grows, and neither leaves a trace in the other."""

import shutil
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from shared.manifest import open_manifest
from tests.pictures import write_shapes

SETS = ("batch=2", "checkpoint.every=3")
WEIGHTS = (
    "unet/diffusion_pytorch_model.safetensors",
    "ema/diffusion_pytorch_model.safetensors",
    "optimizer.safetensors",
)


@pytest.mark.parametrize(("kills", "steps"), [((2, 5), 10), pytest.param(range(2, 42, 2), 45, marks=pytest.mark.slow)])
def test_two_experts_and_a_build_at_once(
    world: Any,
    start: Callable[..., Any],
    events: Callable[..., list[dict[str, Any]]],
    files_of: Callable[[Path, int], dict[str, str]],
    tmp_path: Path,
    kills: Sequence[int],
    steps: int,
) -> None:
    """The refiner is killed meanwhile, and again; each expert's bits are those of the same expert trained alone."""
    own = world.copy(tmp_path / "store")
    pictures = write_shapes(shutil.copytree(world.pictures, tmp_path / "shapes"), 60)

    sets = (*SETS, f"steps={steps}")
    base = start("train-expert", own.arguments(tmp_path / "base", *sets), "base.txt")
    for kill_after in kills:
        refiner = start("train-expert", own.arguments(tmp_path / "refiner", *sets, expert="refiner"), "refiner.txt")
        if kill_after == kills[0]:
            options = [str(pictures), "--store", str(own.store), "--model", str(own.model), "--dataset", "shapes"]
            images = ("images.resolution=64", "images.step=16", "split.eval_fraction=0.1")
            flags = [part for one in images for part in ("--set", one)]
            build = start("cache-build", [*options, *flags, "--device", "cpu"], "build.txt")
        refiner.wait_for(lambda n=kill_after: any(e["step"] >= n for e in events(tmp_path / "refiner", "step")))
        refiner.signal(signal.SIGKILL)
        assert refiner.wait() == -signal.SIGKILL
    refiner = start("train-expert", own.arguments(tmp_path / "refiner", *sets, expert="refiner"), "refiner.txt")
    assert build.wait() == 0, build.errors()
    assert base.wait() == 0, base.errors()
    assert refiner.wait() == 0, refiner.errors()
    assert len(open_manifest(own.store, "main")) == 60

    for expert in ("base", "refiner"):
        alone = start("train-expert", world.arguments(tmp_path / "alone" / expert, *sets, expert=expert), "alone.txt")
        assert alone.wait() == 0, alone.errors()
        together = files_of(tmp_path / expert, steps)
        assert set(together) >= set(WEIGHTS)
        assert together == files_of(tmp_path / "alone" / expert, steps)
