"""What there is to draw: one or two shapes on a quiet ground, made up from (seed, index) and nothing else.

Shapes are vivid and grounds are not, so that neither is ever taken for the other. Every word that a caption may use has
a range of its own, with a gap between neighbours: a shape is clearly small or clearly not.
"""

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

COLOURS = {
    "red": (205, 30, 40),
    "orange": (255, 136, 20),
    "yellow": (250, 226, 40),
    "green": (30, 150, 50),
    "cyan": (20, 200, 225),
    "blue": (20, 85, 215),
    "purple": (130, 25, 145),
    "pink": (255, 130, 190),
}
GROUNDS = {
    "white": (248, 248, 248),
    "grey": (140, 140, 140),
    "black": (16, 16, 16),
    "brown": (100, 66, 40),
    "sand": (220, 196, 150),
}
KINDS = ("circle", "square", "triangle", "star", "cross", "heart", "ring", "crescent")
SIZES_HW = ((64, 64), (96, 96), (128, 128), (80, 112), (112, 80), (96, 128), (128, 96), (64, 128), (128, 64))

# Radius as a share of the picture's short side; medium is the size that goes without saying.
RADII = {"small": (0.16, 0.19), "": (0.23, 0.27), "large": (0.33, 0.40)}
# Where along its side the centre of a shape lies that is at the top (or left), in the middle, at the bottom (or right).
ZONES = ((0.0, 0.38), (0.45, 0.55), (0.62, 1.0))
ROWS, COLUMNS = ("top", "", "bottom"), ("left", "", "right")

MARGIN = 0.03  # between a shape and the border, and half of what is between two shapes, as a share of the short side
OFF_AXIS = 0.5  # a shape left of another stands at most this share of their distance higher or lower
STRIPE_PX = 8  # no stripe is narrower

Point = tuple[float, float]
Size = tuple[int, int]
Style = Literal["plain", "stripes", "fade"]


@dataclass(frozen=True)
class Shape:
    """One filled shape; its radius is that of the circle it fits in."""

    kind: str
    colour: str
    centre_yx: Point
    radius_px: float


@dataclass(frozen=True)
class Ground:
    """What lies behind: one colour, upright stripes of two, or one that fades to another from top to bottom."""

    style: Style
    colour: str
    other: str = ""
    stripes: int = 0


@dataclass(frozen=True)
class Scene:
    """All that a picture shows. With two shapes the first stands left of the second, or above it."""

    size_hw: Size
    ground: Ground
    shapes: tuple[Shape, ...]


def held_out_combinations() -> tuple[tuple[str, str], ...]:
    """The (kind, colour) that are drawn for judging only: each kind once and each colour once."""
    colours = list(COLOURS)
    return tuple((kind, colours[(3 * i + 1) % len(colours)]) for i, kind in enumerate(KINDS))


def make_scene(seed: int, index: int, *, held_out: bool = False, sizes_hw: Sequence[Size] = SIZES_HW) -> Scene:
    """Make up picture number `index`; it depends on no other, so a longer data set begins with a shorter one.

    With `held_out` one of its shapes has a held-out combination of kind and colour; without, none has.
    """
    digest = hashlib.blake2b(f"shapes {seed} {index}{' held out' * held_out}".encode(), digest_size=16).digest()
    rng = random.Random(int.from_bytes(digest, "big"))
    size_hw = rng.choice(sizes_hw)
    ground = _make_ground(size_hw, rng)
    names = _name_shapes(2 if rng.random() < 0.6 else 1, held_out, rng)
    places = place_shapes(len(names), size_hw, rng)
    shapes = (Shape(*name, *place) for name, place in zip(names, places, strict=True))
    return Scene(size_hw, ground, tuple(shapes))


def place_shapes(count: int, size_hw: Size, rng: random.Random) -> list[tuple[Point, float]]:
    """Where one or two shapes stand: the centre and the radius in pixels of each."""
    places = None
    while places is None:  # a draw that does not fit the picture is drawn anew
        places = _place_one(size_hw, rng) if count == 1 else _place_two(size_hw, rng)
    return places


def size_word(radius_px: float, size_hw: Size) -> str:
    """ "small", "large", or "" for what lies between; the borders are in the middle of the gaps."""
    share = radius_px / min(size_hw)
    return "small" if share < 0.21 else "large" if share > 0.30 else ""


def position_word(centre_yx: Point, size_hw: Size) -> str:
    """ "middle", "top", "left", "top left" and so on; the borders are in the middle of the gaps."""
    row, column = (
        words[0 if at < 0.415 * side else 2 if at > 0.585 * side else 1]
        for words, at, side in zip((ROWS, COLUMNS), centre_yx, size_hw, strict=True)
    )
    return f"{row} {column}".strip() or "middle"


def relation_word(first: Point, second: Point) -> str:
    """Where the first centre is, seen from the second: "left of", "right of", "above" or "below"."""
    down, across = second[0] - first[0], second[1] - first[1]
    if abs(across) > abs(down):
        return "left of" if across > 0 else "right of"
    return "above" if down > 0 else "below"


def _make_ground(size_hw: Size, rng: random.Random) -> Ground:
    style: Style = rng.choice(("plain", "plain", "stripes", "fade"))
    colour, other = rng.sample(list(GROUNDS), 2)
    if style == "plain":
        return Ground(style, colour)
    return Ground(style, colour, other, rng.randint(4, size_hw[1] // STRIPE_PX) if style == "stripes" else 0)


def _name_shapes(count: int, held_out: bool, rng: random.Random) -> list[tuple[str, str]]:
    """Kinds and colours; two shapes differ in colour."""
    kept = held_out_combinations()
    free = [(kind, colour) for kind in KINDS for colour in COLOURS if (kind, colour) not in kept]
    names = [rng.choice(kept if held_out else free)]
    if count == 2:
        names.append(rng.choice([name for name in free if name[1] != names[0][1]]))
        rng.shuffle(names)
    return names


def _place_one(size_hw: Size, rng: random.Random) -> list[tuple[Point, float]] | None:
    radius = _draw_radius(size_hw, rng)
    reach = radius + MARGIN * min(size_hw)
    y, x = (_draw_at(side, reach, rng) for side in size_hw)
    return [((y, x), radius)]


def _draw_at(side: int, reach: float, rng: random.Random) -> float:
    """A place along one side, in one of the zones that have room for it."""
    zones = [(max(low * side, reach), min(high * side, side - reach)) for low, high in ZONES]
    return rng.uniform(*rng.choice([(low, high) for low, high in zones if high - low > 0.04 * side]))


def _place_two(size_hw: Size, rng: random.Random) -> list[tuple[Point, float]] | None:
    """Two places with room between them, on either side of the picture's middle; None if these sizes find none."""
    axis = rng.randrange(2)  # 0: one above the other, 1: one left of the other
    radii = [_draw_radius(size_hw, rng) for _ in range(2)]
    margin, half = MARGIN * min(size_hw), size_hw[axis] / 2
    for _ in range(30):
        first, second = [[rng.uniform(margin + radius, side - margin - radius) for side in size_hw] for radius in radii]
        along, off = second[axis] - first[axis], abs(second[1 - axis] - first[1 - axis])
        apart = along > sum(radii) + 2 * margin and off < OFF_AXIS * along
        if apart and first[axis] < half - margin and second[axis] > half + margin:
            return [((y, x), radius) for (y, x), radius in zip((first, second), radii, strict=True)]
    return None


def _draw_radius(size_hw: Size, rng: random.Random) -> float:
    return rng.uniform(*RADII[rng.choice(list(RADII))]) * min(size_hw)
