"""Convolutions in strips against torch's own."""

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

from shared import strips
from shared.strips import STRIPS_FROM_BYTES, convolve_in_strips
from shared.vae import Vae


def noise(*size: int) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("height", [256, 250, 257])
@pytest.mark.parametrize("edge", [1, 3])
def test_a_large_picture_has_the_same_bits(edge: int, height: int) -> None:
    conv = nn.Conv2d(64, 32, edge, padding=edge // 2)
    x = noise(1, 64, height, 1100)
    assert x.nbytes >= STRIPS_FROM_BYTES
    with torch.inference_mode():
        expected = conv(x)
        convolve_in_strips(conv)
        assert torch.equal(conv(x), expected)


def test_every_kind_of_convolution_computes_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Strides, gaps, groups and other paddings are left alone; borders are where the strips meet too."""
    kinds = [
        {}, {"padding": 1}, {"padding": 2}, {"padding": 1, "stride": 2}, {"padding": 1, "dilation": 2},
        {"padding": 1, "groups": 2}, {"padding": 1, "padding_mode": "reflect"}, {"padding": "same"},
        {"padding": 1, "bias": False}, {"kernel_size": 5, "padding": 2}, {"kernel_size": (3, 1), "padding": (1, 0)},
    ]  # fmt: skip
    convs = [nn.Conv2d(4, 6, **({"kernel_size": 3} | kind)) for kind in kinds]  # type: ignore[arg-type]
    monkeypatch.setattr(strips, "STRIPS_FROM_BYTES", 0)
    monkeypatch.setattr(strips, "STRIP_ROWS", 8)
    for conv in convs:
        ours = copy.deepcopy(conv)
        convolve_in_strips(ours)
        for height in (3, 8, 9, 23):
            with torch.inference_mode():
                x = noise(2, 4, height, 12)
                torch.testing.assert_close(ours(x), conv(x), rtol=0, atol=1e-6, msg=f"{conv}, {height} rows")


def test_a_decoder_works_by_strips(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    latents, read = noise(1, 4, 20, 12), list[int]()
    expected = Vae(tiny_model, "cpu").decode(latents)
    monkeypatch.setattr(strips, "STRIPS_FROM_BYTES", 0)
    monkeypatch.setattr(strips, "STRIP_ROWS", 16)
    vae, pad = Vae(tiny_model, "cpu"), torch.nn.functional.pad
    monkeypatch.setattr(strips.functional, "pad", lambda x, edges: read.append(x.shape[2]) or pad(x, edges))
    assert int((vae.decode(latents).int() - expected.int()).abs().max()) <= 1
    assert max(read) == 16 + 2
    assert len(read) > 20
