"""What lies behind the shapes: plain, stripes or fade, read off the pixels between them."""

from typing import Any

import numpy as np

from demo.colour import name_colour
from demo.scene import GROUNDS, Ground

BETTER = 0.6  # a fade or stripes must leave at most this share of the error that a plain ground leaves

Array = np.ndarray[Any, np.dtype[Any]]


def read_ground(pixels: Array, free: Array) -> tuple[Ground, Array]:
    """The ground as seen where `free` [H, W] is true, and the picture [H, W, 3] of it without the shapes."""
    if free.mean() < 0.02:  # there is nothing between the shapes: not a picture of this world
        free = np.ones_like(free)
    candidates = (_plain(pixels, free), _fade(pixels, free), _stripes(pixels, free))
    errors = [float(np.abs(picture - pixels)[free].mean()) for _, picture in candidates]
    plain, *others = candidates
    for number in np.argsort(errors[1:]):
        ground, picture = others[number]
        if ground.colour != ground.other and errors[1 + number] < BETTER * errors[0]:
            return ground, picture
    return plain


def _plain(pixels: Array, free: Array) -> tuple[Ground, Array]:
    colour = np.median(pixels[free], axis=0)
    return Ground("plain", name_colour(colour, GROUNDS)), np.broadcast_to(colour, pixels.shape)


def _fade(pixels: Array, free: Array) -> tuple[Ground, Array]:
    """A straight line through the rows' means."""
    rows, means = _means(pixels, free)
    slope, start = np.polyfit(rows, means, 1) if len(rows) > 1 else (np.zeros(3), means[0])
    line = start + np.arange(len(pixels))[:, None] * slope
    top, bottom = (name_colour(colour, GROUNDS) for colour in (line[0], line[-1]))
    return Ground("fade", top, bottom), np.broadcast_to(line[:, None], pixels.shape)


def _stripes(pixels: Array, free: Array) -> tuple[Ground, Array]:
    """The columns' means, parted in two at the middle of their strongest direction."""
    columns, means = _means(pixels.swapaxes(0, 1), free.T)
    spread = means - means.mean(0)
    along = spread @ np.linalg.svd(spread, full_matrices=False)[2][0]
    is_first = along > (along.max() + along.min()) / 2
    is_first = is_first == is_first[0]  # the leftmost stripe's colour is named first
    colours = [np.median(means[chosen], axis=0) if chosen.any() else means[0] for chosen in (is_first, ~is_first)]
    names = [name_colour(colour, GROUNDS) for colour in colours]
    count = 1 + int((is_first[1:] != is_first[:-1]).sum())
    every = np.arange(pixels.shape[1])
    across = np.stack([np.interp(every, columns, means[:, channel]) for channel in range(3)], -1)
    return Ground("stripes", names[0], names[1], count), np.broadcast_to(across[None], pixels.shape)


def _means(pixels: Array, free: Array) -> tuple[Array, Array]:
    """The rows in which something is free, and the mean colour of what is."""
    counts = free.sum(1)
    rows = np.flatnonzero(counts)
    return rows, (pixels * free[..., None]).sum(1)[rows] / counts[rows, None]
