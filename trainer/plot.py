"""Line plots as inline SVG: axes with round numbers, a legend, and each point's value under the pointer.

Pages of this program open without a network and stand in no need of a script; a curve over timesteps or steps is all
they plot. Colours are those of Okabe and Ito (2008), which colour-blind readers tell apart.
"""

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

COLOURS = ("#999999", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
WIDTH, HEIGHT = 760, 300
LEFT, RIGHT, TOP, BOTTOM = 64, 16, 34, 42
LETTER, ROW = 7, 18  # what a letter of the legend takes, and a row of it
DECADES = 1.5  # spread of values from which an axis is logarithmic


@dataclass(frozen=True)
class Line:
    """One curve: its points (x, y) from left to right; `colour` is an index into COLOURS."""

    label: str
    points: Sequence[tuple[float, float]]
    colour: int
    is_dashed: bool = False
    bars: Mapping[float, float] = field(default_factory=dict)  # half the height of the error bar at an x

    def ends(self) -> list[float]:
        """Every y that is drawn, ends of error bars included."""
        return [y + side * self.bars.get(x, 0.0) for x, y in self.points for side in (-1, 1)]


@dataclass(frozen=True)
class Axis:
    """What an axis says, and from where to where it goes."""

    label: str
    low: float
    high: float
    is_log: bool = False

    def at(self, value: float) -> float:
        """Where a value lies, 0 at the low end and 1 at the high end."""
        low, high, value = (math.log10(v) if self.is_log else v for v in (self.low, self.high, value))
        return (value - low) / (high - low) if high > low else 0.5


def line_plot(
    title: str,
    lines: Sequence[Line],
    x_label: str,
    y_label: str,
    marks: Sequence[tuple[float, str]] = (),
    x_range: tuple[float, float] | None = None,
) -> str:
    """An <svg> of curves; `marks` are upright lines (x, what stands there). Empty where there is no point."""
    lines = [line for line in (replace(one, points=_finite(one.points)) for one in lines) if line.points]
    points = [point for one in lines for point in one.points]
    if not points:
        return ""
    legend, down = _legend(lines)
    x = _axis(x_label, [*(px for px, _ in points), *(x_range or ())], may_be_log=False)
    y = _axis(y_label, [py for _, py in points], [end for one in lines for end in one.ends()], may_be_log=True)
    parts = [
        f'<svg class=plot viewBox="0 0 {WIDTH} {HEIGHT + down}" role=img aria-label="{html.escape(title)}">',
        f"<title>{html.escape(title)}</title>",
        *legend,
        f'<g transform="translate(0 {down})">',
        *_grid(x, y),
        *(_mark(x, value, label) for value, label in marks if x.low <= value <= x.high),
        *(part for one in lines for part in _curve(one, x, y)),
        "</g></svg>",
    ]
    return "\n".join(parts)


def ticks(low: float, high: float, most: int = 8) -> list[float]:
    """Round numbers within [low, high], at most `most`."""
    span = high - low
    if span <= 0:
        return [low]
    step = 10 ** math.floor(math.log10(span / most))
    step = next(step * factor for factor in (1, 2, 5, 10) if span / (step * factor) <= most)
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 12) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten within [low, high]."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    return [factor * 10.0**p for p in powers for factor in (1, 2, 5) if low <= factor * 10.0**p <= high]


def tick_texts(values: Sequence[float]) -> list[str]:
    """Evenly placed numbers as people read them, with as many digits as tell them apart."""
    for digits in range(3, 12):
        texts = [f"{value:.{digits}g}" for value in values]
        if all(abs(float(text) - value) <= 1e-9 * abs(value) for text, value in zip(texts, values, strict=True)):
            break
    return texts


def shown(value: float) -> str:
    """A number as people read it: four digits."""
    return f"{value:.4g}"


