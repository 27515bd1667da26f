"""The losses of an evaluation's page: by timestep on one axis, on either side of a boundary, round by round.

Beside each loss stands the interval that it lies in for want of held-out samples, and its change against the start
model's on the same draws, whose interval is far narrower.
"""

import html
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise

from trainer.eval_axis import BESIDE
from trainer.lineup import START
from trainer.page_pictures import choice_name
from trainer.page_tables import Z, number, percent, table
from trainer.plot import Line, line_plot
from trainer.report import Choice, Report, Round, StretchLoss


def by_timestep(newest: Round) -> list[str]:
    """Everybody on one axis: each on its own part drawn through, elsewhere dashed."""
    parts, lines, changes = newest.choices[-1].answers, list[Line](), list[Line]()
    for colour, name in enumerate(_names(newest)):
        for part in parts:
            of, start = (_stretch(newest, one, part.low, part.high) for one in (name, START))
            is_own = name in (START, part.candidate)
            line = Line(name if is_own else f"{name}, elsewhere", [], colour, is_dashed=not is_own)
            lines.append(_losses(line, of))
            changes.append(_changes(line, of, start))
    marks = [(part.low, f"boundary {part.low}") for part in parts[1:]]
    axis = (0.0, float(parts[-1].high))
    return [
        line_plot("Eval loss by timestep", _joined(lines), "timestep", "eval loss", marks, axis),
        line_plot("Change of loss by timestep", _joined(changes), "timestep", "against the start, %", marks, axis),
        _table(newest, [(part.low, part.high) for part in reversed(parts)]),
    ]


def beside_boundaries(newest: Round) -> list[str]:
    """The timesteps on either side of each boundary."""
    answers = newest.choices[-1].answers
    found = []
    for lower, upper in pairwise(answers):
        if START in (lower.candidate, upper.candidate):
            continue
        near = {(one.low, one.high) for one in newest.losses if upper.low in (one.low, one.high)}
        ranges = sorted((low, high) for low, high in near if high - low <= BESIDE)
        found += [f"<h3>On either side of {upper.low}</h3>", _table(newest, ranges)]
    return found


def over_rounds(report: Report) -> list[str]:
    """What became of every way to fill the parts, over the steps of the experts; none where there is one round."""
    if len(report.rounds) < 2:
        return []
    return [
        "<h2>Round by round</h2>",
        _curves(report, "Eval loss by step", "eval loss", lambda one, _: (one.loss, None)),
        _curves(report, "Change of loss by step", "against the start, %", _change),
        _curves(report, "CLIP score by step", "CLIP score", lambda one, _: (one.clip, None)),
    ]


def _table(newest: Round, ranges: Sequence[tuple[int, int]]) -> str:
    """Everybody's loss over some stretches, and its change against the start model's."""
    rows = []
    for name in _names(newest):
        cells = []
        for low, high in ranges:
            of, start = (_stretch(newest, one, low, high) for one in (name, START))
            loss = number(None) if of is None else number(of.loss, of.error)
            is_change = of is not None and start is not None and name != START
            change = percent(of.change, of.change_error, start.loss) if is_change and of and start else "–"
            cells.append(loss if change == "–" else f"{loss}<br>{change}")
        rows.append([html.escape(name), *cells])
    return table(["", *(f"[{low}, {high})" for low, high in ranges)], rows)


def _losses(line: Line, of: StretchLoss | None) -> Line:
    if of is None:
        return line
    points = [((low + high) / 2, loss) for low, high, loss, _ in of.bins if loss is not None]
    bars = {(low + high) / 2: Z * own for (low, high, *_), (own, _) in zip(of.bins, of.bin_errors, strict=False) if own}
    return replace(line, points=points, bars=bars)


def _changes(line: Line, of: StretchLoss | None, start: StretchLoss | None) -> Line:
    """A curve as its change against the start model's, in per cent; below 0 is better."""
    if of is None or start is None:
        return line
    before = {(low + high) / 2: loss for low, high, loss, _ in start.bins if loss}
    points = [(x, 100 * (y / before[x] - 1)) for x, y in _losses(line, of).points if x in before]
    errors = {(low + high) / 2: more for (low, high, *_), (_, more) in zip(of.bins, of.bin_errors, strict=False)}
    return replace(
        line, points=points, bars={x: 100 * Z * e / before[x] for x, e in errors.items() if e and x in before}
    )


def _joined(lines: Sequence[Line]) -> list[Line]:
    """Lines of the same label as one, so that a legend names each once."""
    joined: dict[str, Line] = {}
    for one in lines:
        before = joined.get(one.label, replace(one, points=[], bars={}))
        joined[one.label] = replace(one, points=[*before.points, *one.points], bars={**before.bars, **one.bars})
    return [one for one in joined.values() if one.points]


def _change(one: Choice, start: Choice) -> tuple[float | None, float | None]:
    if one is start or one.change is None or not start.loss:
        return None, None
    return 100 * one.change / start.loss, None if one.change_error is None else 100 * one.change_error / start.loss


def _curves(
    report: Report,
    title: str,
    what: str,
    value_of: Callable[[Choice, Choice], tuple[float | None, float | None]],
) -> str:
    """A number of each choice, with its error, over the optimizer steps that the experts have done together."""
    lines: dict[str, Line] = {}
    for round_ in report.rounds:
        steps = float(sum(expert.step or 0 for expert in round_.experts))
        for one in round_.choices:
            name = choice_name(one)
            line = lines.setdefault(name, Line(name, [], len(lines)))
            value, error = value_of(one, round_.choices[0])
            if value is not None:
                bars = {**line.bars, steps: Z * error} if error else line.bars
                lines[name] = replace(line, points=[*line.points, (steps, value)], bars=bars)
    return line_plot(title, list(lines.values()), "steps of all experts together", what)


def _names(newest: Round) -> list[str]:
    return list(dict.fromkeys(one.candidate for one in newest.losses))


def _stretch(newest: Round, name: str, low: int, high: int) -> StretchLoss | None:
    return next((one for one in newest.losses if (one.candidate, one.low, one.high) == (name, low, high)), None)
