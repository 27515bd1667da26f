"""Two experts made one model: what its weights are, that others draw with it, and what it is measured by."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from safetensors.torch import load_file
from torch import Tensor

from shared.errors import ConfigError, ContractError
from trainer.bundle import BundleRequest, bundle
from trainer.checkpoint import UNET_FILE, open_expert
from trainer.loop import train_expert
from trainer.merge_loss import merge_losses


@pytest.fixture
def request_of(pair: tuple[Path, Path], tiny_model: Path, tmp_path: Path) -> Callable[..., BundleRequest]:
    def made(share: float, **changes: Any) -> BundleRequest:
        whole = BundleRequest(pair, tiny_model, tmp_path / "out", merge=share, prove=False, device="cpu")
        return replace(whole, **changes)

    return made


def averaged(run: Path) -> dict[str, Tensor]:
    return load_file(open_expert(run).path / "ema" / UNET_FILE)


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_every_weight_lies_between_theirs(
    request_of: Callable[..., BundleRequest], pair: tuple[Path, Path], share: float
) -> None:
    merged = load_file(bundle(request_of(share)) / "stage_1" / "unet" / UNET_FILE)
    base, refiner = map(averaged, pair)
    assert merged.keys() == base.keys()
    for name, tensor in merged.items():
        expected = base[name].double() * (1 - share) + refiner[name].double() * share
        torch.testing.assert_close(tensor.double(), expected, rtol=1e-6, atol=1e-7)
        if share in (0.0, 1.0):
            assert torch.equal(tensor, (base, refiner)[int(share)][name])


def test_one_pipeline_draws_with_it(
    request_of: Callable[..., BundleRequest], capfd: pytest.CaptureFixture[str]
) -> None:
    out = bundle(request_of(0.5, prove=True))
    assert "proved: ddim, 4 steps" in capfd.readouterr().err
    assert not (out / "stage_2").exists()
    pipeline = StableDiffusionXLPipeline.from_pretrained(out / "stage_1", use_safetensors=True)
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline("a red circle", num_inference_steps=2, height=64, width=64, output_type="np").images.std() > 0
    facts = json.loads((out / "pair.json").read_text())
    assert facts["boundaries"] == []
    assert facts["stages"][0]["blend"]["share"] == 0.5
    assert facts["stages"][0]["denoising_start"] is None
    assert {path.parent.name for path in (out / "stage_1").glob("expert*/expert.json")} == {"expert", "expert_2"}
    assert "0.5 of `base`" in (out / "README.md").read_text()


def test_it_is_one_file_too(request_of: Callable[..., BundleRequest]) -> None:
    out = bundle(request_of(0.5, form="single-file", prove=True))
    assert [path.name for path in out.glob("*.safetensors")] == ["stage_1.safetensors"]


def test_adapters_are_merged_first(world: Any, tiny_model: Path, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    lora = ("steps=2", "adapter.rank=4", "adapter.alpha=4", "optimizer.learning_rate=1e-1")
    for name in ("base", "refiner"):
        train_expert(world.request(tmp_path / name, *lora, expert=name))
    runs = (tmp_path / "base", tmp_path / "refiner")
    asked = BundleRequest(runs, tiny_model, tmp_path / "one", merge=0.5, prove=False, device="cpu")
    one = load_file(bundle(asked) / "stage_1" / "unet" / UNET_FILE)
    apart = bundle(replace(asked, merge=None, merge_adapters=True, out=tmp_path / "apart"))
    base, refiner = (load_file(apart / f"stage_{number}" / "unet" / UNET_FILE) for number in (1, 2))
    assert any(not torch.equal(base[name], refiner[name]) for name in base)
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, (base[name] + refiner[name]) / 2, rtol=1e-5, atol=1e-6)


def test_its_loss_stands_beside_the_pairs(
    request_of: Callable[..., BundleRequest], pair: tuple[Path, Path], world: Any, judge_in: Any, tmp_path: Path
) -> None:
    out = bundle(request_of(0.5, store=world.store, draws=12))
    losses = {one["name"]: one for one in json.loads((out / "pair.json").read_text())["losses"]}
    assert list(losses) == ["start model", "both experts", "base + refiner"]
    assert losses["start model"]["change"] == 0
    assert "| `both experts` | " in (out / "README.md").read_text()
    # evaluate-experts measures the same; and weights that are the base's have the base's loss, part by part.
    judged = judge_in(tmp_path / "judged").rounds[0]
    assert losses["start model"]["loss"] == judged.choices[0].loss
    assert losses["both experts"]["loss"] == judged.choices[-1].loss
    parts = [one for one in judged.losses if one.candidate == "base" and one.high - one.low > 50]
    base = open_expert(pair[0])
    same = merge_losses(pair, world.model, None, base.path / "ema", base.card.facts, world.store, None, "cpu", 12)
    assert same[-1].loss == pytest.approx(sum(one.loss * (one.high - one.low) for one in parts) / 1000, rel=1e-6)
    assert sum(one.high - one.low for one in parts) == 1000


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"merge": 1.5}, "--merge 1.5: from 0"),
        ({"form": "kohya-lora"}, "--merge gives a whole model"),
        ({"form": "single-file", "store": Path("x")}, "--store measures"),
        ({"merge": None, "store": Path("x")}, "--store measures"),
    ],
)
def test_what_cannot_be_is_said_in_a_line(
    request_of: Callable[..., BundleRequest], tmp_path: Path, changes: dict[str, Any], says: str
) -> None:
    with pytest.raises(ConfigError, match=says):
        bundle(request_of(0.5, **changes))
    assert not (tmp_path / "out").exists()


def test_three_are_not_two(world: Any, tiny_model: Path, tmp_path: Path) -> None:
    parts = (("low", 0, 200), ("middle", 200, 600), ("high", 600, 1000))
    for name, low, high in parts:
        train_expert(world.request(tmp_path / name, "steps=1", f"name={name}", f"timesteps={{low={low}, high={high}}}"))
    runs = [tmp_path / name for name, _, _ in parts]
    with pytest.raises(ContractError, match="two experts make one model, not 3"):
        bundle(BundleRequest(runs, tiny_model, tmp_path / "out", merge=0.5, prove=False, device="cpu"))
