"""The only door to diffusers' AutoencoderKL: pictures to moments, latents to pictures, and which VAE it is."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from shared.errors import ConfigError, DataError
from shared.weights import find_weights, read_component_config, weights_digest, weights_variant

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from shared.latents import LatentMoments

EncodeDtype = Literal["float32", "bfloat16", "float16"]

# Settings that change what the same tensors compute, with the defaults of versions that do not write them.
_SETTINGS = {
    "act_fn": "silu",
    "norm_num_groups": 32,
    "layers_per_block": 1,
    "mid_block_add_attention": True,
    "use_quant_conv": True,
    "use_post_quant_conv": True,
    "shift_factor": None,
    "latents_mean": None,
    "latents_std": None,
}


@dataclass(frozen=True)
class VaeFacts:
    """What a store must know of the VAE that filled it."""

    digest: str  # blake2b-256, hex
    scaling_factor: float
    latent_channels: int
    downscale: int  # pixels per latent, along an edge
    force_upcast: bool  # half precision overflows


def read_vae_facts(model: Path) -> VaeFacts:
    """Facts of MODEL/vae, without loading it; raises DataError where it is not an SDXL-like AutoencoderKL."""
    folder = model / "vae"
    find_weights(folder)
    config = read_component_config(folder)
    if config.get("_class_name") != "AutoencoderKL":
        raise DataError(f"{folder} is a {config.get('_class_name')}; this program encodes with an AutoencoderKL")
    if any(config.get(key) is not None for key in ("shift_factor", "latents_mean", "latents_std")):
        raise DataError(f"{folder} shifts its latents, which no SDXL-layout UNet is trained on")
    try:
        return VaeFacts(
            digest=weights_digest(folder, _SETTINGS),
            scaling_factor=float(config.get("scaling_factor", 0.18215)),
            latent_channels=int(config.get("latent_channels", 4)),
            downscale=2 ** (len(config["block_out_channels"]) - 1),
            force_upcast=bool(config.get("force_upcast", True)),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{folder}/config.json is not that of an AutoencoderKL: {error!r}") from None


def choose_encode_dtype(setting: str, facts: VaeFacts, device_type: str) -> EncodeDtype:
    """The dtype to encode in: as set, or for "auto" the fastest in which this VAE does not overflow on the device."""
    if setting == "auto":
        if device_type == "cpu" or facts.force_upcast:
            return "float32"
        return "bfloat16"
    if setting == "float16" and facts.force_upcast:
        raise ConfigError(
            "encode.dtype = 'float16': this VAE overflows in it (force_upcast); use 'float32' or 'bfloat16'"
        )
    if setting in ("float32", "bfloat16", "float16"):
        return setting  # type: ignore[return-value]
    raise ConfigError(f"encode.dtype = {setting!r}: known are 'auto', 'float32', 'bfloat16', 'float16'")


class Vae:
    """AutoencoderKL on one device, for inference only."""

    def __init__(self, model: Path, device: "torch.device | str", dtype: EncodeDtype = "float32") -> None:
        import torch
        from diffusers import AutoencoderKL

        from shared.strips import convolve_in_strips

        folder = model / "vae"
        self.dtype = getattr(torch, dtype)
        self.device = torch.device(device)
        variant = weights_variant(folder)
        try:
            vae, report = AutoencoderKL.from_pretrained(
                folder, use_safetensors=True, variant=variant, dtype=self.dtype, output_loading_info=True
            )
        except (ValueError, RuntimeError) as error:
            raise DataError(f"{folder} cannot be loaded: {error}") from None
        if report["missing_keys"]:
            raise DataError(f"{folder} lacks weights of {sorted(report['missing_keys'])[0]}: the folder is incomplete")
        self._vae: Any = vae
        self._vae.to(self.device).eval().requires_grad_(False)
        convolve_in_strips(self._vae.decoder)
        self.scaling_factor = float(self._vae.config.scaling_factor)

    @property
    def module(self) -> Any:
        """The network itself, for whoever moves it to another device."""
        return self._vae

    def encode(self, pixels: "Tensor") -> "LatentMoments":
        """Moments fp32 [B, 4, h, w] of pixels uint8 [B, H, W, 3], unscaled."""
        import torch

        from shared.latents import LatentMoments

        with torch.inference_mode():
            x = pixels.to(self.device).permute(0, 3, 1, 2).float() / 127.5 - 1  # half precision blurs mid-grey
            distribution = self._vae.encode(x.to(self.dtype)).latent_dist
            return LatentMoments(distribution.mean.float(), distribution.logvar.float())

    def decode(self, latents: "Tensor") -> "Tensor":
        """Pixels uint8 [B, H, W, 3] on the CPU of scaled latents [B, 4, h, w]."""
        import torch

        with torch.inference_mode():
            z = latents.to(self.device, self.dtype) / self.scaling_factor
            x: Tensor = self._vae.decode(z, return_dict=False)[0].float()
            return ((x / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu()
