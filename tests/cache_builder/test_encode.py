"""Crops and captions to framed records: what they hold, and what is never stored."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from cache_builder.encode import Crop, SampleEncoder
from cache_builder.keys import text_facts_key
from shared.errors import ConfigError
from shared.record import decode_record
from shared.text_encoders import TextEncoders
from shared.vae import Vae


def keys(count: int) -> list[bytes]:
    return [bytes([index]) * 16 for index in range(1, count + 1)]


def crops(count: int, size_hw: tuple[int, int] = (64, 48)) -> list[Crop]:
    rng = np.random.default_rng(0)
    return [Crop(key, rng.integers(0, 256, (*size_hw, 3), dtype=np.uint8)) for key in keys(count)]


def make_encoder(model: Path, latents: str = "moments", chunks: int = 1, device: str = "cpu") -> SampleEncoder:
    return SampleEncoder(model, device, "float32", latents, chunks)


def test_latents_of_a_batch(tiny_model: Path) -> None:
    batch = crops(3)
    framed = make_encoder(tiny_model).encode_crops(batch)
    moments = Vae(tiny_model, "cpu").encode(torch.from_numpy(np.stack([crop.pixels for crop in batch])))
    for index, (crop, item) in enumerate(zip(batch, framed, strict=True)):
        assert item is not None
        assert item[0] == crop.key
        record = decode_record(crop.key, item[1])
        assert (record.kind, dict(record.meta)) == ("latents", {})
        np.testing.assert_array_equal(record.tensors["mean"], moments.mean[index].half().numpy())
        assert moments.logvar is not None
        np.testing.assert_array_equal(record.tensors["logvar"], moments.logvar[index].half().numpy())
        assert record.tensors["mean"].shape == (4, 8, 6)


def test_the_mean_alone_takes_half_the_bytes(tiny_model: Path) -> None:
    (moments,) = make_encoder(tiny_model).encode_crops(crops(1))
    (mean,) = make_encoder(tiny_model, "mean").encode_crops(crops(1))
    assert moments is not None
    assert mean is not None
    both, one = decode_record(*moments), decode_record(*mean)
    assert list(one.tensors) == ["mean"]
    np.testing.assert_array_equal(one.tensors["mean"], both.tensors["mean"])


def test_captions_of_a_batch(tiny_model: Path) -> None:
    captions = ["a red circle", "", "a blue star " * 40, "カード 🂡 \u202e"]
    framed = make_encoder(tiny_model, chunks=2).encode_captions(captions, keys(4))
    encoders = TextEncoders(tiny_model, "cpu", 2)
    embeds = encoders.encode(captions)
    assert len(framed) == 8
    for index, (caption, key) in enumerate(zip(captions, keys(4), strict=True)):
        (text_at, text), (facts_at, facts) = framed[2 * index : 2 * index + 2]
        assert (text_at, facts_at) == (key, text_facts_key(key))
        record, count = decode_record(key, text), encoders.count(caption)
        expected = {"tokens": count.tokens, "truncated": count.truncated}
        assert (record.kind, dict(record.meta)) == ("text", {"caption": caption, **expected})
        fact = decode_record(facts_at, facts)
        assert (fact.kind, dict(fact.meta), dict(fact.tensors)) == ("text facts", expected, {})
        assert record.tensors["prompt_embeds"].shape == (154, 96)
        np.testing.assert_array_equal(record.tensors["prompt_embeds"], embeds.prompt_embeds[index].half().numpy())
        np.testing.assert_array_equal(
            record.tensors["pooled_prompt_embeds"], embeds.pooled_prompt_embeds[index].half().numpy()
        )
    assert decode_record(*framed[3]).meta == {"tokens": 0, "truncated": False}
    assert decode_record(*framed[5]).meta == {"tokens": 120, "truncated": False}


def test_only_the_picture_that_breaks_is_left_out(tiny_model: Path, tmp_path: Path) -> None:
    """Weights under which the latents of a grey picture overflow fp16 and those of a black one do not."""
    from safetensors.torch import load_file, save_file

    model = shutil.copytree(tiny_model, tmp_path / "model")
    weights = model / "vae/diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    save_file(tensors | {"quant_conv.weight": tensors["quant_conv.weight"] * 3000}, weights)
    pixels = np.stack([np.full((64, 48, 3), level, np.uint8) for level in (0, 127, 0)])
    moments = Vae(model, "cpu").encode(torch.from_numpy(pixels))
    assert moments.mean.isfinite().all()  # it is storing them that would break them
    batch = [Crop(key, crop) for key, crop in zip(keys(3), pixels, strict=True)]
    assert [item is not None for item in make_encoder(model).encode_crops(batch)] == [True, False, True]


def test_models_are_loaded_when_they_are_needed(tmp_path: Path, tiny_model: Path) -> None:
    model = shutil.copytree(tiny_model, tmp_path / "model")
    shutil.rmtree(model / "text_encoder")
    encoder = make_encoder(model)
    assert encoder.encode_crops(crops(1)) != [None]
    shutil.rmtree(model / "vae")
    assert encoder.encode_crops(crops(1)) != [None]  # and once


def test_a_device_that_is_not_there(tiny_model: Path) -> None:
    with pytest.raises(ConfigError, match="--device cuda:77 cannot be used"):
        make_encoder(tiny_model, device="cuda:77").encode_crops(crops(1))
