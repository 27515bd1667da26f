"""Latents to a small picture without a VAE: one linear map of channels to colours, fitted when a store is built.

A cached crop of 1024 px comes out at 128 px, in microseconds, blurred, in about the right colours: enough for pages
and reports that must not load a VAE. STORE/store.json keeps a map for each VAE:

    "previews": {"<VAE digest>": {"weights": [[r, g, b], ...], "bias": [r, g, b], "pictures": n}}

so that rgb = bias + latents . weights, with unscaled latents (means) and black at 0, white at 1.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from shared.errors import StoreFormat
from shared.store_card import read_card, write_card

Pixels = np.ndarray[Any, np.dtype[np.uint8]]
Matrix = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True)
class Preview:
    """The map of one VAE's latents to colours."""

    weights: Matrix  # [c, 3]
    bias: Matrix  # [3]
    pictures: int
    """How many it was fitted on."""


def preview_picture(latents: np.ndarray[Any, Any], preview: Preview) -> Pixels:
    """uint8 [h, w, 3] of unscaled latents [c, h, w], one pixel a latent."""
    rgb = np.moveaxis(latents.astype(np.float64), 0, -1) @ preview.weights + preview.bias
    return np.asarray((np.nan_to_num(rgb).clip(0, 1) * 255).round(), np.uint8)


def read_preview(store: Path, vae_digest: str) -> Preview | None:
    """The map that a store keeps for a VAE, or None; raises StoreFormat where store.json is damaged."""
    try:
        kept = read_card(store).get("previews", {}).get(vae_digest)
        if kept is None:
            return None
        weights, bias = np.array(kept["weights"], np.float64), np.array(kept["bias"], np.float64)
        if weights.ndim != 2 or weights.shape[1] != 3 or bias.shape != (3,) or not np.isfinite([*weights, bias]).all():
            raise ValueError(f"weights {weights.shape}, bias {bias.shape}")
        return Preview(weights, bias, int(kept["pictures"]))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise StoreFormat(
            f"{store}/store.json: its preview cannot be read ({error!r}); take 'previews' out of it"
        ) from None


def write_preview(store: Path, vae_digest: str, preview: Preview) -> None:
    """Keep the map of a VAE in store.json; the caller is the store's writer."""
    card = read_card(store)
    numbers = {"weights": np.round(preview.weights, 6).tolist(), "bias": np.round(preview.bias, 6).tolist()}
    card["previews"] = card.get("previews", {}) | {vae_digest: numbers | {"pictures": preview.pictures}}
    write_card(store, card)


class PreviewFit:
    """Least squares over crops and their latents, as they come: only sums are kept."""

    def __init__(self) -> None:
        self.pictures = 0
        self._left: Any = 0.0  # sum of x x^T, with x = (latents, 1): [c + 1, c + 1]
        self._right: Any = 0.0  # sum of x rgb^T: [c + 1, 3]

    def add(self, pixels: Pixels, latents: np.ndarray[Any, Any]) -> None:
        """One crop [H, W, 3] and its unscaled latents [c, h, w]; H and W are multiples of h and w."""
        channels, h, w = latents.shape
        high, wide = pixels.shape[0] // h, pixels.shape[1] // w
        rows = pixels.reshape(h, high, -1).sum(axis=1, dtype=np.uint32)  # along memory first: six times as fast
        blocks = rows.reshape(h, w, wide, 3).sum(axis=2) / (255 * high * wide)
        x = np.concatenate([latents.reshape(channels, -1), np.ones((1, h * w))]).astype(np.float64)
        self._left = self._left + x @ x.T
        self._right = self._right + x @ blocks.reshape(-1, 3)
        self.pictures += 1

    def solve(self) -> Preview:
        """The best map for what was added; where that says nothing of a channel, the smallest."""
        solution = np.linalg.lstsq(self._left, self._right, rcond=1e-10)[0]
        return Preview(solution[:-1], solution[-1], self.pictures)
