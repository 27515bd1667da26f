"""Adapters handed over: as diffusers and as peft read them, or added to their UNets."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLImg2ImgPipeline, StableDiffusionXLPipeline, UniPCMultistepScheduler
from PIL import Image

from tests.trainer.unet_answer import answer
from trainer.adapter import load_adapter
from trainer.bundle import BundleRequest, bundle
from trainer.checkpoint import open_expert
from trainer.ensemble import DrawSettings
from trainer.generate import GenerateRequest, generate
from trainer.loop import train_expert
from trainer.unet import load_unet

CPU = torch.device("cpu")
LORA = ("adapter.rank=4", "adapter.alpha=6", 'adapter.targets=["attention","*.conv1"]', "optimizer.learning_rate=1e-1")
PROMPT = "a red circle on white"


@pytest.fixture(scope="module")
def adapters(world: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("adapters")
    train_expert(world.request(folder / "base", "steps=2", *LORA))
    train_expert(world.request(folder / "refiner", "steps=2", *LORA, "adapter.kind=dora", expert="refiner"))
    return folder / "base", folder / "refiner"


@pytest.fixture
def request_of(adapters: tuple[Path, Path], tiny_model: Path, tmp_path: Path) -> Callable[..., BundleRequest]:
    def made(**changes: Any) -> BundleRequest:
        return replace(BundleRequest(adapters, tiny_model, tmp_path / "out", device="cpu"), **changes)

    return made


def test_peft_and_diffusers_load_each_with_its_alpha(
    request_of: Callable[..., BundleRequest], adapters: tuple[Path, Path], tiny_model: Path
) -> None:
    from peft import PeftModel

    out = bundle(request_of(prove=False))
    for number, run in enumerate(adapters, 1):
        checkpoint = open_expert(run)
        assert checkpoint.card.facts.adapter is not None
        ours, plain, of_peft, of_diffusers = (load_unet(tiny_model / "unet", CPU) for _ in range(4))
        load_adapter(ours, checkpoint.card.facts.adapter, "ours", checkpoint.weights("ema"))
        of_diffusers.load_lora_adapter(
            out / f"stage_{number}", prefix="unet", weight_name="pytorch_lora_weights.safetensors"
        )
        loaded = PeftModel.from_pretrained(of_peft, out / f"stage_{number}")
        assert torch.equal(answer(ours), answer(of_diffusers))
        assert torch.equal(answer(ours), answer(loaded))
        assert not torch.allclose(answer(ours), answer(plain), atol=1e-4)
        assert not (out / f"stage_{number}" / "unet").exists()


def pictures(out: Path, stages: tuple[Any, Any]) -> Any:
    for pipeline in stages:
        own = UniPCMultistepScheduler.from_pretrained(out / "stage_1", subfolder="scheduler")
        from diffusers import DDIMScheduler

        pipeline.scheduler = DDIMScheduler.from_config(own.config)
        pipeline.set_progress_bar_config(disable=True)
    settings = {"prompt": PROMPT, "num_inference_steps": 6, "guidance_scale": 4.0, "guidance_rescale": 0.7}
    generator = torch.Generator().manual_seed(0)
    half = stages[0](
        **settings, generator=generator, height=64, width=64, denoising_end=0.65, output_type="latent"
    ).images
    return np.asarray(stages[1](**settings, generator=generator, denoising_start=0.65, image=half).images[0])


def our_loop(experts: tuple[Path, Path], model: Path, out: Path) -> Any:
    settings = DrawSettings(6, 4.0, 0.7, "ddim")
    request = GenerateRequest(experts, model, (PROMPT,), out, settings, height=64, width=64, device="cpu")
    with Image.open(next(iter(generate(request)))) as image:
        return np.asarray(image)


def test_a_pair_of_adapters_draws_our_loops_picture(
    request_of: Callable[..., BundleRequest],
    adapters: tuple[Path, Path],
    tiny_model: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    out = bundle(request_of())
    assert "proved: ddim, 4 steps" in capfd.readouterr().err
    base = StableDiffusionXLPipeline.from_pretrained(tiny_model, use_safetensors=True)
    refiner = StableDiffusionXLImg2ImgPipeline.from_pretrained(tiny_model, use_safetensors=True)
    base.load_lora_weights(out / "stage_1")
    refiner.load_lora_weights(out / "stage_2")
    assert np.array_equal(pictures(out, (base, refiner)), our_loop(adapters, tiny_model, tmp_path / "ours"))
    facts = json.loads((out / "pair.json").read_text())
    assert [stage["is_adapter"] for stage in facts["stages"]] == [True, True]
    assert "load_lora_weights" in (out / "README.md").read_text()


def test_merged_they_are_whole_folders(
    request_of: Callable[..., BundleRequest], adapters: tuple[Path, Path], tiny_model: Path, tmp_path: Path
) -> None:
    out = bundle(request_of(merge_adapters=True))
    base = StableDiffusionXLPipeline.from_pretrained(out / "stage_1", use_safetensors=True)
    refiner = StableDiffusionXLImg2ImgPipeline.from_pretrained(out / "stage_2", use_safetensors=True)
    ours = our_loop(adapters, tiny_model, tmp_path / "ours").astype(int)
    theirs = pictures(out, (base, refiner)).astype(int)
    assert np.abs(ours - theirs).max() <= 2  # weights are added up in another order
    assert not list((out / "stage_1").glob("*.safetensors"))


def test_an_adapter_and_a_whole_expert(
    request_of: Callable[..., BundleRequest], adapters: tuple[Path, Path], pair: tuple[Path, Path]
) -> None:
    out = bundle(request_of(experts=(pair[0], adapters[1])))
    assert (out / "stage_1" / "unet").is_dir()
    assert (out / "stage_2" / "adapter_config.json").exists()
