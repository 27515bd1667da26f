"""Picture -> what is seen in it: the judge's eyes, without a network.

    picture -> vivid pixels -> patches ─┐
            -> ground between them ─────┴-> how much of each pixel is shape -> kind, colour, centre, radius

Shapes are vivid and grounds are not, so vividness finds the shapes. What lies between a shape's colour and its ground
is read as a share of the pixel, which makes soft edges harmless; the kind is that of the drawn outline that overlaps
most.
"""

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from PIL import Image, ImageFilter

from demo.colour import find_tint, name_colour, name_colours, to_lab, vividness
from demo.draw import draw_mask
from demo.ground import read_ground
from demo.scene import COLOURS, KINDS, Ground, Point, Scene, Shape, Size, position_word, size_word

VIVID, STRONG = 20.0, 27.0  # Lab units from every ground; the drawn colours have 40 and more
SPECK_SHARE = 0.012  # of the short side squared: a third of the smallest shape; what is smaller is no shape
SOFT_EDGE_PX = 3  # how far a shape's edge may reach beyond its vivid pixels
OTHER_LEVELS = 60.0  # of 255: a pixel this far from a mix of shape and ground belongs to another shape
SURE_OVERLAP = 0.86  # of the outline of a kind: what overlaps less is of no kind
PATCH, PATCH_SHARE = 32, 0.2  # forms are compared on a square of 32 x 32 of which each fills a fifth
BLURS = (0.0, 0.06, 0.12, 0.18, 0.25)  # of the radius

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class Found:
    """A shape as seen; kind "" where no kind's outline fits. Confidence is its overlap with the best one, 0 to 1."""

    kind: str
    colour: str
    centre_yx: Point
    radius_px: float
    size: str
    position: str
    confidence: float


@dataclass(frozen=True)
class Reading:
    """What is seen in a picture, the largest shape first."""

    size_hw: Size
    ground: Ground
    shapes: tuple[Found, ...]

    def scene(self) -> Scene:
        """The scene that would be drawn as what was seen: the truth that a picture without one is measured against."""
        known = [shape for shape in self.shapes if shape.kind]
        shapes = (Shape(shape.kind, shape.colour, shape.centre_yx, shape.radius_px) for shape in known)
        return Scene(self.size_hw, self.ground, tuple(shapes))


def read_picture(image: Image.Image) -> Reading:
    """Read shapes and ground out of a picture of the small world, 64 px to a few hundred a side."""
    pixels = _smoothed(np.asarray(image.convert("RGB"), np.float64))  # [H, W, 3], 0 to 255
    size_hw: Size = (pixels.shape[0], pixels.shape[1])
    lab = to_lab(pixels)
    strength = vividness(lab, find_tint(lab))
    vivid = strength > VIVID
    ground, behind = read_ground(pixels, ~_grown(vivid, SOFT_EDGE_PX))
    strong = [patch for patch in _patches(vivid) if np.quantile(strength[patch], 0.8) > STRONG]
    patches = [part for patch in strong for part in _one_coloured(patch, pixels, behind)]
    shapes = [_look_at(patch, patches, pixels, behind) for patch in patches]
    return Reading(size_hw, ground, tuple(sorted(shapes, key=lambda shape: -shape.radius_px)))


def _smoothed(pixels: Array) -> Array:
    """Each pixel with its neighbours, (1 2 1) down and across: against noise, and less than the blurs allow for."""
    for axis in (0, 1):
        around = np.pad(pixels, [(1, 1) if a == axis else (0, 0) for a in range(3)], mode="edge")
        before, after = (np.take(around, range(first, first + pixels.shape[axis]), axis) for first in (0, 2))
        pixels = (before + 2 * pixels + after) / 4
    return pixels


def _patches(mask: Array) -> list[Array]:
    """The connected parts of a mask that are larger than a speck, each as a mask."""
    smallest = SPECK_SHARE * min(mask.shape) ** 2
    labels = np.where(mask, np.arange(1, mask.size + 1).reshape(mask.shape), 0)
    while True:  # the highest number of each part spreads until it fills it
        spread = np.where(mask, _highest_near(labels), 0)
        spread[mask] = spread.ravel()[spread[mask] - 1]  # a number names a pixel, which may know a higher one already
        if (spread == labels).all():
            break
        labels = spread
    numbers, counts = np.unique(labels[mask], return_counts=True)
    return [labels == number for number, count in zip(numbers, counts, strict=True) if count >= smallest]


def _one_coloured(patch: Array, pixels: Array, behind: Array) -> list[Array]:
    """The patch, or its parts where two shapes of different colours touch in it."""
    colour = _colour_of(patch, pixels)
    share = _share(pixels, colour, behind)[..., None]
    strange = patch & (np.linalg.norm(pixels - behind - share * (colour - behind), axis=-1) > OTHER_LEVELS)
    strange = _grown(~_grown(~strange, 1), 1)  # edges are not shapes
    others = _patches(strange & patch)
    rest = patch & ~strange
    return [*_patches(rest), *others] if others else [patch]


