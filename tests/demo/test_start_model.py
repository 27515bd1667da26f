"""The start model that lies in the repository: small, whole, and it draws what it is asked for.

Its numbers on hundreds of pictures stand in its card; here are few, with room for chance.
"""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from demo.model_card import GUIDANCE, measure_clip, measure_vae
from demo.pipeline import draw_with_pipeline
from demo.prompts import PICTURE_HW, make_prompts
from demo.scene import KINDS
from demo.score import Judged, judge_pictures, score, score_sets
from demo.train_clip import tokenize
from demo.train_tiny import _write_index, unet_config

MODEL = Path(__file__).parents[2] / "demo" / "model"
PROMPTS = make_prompts(6, seed=23)
MEGABYTE = 1e6


@pytest.fixture(scope="module")
def card() -> dict[str, dict[str, float]]:
    numbers: dict[str, dict[str, float]] = json.loads((MODEL / "scores.json").read_text())
    return numbers


def test_it_is_small_enough_to_live_in_a_repository() -> None:
    files = [path for path in MODEL.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 30 * MEGABYTE
    assert not {path.suffix for path in files} - {".safetensors", ".json", ".txt", ".md"}
    assert not [path for path in files if os.access(path, os.X_OK)]
    unet = load_file(MODEL / "unet" / "diffusion_pytorch_model.safetensors")
    assert sum(tensor.numel() for tensor in unet.values()) <= 8_000_000
    for path in MODEL.rglob("*.safetensors"):
        assert {tensor.dtype for tensor in load_file(path).values()} <= {torch.float16, torch.int64}


def test_its_files_are_what_the_training_writes(tmp_path: Path) -> None:
    _write_index(tmp_path)
    for name in ("model_index.json", "scheduler/scheduler_config.json"):
        here, there = (json.loads((folder / name).read_text()) for folder in (tmp_path, MODEL))
        assert here | {"_diffusers_version": ""} == there | {"_diffusers_version": ""}
    written = UNet2DConditionModel.load_config(MODEL / "unet")
    assert {key: list(v) if isinstance(v, tuple) else v for key, v in unet_config().items()}.items() <= written.items()


def test_the_card_says_what_was_measured(card: dict[str, dict[str, float]]) -> None:
    text = (MODEL / "README.md").read_text()
    assert f"{card['vae']['psnr_db']:.2f} dB" in text
    for numbers in card["drawn"].values():
        assert f"{numbers['follows']:.1%}" in text  # type: ignore[index]
    assert text.isascii()


def test_the_vae_keeps_what_pictures_show(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("demo.model_card.RECONSTRUCTED", 12)
    reached = measure_vae(MODEL, "cpu")
    assert reached["psnr_db"] >= 30
    assert reached["follows"] >= 0.97
    assert reached["sharpness"] >= 0.7


def test_the_clip_tells_pictures_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("demo.model_card.RETRIEVED", 64)
    found = measure_clip(MODEL)
    assert min(found["caption_found"], found["picture_found"]) >= 0.9
    assert found["kind_found"] >= 0.85
    assert found["place_found"] >= 0.9


def test_text_embeds_tell_every_kind_from_every_other() -> None:
    """Else no UNet can: where two kinds had nearly one vector, stars came out as triangles."""
    captions = [f"a small red {kind} at the left on sand" for kind in KINDS]
    for name, model_class in (("text_encoder", CLIPTextModel), ("text_encoder_2", CLIPTextModelWithProjection)):
        encoder = model_class.from_pretrained(MODEL / name, use_safetensors=True, dtype=torch.float32)
        with torch.inference_mode():
            embeds = encoder(tokenize(captions), output_hidden_states=True).hidden_states[-2].flatten(1)
        apart = torch.pdist(embeds).min() / embeds.norm(dim=1).mean()
        assert apart >= 0.2


@pytest.fixture(scope="module")
def pictures() -> list[Image.Image]:
    return draw_with_pipeline(MODEL, PROMPTS, PICTURE_HW, steps=20, guidance=GUIDANCE, seeds=range(len(PROMPTS)))


def judged(pictures: list[Image.Image], prompts: list[str]) -> list[Judged]:
    return judge_pictures(pictures, prompts, [Path()] * len(prompts), MODEL / "clip")


def test_it_draws_what_is_asked(pictures: list[Image.Image]) -> None:
    sets = score_sets(judged(pictures, PROMPTS))
    for name in ("one", "held out"):
        assert sets[name].colour >= 0.75
        assert sets[name].count >= 0.75
        assert sets[name].position >= 0.75
    assert sets["one"].follows + sets["held out"].follows >= 1.5  # 1.99 over 200 pictures
    assert sets["two"].follows >= 0.6  # 0.93 over 100
    assert sets["two"].relation >= 0.8  # 1.00 over 100
    everything = score(judged(pictures, PROMPTS))
    assert everything.ground >= 0.9
    assert everything.sharpness >= 0.55
    assert everything.clip is not None
    assert everything.clip >= 78  # 85 over 300 pictures


def test_a_wrong_null_prompt_shows_at_once(tmp_path: Path) -> None:
    """Guided away from an empty prompt that it was not trained with, the model draws something else."""
    wrong = Path(shutil.copytree(MODEL, tmp_path / "wrong"))
    index = json.loads((wrong / "model_index.json").read_text())
    index["force_zeros_for_empty_prompt"] = not index["force_zeros_for_empty_prompt"]
    (wrong / "model_index.json").write_text(json.dumps(index))
    some, seeds = PROMPTS[:6], range(6)
    clips = []
    for model in (MODEL, wrong):
        drawn = draw_with_pipeline(model, some, PICTURE_HW, steps=20, guidance=8.0, seeds=seeds)
        clips.append(score(judged(drawn, some)).clip or 0)
    assert clips[1] <= clips[0] - 10  # 68 and 86


def test_prompts_in_the_wrong_order_show_at_once(pictures: list[Image.Image]) -> None:
    """What a mix-up in a batch would look like: the judge and the CLIP see it."""
    right, mixed = (score(judged(pictures, prompts)) for prompts in (PROMPTS, [*PROMPTS[1:], PROMPTS[0]]))
    assert mixed.ground <= right.ground - 0.4
    assert mixed.clip is not None
    assert right.clip is not None
    assert mixed.clip <= right.clip - 20
