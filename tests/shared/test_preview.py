"""The linear preview: what is linear is found, what a store keeps comes back, nothing else in store.json is touched."""

import json
from pathlib import Path

import numpy as np
import pytest

from shared.errors import StoreFormat
from shared.preview import Preview, PreviewFit, preview_picture, read_preview, write_preview
from shared.store import StoreReader, StoreWriter

WEIGHTS = np.array([[0.1, 0, -0.05], [0, 0.08, 0.02], [-0.03, 0.04, 0.1], [0.02, -0.06, 0.01]])
BIAS = np.array([0.5, 0.4, 0.6])


def crop_of(latents: np.ndarray) -> np.ndarray:
    """A picture that depends linearly on its latents, 8 pixels each, up to rounding."""
    rgb = np.moveaxis(latents, 0, -1) @ WEIGHTS + BIAS
    return np.rint(rgb.clip(0, 1) * 255).astype(np.uint8).repeat(8, axis=0).repeat(8, axis=1)


def fitted(pictures: int, seed: int = 0) -> Preview:
    source, fit = np.random.default_rng(seed), PreviewFit()
    for number in range(pictures):
        latents = source.normal(size=(4, 6 + number % 3, 9))
        fit.add(crop_of(latents), latents.astype(np.float16))
    return fit.solve()


def test_a_linear_map_is_found() -> None:
    preview = fitted(20)
    np.testing.assert_allclose(preview.weights, WEIGHTS, atol=2e-3)
    np.testing.assert_allclose(preview.bias, BIAS, atol=2e-3)
    latents = np.random.default_rng(5).normal(size=(4, 7, 5))
    picture = preview_picture(latents, preview)
    assert (picture.dtype, picture.shape) == (np.uint8, (7, 5, 3))
    assert np.abs(picture.astype(int) - crop_of(latents)[::8, ::8]).max() <= 2


def test_a_flat_picture_is_enough_for_a_map() -> None:
    fit = PreviewFit()
    fit.add(np.full((16, 16, 3), 51, np.uint8), np.ones((4, 2, 2), np.float16))
    assert (preview_picture(np.ones((4, 2, 2)), fit.solve()) == 51).all()


def test_whatever_the_latents_are_a_picture_comes_out() -> None:
    latents = np.array([np.nan, np.inf, -np.inf, 6e4]).reshape(4, 1, 1)
    assert preview_picture(latents.astype(np.float16), fitted(5)).shape == (1, 1, 3)


def test_a_store_keeps_a_preview_for_each_vae(tmp_path: Path) -> None:
    StoreWriter(tmp_path).close()
    card = json.loads((tmp_path / "store.json").read_text())
    one, other = fitted(3, 1), fitted(3, 2)
    assert read_preview(tmp_path, "aa") is None
    write_preview(tmp_path, "aa", one)
    write_preview(tmp_path, "bb", other)
    for digest, preview in (("aa", one), ("bb", other)):
        kept = read_preview(tmp_path, digest)
        assert kept is not None
        np.testing.assert_allclose(kept.weights, preview.weights, atol=1e-6)
        np.testing.assert_allclose(kept.bias, preview.bias, atol=1e-6)
    now = json.loads((tmp_path / "store.json").read_text())
    assert now.pop("previews").keys() == {"aa", "bb"}
    assert now == card
    StoreReader(tmp_path).close()  # a reader that knows nothing of previews reads on


@pytest.mark.parametrize(
    "kept", [[], {"aa": []}, {"aa": {"weights": [[1]], "bias": [1]}}, {"aa": {"weights": "x"}}, {"aa": {"weights": 1}}]
)
def test_a_preview_that_cannot_be_is_named(tmp_path: Path, kept: object) -> None:
    StoreWriter(tmp_path).close()
    card = json.loads((tmp_path / "store.json").read_text())
    (tmp_path / "store.json").write_text(json.dumps(card | {"previews": kept}))
    with pytest.raises(StoreFormat, match="preview cannot be read"):
        read_preview(tmp_path, "aa")
