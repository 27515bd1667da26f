"""How fine a picture is, measured at the edges of the truth it should show: what a refiner is for.

    picture, truth -> profiles across every edge of the truth -> how steep, and how far from where they should be

The truth is the drawn picture from which a picture was made, or, for one made from a caption alone, the drawing of what
the judge sees in it: `measure_detail(picture, draw(read_picture(picture).scene()))`.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

REACH_PX = 3.0  # profiles run this far to both sides of an edge; what is farther off counts as this far
STEP_PX = 0.25
EDGE_LEVELS = 16.0  # per px, of 255: what rises less is no edge but a fade
CONTRAST_LEVELS = 40.0  # from one end of a profile to the other, in the truth
CORNER = 0.15  # where the edge's direction turns within two pixels: the smaller part of the slopes over the larger
WINDOW_PX = 5

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class Detail:
    """Medians and means over the pixels on the truth's edges.

    sharpness: the picture's steepest slope across an edge over the truth's; 1 = as drawn, 0 = no edge (median).
    edge_error_px: distance across the edge between where picture and truth cross the middle of the two colours (mean).
    corner_error_px: the same within two pixels of a corner; a rounded corner shows here (mean; 0 where there is none).
    colour_error_levels: difference three pixels inside and outside of the edges, of 255 (mean).
    """

    sharpness: float
    edge_error_px: float
    corner_error_px: float
    colour_error_levels: float


def measure_detail(picture: Image.Image, truth: Image.Image) -> Detail:
    """Measure the picture's edges against the truth's; raises ValueError for other sizes, or a truth without edges."""
    if picture.size != truth.size:
        raise ValueError(f"a picture of {picture.size} px and a truth of {truth.size} px cannot be compared")
    made, drawn = (np.asarray(image.convert("RGB"), np.float64) for image in (picture, truth))
    at, normals, is_corner = _edges(drawn)
    made_profiles, drawn_profiles = (_profiles(pixels, at, normals) for pixels in (made, drawn))  # [N, T, 3]
    ends = drawn_profiles[:, [0, -1]]
    contrast = np.linalg.norm(ends[:, 1] - ends[:, 0], axis=-1)
    clear = contrast > CONTRAST_LEVELS
    if not clear.any():
        raise ValueError("the truth has no edges to measure at")
    made_profiles, drawn_profiles, ends = made_profiles[clear], drawn_profiles[clear], ends[clear]
    line = (ends[:, 1] - ends[:, 0]) / contrast[clear, None] ** 2
    made_rise, drawn_rise = (
        np.einsum("ntc,nc->nt", profiles - ends[:, :1], line) for profiles in (made_profiles, drawn_profiles)
    )
    slopes = [np.abs(np.diff(rise, axis=1)).max(1) for rise in (made_rise, drawn_rise)]
    errors_px = np.minimum(np.abs(_crossing(made_rise) - _crossing(drawn_rise)), REACH_PX)
    corners = errors_px[is_corner[clear]]
    return Detail(
        float(np.median(slopes[0] / np.maximum(slopes[1], 1e-6))),
        float(errors_px.mean()),
        float(corners.mean()) if corners.size else 0.0,
        float(np.abs(made_profiles[:, [0, -1]] - ends).mean()),
    )


def _edges(pixels: Array) -> tuple[Array, Array, Array]:
    """The truth's edge pixels (y, x) [N, 2], unit normals [N, 2], and which of them lie at a corner [N]."""
    down, across = np.gradient(pixels, axis=(0, 1))
    yy, xx, yx = (down * down).sum(-1), (across * across).sum(-1), (down * across).sum(-1)
    angle = 0.5 * np.arctan2(2 * yx, xx - yy)  # of the steepest direction, from the x axis
    slope = np.sqrt(yy + xx)
    normals = np.stack([np.sin(angle), np.cos(angle)], -1)
    places = np.argwhere(np.ones_like(slope, bool))
    flat = normals.reshape(-1, 2)
    beside = [_sample(slope[..., None], places + side * flat)[:, 0].reshape(slope.shape) for side in (-1.0, 1.0)]
    is_edge = (slope > EDGE_LEVELS) & (slope >= beside[0]) & (slope >= beside[1])  # the ridge of the slope
    yy, xx, yx = (_around(part) for part in (yy, xx, yx))
    half, turn = (yy + xx) / 2, np.hypot((yy - xx) / 2, yx)
    is_corner = half - turn > CORNER * (half + turn)
    return np.argwhere(is_edge).astype(np.float64), normals[is_edge], is_corner[is_edge]


def _around(values: Array) -> Array:
    """The mean over a square window around each pixel."""
    padded = np.pad(values, WINDOW_PX // 2)
    mean: Array = np.lib.stride_tricks.sliding_window_view(padded, (WINDOW_PX, WINDOW_PX)).mean((-1, -2))
    return mean


def _profiles(pixels: Array, at: Array, normals: Array) -> Array:
    """The colours along each normal, from REACH_PX on one side to REACH_PX on the other: [N, T, 3]."""
    offsets = np.arange(-REACH_PX, REACH_PX + STEP_PX / 2, STEP_PX)
    places = at[:, None] + offsets[None, :, None] * normals[:, None]
    return _sample(pixels, places.reshape(-1, 2)).reshape(len(at), len(offsets), pixels.shape[-1])


def _sample(pixels: Array, places: Array) -> Array:
    """Bilinear: the colours at places (y, x) [N, 2], those outside taken from the border."""
    last = np.array(pixels.shape[:2]) - 1
    places = np.clip(places, 0, last)
    low = np.minimum(places.astype(np.intp), last - 1)
    (fy, fx), (y, x) = (places - low).T, low.T
    top = pixels[y, x] * (1 - fx)[:, None] + pixels[y, x + 1] * fx[:, None]
    bottom = pixels[y + 1, x] * (1 - fx)[:, None] + pixels[y + 1, x + 1] * fx[:, None]
    mixed: Array = top * (1 - fy)[:, None] + bottom * fy[:, None]
    return mixed


def _crossing(rise: Array) -> Array:
    """Where each profile [N, T] passes one half, nearest to its middle, in px; twice REACH_PX where it never does."""
    before, after = rise[:, :-1] - 0.5, rise[:, 1:] - 0.5
    passes = (before <= 0) != (after <= 0)
    step = np.where(passes, before / np.where(passes, before - after, 1.0), 0.0)
    at = -REACH_PX + STEP_PX * (np.arange(before.shape[1]) + step)
    nearest = np.where(passes, np.abs(at), np.inf).argmin(1)
    rows = np.arange(len(rise))
    return np.where(passes.any(1), at[rows, nearest], 2 * REACH_PX)
