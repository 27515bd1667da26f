"""The tiny model: SDXL's layout on disk, readable by old and new libraries, and a working pipeline behind it."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionXLImg2ImgPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import CLIPTokenizer

from demo.captions import WORDS, describe
from demo.draw import draw
from demo.scene import make_scene
from demo.tiny_model import POOLED_WIDTH, TEXT_WIDTHS, TIME_ID_WIDTH, main, make_vocabulary, write_tiny_model

# numpy 2 says this of the line in which diffusers' Euler hands it a tensor; nothing of ours can keep it quiet.
euler_warns = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")
CAPTIONS = ("a red circle left of a blue square on sand", "a blue square left of a red circle on sand", "")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def refiner(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("models") / "refiner", unet_layout="sdxl-refiner")


@pytest.fixture(scope="module")
def pipeline(folder: Path) -> Iterator[StableDiffusionXLPipeline]:
    pipeline = StableDiffusionXLPipeline.from_pretrained(folder, use_safetensors=True, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    with torch.no_grad():
        yield pipeline


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def encode(pipeline: StableDiffusionXLPipeline, caption: str) -> tuple[torch.Tensor, torch.Tensor]:
    embeds, _, pooled, _ = pipeline.encode_prompt(caption, device="cpu", do_classifier_free_guidance=False)
    return embeds, pooled


def test_folder_is_complete_and_small(folder: Path) -> None:
    files = files_of(folder)
    tokenizer_files = {"vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json"}
    expected = {f"{part}/{name}" for part in ("tokenizer", "tokenizer_2") for name in tokenizer_files}
    expected |= {
        f"{part}/{name}" for part in ("text_encoder", "text_encoder_2") for name in ("config.json", "model.safetensors")
    }
    expected |= {
        f"{part}/{name}" for part in ("vae", "unet") for name in ("config.json", "diffusion_pytorch_model.safetensors")
    }
    assert set(files) == expected | {"model_index.json", "scheduler/scheduler_config.json"}
    assert sum(map(len, files.values())) < 6e6


@pytest.mark.parametrize("part", ["text_encoder", "text_encoder_2"])
def test_older_transformers_find_the_names_they_need(folder: Path, part: str) -> None:
    with safe_open(folder / part / "model.safetensors", "pt") as weights:
        names = set(weights.keys())
        assert weights.metadata() == {"format": "pt"}
    assert names - {"text_projection.weight"} == {name for name in names if name.startswith("text_model.")}
    assert ("text_projection.weight" in names) == (part == "text_encoder_2")


def test_no_weight_of_the_folder_is_left_out(folder: Path, pipeline: StableDiffusionXLPipeline) -> None:
    # A name that a loader does not know is skipped with no more than a warning, so compare what arrived.
    for part in ("text_encoder", "text_encoder_2", "vae", "unet"):
        (path,) = (folder / part).glob("*.safetensors")
        arrived = {name.removeprefix("text_model."): t for name, t in getattr(pipeline, part).state_dict().items()}
        written = {name.removeprefix("text_model."): t for name, t in load_file(path).items()}
        assert arrived.keys() == written.keys()
        assert all(torch.equal(arrived[name], written[name]) for name in written)


def test_weights_are_a_function_of_the_seed(folder: Path, refiner: Path, tmp_path: Path) -> None:
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    assert files_of(write_tiny_model(tmp_path / "again")) == files_of(folder)
    assert torch.equal(torch.random.get_rng_state(), before)
    other = files_of(write_tiny_model(tmp_path / "other", seed=1))
    changed = {name for name, content in files_of(folder).items() if other[name] != content}
    assert changed == {name for name in other if name.endswith(".safetensors")}


def test_weights_may_be_read_by_everyone_whom_the_umask_allows(folder: Path) -> None:
    modes = {path.stat().st_mode & 0o777 for path in folder.rglob("*") if path.is_file()}
    assert len(modes) == 1


@euler_warns
def test_pipeline_draws(pipeline: StableDiffusionXLPipeline) -> None:
    def picture(caption: str) -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        size = {"height": 64, "width": 64, "num_inference_steps": 2}
        # The latents, because Pillow-bound output would hide a NaN behind a cast.
        return pipeline(caption, **size, generator=generator, output_type="latent").images

    first, second = picture(CAPTIONS[0]), picture(CAPTIONS[1])
    assert first.shape == (1, 4, 8, 8)
    assert torch.isfinite(first).all()
    assert torch.isfinite(pipeline.vae.decode(first / pipeline.vae.config.scaling_factor).sample).all()
    assert not torch.allclose(first, second, atol=1e-4)


def test_prompts_are_told_apart(pipeline: StableDiffusionXLPipeline) -> None:
    captions = [*CAPTIONS, *(describe(make_scene(0, index))[0] for index in range(8))]
    encoded = [encode(pipeline, caption) for caption in captions]
    assert encoded[0][0].shape == (1, 77, sum(TEXT_WIDTHS))
    assert encoded[0][1].shape == (1, POOLED_WIDTH)
    for which in (0, 1):
        vectors = torch.stack([both[which].flatten() for both in encoded])
        distances = torch.cdist(vectors, vectors) / vectors.norm(dim=1).mean()
        assert (distances + torch.eye(len(captions))).min() > 0.05


def test_padding_reaches_only_its_own_encoder(pipeline: StableDiffusionXLPipeline) -> None:
    first, second = pipeline.tokenizer, pipeline.tokenizer_2
    assert first.model_max_length == second.model_max_length == 77
    assert (first.pad_token, second.pad_token, second.pad_token_id) == ("<|endoftext|>", "!", 0)
    assert first.pad_token_id == first.eos_token_id == len(first) - 1
    assert pipeline.text_encoder.config.eos_token_id == pipeline.text_encoder_2.config.eos_token_id == len(first) - 1
    ids = [t("a red circle", padding="max_length", max_length=77).input_ids for t in (first, second)]
    assert ids[0][:5] == ids[1][:5]
    assert set(ids[0][5:]) == {len(first) - 1}
    assert set(ids[1][5:]) == {0}


def test_words_of_the_shapes_are_tokens_and_any_text_encodes(folder: Path) -> None:
    vocabulary, merges = make_vocabulary()
    assert list(vocabulary.values()) == list(range(len(vocabulary)))
    assert {"".join(pair) for pair in merges} <= vocabulary.keys()
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    caption = " ".join(WORDS)
    assert tokenizer.tokenize(caption) == [f"{word}</w>" for word in caption.split()]
    assert tokenizer.decode(tokenizer("zürich: 火, it's 12 %").input_ids, skip_special_tokens=True).startswith("zürich")


def test_vae_latents_spread_as_the_real_ones(pipeline: StableDiffusionXLPipeline) -> None:
    pictures = [draw(make_scene(0, index)).resize((64, 64)) for index in range(8)]
    pixels = torch.stack([torch.frombuffer(bytearray(p.tobytes()), dtype=torch.uint8) for p in pictures])
    batch = pixels.view(-1, 64, 64, 3).permute(0, 3, 1, 2) / 127.5 - 1
    moments = pipeline.vae.encode(batch).latent_dist
    assert moments.mean.shape == (8, 4, 8, 8)
    assert 0.5 < (moments.mean * pipeline.vae.config.scaling_factor).std() < 2
    assert -20 < moments.logvar.min() <= moments.logvar.max() < -5
    decoded = pipeline.vae.decode(moments.mean).sample
    assert decoded.shape == batch.shape
    assert 0.05 < decoded.std() < 2


def test_configs_are_sdxl(folder: Path, pipeline: StableDiffusionXLPipeline) -> None:
    scheduler, vae, unet = pipeline.scheduler.config, pipeline.vae.config, pipeline.unet.config
    assert (scheduler.beta_schedule, scheduler.beta_start, scheduler.beta_end) == ("scaled_linear", 0.00085, 0.012)
    assert (scheduler.timestep_spacing, scheduler.steps_offset, scheduler.prediction_type) == ("leading", 1, "epsilon")
    assert (vae.scaling_factor, vae.force_upcast, pipeline.vae_scale_factor) == (0.13025, True, 8)
    assert (unet.addition_embed_type, unet.cross_attention_dim) == ("text_time", sum(TEXT_WIDTHS))
    assert sum(p.numel() for p in pipeline.unet.parameters()) < 1e6
    assert json.loads((folder / "model_index.json").read_text())["force_zeros_for_empty_prompt"] is True


def test_refiner_has_the_stock_layout(refiner: Path) -> None:
    unet = UNet2DConditionModel.from_pretrained(refiner, subfolder="unet")
    assert unet.config.cross_attention_dim == TEXT_WIDTHS[1]
    assert unet.config.projection_class_embeddings_input_dim == POOLED_WIDTH + 5 * TIME_ID_WIDTH
    assert not (refiner / "text_encoder").exists()
    assert not (refiner / "tokenizer").exists()


@euler_warns
def test_refiner_finishes_what_the_base_began(refiner: Path, pipeline: StableDiffusionXLPipeline) -> None:
    second = StableDiffusionXLImg2ImgPipeline.from_pretrained(refiner, use_safetensors=True)
    second.set_progress_bar_config(disable=True)
    assert second.config.force_zeros_for_empty_prompt is False
    assert second.config.requires_aesthetics_score is True
    common = {"num_inference_steps": 4, "generator": torch.Generator().manual_seed(0), "output_type": "latent"}
    half = pipeline(CAPTIONS[0], height=64, width=64, denoising_end=0.65, **common).images
    whole = second(CAPTIONS[0], image=half, denoising_start=0.65, **common).images
    assert whole.shape == half.shape
    assert torch.isfinite(whole).all()
    assert not torch.equal(whole, half)


def test_refiner_shares_what_the_stock_refiner_shares(folder: Path, refiner: Path) -> None:
    base, other = files_of(folder), files_of(refiner)
    assert {name for name in other if base.get(name) != other[name]} == {
        "model_index.json",
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
    }


@pytest.mark.parametrize("arguments", [[], ["--seed", "x"], ["--unet-layout", "sd3"]])
def test_bad_argument_is_one_line(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        main(["model", *arguments] if arguments else [])
    assert stopped.value.code == 64
    assert capsys.readouterr().err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_help_needs_no_torch() -> None:
    script = "import sys, demo.tiny_model; assert not {'torch', 'diffusers', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True)