def _look_at(patch: Array, patches: list[Array], pixels: Array, behind: Array) -> Found:
    size_hw: Size = (patch.shape[0], patch.shape[1])
    colour = _colour_of(patch, pixels)
    near = _grown(patch, SOFT_EDGE_PX)
    for other in patches:
        if other is not patch:
            near &= ~_grown(other, 1)
    share = np.where(near | patch, _share(pixels, colour, behind), 0.0)
    kind, overlap = _kind_of(share)
    (_, y, x), area = _centroid(share), float(share.sum())
    unit_area, down, across = _unit_form(kind or "circle")
    radius = float(np.sqrt(area / unit_area))
    centre = (y - radius * down, x - radius * across)
    words = size_word(radius, size_hw), position_word(centre, size_hw)
    return Found(kind, name_colour(colour, COLOURS), centre, radius, *words, overlap)


def _colour_of(patch: Array, pixels: Array) -> Array:
    """The colour of a patch away from its edges: that of its most vivid half, or of the commonest name among it."""
    inside = pixels[patch]  # [N, 3]
    strength = vividness(to_lab(inside))
    strong = inside[strength >= np.median(strength)]
    names = name_colours(strong, COLOURS)
    chosen: Array = np.median(strong[names == np.bincount(names).argmax()], axis=0)
    return chosen


def _share(pixels: Array, colour: Array, behind: Array) -> Array:
    """How much of each pixel is shape: its place on the line from the ground's colour to the shape's, 0 to 1."""
    line = colour - behind
    along: Array = ((pixels - behind) * line).sum(-1) / np.maximum((line**2).sum(-1), 1.0)
    return np.clip(along, 0.0, 1.0)


def _kind_of(share: Array) -> tuple[str, float]:
    """The kind whose outline overlaps most with this form, and by how much; "" where none fits."""
    form = _to_patch(share)
    kinds, outlines = _outlines()
    overlaps = 1 - np.abs(outlines - form).sum((-1, -2)) / (outlines.sum((-1, -2)) + form.sum())
    best = int(overlaps.argmax())
    overlap = float(overlaps[best])
    return (kinds[best] if overlap > SURE_OVERLAP else ""), overlap


@cache
def _outlines() -> tuple[list[str], Array]:
    """Every kind as it is drawn, at several blurs, each on a patch of its own: [N, PATCH, PATCH]."""
    radius = 48.0
    drawn = [(kind, draw_mask(Shape(kind, "", (64.0, 64.0), radius), (128, 128))) for kind in KINDS]
    blurred = [(kind, mask.filter(ImageFilter.GaussianBlur(blur * radius))) for kind, mask in drawn for blur in BLURS]
    return [kind for kind, _ in blurred], np.stack([_to_patch(_as_seen(np.asarray(mask) / 255)) for _, mask in blurred])


def _as_seen(mask: Array) -> Array:
    """A blurred mask as `_share` finds it: thin lines that are nowhere their full colour are still taken for full."""
    inside = mask[mask > 0.4]
    seen: Array = np.minimum(1.0, mask / np.median(inside[inside >= np.median(inside)]))
    return seen


@cache
def _unit_form(kind: str) -> tuple[float, float, float]:
    """Area in squared radii, and how far down and across from the centre the centroid lies, in radii."""
    mask = np.asarray(draw_mask(Shape(kind, "", (64.0, 64.0), 48.0), (128, 128))) / 255
    _, y, x = _centroid(mask)
    return float(mask.sum()) / 48.0**2, (y - 64.0) / 48.0, (x - 64.0) / 48.0


def _to_patch(share: Array) -> Array:
    """The form moved to the middle of a patch and scaled to a fixed area, by bilinear interpolation."""
    area, y, x = _centroid(share)
    steps = (np.arange(PATCH) + 0.5 - PATCH / 2) * np.sqrt(area / PATCH_SHARE) / PATCH
    down, across = _weights(y + steps, share.shape[0]), _weights(x + steps, share.shape[1])
    moved: Array = down @ share @ across.T
    return moved


def _weights(at: Array, side: int) -> Array:
    """Rows that pick, from `side` pixels, the values at these places; nothing lies outside."""
    distance = np.abs(at[:, None] - (np.arange(side) + 0.5)[None])
    weights: Array = np.maximum(0.0, 1.0 - distance)
    return weights


def _centroid(share: Array) -> tuple[float, float, float]:
    """Area in pixels, and the centroid's y and x."""
    area = max(float(share.sum()), 1e-9)
    y = float(share.sum(1) @ (np.arange(share.shape[0]) + 0.5)) / area
    x = float(share.sum(0) @ (np.arange(share.shape[1]) + 0.5)) / area
    return area, y, x


def _grown(mask: Array, steps: int) -> Array:
    for _ in range(steps):
        mask = _highest_near(mask)
    return mask


def _highest_near(values: Array) -> Array:
    """For each pixel the highest of its own value and its four neighbours'."""
    padded = np.pad(values, 1)
    near = (padded[:-2, 1:-1], padded[2:, 1:-1], padded[1:-1, :-2], padded[1:-1, 2:])
    highest: Array = values
    for neighbour in near:
        highest = np.maximum(highest, neighbour)
    return highest
