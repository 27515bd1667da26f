"""Stages as single files: every tensor comes back through diffusers' own loader, and every name is known."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from benchmarks.full_size import BASE, REFINER, SSD_1B, VAE
from shared.errors import ContractError
from shared.original_layout import (
    original_big_g,
    original_clip_l,
    original_name,
    original_unet,
    original_vae,
    unet_modules,
    vae_modules,
)
from shared.original_reading import read_parts
from shared.tensor_file import LazyTensor
from trainer.bundle import BundleRequest, bundle
from trainer.bundle_card import bundle_card
from trainer.bundle_stage import read_stages
from trainer.checkpoint import open_expert
from trainer.comfy import checkpoint_workflow, comfy_timesteps, step_range
from trainer.original_file import architecture, load_file_pipeline, require_sayable
from trainer.schedulers import make_scheduler


@pytest.fixture(scope="module")
def towers() -> list[Any]:
    """SDXL's text encoders, without weights."""
    sizes = {"intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
    big = {"intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20}
    with torch.device("meta"):
        return [
            CLIPTextModel(CLIPTextConfig(hidden_size=768, projection_dim=768, **sizes)),
            CLIPTextModelWithProjection(CLIPTextConfig(hidden_size=1280, projection_dim=1280, **big)),
        ]


@pytest.mark.parametrize("config", [BASE, SSD_1B, REFINER], ids=["base", "ssd-1b", "refiner"])
def test_every_key_of_the_full_size_unets_is_mapped_once_and_back(config: dict[str, Any]) -> None:
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    with torch.device("meta"):
        shapes = UNet2DConditionModel(**config).state_dict()
    modules = unet_modules(config)
    original = {"model.diffusion_model." + original_name(name, modules): t for name, t in shapes.items()}
    assert len(original) == len(shapes)
    back = convert_ldm_unet_checkpoint(dict(original), config)
    assert {name: t.shape for name, t in back.items()} == {name: t.shape for name, t in shapes.items()}


def test_every_key_of_the_full_size_vae_is_mapped_once_and_back() -> None:
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

    with torch.device("meta"):
        shapes = AutoencoderKL(**VAE).state_dict()
    modules = vae_modules(VAE)
    original = {"first_stage_model." + original_name(name, modules): tensor for name, tensor in shapes.items()}
    assert len(original) == len(shapes)
    assert convert_ldm_vae_checkpoint(dict(original), VAE).keys() == shapes.keys()


def on_meta(tensors: Mapping[str, torch.Tensor]) -> dict[str, LazyTensor]:
    return {name: LazyTensor("F16", tuple(tensor.shape), bytes) for name, tensor in tensors.items()}


def test_every_key_of_the_full_size_second_text_encoder_is_known_to_diffusers(towers: list[Any]) -> None:
    from diffusers.loaders.single_file_utils import convert_open_clip_checkpoint

    stored = original_big_g(on_meta(towers[1].state_dict()), 1)
    shapes = {name: torch.empty(own.shape, device="meta") for name, own in stored.items()}
    back = convert_open_clip_checkpoint(towers[1], shapes, "conditioner.embedders.1.model.")
    known = {f"text_model.{n}" if not n.startswith("text_") else n: t.shape for n, t in towers[1].state_dict().items()}
    assert {name: tensor.shape for name, tensor in back.items()} == known


@pytest.mark.parametrize("config", [BASE, SSD_1B, REFINER], ids=["base", "ssd-1b", "refiner"])
def test_a_whole_file_at_full_size_is_read_back_by_its_shapes(config: dict[str, Any], towers: list[Any]) -> None:
    """Without any settings: names, shapes and the UNet that is made of what they say."""
    with torch.device("meta"):
        unet, vae = UNet2DConditionModel(**config), AutoencoderKL(**VAE)
    clip_l, big_g = (on_meta(tower.state_dict()) for tower in towers)
    is_refiner = config is REFINER
    file = original_unet(on_meta(unet.state_dict()), config) | original_vae(on_meta(vae.state_dict()), VAE)
    file |= original_big_g(big_g, 0 if is_refiner else 1) | ({} if is_refiner else original_clip_l(clip_l))
    own = {"unet": on_meta(unet.state_dict()), "vae": on_meta(vae.state_dict()), "text_encoder_2": big_g}
    own |= {} if is_refiner else {"text_encoder": clip_l}
    parts = read_parts(file)
    assert parts.keys() == own.keys()
    for part, tensors in own.items():
        plain = {name.removeprefix("text_model."): tensor.shape for name, tensor in tensors.items()}
        assert {n.removeprefix("text_model."): t.shape for n, t in parts[part].tensors.items()} == plain
    with torch.device("meta"):
        made = UNet2DConditionModel.from_config(parts["unet"].settings)
    assert {n: t.shape for n, t in made.state_dict().items()} == {n: t.shape for n, t in unet.state_dict().items()}
    assert list(made.config["attention_head_dim"]) == list(config["attention_head_dim"])


def test_it_comes_back_tensor_by_tensor(
    pair: tuple[Path, Path], tiny_model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = bundle(BundleRequest(pair, tiny_model, tmp_path / "out", "single-file", device="cpu"))
    assert "proved: euler, 4 steps" in capfd.readouterr().err
    for number, run in enumerate(pair, 1):
        file = out / f"stage_{number}.safetensors"
        with safe_open(file, "pt") as opened:
            said, names = opened.metadata(), set(opened.keys())
        assert {"v_pred", "ztsnr", "conditioner.embedders.1.model.text_projection"} <= names
        assert said["modelspec.prediction_type"] == "v"
        stage = _Named(number)
        pipeline = load_file_pipeline(out, stage, torch.float32)  # type: ignore[arg-type]
        unet = load_file(run / "checkpoints" / "step-00000002" / "ema" / "diffusion_pytorch_model.safetensors")
        _same(pipeline.unet.state_dict(), unet)
        _same(pipeline.vae.state_dict(), load_file(tiny_model / "vae" / "diffusion_pytorch_model.safetensors"))
        for part in ("text_encoder", "text_encoder_2"):
            _same(getattr(pipeline, part).state_dict(), load_file(tiny_model / part / "model.safetensors"))


class _Named:
    """A stage as far as it is loaded."""

    def __init__(self, number: int) -> None:
        self.number, self.folder = number, f"stage_{number}"


def _same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    plain = [{name.removeprefix("text_model."): t for name, t in side.items()} for side in (ours, theirs)]
    assert plain[0].keys() == plain[1].keys()
    assert all(torch.equal(plain[0][name], plain[1][name]) for name in plain[0])


def test_the_workflow_hands_over_at_the_boundarys_step(
    pair: tuple[Path, Path], tiny_model: Path, tmp_path: Path
) -> None:
    out = bundle(BundleRequest(pair, tiny_model, tmp_path / "out", "single-file", prove=False, device="cpu"))
    nodes = json.loads((out / "workflow.json").read_text())
    first, second = (nodes[f"stage_{number}_sampler"]["inputs"] for number in (1, 2))
    assert (first["start_at_step"], first["end_at_step"], second["start_at_step"], second["end_at_step"]) == (
        0, 26, 26, 10000,
    )  # fmt: skip
    assert (first["add_noise"], second["add_noise"]) == ("enable", "disable")
    assert (first["return_with_leftover_noise"], second["return_with_leftover_noise"]) == ("enable", "disable")
    for node in nodes.values():  # every link leads to a node
        assert all(value[0] in nodes for value in node["inputs"].values() if isinstance(value, list))
    for name in ("stage_1", "stage_2"):  # said beside the file too: ComfyUI does not read a stock refiner's `v_pred`
        schedule = nodes[nodes[f"{name}_rescale"]["inputs"]["model"][0]]
        assert schedule["class_type"] == "ModelSamplingDiscrete"
        assert schedule["inputs"] == {"model": [name, 0], "sampling": "v_prediction", "zsnr": True}


def test_the_workflow_draws_against_what_each_expert_learnt_for_no_prompt(
    pair: tuple[Path, Path], tiny_model: Path
) -> None:
    first, second = read_stages(pair, tiny_model, None, lambda facts: True, raw=False, dtype=None)
    assert second.facts.null_prompt == "zeros"
    encoded = second.checkpoint.card.facts.model_copy(update={"null_prompt": "encoded"})
    checkpoint = replace(second.checkpoint, card=second.card.model_copy(update={"facts": encoded}))
    stages = (first, replace(second, checkpoint=checkpoint))
    nodes = checkpoint_workflow(stages)
    zeros, empty = (nodes[nodes[f"stage_{number}_sampler"]["inputs"]["negative"][0]] for number in (1, 2))
    assert (zeros["class_type"], empty["class_type"]) == ("ConditioningZeroOut", "CLIPTextEncode")
    assert zeros["inputs"]["conditioning"] == ["stage_1_negative", 0]
    assert (empty["inputs"]["text"], nodes["stage_1_negative"]["class_type"]) == ("", "CLIPTextEncode")
    titles = [nodes[f"stage_{number}_negative"]["_meta"]["title"] for number in (1, 2)]
    assert titles == ["stage_1 negative prompt: bypass stage_1_null to use it", "stage_2 negative prompt"]
    card = bundle_card(stages, "single-file", "model")
    assert "bypass `stage_1_null` (" in card
    assert "say `width` and `height`" not in card
    assert "at step 26 of 40" in card
    assert "13 of 20, 20 of 30, 33 of 50" in card


def test_a_stock_refiners_prompts_say_the_size_that_is_drawn(pair: tuple[Path, Path], tiny_model: Path) -> None:
    first, second = read_stages(pair, tiny_model, None, lambda facts: True, raw=False, dtype=None)
    facts = second.facts.model_copy(update={"layout": "sdxl-refiner", "null_prompt": "encoded"})
    checkpoint = replace(second.checkpoint, card=second.card.model_copy(update={"facts": facts}))
    stages = (first, replace(second, checkpoint=checkpoint))
    nodes = checkpoint_workflow(stages)
    drawn = {edge: nodes["latent"]["inputs"][edge] for edge in ("width", "height")}
    for sign, score in (("positive", 6.0), ("negative", 2.5)):
        inputs = nodes[f"stage_2_{sign}"]["inputs"]
        assert {edge: inputs[edge] for edge in drawn} == drawn
        assert inputs["ascore"] == score
    assert "The prompts of stage_2 say `width` and `height`" in bundle_card(stages, "single-file", "model")


def test_the_workflows_steps_are_rounded_as_comfyui_rounds_them(pair: tuple[Path, Path]) -> None:
    """Its 0.8.0 asks for 500 at half of 38, 76 and 122 steps, where exact sums give 499."""
    contract = open_expert(pair[0]).card.contract
    assert contract.timestep_spacing == "trailing"
    assert [comfy_timesteps(contract, steps)[steps // 2] for steps in (38, 76, 122, 40)] == [500, 500, 500, 499]


@pytest.mark.parametrize("steps", [4, 20, 25, 40, 100])
def test_the_workflows_steps_are_the_contracts_and_each_has_one_sampler(
    pair: tuple[Path, Path], tiny_model: Path, steps: int
) -> None:
    stages = read_stages(pair, tiny_model, None, lambda facts: True, raw=False, dtype=None)
    contract = stages[0].card.contract
    scheduler = make_scheduler("euler", contract)
    scheduler.set_timesteps(steps)
    timesteps = comfy_timesteps(contract, steps)
    assert timesteps == scheduler.timesteps.tolist()
    (begin, split), (again, end) = (step_range(stage, steps) for stage in stages)
    assert (begin, split, end) == (0, again, steps)
    for stage in stages:
        first, beyond = step_range(stage, steps)
        assert all(t in stage.facts.timesteps for t in timesteps[first:beyond])


@pytest.mark.parametrize(
    ("config", "layout", "known_as"),
    [
        (BASE, "sdxl", "stable-diffusion-xl-v1-base"),
        (SSD_1B, "sdxl", "segmind-stable-diffusion-1b"),
        (SSD_1B | {"mid_block_type": "UNetMidBlock2D"}, "sdxl", "segmind-stable-diffusion-1b"),
        (REFINER, "sdxl-refiner", "stable-diffusion-xl-v1-refiner"),
    ],
)
def test_a_file_says_what_it_is_made_of(config: dict[str, Any], layout: Any, known_as: str) -> None:
    assert architecture(config, layout) == known_as


@pytest.mark.parametrize("change", [{"beta_end": 0.02}, {"beta_schedule": "linear"}, {"prediction_type": "sample"}])
def test_what_no_loader_would_know_is_refused(pair: tuple[Path, Path], change: dict[str, Any]) -> None:
    contract = open_expert(pair[0]).card.contract
    require_sayable(contract)
    with pytest.raises(ContractError, match=r"no program knows from a file .*use --format diffusers"):
        require_sayable(contract.model_copy(update=change))
