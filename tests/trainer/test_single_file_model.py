"""--model FILE.safetensors: a bundle's single file is a model again, the same one to stores, trainers and drawing."""

import errno
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionXLPipeline, UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from benchmarks.full_size import BASE
from benchmarks.full_size import VAE as FULL_VAE
from demo.model_files import make_vocabulary, write_tokenizer
from shared import single_file
from shared.errors import ConfigError, DataError, StoreFull
from shared.model_folder import model_name, read_licence, resolve_model
from shared.text_encoders import read_text_facts
from shared.vae import read_vae_facts
from tests.shared.test_hub import write_original
from trainer.bundle import BundleRequest, bundle
from trainer.drawing import GenerateRequest
from trainer.drawn import resolve_base
from trainer.ensemble import DrawSettings
from trainer.generate import generate
from trainer.original_file import load_file_pipeline
from trainer.unet import unet_digest

UNET = BASE | {
    "block_out_channels": (64, 128, 192),
    "attention_head_dim": (1, 2, 3),
    "transformer_layers_per_block": (1, 1, 2),
    "cross_attention_dim": 64 + 128,
    "projection_class_embeddings_input_dim": 128 + 6 * 256,
}
UNEVEN = {
    "mid_block_type": None,
    "transformer_layers_per_block": ((1, 1), (1, 1), (2, 1)),
    "reverse_transformer_layers_per_block": ((1, 2, 3), (2, 1, 1), (1, 1, 1)),
}
VAE = FULL_VAE | {"block_out_channels": (32, 32, 64, 64)}


