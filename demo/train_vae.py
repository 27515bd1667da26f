"""Pictures of the small world -> their VAE: SDXL's AutoencoderKL (4 channels, an eighth of the size), only small.

drawn pictures -> encode -> z = mean + deviation eps -> decode -> squared error + a little KL
               -> each latent channel brought to mean 0 and spread 1/0.13025, as SDXL's have
"""

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from demo.draw import draw
from demo.fit import fit
from demo.fit_plan import FitPlan
from demo.model_files import VAE_SCALING_FACTOR
from demo.scene import Size, make_scene
from shared.seeding import make_generator

SIZES_HW: tuple[Size, ...] = (
    (96, 96),
    (80, 112),
    (112, 80),
)  # larger than what is drawn with it: finer detail to learn
PICTURES_SEED = 101  # no picture that it learns from is in a data set
KL_WEIGHT = 1e-5  # of a latent's divergence, beside a squared error per value of [-1, 1]

VAE_CONFIG: dict[str, Any] = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (16, 16, 64, 96),  # narrow where pixels are many: two thirds of the time is spent there
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "latent_channels": 4,
    "sample_size": 96,
    "scaling_factor": VAE_SCALING_FACTOR,
    "force_upcast": True,
}


def train_vae(folder: Path, plan: FitPlan, device: torch.device) -> dict[str, Tensor]:
    """The VAE's weights, averaged and with SDXL's spread of latents; goes on with what `folder` holds."""
    from diffusers import AutoencoderKL

    torch.manual_seed(plan.seed)  # the layers of the library draw their first weights from torch's own generator
    vae = AutoencoderKL(**VAE_CONFIG).to(device)

    def loss(step: int) -> Tensor:
        x = to_input(draw_batch(PICTURES_SEED, step * plan.batch, plan.batch, SIZES_HW[step % len(SIZES_HW)])).to(
            device
        )
        with torch.autocast(device.type, torch.bfloat16):
            posterior = vae.encode(x).latent_dist
            eps = torch.randn(posterior.mean.shape, generator=make_generator(plan.seed, "vae", step)).to(device)
            decoded = vae.decode(posterior.mean + posterior.std * eps).sample
        mean, logvar = posterior.mean.float(), posterior.logvar.float()
        divergence = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        error = (decoded.float() - x).square().mean()
        total: Tensor = error + KL_WEIGHT * divergence
        return total

    vae.load_state_dict(fit("vae", vae, loss, plan, folder))
    _spread_as_sdxl(vae.eval(), device)
    return {name: tensor.cpu() for name, tensor in vae.state_dict().items()}


def draw_batch(seed: int, first: int, count: int, size_hw: Size, *, held_out: bool = False) -> Tensor:
    """Pictures `first` to `first + count` of one size, uint8 [B, H, W, 3]."""
    scenes = (make_scene(seed, first + i, held_out=held_out, sizes_hw=(size_hw,)) for i in range(count))
    return torch.from_numpy(np.stack([np.asarray(draw(scene)) for scene in scenes]))


def to_input(pixels: Tensor) -> Tensor:
    """uint8 [B, H, W, 3] -> what the VAE takes, fp32 [B, 3, H, W] in [-1, 1]."""
    return (pixels.float() / 127.5 - 1).permute(0, 3, 1, 2).contiguous()


def psnr_db(made: Tensor, truth: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each picture, [B], of pixels uint8 [B, H, W, 3]."""
    error = (made.float() - truth.float()).square().flatten(1).mean(1)
    return 10 * torch.log10(255**2 / error.clamp(min=1e-9))


@torch.no_grad()
def _spread_as_sdxl(vae: Any, device: torch.device) -> None:
    """Fold a shift and a scale per latent channel into the layers on either side of the latents."""
    batches = [to_input(draw_batch(PICTURES_SEED, -256 * (1 + i), 256, size)) for i, size in enumerate(SIZES_HW)]
    latents = torch.cat(
        [vae.encode(batch.to(device)).latent_dist.mean.transpose(0, 1).flatten(1) for batch in batches], 1
    )
    mean, scale = latents.mean(1), 1 / (latents.std(1) * VAE_SCALING_FACTOR)
    into, out_of, channels = vae.quant_conv, vae.post_quant_conv, len(mean)
    out_of.bias += (out_of.weight[:, :, 0, 0] * mean).sum(1)
    out_of.weight /= scale[None, :, None, None]
    into.weight[:channels] *= scale[:, None, None, None]
    into.bias[:channels] = (into.bias[:channels] - mean) * scale
    into.bias[channels:] += 2 * torch.log(scale)
    assert math.isfinite(float(scale.sum()))
