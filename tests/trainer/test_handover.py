"""The statistics of a hand-over: white noise is white, blur is seen where it blurs, and means and variances are."""

import pytest
import torch

from trainer.handover import BANDS, band_power, latent_facts


def noise(seed: int, h: int = 64, w: int = 48) -> torch.Tensor:
    return torch.randn((4, h, w), generator=torch.Generator().manual_seed(seed))


def test_white_noise_has_power_1_at_every_frequency() -> None:
    facts = latent_facts([2 + noise(i) for i in range(32)])
    assert facts.power == pytest.approx([1.0] * BANDS, abs=0.08)
    assert facts.mean == pytest.approx([2.0] * 4, abs=0.02)
    assert facts.variance == pytest.approx([1.0] * 4, abs=0.02)


def test_what_is_blurred_lacks_high_frequencies() -> None:
    x = noise(0)
    blurred = torch.nn.functional.avg_pool2d(x[None], 3, 1, 1)[0]
    sharp, soft = band_power(x), band_power(blurred)
    assert soft[0] > 0.5 * sharp[0]
    assert soft[-1] < 0.1 * sharp[-1]


def test_a_wave_stands_in_the_band_of_its_frequency() -> None:
    x = torch.cos(2 * torch.pi * 0.25 * torch.arange(64)).expand(4, 64, 64)
    assert int(band_power(x).argmax()) == int(0.25 * 2 * BANDS)


def test_sizes_may_differ_and_small_ones_leave_no_gap() -> None:
    facts = latent_facts([noise(0, 8, 8), noise(1, 64, 32)])
    assert all(value is not None and value > 0 for value in facts.power)
