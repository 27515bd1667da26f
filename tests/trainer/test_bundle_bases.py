"""Adapters that stand on other UNets than the bundle's model: each is handed over with a word on which."""

import json
import runpy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from demo.tiny_model import write_tiny_model
from shared.errors import ConfigError, ContractError
from trainer.bundle import BundleRequest, bundle
from trainer.checkpoint import open_expert
from trainer.drawing import GenerateRequest
from trainer.ensemble import DrawSettings
from trainer.generate import generate
from trainer.loop import train_expert

LORA = ("adapter.rank=4", "adapter.alpha=6", "optimizer.learning_rate=1e-1", "steps=1", "batch=1")
RequestOf = Callable[..., BundleRequest]


@pytest.fixture(scope="module")
def base_adapter(world: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    run: Path = tmp_path_factory.mktemp("base-adapter") / "run"
    train_expert(world.request(run, *LORA))
    return run


@pytest.fixture(scope="module")
def stock_refiner(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("models") / "stock-refiner", unet_layout="sdxl-refiner")


@pytest.fixture
def request_of(world: Any, base_adapter: Path, stock_refiner: Path, tmp_path: Path) -> RequestOf:
    """A bundle of an adapter on the model, and one with these targets on the stock refiner's layout."""

    def made(targets: str, **changes: Any) -> BundleRequest:
        run, sets = tmp_path / "run", (*LORA, "loss.null_prompt=encoded", f'adapter.targets=["{targets}"]')
        train_expert(replace(world.request(run, *sets, expert="refiner"), model=stock_refiner))
        request = BundleRequest((base_adapter, run), world.model, tmp_path / "out", base=stock_refiner, device="cpu")
        return replace(request, **changes)

    return made


def drawn_by_the_card(out: Path, folder: Path, **places: Path) -> dict[str, Any]:
    """What the script on a bundle's card leaves behind, given the places of what it names."""
    script = (out / "README.md").read_text().partition("```python\n")[2].partition("```")[0]
    for name, place in {"BUNDLE": out, **places}.items():
        line = next(line for line in script.splitlines() if line.startswith(f"{name} = "))
        script = script.replace(line, f"{name} = {str(place)!r}")
    script = script.replace('"num_inference_steps": 40', '"num_inference_steps": 3').replace("picture.png", "drawn.png")
    (folder / "script.py").write_text(script)
    left = runpy.run_path(str(folder / "script.py"))
    with Image.open("drawn.png") as image:
        assert image.size == (128, 128)
    return left


def test_the_stock_refiners_adapter_has_the_checkpoint_that_it_stands_on(
    request_of: RequestOf, world: Any, stock_refiner: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = bundle(request_of("attention", form="kohya-lora"))
    nodes = json.loads((out / "workflow.json").read_text())
    loaders = {name: own["inputs"]["ckpt_name"] for name, own in nodes.items() if "ckpt_name" in own["inputs"]}
    assert loaders == {"base": f"{world.model.name}.safetensors", "base_2": "stock-refiner.safetensors"}
    assert [nodes[f"stage_{n}"]["inputs"]["model"][0] for n in (1, 2)] == ["base", "base_2"]
    assert nodes["stage_2_positive"]["inputs"]["clip"][0] == "base_2"
    assert 'BASE_2 = "stock-refiner"' in (out / "README.md").read_text()
    assert "Base model: `stock-refiner`" in (out / "stage_2" / "README.md").read_text()
    monkeypatch.chdir(tmp_path)
    left = drawn_by_the_card(out, tmp_path, BASE=world.model, BASE_2=stock_refiner)
    assert [left[f"stage_{n}"].config.force_zeros_for_empty_prompt for n in (1, 2)] == [True, False]


def test_an_adapter_on_an_expert_names_that_experts_step(
    world: Any, base_adapter: Path, pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    train_expert(replace(world.request(run, *LORA, expert="refiner"), start=pair[1]))
    request = BundleRequest((base_adapter, run), world.model, tmp_path / "out", base=pair[1], device="cpu")
    out = bundle(request)
    assert "# the UNet on which it stands, of step 2 of refiner" in (out / "README.md").read_text()
    monkeypatch.chdir(tmp_path)
    unet = open_expert(pair[1]).path / "ema"
    drawn_by_the_card(out, tmp_path, BASE=world.model, BASE_2=world.model, UNET_2=unet)
    files = bundle(replace(request, form="kohya-lora", out=tmp_path / "files", prove=False))
    assert json.loads((files / "workflow.json").read_text())["base_2"]["inputs"]["ckpt_name"] == "refiner.safetensors"


def test_what_diffusers_does_not_read_back_is_said(request_of: RequestOf, tmp_path: Path) -> None:
    """It takes the upsampler behind a block without attention for an attention, and would leave it out."""
    request = request_of("*.upsamplers.*", form="kohya-lora")
    with pytest.raises(ContractError, match=r"does not read the adapter of stage_2 back \(2 of 6 tensors .*--no-prove"):
        bundle(request)
    assert not (tmp_path / "out").exists()
    stored = load_file(bundle(replace(request, prove=False)) / "stage_2.safetensors")
    assert "lora_unet_output_blocks_1_1_conv.alpha" in stored


def test_a_base_that_nobody_stands_on_is_refused(pair: tuple[Path, Path], world: Any, tmp_path: Path) -> None:
    """It would be passed over in silence otherwise, and what was meant by it with it."""
    bundled = BundleRequest(pair, world.model, tmp_path / "bundle", base=pair[0], device="cpu")
    drawn = GenerateRequest(
        pair, world.model, ("red",), tmp_path / "drawn", DrawSettings(2, 1.0), base=pair[0], device="cpu"
    )
    for ask in (lambda: bundle(bundled), lambda: list(generate(drawn))):
        with pytest.raises(ConfigError, match=r"--base .* none of these experts"):
            ask()
    assert not list(tmp_path.iterdir())
