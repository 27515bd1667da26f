"""Adapters under kohya's names: diffusers reads back every tensor, and alpha."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.utils import convert_unet_state_dict_to_peft
from safetensors import safe_open
from safetensors.torch import load_file

from benchmarks.full_size import BASE, REFINER, SSD_1B
from shared.errors import ConfigError
from shared.original_layout import original_name, unet_modules
from tests.trainer.unet_answer import answer
from trainer.adapter import load_adapter
from trainer.bundle import BundleRequest, bundle
from trainer.checkpoint import open_expert
from trainer.kohya import kohya_place
from trainer.loop import train_expert
from trainer.unet import load_unet

LORA = ("adapter.rank=4", "adapter.alpha=6", "optimizer.learning_rate=1e-1", "steps=2")


@pytest.fixture(scope="module")
def adapters(world: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("adapters")
    for name in ("base", "refiner"):
        train_expert(world.request(folder / name, *LORA, expert=name))
    return folder / "base", folder / "refiner"


def test_diffusers_reads_back_every_tensor(
    adapters: tuple[Path, Path], tiny_model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = bundle(BundleRequest(adapters, tiny_model, tmp_path / "out", "kohya-lora", device="cpu"))
    assert "proved: ddim, 4 steps" in capfd.readouterr().err
    config = load_unet(tiny_model / "unet", torch.device("cpu")).config
    for number, run in enumerate(adapters, 1):
        file = out / f"stage_{number}.safetensors"
        names = load_file(file).keys()
        assert all(name.startswith("lora_unet_") for name in names)
        assert any("input_blocks" in name for name in names)
        with safe_open(file, "pt") as opened:
            assert opened.metadata()["ss_network_alpha"] == "6"
        state, alphas = StableDiffusionXLPipeline.lora_state_dict(str(file), unet_config=config)
        saved = load_file(run / "checkpoints" / "step-00000002" / "ema" / "pytorch_lora_weights.safetensors")
        assert len(state) == len(saved)
        assert set(alphas.values()) == {6.0}
        assert sorted(float(t.double().sum()) for t in state.values()) == sorted(
            float(t.double().sum()) for t in saved.values()
        )


def test_its_workflow_puts_each_adapter_on_the_one_model(
    adapters: tuple[Path, Path], tiny_model: Path, tmp_path: Path
) -> None:
    out = bundle(BundleRequest(adapters, tiny_model, tmp_path / "out", "kohya-lora", prove=False, device="cpu"))
    nodes = json.loads((out / "workflow.json").read_text())
    files = [node["inputs"]["ckpt_name"] for node in nodes.values() if node["class_type"] == "CheckpointLoaderSimple"]
    assert files == [f"{tiny_model.name}.safetensors"]
    for number, steps in ((1, (0, 26)), (2, (26, 10000))):
        sampler = nodes[f"stage_{number}_sampler"]["inputs"]
        assert (sampler["start_at_step"], sampler["end_at_step"]) == steps
        passed, place = [], sampler["model"][0]
        while nodes[place]["class_type"] != "CheckpointLoaderSimple":
            passed.append(nodes[place]["class_type"])
            place, lora = nodes[place]["inputs"]["model"][0], nodes[place]["inputs"].get("lora_name")
        assert passed == ["RescaleCFG", "ModelSamplingDiscrete", "LoraLoaderModelOnly"]
        assert (out / lora).exists()
        assert lora == f"stage_{number}.safetensors"


@pytest.mark.parametrize("config", [BASE, SSD_1B, REFINER], ids=["base", "ssd-1b", "refiner"])
def test_every_layer_of_the_full_size_unets_has_the_name_that_programs_know(config: dict[str, Any]) -> None:
    """kohya's scripts and ComfyUI: the original name in underscores; diffusers: it takes the name apart again."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(**config)
    layers = [name for name, own in unet.named_modules() if isinstance(own, torch.nn.Linear | torch.nn.Conv2d)]
    places = {layer: kohya_place(layer, unet_modules(config)) for layer in layers}
    assert len(set(places.values())) == len(layers)
    weights = [original_name(f"{layer}.weight", unet_modules(config)).removesuffix(".weight") for layer in layers]
    assert list(places.values()) == ["lora_unet_" + name.replace(".", "_") for name in weights]
    # diffusers takes convolutions of the refiner's twelve blocks for others' (input_blocks_1 for input_blocks_10)
    read = [layer for layer in layers if config is not REFINER or ".attentions." in layer]
    ends = {".lora_down.weight": torch.zeros(4, 1), ".lora_up.weight": torch.zeros(1, 4), ".alpha": torch.tensor(4.0)}
    file = {places[layer] + end: tensor for layer in read for end, tensor in ends.items()}
    state, alphas = StableDiffusionXLPipeline.lora_state_dict(file, unet_config=unet.config)
    back = {name.rpartition(".lora_")[0] for name in convert_unet_state_dict_to_peft(state)}
    assert {name.removeprefix("unet.").replace(".processor", "") for name in back} == set(read)
    assert len(alphas) == len(read)


@pytest.mark.parametrize("targets", ["attention", "*.conv1"])
def test_it_computes_what_ours_does(world: Any, tiny_model: Path, tmp_path: Path, targets: str) -> None:
    run = tmp_path / "run"
    train_expert(world.request(run, *LORA, f'adapter.targets=["{targets}"]', expert="whole"))
    out = bundle(BundleRequest((run,), tiny_model, tmp_path / "out", "kohya-lora", prove=False, device="cpu"))
    pipeline = StableDiffusionXLPipeline.from_pretrained(tiny_model, use_safetensors=True)
    pipeline.load_lora_weights(out, weight_name="stage_1.safetensors")
    checkpoint = open_expert(run)
    assert checkpoint.card.facts.adapter is not None
    ours, plain = (load_unet(tiny_model / "unet", torch.device("cpu")) for _ in range(2))
    load_adapter(ours, checkpoint.card.facts.adapter, "ours", checkpoint.weights("ema"))
    assert torch.equal(answer(pipeline.unet), answer(ours))
    assert not torch.allclose(answer(ours), answer(plain), atol=1e-4)


def test_a_whole_unet_has_no_such_form(pair: tuple[Path, Path], tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is a whole UNet"):
        bundle(BundleRequest(pair, tiny_model, tmp_path / "out", "kohya-lora", device="cpu"))
    assert list(tmp_path.iterdir()) == []


def test_a_dora_is_refused_for_its_magnitudes_would_be_dropped(world: Any, tiny_model: Path, tmp_path: Path) -> None:
    train_expert(world.request(tmp_path / "run", *LORA, "adapter.kind=dora", expert="whole"))
    with pytest.raises(ConfigError, match="'whole' is a DoRA"):
        bundle(BundleRequest((tmp_path / "run",), tiny_model, tmp_path / "out", "kohya-lora", device="cpu"))
