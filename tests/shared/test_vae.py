"""The VAE's door against diffusers' AutoencoderKL, on the tiny model."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file

from shared.errors import ConfigError, DataError
from shared.vae import EncodeDtype, Vae, VaeFacts, choose_encode_dtype, read_vae_facts

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def pixels() -> torch.Tensor:
    return torch.randint(0, 256, (2, 64, 96, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


@pytest.fixture
def copy(tiny_model: Path, tmp_path: Path) -> Path:
    shutil.copytree(tiny_model / "vae", tmp_path / "vae")
    return tmp_path


def change_config(folder: Path, **changed: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changed))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_moments_are_diffusers(tiny_model: Path, pixels: torch.Tensor, dtype: EncodeDtype) -> None:
    theirs = AutoencoderKL.from_pretrained(tiny_model / "vae").to(getattr(torch, dtype)).eval()
    with torch.inference_mode():
        x = pixels.permute(0, 3, 1, 2).float() / 127.5 - 1
        posterior = theirs.encode(x.to(theirs.dtype)).latent_dist
    moments = Vae(tiny_model, "cpu", dtype).encode(pixels)
    assert moments.mean.shape == moments.logvar.shape == (2, 4, 8, 12)
    assert moments.mean.dtype == moments.logvar.dtype == torch.float32
    assert torch.equal(moments.mean, posterior.mean.float())
    assert torch.equal(moments.logvar, posterior.logvar.float())


def test_pixels_become_what_the_pipelines_make_of_them(tiny_model: Path, pixels: torch.Tensor) -> None:
    from diffusers.image_processor import VaeImageProcessor

    vae, seen = Vae(tiny_model, "cpu"), []
    vae._vae.encoder.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    vae.encode(pixels)
    expected = VaeImageProcessor(vae_scale_factor=8).preprocess(pixels.permute(0, 3, 1, 2).float() / 255)
    torch.testing.assert_close(seen[0], expected, rtol=0, atol=2e-7)
    assert float(seen[0].min()) >= -1
    assert float(seen[0].max()) <= 1


def test_half_precision_sees_pixels_rounded_once(tiny_model: Path) -> None:
    """127 and 128 lie beside mid-grey, where rounding before the subtraction would move them by half a step."""
    vae, seen = Vae(tiny_model, "cpu", "bfloat16"), []
    vae._vae.encoder.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    ramp = torch.arange(256, dtype=torch.uint8).view(1, 16, 16, 1).expand(1, 16, 16, 3)
    vae.encode(ramp)
    exact = (ramp.double() / 127.5 - 1).permute(0, 3, 1, 2)
    assert bool(((seen[0].double() - exact).abs() <= exact.abs() * 2**-8).all())


def test_decoding_is_the_pipelines(tiny_model: Path) -> None:
    theirs = AutoencoderKL.from_pretrained(tiny_model / "vae").eval()
    latents = torch.randn(2, 4, 8, 12, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        x = theirs.decode(latents / theirs.config.scaling_factor, return_dict=False)[0]
    expected = ((x / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy() * 255).round().astype("uint8")
    decoded = Vae(tiny_model, "cpu").decode(latents)
    assert decoded.dtype == torch.uint8
    assert torch.equal(decoded, torch.from_numpy(expected))


def test_encoding_needs_no_gradient_and_changes_no_pixels(tiny_model: Path, pixels: torch.Tensor) -> None:
    before = pixels.clone()
    vae = Vae(tiny_model, "cpu")
    first, again = vae.encode(pixels), vae.encode(pixels)
    assert torch.equal(first.mean, again.mean)
    assert not first.mean.requires_grad
    assert torch.equal(pixels, before)


# --- facts ---


def test_facts_are_the_configs(tiny_model: Path) -> None:
    facts = read_vae_facts(tiny_model)
    assert (facts.scaling_factor, facts.latent_channels, facts.downscale, facts.force_upcast) == (0.13025, 4, 8, True)
    assert len(facts.digest) == 64


def test_digest_survives_diffusers_saving_it_again(tiny_model: Path, tmp_path: Path) -> None:
    vae = AutoencoderKL.from_pretrained(tiny_model / "vae")
    vae.save_pretrained(tmp_path / "again" / "vae")
    vae.save_pretrained(tmp_path / "shards" / "vae", max_shard_size="50KB")
    assert len(list((tmp_path / "shards" / "vae").glob("*.safetensors"))) > 1
    for name in ("again", "shards"):
        assert read_vae_facts(tmp_path / name) == read_vae_facts(tiny_model)


@pytest.mark.parametrize(
    "changed", [{"act_fn": "relu"}, {"norm_num_groups": 2}, {"layers_per_block": 2}, {"mid_block_add_attention": False}]
)
def test_settings_that_change_the_function_change_the_digest(
    tiny_model: Path, copy: Path, changed: dict[str, object]
) -> None:
    change_config(copy / "vae", **changed)
    assert read_vae_facts(copy).digest != read_vae_facts(tiny_model).digest


def test_settings_that_change_nothing_leave_the_digest(tiny_model: Path, copy: Path) -> None:
    change_config(copy / "vae", _diffusers_version="9.9", _name_or_path="/elsewhere", sample_size=1024)
    assert read_vae_facts(copy) == read_vae_facts(tiny_model)


def test_other_autoencoders_are_refused(copy: Path) -> None:
    change_config(copy / "vae", _class_name="AutoencoderTiny")
    with pytest.raises(DataError, match="AutoencoderTiny"):
        read_vae_facts(copy)
    change_config(copy / "vae", _class_name="AutoencoderKL", shift_factor=0.1)
    with pytest.raises(DataError, match="shifts its latents"):
        read_vae_facts(copy)
    change_config(copy / "vae", shift_factor=None, block_out_channels=None)
    with pytest.raises(DataError, match=r"config\.json"):
        read_vae_facts(copy)


def test_a_folder_without_some_weights_is_incomplete(copy: Path) -> None:
    tensors = load_file(copy / "vae" / WEIGHTS)
    del tensors["encoder.conv_in.bias"]
    save_file(tensors, copy / "vae" / WEIGHTS)
    with pytest.raises(DataError, match=r"lacks weights of encoder\.conv_in\.bias"):
        Vae(copy, "cpu")


def test_a_variant_alone_is_loaded(tiny_model: Path, copy: Path, pixels: torch.Tensor) -> None:
    (copy / "vae" / WEIGHTS).rename(copy / "vae" / "diffusion_pytorch_model.fp16.safetensors")
    assert torch.equal(Vae(copy, "cpu").encode(pixels).mean, Vae(tiny_model, "cpu").encode(pixels).mean)


def facts(force_upcast: bool) -> VaeFacts:
    return VaeFacts("aa", 0.13025, 4, 8, force_upcast)


@pytest.mark.parametrize(
    ("setting", "force_upcast", "device_type", "expected"),
    [
        ("auto", True, "cuda", "float32"),
        ("auto", False, "cuda", "bfloat16"),
        ("auto", False, "cpu", "float32"),
        ("bfloat16", True, "cuda", "bfloat16"),
        ("float16", False, "cuda", "float16"),
        ("float32", False, "cuda", "float32"),
    ],
)
def test_encode_dtype(setting: str, force_upcast: bool, device_type: str, expected: str) -> None:
    assert choose_encode_dtype(setting, facts(force_upcast), device_type) == expected


def test_encode_dtypes_that_cannot_be_meant() -> None:
    with pytest.raises(ConfigError, match="overflows"):
        choose_encode_dtype("float16", facts(True), "cuda")
    with pytest.raises(ConfigError, match="known are"):
        choose_encode_dtype("int8", facts(False), "cuda")
