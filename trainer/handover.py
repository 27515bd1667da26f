"""What is handed over at B: does what the upper expert made of noise look, to the last of its steps, like real data?

held-out captions -> drawn from noise down to the last step above B -> estimate of x_0    \\
the same held-out latents, noised to that very step                 -> estimate of x_0     -> drift

Both are estimates of the same expert at the same timestep, so the blur of an estimate is in both and cancels out. Drift
is of x_0's mean and variance in each latent channel, and of its power spectrum by spatial frequency.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from trainer.report import LatentFacts

BANDS = 8  # of spatial frequency, from 0 to half a cycle per latent pixel


def latent_facts(latents: Sequence[Tensor]) -> LatentFacts:
    """Over latents fp32 [4, h, w] of any sizes; every picture counts alike."""
    stacked = [x.double() for x in latents]
    means = torch.stack([x.mean(dim=(1, 2)) for x in stacked])
    squares = torch.stack([x.square().mean(dim=(1, 2)) for x in stacked])
    mean = means.mean(0)
    power = torch.stack([band_power(x) for x in stacked]).nanmean(0)
    variance = squares.mean(0) - mean.square()
    return LatentFacts(mean=mean.tolist(), variance=variance.tolist(), power=power.tolist())


def band_power(x: Tensor) -> Tensor:
    """Mean power [BANDS] of latents [4, h, w] by radius of frequency, the mean taken out; NaN where a band has none.

    Normalised so that white noise of variance 1 has power 1 in every band (Parseval).
    """
    h, w = x.shape[-2:]
    spectrum = torch.fft.fft2(x - x.mean(dim=(1, 2), keepdim=True), norm="ortho").abs().square().mean(0)
    radius = torch.hypot(torch.fft.fftfreq(h, dtype=x.dtype)[:, None], torch.fft.fftfreq(w, dtype=x.dtype)[None])
    band = (radius * 2 * BANDS).long()  # corners beyond half a cycle are left out
    inside = (band < BANDS) & (radius > 0)
    sums = torch.zeros(BANDS, dtype=x.dtype).index_add(0, band[inside], spectrum[inside])
    return sums / torch.zeros(BANDS, dtype=x.dtype).index_add(0, band[inside], torch.ones_like(spectrum[inside]))
