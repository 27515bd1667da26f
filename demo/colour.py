"""Colours as an eye tells them apart: sRGB to CIE Lab, the nearest name, and how far a colour is from every ground."""

from collections.abc import Mapping
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]
Rgb = tuple[int, int, int]

WHITE = np.array([0.9505, 1.0, 1.089])  # D65
TO_XYZ = np.array([[0.4124, 0.2126, 0.0193], [0.3576, 0.7152, 0.1192], [0.1805, 0.0722, 0.9505]])
QUIET_END = np.array(
    [4.0, 25.0]
)  # (a, b) of sand, the least quiet of the grounds; all lie near the line from grey to it
NEVER_QUIET = 30.0  # Lab units: no ground is as vivid, not even in coloured light


def to_lab(pixels: Array) -> Array:
    """sRGB, 0 to 255, [..., 3] -> Lab."""
    encoded = np.clip(pixels, 0, 255) / 255
    linear = np.where(encoded <= 0.04045, encoded / 12.92, ((encoded + 0.055) / 1.055) ** 2.4)
    xyz = linear @ TO_XYZ / WHITE
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.stack([116 * f[..., 1] - 16, 500 * (f[..., 0] - f[..., 1]), 200 * (f[..., 1] - f[..., 2])], -1)


def vividness(lab: Array, tint: Array | None = None) -> Array:
    """Distance from the nearest colour that a ground may have, whatever the lightness; in Lab units.

    `tint` (a, b) is what the light, or a model, has added to every colour.
    """
    distance: Array = np.linalg.norm(_from_quiet(lab[..., 1:] - (0.0 if tint is None else tint)), axis=-1)
    return distance


def find_tint(lab: Array) -> Array:
    """What the quiet part of a picture has of colour beyond what grounds may have: (a, b), in the middle."""
    quiet = vividness(lab) < NEVER_QUIET
    tint: Array = np.median(_from_quiet(lab[..., 1:][quiet]), axis=0) if quiet.any() else np.zeros(2)
    return tint


def _from_quiet(a_b: Array) -> Array:
    """From the nearest place on the grounds' line to here."""
    along = np.clip(a_b @ QUIET_END / (QUIET_END @ QUIET_END), 0, 1)
    step: Array = a_b - along[..., None] * QUIET_END
    return step


def name_colours(pixels: Array, colours: Mapping[str, Rgb]) -> Array:
    """For each pixel [..., 3] the place of the nearest of these colours among them."""
    palette = to_lab(np.array(list(colours.values()), np.float64))
    nearest: Array = np.linalg.norm(to_lab(pixels)[..., None, :] - palette, axis=-1).argmin(-1)
    return nearest


def name_colour(pixel: Array, colours: Mapping[str, Rgb]) -> str:
    """The name of the nearest colour."""
    return list(colours)[int(name_colours(pixel, colours))]
