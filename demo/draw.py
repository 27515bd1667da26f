"""Scene -> picture: every kind's outline, the grounds, smooth edges. The judge takes its templates from here too."""

import math
from collections.abc import Callable, Sequence
from functools import cache

from PIL import Image, ImageDraw

from demo.scene import COLOURS, GROUNDS, Ground, Point, Scene, Shape

OVERSAMPLING = 4

Outline = list[Point]  # corners (y, x)


def draw(scene: Scene) -> Image.Image:
    """Draw the scene; each shape lies under a mask that was drawn large and shrunk, which smooths its edges."""
    picture = draw_ground(scene.ground, scene.size_hw)
    for shape in scene.shapes:
        picture.paste(COLOURS[shape.colour], mask=draw_mask(shape, scene.size_hw))
    return picture


def draw_ground(ground: Ground, size_hw: tuple[int, int]) -> Image.Image:
    """The ground alone: plain, upright stripes, or a fade from top to bottom."""
    height, width = size_hw
    first, second = (
        Image.new("RGB", (width, height), GROUNDS[colour]) for colour in (ground.colour, ground.other or ground.colour)
    )
    if ground.style == "plain":
        return first
    if ground.style == "fade":
        column = Image.frombytes("L", (1, height), bytes(round(255 * y / (height - 1)) for y in range(height)))
        return Image.composite(second, first, column.resize((width, height)))
    mask = Image.new("L", (width * OVERSAMPLING, height * OVERSAMPLING))
    stripe = width * OVERSAMPLING / ground.stripes
    for number in range(1, ground.stripes, 2):
        box = (round(number * stripe), 0, round((number + 1) * stripe) - 1, mask.height)
        ImageDraw.Draw(mask).rectangle(box, fill=255)
    return Image.composite(second, first, mask.reduce(OVERSAMPLING))


def draw_mask(shape: Shape, size_hw: tuple[int, int]) -> Image.Image:
    """How much of each pixel the shape covers, 0 to 255."""
    height, width = size_hw
    mask = Image.new("L", (width * OVERSAMPLING, height * OVERSAMPLING))
    canvas = ImageDraw.Draw(mask)
    (y, x), radius = shape.centre_yx, shape.radius_px
    outer, *holes = _outlines(shape.kind)
    for outline, fill in ((outer, 255), *((hole, 0) for hole in holes)):
        corners = [(OVERSAMPLING * (x + radius * dx), OVERSAMPLING * (y + radius * dy)) for dy, dx in outline]
        canvas.polygon(corners, fill=fill)
    return mask.reduce(OVERSAMPLING)


@cache
def _outlines(kind: str) -> list[Outline]:
    """The outline and those of its holes, in units of the radius: the middle of their box is at (0, 0)."""
    outlines = OUTLINES[kind]()
    ys, xs = zip(*outlines[0], strict=True)
    y, x = (min(ys) + max(ys)) / 2, (min(xs) + max(xs)) / 2
    reach = max(math.hypot(dy - y, dx - x) for dy, dx in outlines[0])
    return [[((dy - y) / reach, (dx - x) / reach) for dy, dx in outline] for outline in outlines]


def _around(count: int, reaches: Sequence[float] = (1.0,), turn: float = 0.0) -> Outline:
    """`count` corners around the centre, clockwise from the top, at these shares of the radius in turn."""
    angles = [2 * math.pi * (i + turn) / count for i in range(count)]
    radii = [reaches[i % len(reaches)] for i in range(count)]
    return [(-r * math.cos(a), r * math.sin(a)) for a, r in zip(angles, radii, strict=True)]


def _cross() -> list[Outline]:
    """A plus sign: one arm, four times, each a quarter turn on."""
    long, thick = 0.95, 0.3
    arm = [(-thick, -thick), (-long, -thick), (-long, thick)]
    quarters = [arm, [(x, -y) for y, x in arm], [(-y, -x) for y, x in arm], [(-x, y) for y, x in arm]]
    return [[corner for quarter in quarters for corner in quarter]]


def _heart() -> list[Outline]:
    turns = [2 * math.pi * i / 64 for i in range(64)]
    curve = [
        (-(13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)), 16 * math.sin(t) ** 3)
        for t in turns
    ]
    return [curve]


def _ring() -> list[Outline]:
    return [_around(64), [(0.55 * y, 0.55 * x) for y, x in _around(64)]]


def _crescent() -> list[Outline]:
    """The unit circle without the part that a smaller circle to its right covers."""
    apart, bite = 0.5, 0.8
    tip = math.acos((1 + apart**2 - bite**2) / (2 * apart))  # where the circles meet, seen from the centre
    inner_tip = math.acos((apart**2 + bite**2 - 1) / (2 * apart * bite))  # and seen from the bite's centre
    steps = [i / 48 for i in range(49)]
    outer_turns = [tip + 2 * (math.pi - tip) * step for step in steps]
    inner_turns = [inner_tip * (2 * step - 1) for step in steps]
    outer = [(-math.sin(t), math.cos(t)) for t in outer_turns]
    return [outer + [(-bite * math.sin(t), apart - bite * math.cos(t)) for t in inner_turns]]


OUTLINES: dict[str, Callable[[], list[Outline]]] = {
    "circle": lambda: [_around(64)],
    "square": lambda: [_around(4, turn=0.5)],
    "triangle": lambda: [_around(3)],
    "star": lambda: [_around(10, (1.0, 0.42))],
    "cross": _cross,
    "heart": _heart,
    "ring": _ring,
    "crescent": _crescent,
}
