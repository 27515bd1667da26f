"""Moments to latents: diffusers' posterior, drawn with the noise that it is given."""

import pytest
import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

from shared.latents import LatentMoments, sample_latents

SCALING_FACTOR = 0.13025


def random_moments(dtype: torch.dtype = torch.float32) -> LatentMoments:
    source = torch.Generator().manual_seed(0)
    mean = 8 * torch.randn(3, 4, 8, 6, generator=source)
    logvar = 30 * torch.randn(3, 4, 8, 6, generator=source)  # far over both clamps
    return LatentMoments(mean.to(dtype), logvar.to(dtype))


def test_sample_is_that_of_diffusers() -> None:
    moments = random_moments()
    eps = torch.randn(3, 4, 8, 6, generator=torch.Generator().manual_seed(1))
    theirs = DiagonalGaussianDistribution(torch.cat([moments.mean, moments.logvar], dim=1))
    expected = SCALING_FACTOR * (theirs.mean + theirs.std * eps)
    torch.testing.assert_close(sample_latents(moments, SCALING_FACTOR, eps), expected, rtol=1e-6, atol=1e-6)
    drawn = theirs.sample(torch.Generator().manual_seed(1))
    torch.testing.assert_close(sample_latents(moments, 1.0, eps), drawn, rtol=1e-6, atol=1e-6)


def test_without_noise_it_is_the_scaled_mean() -> None:
    moments = random_moments()
    assert torch.equal(sample_latents(moments, SCALING_FACTOR, torch.zeros(())), SCALING_FACTOR * moments.mean)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_stored_halves_are_computed_in_single_precision(dtype: torch.dtype) -> None:
    moments = random_moments(dtype)
    eps = torch.randn(3, 4, 8, 6, generator=torch.Generator().manual_seed(1))
    single = LatentMoments(moments.mean.float(), moments.logvar.float())
    drawn = sample_latents(moments, SCALING_FACTOR, eps)
    assert drawn.dtype == torch.float32
    assert torch.equal(drawn, sample_latents(single, SCALING_FACTOR, eps))


def test_a_single_sample_needs_no_batch_dimension() -> None:
    moments = random_moments()
    eps = torch.randn(4, 8, 6, generator=torch.Generator().manual_seed(1))
    one = sample_latents(LatentMoments(moments.mean[1], moments.logvar[1]), 1.0, eps)
    assert torch.equal(one, sample_latents(moments, 1.0, eps.expand(3, -1, -1, -1))[1])


def test_what_is_stored_and_drawn_stays_as_it_is() -> None:
    """Single precision is computed in place, in a copy."""
    moments = random_moments()
    eps = torch.randn(3, 4, 8, 6, generator=torch.Generator().manual_seed(1))
    before = [tensor.clone() for tensor in (moments.mean, moments.logvar, eps)]
    sample_latents(moments, SCALING_FACTOR, eps)
    assert all(map(torch.equal, (moments.mean, moments.logvar, eps), before))