def _finite(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    return [point for point in points if all(math.isfinite(value) for value in point)]


def _axis(label: str, values: Sequence[float], ends: Sequence[float] = (), *, may_be_log: bool) -> Axis:
    """An axis that has room for all `values` and, where it is not logarithmic, for the `ends` of their error bars."""
    low, high = min(values), max(values)
    if not may_be_log:
        return Axis(label, low, high)
    if low > 0 and math.log10(high / low) > DECADES:
        return Axis(label, low / 1.2, high * 1.2, is_log=True)
    low, high = min(low, *ends, low), max(high, *ends, high)
    pad = (high - low) * 0.08 or abs(high) * 0.1 or 1.0
    return Axis(label, 0.0 if 0 <= low < pad else low - pad, high + pad)


def _x(axis: Axis, value: float) -> float:
    return round(LEFT + axis.at(value) * (WIDTH - LEFT - RIGHT), 1)


def _y(axis: Axis, value: float) -> float:
    return round(HEIGHT - BOTTOM - axis.at(value) * (HEIGHT - TOP - BOTTOM), 1)


def _grid(x: Axis, y: Axis) -> list[str]:
    left, right, top, bottom = LEFT, WIDTH - RIGHT, TOP, HEIGHT - BOTTOM
    parts = []
    heights = log_ticks(y.low, y.high) if y.is_log else ticks(y.low, y.high)
    for value, text in zip(heights, tick_texts(heights), strict=True):
        at = _y(y, value)
        parts.append(f'<line class=grid x1="{left}" x2="{right}" y1="{at}" y2="{at}"/>')
        parts.append(f'<text x="{left - 6}" y="{at + 4}" text-anchor=end>{text}</text>')
    for value in ticks(x.low, x.high, 12):
        at = _x(x, value)
        parts.append(f'<line class=tick x1="{at}" x2="{at}" y1="{bottom}" y2="{bottom + 4}"/>')
        parts.append(f'<text x="{at}" y="{bottom + 17}" text-anchor=middle>{shown(value)}</text>')
    parts.append(f'<path class=frame d="M{left} {top}V{bottom}H{right}"/>')
    parts.append(
        f'<text x="{(left + right) / 2}" y="{HEIGHT - 6}" text-anchor=middle>{html.escape(x.label)}</text>'
        f'<text transform="translate(14 {(top + bottom) / 2}) rotate(-90)" text-anchor=middle>'
        f"{html.escape(y.label)}</text>"
    )
    return parts


def _mark(x: Axis, value: float, label: str) -> str:
    at = _x(x, value)
    return (
        f'<line class=mark x1="{at}" x2="{at}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>'
        f'<text class=mark x="{at + 4}" y="{HEIGHT - BOTTOM - 6}">{html.escape(label)}</text>'
    )


def _curve(line: Line, x: Axis, y: Axis) -> list[str]:
    colour = COLOURS[line.colour % len(COLOURS)]
    places = [(_x(x, px), _y(y, py)) for px, py in line.points]
    path = "M" + "L".join(f"{px} {py}" for px, py in places)
    dashes = ' stroke-dasharray="5 4"' if line.is_dashed else ""
    bars = [_bar(line, colour, point, x, y) for point in line.points if line.bars.get(point[0])]
    dots = [
        f'<circle cx="{px}" cy="{py}" r="3" fill="{colour}"><title>{html.escape(_told(line, own))}</title></circle>'
        for (px, py), own in zip(places, line.points, strict=True)
    ]
    return [f'<path class=curve d="{path}" stroke="{colour}"{dashes}/>', *bars, *dots]


def _bar(line: Line, colour: str, point: tuple[float, float], x: Axis, y: Axis) -> str:
    """An error bar, cut where the frame ends; those of several curves stand beside each other."""
    half = line.bars[point[0]]
    low, high = (min(max(point[1] + side * half, y.low), y.high) for side in (-1, 1))
    at = round(_x(x, point[0]) + 2 * (line.colour % len(COLOURS) - 1), 1)
    return f'<line class=bar x1="{at}" x2="{at}" y1="{_y(y, low)}" y2="{_y(y, high)}" stroke="{colour}"/>'


def _told(line: Line, point: tuple[float, float]) -> str:
    """What stands under the pointer."""
    half = line.bars.get(point[0])
    return f"{line.label}: {shown(point[1])}{f' ± {half:.2g}' if half else ''} at {shown(point[0])}"


def _legend(lines: Sequence[Line]) -> tuple[list[str], int]:
    """The legend above the frame, and how much room it takes besides the one row that has its place there."""
    parts, at, down = [], LEFT, 0
    for line in lines:
        width = 28 + LETTER * len(line.label)
        if at > LEFT and at + width > WIDTH:
            at, down = LEFT, down + ROW
        colour, dashes = COLOURS[line.colour % len(COLOURS)], ' stroke-dasharray="5 4"' if line.is_dashed else ""
        parts.append(
            f'<line x1="{at}" x2="{at + 22}" y1="{down + 14}" y2="{down + 14}" stroke="{colour}" stroke-width="2"'
            f'{dashes}/><text x="{at + 28}" y="{down + 18}">{html.escape(line.label)}</text>'
        )
        at += width + 16
    return parts, down
