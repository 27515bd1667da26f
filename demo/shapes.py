"""Draw captioned pictures of simple shapes: the data set of the small world.

`python -m demo.shapes OUT` writes what `cache-build` reads first: `shape-00000.png` with `shape-00000.txt` beside it,
one caption a line. Nothing here knows of models, so it starts in a blink.

    (seed, index) -> Scene -> picture
                         \\-> captions, worked out from the geometry and so true of the picture
"""

import argparse
import hashlib
import math
import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from PIL import Image, ImageDraw

COLOURS = {
    "red": (214, 40, 40),
    "orange": (247, 140, 30),
    "yellow": (250, 214, 50),
    "green": (46, 152, 74),
    "blue": (38, 84, 200),
    "purple": (150, 62, 190),
    "white": (250, 250, 250),
    "black": (20, 20, 20),
}
KINDS = ("circle", "square", "triangle", "diamond", "star", "cross")
SIZES_HW = ((96, 96), (128, 128), (72, 72), (96, 128), (128, 96), (64, 128), (128, 64), (72, 108), (108, 72))

EXIT_USAGE = 64
MARGIN_PX = 3
OVERSAMPLING = 4
SMALL, LARGE = 0.23, 0.33  # radius as a share of the picture's short side

Point = tuple[float, float]


@dataclass(frozen=True)
class Shape:
    """One filled shape; its radius is that of the circle it fits in."""

    kind: str
    colour: str
    centre_yx: Point
    radius_px: float


@dataclass(frozen=True)
class Scene:
    """All that a picture shows. With two shapes the first stands left of the second, or above it."""

    size_hw: tuple[int, int]
    background: str
    shapes: tuple[Shape, ...]


class OneLineParser(argparse.ArgumentParser):
    """An argument parser that says what is wrong in one line, without the usage text, and exits with 64."""

    def error(self, message: str) -> NoReturn:
        self.exit(EXIT_USAGE, f"{self.prog}: {message}\n")


def make_scene(seed: int, index: int) -> Scene:
    """Make up picture number `index`; it depends on nothing else, so a longer data set begins with a shorter one."""
    digest = hashlib.blake2b(f"shapes {seed} {index}".encode(), digest_size=16).digest()
    rng = random.Random(int.from_bytes(digest, "big"))
    size_hw = rng.choice(SIZES_HW)
    background, *colours = rng.sample(list(COLOURS), 3)
    kinds = rng.sample(KINDS, 2)
    cells = [(0.0, 0.0, float(size_hw[0]), float(size_hw[1]))] if rng.random() < 0.4 else _two_cells(size_hw, rng)
    shapes = (_place(kind, colour, cell, rng) for kind, colour, cell in zip(kinds, colours, cells, strict=False))
    return Scene(size_hw, background, tuple(shapes))


def describe(scene: Scene) -> tuple[str, str]:
    """Say what the picture shows in two ways, both read off the scene's numbers."""
    if len(scene.shapes) == 1:
        return _describe_one(scene, scene.shapes[0])
    first, second = scene.shapes
    forth, back = ("left of", "right of") if _side_by_side(first, second) else ("above", "below")
    return (
        f"{_named(first)} {forth} {_named(second)} on {scene.background}",
        f"{_named(second)} {back} {_named(first)}, {scene.background} background",
    )


def draw(scene: Scene) -> Image.Image:
    """Draw the scene large and shrink it, which smooths the edges."""
    height, width = scene.size_hw
    big = Image.new("RGB", (width * OVERSAMPLING, height * OVERSAMPLING), COLOURS[scene.background])
    canvas = ImageDraw.Draw(big)
    for shape in scene.shapes:
        outline = [(x * OVERSAMPLING, y * OVERSAMPLING) for y, x in _outline(shape)]
        canvas.polygon(outline, fill=COLOURS[shape.colour])
    return big.reduce(OVERSAMPLING)


def write_shapes(out: Path, count: int = 512, seed: int = 0) -> Path:
    """Write `count` pictures and their captions into the folder `out`, over those of the same name."""
    out.mkdir(parents=True, exist_ok=True)
    for index in range(count):
        scene = make_scene(seed, index)
        captions = describe(scene)[: 2 if index % 3 == 0 else 1]
        # The caption goes first: whoever watches the folder never finds a picture without one.
        (out / f"shape-{index:05d}.txt").write_text("\n".join(captions) + "\n", encoding="utf-8")
        draw(scene).save(out / f"shape-{index:05d}.png")
    return out