@pytest.fixture(scope="module")
def bundled(pair: tuple[Path, Path], tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of single files: stage_1.safetensors is the base expert with the model's VAE and text encoders."""
    out = tmp_path_factory.mktemp("bundled") / "pair"
    return bundle(BundleRequest(pair, tiny_model, out, "single-file", prove=False, device="cpu"))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "sdxl-experts" / "models"


def test_it_is_the_same_model_to_store_and_trainer(
    bundled: Path,
    pair: tuple[Path, Path],
    tiny_model: Path,
    world: Any,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    model = resolve_model(str(bundled / "stage_1.safetensors"))
    assert "converted once into" in capfd.readouterr().err
    assert model_name(model) == "stage_1"
    assert read_vae_facts(model) == read_vae_facts(tiny_model)
    assert read_text_facts(model) == read_text_facts(tiny_model)
    assert unet_digest(model / "unet") == unet_digest(pair[0] / "checkpoints" / "step-00000002" / "ema")
    before = world.copy(tmp_path / "store")
    size = (before.store / "data.mdb").stat().st_size
    assert replace(before, model=model).build() == world.build()  # nothing is encoded anew
    assert (before.store / "data.mdb").stat().st_size == size
    assert resolve_model(str(bundled / "stage_1.safetensors")) == model
    assert capfd.readouterr().err.count("converted") == 0


def test_diffusers_reads_the_same_tensors_from_the_file(bundled: Path) -> None:
    model = resolve_model(str(bundled / "stage_1.safetensors"))

    class _Stage:
        number, folder = 1, "stage_1"

    pipeline = load_file_pipeline(bundled, _Stage(), torch.float32)  # type: ignore[arg-type]
    for part, name in single_file._WEIGHTS_FILE.items():
        ours = {key.removeprefix("text_model."): t for key, t in load_file(model / part / name).items()}
        theirs = {key.removeprefix("text_model."): t for key, t in getattr(pipeline, part).state_dict().items()}
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)
        config = json.loads((model / part / "config.json").read_text())
        assert config.items() >= json.loads((bundled / "stage_1" / part / "config.json").read_text()).items()


def test_it_draws_the_same_pictures(bundled: Path, pair: tuple[Path, Path], tiny_model: Path, tmp_path: Path) -> None:
    drawn = {}
    for name, model in {"folder": tiny_model, "file": resolve_model(str(bundled / "stage_1.safetensors"))}.items():
        settings = DrawSettings(steps=4, guidance=2.0)
        request = GenerateRequest(pair, model, ["a red circle"], tmp_path / name, settings, device="cpu")
        (path,) = generate(request)
        drawn[name] = Image.open(path).tobytes()
    assert drawn["file"] == drawn["folder"]


def plain_copy(bundled: Path, to: Path, **metadata: str) -> Path:
    """The file without its folder and its marks, as somebody else's programs would have written it."""
    tensors = {
        name: t for name, t in load_file(bundled / "stage_1.safetensors").items() if name not in ("v_pred", "ztsnr")
    }
    save_file(tensors, to, metadata=metadata)
    return to


def schedule(model: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((model / "scheduler" / "scheduler_config.json").read_text())
    return config


def test_what_it_predicts_is_read_off_its_marks_and_settings_say_otherwise(bundled: Path, tmp_path: Path) -> None:
    settings = shutil.copytree(bundled / "stage_1", tmp_path / "settings")
    shutil.rmtree(settings / "scheduler")

    def read(file: Path) -> tuple[str, bool, str]:
        said = schedule(resolve_model(str(file), config=str(settings)))
        return said["prediction_type"], said["rescale_betas_zero_snr"], said["timestep_spacing"]

    assert read(bundled / "stage_1.safetensors") == ("v_prediction", True, "trailing")
    assert read(plain_copy(bundled, tmp_path / "eps.safetensors")) == ("epsilon", False, "leading")
    v_file = plain_copy(bundled, tmp_path / "v.safetensors", **{"modelspec.prediction_type": "v"})
    assert read(v_file) == ("v_prediction", False, "leading")
    (settings / "scheduler").mkdir()
    (settings / "scheduler" / "scheduler_config.json").write_text(
        '{"prediction_type": "sample", "_class_name": "DDIMScheduler"}'
    )
    model = resolve_model(str(v_file), config=str(settings))
    assert schedule(model)["prediction_type"] == "sample"
    assert json.loads((model / "model_index.json").read_text())["scheduler"] == ["diffusers", "DDIMScheduler"]


def test_its_licence_is_what_it_says_of_itself(bundled: Path, tmp_path: Path) -> None:
    file = plain_copy(bundled, tmp_path / "mine.safetensors", **{"modelspec.license": "CreativeML Open RAIL++-M"})
    assert read_licence(resolve_model(str(file), config=str(bundled / "stage_1"))) == "CreativeML Open RAIL++-M"


def test_weights_are_written_once_whatever_the_settings(bundled: Path, tmp_path: Path, cache: Path) -> None:
    file = plain_copy(bundled, tmp_path / "file.safetensors")
    whole = resolve_model(str(file), config=str(bundled / "stage_1"))
    other = shutil.copytree(bundled / "stage_1", tmp_path / "other")
    (other / "tokenizer" / "special_tokens_map.json").write_text('{"pad_token": "!"}')
    again = resolve_model(str(file), config=str(other))
    assert again != whole
    assert (again / "unet" / "diffusion_pytorch_model.safetensors").samefile(
        whole / "unet" / "diffusion_pytorch_model.safetensors"
    )
    named = shutil.copyfile(file, tmp_path / "other-name.safetensors")
    assert model_name(resolve_model(str(named), config=str(other))) == "other-name"
    assert len(list(cache.glob("*/weights"))) == 1


@pytest.mark.parametrize("layers", [{}, UNEVEN], ids=["base", "uneven"])
def test_at_sdxls_proportions_no_settings_need_to_be_given(tmp_path: Path, layers: dict[str, Any]) -> None:
    """Heads of 64 channels, norms of 32 groups: facts and digests are those of the folder, read off the file alone."""
    torch.manual_seed(0)
    folder, ids = tmp_path / "folder", {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1}
    UNet2DConditionModel(**(UNET | layers)).save_pretrained(folder / "unet")
    AutoencoderKL(**VAE).save_pretrained(folder / "vae")
    towers = {
        "text_encoder": (CLIPTextModel, 64, "quick_gelu"),
        "text_encoder_2": (CLIPTextModelWithProjection, 128, "gelu"),
    }
    for part, (kind, width, act) in towers.items():
        sizes = {"hidden_size": width, "intermediate_size": 2 * width, "projection_dim": width, "hidden_act": act}
        config = CLIPTextConfig(
            **ids, **sizes, vocab_size=len(make_vocabulary()[0]), num_hidden_layers=2, num_attention_heads=width // 64
        )
        kind(config).save_pretrained(folder / part)
    for part, pad in (("tokenizer", "<|endoftext|>"), ("tokenizer_2", "!")):
        write_tokenizer(folder / part, pad_token=pad)
        shutil.copytree(folder / part, tmp_path / "tokenizers" / part)
    file = write_original(folder, tmp_path / "file.safetensors")
    model = resolve_model(str(file), config=str(tmp_path / "tokenizers"))
    assert read_vae_facts(model) == read_vae_facts(folder)
    assert read_text_facts(model) == read_text_facts(folder)
    assert unet_digest(model / "unet") == unet_digest(folder / "unet")
    assert (base := resolve_base(file))  # as --base, which needs no tokenizers
    assert unet_digest(base / "unet") == unet_digest(folder / "unet")
    pipeline = StableDiffusionXLPipeline.from_pretrained(model, use_safetensors=True)
    pipeline.set_progress_bar_config(disable=True)
    drawn = pipeline("a circle", height=64, width=64, num_inference_steps=1, output_type="latent").images
    assert drawn.shape == (1, 4, 8, 8)


def test_a_refiner_or_a_unet_alone_is_enough_for_who_needs_no_more(bundled: Path, tmp_path: Path) -> None:
    tensors = load_file(bundled / "stage_1.safetensors")
    unet = {name: t for name, t in tensors.items() if name.startswith("model.diffusion_model.")}
    save_file(unet, file := tmp_path / "unet.safetensors")
    shutil.copytree(bundled / "stage_1" / "unet", tmp_path / "settings" / "unet")
    model = resolve_model(str(file), ("unet",), str(tmp_path / "settings"))
    assert sorted(path.name for path in model.iterdir()) == ["model_index.json", "scheduler", "unet"]
    with pytest.raises(DataError, match=r"unet\.safetensors is a checkpoint without a vae, which this command needs"):
        resolve_model(str(file), ("vae",), str(tmp_path / "settings"))


def test_two_commands_at_once_convert_it_once_and_a_kill_leaves_nothing(
    bundled: Path, tmp_path: Path, cache: Path
) -> None:
    file = bundled / "stage_1.safetensors"
    code = f"from shared.model_folder import resolve_model; print(resolve_model({str(file)!r}))"
    killed = (
        "import os; from shared import single_file; write = single_file.write_lazily\n"
        "def die(path, *rest): write(path, *rest); os._exit(9) if 'vae' in path.name else None\n"
        f"single_file.write_lazily = die; {code}"
    )
    assert subprocess.run([sys.executable, "-c", killed], check=False).returncode == 9
    (weights,) = cache.glob("*/weights")
    assert sorted(path.name for path in weights.iterdir()) == [".vae.safetensors", "unet.safetensors"]
    running = [subprocess.Popen([sys.executable, "-c", code], stdout=-1, stderr=-1, text=True) for _ in range(2)]
    told = [process.communicate() for process in running]
    assert {out for out, _ in told} == {f"{resolve_model(str(file))}\n"}
    assert sum("converted once" in errors for _, errors in told) == 1
    assert not list(weights.glob(".*"))


def test_no_room_is_said_before_anything_is_written(
    bundled: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1, 1, 0))  # type: ignore[attr-defined]
    with pytest.raises(StoreFull, match=r"stage_1\.safetensors in diffusers layout .*XDG_CACHE_HOME.* 0 B are free"):
        resolve_model(str(bundled / "stage_1.safetensors"))
    assert not list(cache.rglob("*.safetensors"))


def test_without_tokenizers_the_way_out_is_named(bundled: Path, tmp_path: Path) -> None:
    file = plain_copy(bundled, tmp_path / "alone.safetensors")
    with pytest.raises(DataError, match=r"holds no tokenizers.*--model-config") as refused:
        resolve_model(str(file))
    assert "\n" not in str(refused.value)
    settings = shutil.copytree(bundled / "stage_1", tmp_path / "settings")
    shutil.rmtree(settings / "tokenizer_2")
    with pytest.raises(DataError, match=r"settings has none: .*--model-config"):
        resolve_model(str(file), config=str(settings))
    assert resolve_model(str(file), ("unet",), str(settings)).is_dir()  # a trainer needs none


def test_what_is_no_such_file_is_one_line(bundled: Path, tiny_model: Path, tmp_path: Path) -> None:
    whole = (bundled / "stage_1.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "model.ckpt").write_bytes(b"\x80\x02cos\nsystem\n")
    (tmp_path / "empty.safetensors").write_bytes(b"")
    shutil.copyfile(tiny_model / "unet" / "diffusion_pytorch_model.safetensors", tmp_path / "plain.safetensors")
    said = {
        "cut.safetensors": "is not a whole safetensors file",
        "empty.safetensors": "is not a whole safetensors file",
        "model.ckpt": "is a pickle, .* convert it to .safetensors once",
        "plain.safetensors": r"no tensor of it is called model\.diffusion_model",
        "none.safetensors": "no model file",
    }
    for name, words in said.items():
        with pytest.raises(DataError, match=words) as refused:
            resolve_model(str(tmp_path / name))
        assert "\n" not in str(refused.value)
    with pytest.raises(ConfigError, match="--model-config is for a --model that is one"):
        resolve_model(str(tiny_model), config=str(tiny_model))
    with pytest.raises(DataError, match=r"--model-config .*: no folder with one of vae/"):
        resolve_model(str(bundled / "stage_1.safetensors"), config=str(tmp_path))


def test_a_disk_that_fills_up_is_given_back(bundled: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An OSError, of which every command makes one line and exit code 74; what is whole stays."""
    write = single_file.write_lazily

    def full(path: Path, *given: Any) -> str:
        written = write(path, *given)
        if "vae" in path.name:
            raise OSError(errno.ENOSPC, "No space left on device")
        return written

    monkeypatch.setattr(single_file, "write_lazily", full)
    with pytest.raises(OSError, match="No space left"):
        resolve_model(str(bundled / "stage_1.safetensors"))
    (weights,) = cache.glob("*/weights")
    assert [path.name for path in weights.iterdir()] == ["unet.safetensors"]


def test_a_cache_that_cannot_be_written_is_an_os_error(
    bundled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "a file"))
    with pytest.raises(NotADirectoryError):
        resolve_model(str(bundled / "stage_1.safetensors"))
