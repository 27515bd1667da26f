"""Latents as the VAE gives them: the moments of a diagonal Gaussian, unscaled, from which each epoch draws afresh."""

from dataclasses import dataclass

from torch import Tensor

LOGVAR_MIN, LOGVAR_MAX = -30.0, 20.0  # where diffusers' DiagonalGaussianDistribution clamps


@dataclass(frozen=True)
class LatentMoments:
    """Mean and log-variance of the posterior q(z|x), each [B, 4, h, w] (or without B), unscaled; None: no variance."""

    mean: Tensor
    logvar: Tensor | None


def sample_latents(moments: LatentMoments, scaling_factor: float, eps: Tensor) -> Tensor:
    """x_0 = scaling_factor * (mean + exp(logvar / 2) eps), fp32; `eps` standard normal in the shape of the mean."""
    if moments.logvar is None:
        return scaling_factor * moments.mean.float()
    deviation = moments.logvar.float().clamp(LOGVAR_MIN, LOGVAR_MAX).mul_(0.5).exp_()
    return (
        deviation.mul_(eps).add_(moments.mean).mul_(scaling_factor)
    )  # in place: small operations cost what they touch