def main(arguments: Sequence[str] | None = None) -> int:
    """The door of `python -m demo.shapes`."""
    parser = OneLineParser(prog="demo.shapes", description="Draw captioned pictures of simple shapes.")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to write into; made if missing")
    parser.add_argument("--count", type=int, default=512, help="pictures to draw (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="another seed, other pictures (default: %(default)s)")
    options = parser.parse_args(arguments)
    if options.count < 1:
        parser.error(f"argument --count: must be at least 1, not {options.count}")
    try:
        write_shapes(options.out, options.count, options.seed)
    except OSError as error:
        parser.error(f"cannot write to {options.out}: {error.strerror or error}")
    print(f"{options.count} pictures in {options.out}")
    return 0


def _two_cells(size_hw: tuple[int, int], rng: random.Random) -> list[tuple[float, float, float, float]]:
    """Cut the picture into halves (top, left, bottom, right) along its longer side, so that two shapes never meet."""
    height, width = size_hw
    lengthwise = width > height if width != height else rng.random() < 0.5
    if lengthwise:
        return [(0, 0, height, width / 2), (0, width / 2, height, width)]
    return [(0, 0, height / 2, width), (height / 2, 0, height, width)]


def _place(kind: str, colour: str, cell: tuple[float, float, float, float], rng: random.Random) -> Shape:
    top, left, bottom, right = cell
    radius = rng.uniform(0.45, 0.9) * (min(bottom - top, right - left) / 2 - MARGIN_PX)
    reach = radius + MARGIN_PX
    centre_yx = (rng.uniform(top + reach, bottom - reach), rng.uniform(left + reach, right - reach))
    return Shape(kind, colour, centre_yx, radius)


def _describe_one(scene: Scene, shape: Shape) -> tuple[str, str]:
    share = shape.radius_px / min(scene.size_hw)
    size = "small" if share < SMALL else "large" if share > LARGE else ""
    return (
        f"{_named(shape)} on {scene.background}",
        f"{_named(shape, size)} {_where(scene, shape)}, {scene.background} background",
    )


def _where(scene: Scene, shape: Shape) -> str:
    (y, x), (height, width) = shape.centre_yx, scene.size_hw
    row = "top" if y < 0.4 * height else "bottom" if y > 0.6 * height else ""
    column = "left" if x < 0.4 * width else "right" if x > 0.6 * width else ""
    return f"at the {row} {column}".replace("  ", " ").rstrip() if row or column else "in the middle"


def _named(shape: Shape, size: str = "") -> str:
    words = f"{size} {shape.colour} {shape.kind}".strip()
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def _side_by_side(first: Shape, second: Shape) -> bool:
    (y1, x1), (y2, x2) = first.centre_yx, second.centre_yx
    return x2 - x1 > first.radius_px + second.radius_px and x2 - x1 >= y2 - y1


def _outline(shape: Shape) -> list[Point]:
    """The corners as (y, x); each of them lies on the shape's circle or inside it."""
    match shape.kind:
        case "circle":
            return _corners(shape, 64, [1.0])
        case "square":
            return _corners(shape, 4, [1.0], turn=0.5)
        case "triangle":
            return _corners(shape, 3, [1.0])
        case "diamond":
            return [(y, shape.centre_yx[1] + 0.7 * (x - shape.centre_yx[1])) for y, x in _corners(shape, 4, [1.0])]
        case "star":
            return _corners(shape, 10, [1.0, 0.42])
        case "cross":
            return _cross(shape)
    raise ValueError(f"no such kind of shape: {shape.kind}")


def _corners(shape: Shape, count: int, reaches: Sequence[float], turn: float = 0.0) -> list[Point]:
    """`count` corners around the centre, clockwise from the top, at these shares of the radius in turn."""
    y, x = shape.centre_yx
    angles = [2 * math.pi * (i + turn) / count for i in range(count)]
    radii = [shape.radius_px * reaches[i % len(reaches)] for i in range(count)]
    return [(y - r * math.cos(a), x + r * math.sin(a)) for a, r in zip(angles, radii, strict=True)]


def _cross(shape: Shape) -> list[Point]:
    """A plus sign: one arm, four times, each a quarter turn on."""
    y, x = shape.centre_yx
    long, thick = 0.95 * shape.radius_px, 0.3 * shape.radius_px
    arm = [(-thick, -thick), (-long, -thick), (-long, thick)]
    quarters = [arm, [(dx, -dy) for dy, dx in arm], [(-dy, -dx) for dy, dx in arm], [(-dx, dy) for dy, dx in arm]]
    return [(y + dy, x + dx) for quarter in quarters for dy, dx in quarter]


if __name__ == "__main__":
    sys.exit(main())
