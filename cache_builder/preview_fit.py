"""Fits a VAE's preview on the first pictures that a build encodes, and keeps it in the store (shared/preview.py)."""

from pathlib import Path
from typing import Any

import numpy as np

from shared.preview import PreviewFit, read_preview, write_preview
from shared.record import decode_record

ENOUGH_PICTURES = 64  # of some thousand latents each, for the 15 numbers of the map


class PreviewKeeper:
    """Learns until it has enough, once for each VAE of a store; does nothing where the store has its preview."""

    def __init__(self, store: Path, vae_digest: str) -> None:
        self._store, self._vae_digest = store, vae_digest
        self._fit = PreviewFit() if read_preview(store, vae_digest) is None else None

    @property
    def is_learning(self) -> bool:
        """Whether it has use for another crop."""
        return self._fit is not None

    def add(self, pixels: np.ndarray[Any, np.dtype[np.uint8]], key: bytes, record: bytes) -> None:
        """A crop and the record that was made of it."""
        if self._fit is None:
            return
        self._fit.add(pixels, decode_record(key, record).tensors["mean"])
        if self._fit.pictures >= ENOUGH_PICTURES:
            self.keep()

    def keep(self) -> None:
        """Put what was learnt into store.json, if there is anything new."""
        if self._fit is not None and self._fit.pictures:
            write_preview(self._store, self._vae_digest, self._fit.solve())
            self._fit = None
