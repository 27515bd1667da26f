"""--model: a folder as it is; a Hub id by its safetensors and settings alone, or one clear line."""

from pathlib import Path

import pytest

from shared.errors import DataError
from shared.model_folder import _choose, resolve_model

HUB = [
    "README.md",
    "model_index.json",
    "sd_xl_base_1.0.safetensors",
    "scheduler/scheduler_config.json",
    "text_encoder/config.json",
    "text_encoder/model.safetensors",
    "text_encoder/model.fp16.safetensors",
    "text_encoder/pytorch_model.bin",
    "tokenizer/merges.txt",
    "tokenizer/vocab.json",
    "unet/config.json",
    "unet/diffusion_pytorch_model.fp16.safetensors",
    "unet/evil.py",
    "vae/config.json",
    "vae/diffusion_pytorch_model-00001-of-00002.safetensors",
    "vae/diffusion_pytorch_model-00002-of-00002.safetensors",
    "vae/diffusion_pytorch_model.safetensors.index.json",
    "vae_1_0/diffusion_pytorch_model.safetensors",
]


def test_a_folder_is_taken_as_it_is(tiny_model: Path) -> None:
    assert resolve_model(str(tiny_model)) == tiny_model


def test_of_a_repository_only_what_is_needed_is_fetched() -> None:
    assert sorted(_choose(HUB, ["vae", "text_encoder", "tokenizer"])) == [
        "text_encoder/config.json",
        "text_encoder/model.safetensors",
        "tokenizer/merges.txt",
        "tokenizer/vocab.json",
        "vae/config.json",
        "vae/diffusion_pytorch_model-00001-of-00002.safetensors",
        "vae/diffusion_pytorch_model-00002-of-00002.safetensors",
        "vae/diffusion_pytorch_model.safetensors.index.json",
    ]


def test_a_variant_is_fetched_where_there_is_nothing_else() -> None:
    assert list(_choose(HUB, ["unet"])) == ["unet/config.json", "unet/diffusion_pytorch_model.fp16.safetensors"]


@pytest.mark.parametrize("model", ["sd_xl_base_1.0.safetensors", "models/sd_xl_base_1.0.ckpt"])
def test_a_missing_file_is_named(model: str) -> None:
    with pytest.raises(DataError, match="no model file"):
        resolve_model(model)


@pytest.mark.parametrize("model", ["/no/such/folder", "./nothing", "nothing", "some/deep/path"])
def test_a_missing_folder_is_named(model: str) -> None:
    with pytest.raises(DataError, match="no model folder"):
        resolve_model(model)


def test_a_folder_without_an_index_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no model_index\.json"):
        resolve_model(str(tmp_path))


def test_a_repository_that_is_not_cached_cannot_be_had_offline() -> None:
    with pytest.raises(DataError, match="the Hub did not give it") as refused:
        resolve_model("some-body/some-model-that-is-not-cached")
    assert "\n" not in str(refused.value)
