"""OUT/report.json as a page for people: one file with its plots and pictures in it, which opens without a network.

Names, captions and prompts are other people's text: every one of them is escaped.
"""

import html
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from pathlib import Path

from trainer.eval_axis import BESIDE
from trainer.lineup import START
from trainer.page_pictures import STYLE as PICTURE_STYLE
from trainer.page_pictures import choice_name, pictures_of
from trainer.plot import Line, line_plot, shown
from trainer.report import Choice, JudgedExpert, Report, Round, StretchLoss

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 72rem; padding: 0 1rem; color: #222; }
h2 { margin-top: 2.2rem; } code { overflow-wrap: anywhere; } .note { color: #8a4b00; }
table { border-collapse: collapse; margin: 1rem 0; }
th, td { padding: .25rem .7rem; text-align: right; border-bottom: 1px solid #ddd; }
th.text, td.text { text-align: left; }
.best { font-weight: 600; background: #e8f4ec; }
.plot { width: 100%; max-width: 58rem; height: auto; display: block; font: 11px system-ui, sans-serif; margin: 1rem 0; }
.plot .grid { stroke: #eee; } .plot .tick { stroke: #888; } .plot .frame { fill: none; stroke: #888; }
.plot .curve { fill: none; stroke-width: 2; } .plot line.mark { stroke: #bbb; stroke-dasharray: 2 3; }
.plot text.mark { fill: #777; }
"""


def report_page(report: Report, out: Path) -> str:
    """The whole page; `out` is where the report's pictures lie."""
    newest = report.rounds[-1]
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8><title>Experts, evaluated</title>",
        f"<style>{STYLE}{PICTURE_STYLE}</style><h1>Experts, evaluated</h1>",
        *_what(report, newest),
        "<h2>Every way to fill the parts</h2>",
        _choices(newest),
        *pictures_of(report, newest, out),
        "<h2>Loss by timestep</h2>",
        *_losses(newest),
        *_beside(newest),
        *_handover(newest),
        *_sweep(newest),
        *_over_rounds(report),
    ]
    return "\n".join(part for part in parts if part) + "\n"


def table(head: Sequence[str], rows: Iterable[Sequence[str]], texts: int = 1) -> str:
    """A <table> of cells that are HTML already: `texts` columns of words, then numbers."""
    lines = [_row("th", head, texts), *(_row("td", row, texts) for row in rows)]
    return f"<table><thead>{lines[0]}</thead><tbody>{''.join(lines[1:])}</tbody></table>"


def _row(tag: str, cells: Sequence[str], texts: int) -> str:
    kinds = [" class=text" if index < texts else "" for index in range(len(cells))]
    return "<tr>" + "".join(f"<{tag}{kind}>{cell}</{tag}>" for kind, cell in zip(kinds, cells, strict=True)) + "</tr>"


def number(value: float | None) -> str:
    """A number for a cell; a dash where there is none."""
    return "–" if value is None else shown(value)


def _what(report: Report, newest: Round) -> list[str]:
    text = html.escape
    rows = [[text(one.name), f"<code>{text(one.run)}</code>", _range(one), _state(one)] for one in newest.experts]
    return [
        f"<p>Round {newest.number}, {text(newest.at)}, {newest.took_s:.0f} s. Start model "
        f"<code>{text(report.model)}</code>; {report.samples} held-out samples of manifest "
        f"<code>{text(report.manifest)}</code> (<code>{text(report.digest[:16])}</code>), {report.draws} draws over "
        "each part of the schedule: the same samples, timesteps and noise for everybody.</p>",
        table(["expert", "run", "timesteps", ""], rows, texts=4),
        *(f"<p class=note>{text(note)}</p>" for note in report.notes),
    ]


def _range(one: JudgedExpert) -> str:
    return "–" if one.low is None else f"[{one.low}, {one.high})"


def _state(one: JudgedExpert) -> str:
    if one.state != "judged":
        return one.state
    return f"step {one.step}, {'averaged' if one.weights == 'ema' else 'raw'} weights"


def _choices(newest: Round) -> str:
    """The table of all choices, high timesteps first, as a picture is drawn."""
    parts = list(reversed(newest.choices[0].answers))
    head = [f"timesteps [{part.low}, {part.high})" for part in parts]
    best_loss = min((one.loss for one in newest.choices if one.loss is not None), default=None)
    best_clip = max((one.clip for one in newest.choices if one.clip is not None), default=None)
    rows = [
        [
            *(html.escape(answer.candidate) for answer in reversed(one.answers)),
            _marked(one.loss, best_loss),
            _marked(one.clip, best_clip),
        ]
        for one in newest.choices
    ]
    return table([*head, "eval loss", "CLIP score"], rows, texts=len(parts))


def _marked(value: float | None, best: float | None) -> str:
    return f"<span class=best>{number(value)}</span>" if value is not None and value == best else number(value)


def _losses(newest: Round) -> list[str]:
    """Everybody on one axis: each on its own part drawn through, elsewhere dashed."""
    parts, names = newest.choices[-1].answers, _names(newest)
    lines = []
    for colour, name in enumerate(names):
        for part in parts:
            of = _stretch(newest, name, part.low, part.high)
            points = [] if of is None else [((a + b) / 2, loss) for a, b, loss, _ in of.bins if loss is not None]
            is_own = name in (START, part.candidate)
            lines.append(Line(name if is_own else f"{name}, elsewhere", points, colour, is_dashed=not is_own))
    marks = [(part.low, f"boundary {part.low}") for part in parts[1:]]
    axis = (0.0, float(parts[-1].high))
    plot = line_plot("Eval loss by timestep", _joined(lines), "timestep", "eval loss", marks, axis)
    change = line_plot("Change of loss by timestep", _changes(lines), "timestep", "against the start, %", marks, axis)
    rows = [
        [html.escape(name), *(number(_loss(newest, name, part.low, part.high)) for part in reversed(parts))]
        for name in names
    ]
    return [plot, change, table(["", *(f"[{part.low}, {part.high})" for part in reversed(parts))], rows)]


def _changes(lines: Sequence[Line]) -> list[Line]:
    """Each curve as its change against the start model's, in per cent; below 0 is better."""
    start = {x: y for one in lines if one.label == START for x, y in one.points}
    return _joined(
        [
            Line(one.label, [(x, 100 * (y / start[x] - 1)) for x, y in one.points if start.get(x)], *one.style)
            for one in lines
        ]
    )


def _joined(lines: Sequence[Line]) -> list[Line]:
    """Lines of the same label as one, so that a legend names each once."""
    joined: dict[str, Line] = {}
    for one in lines:
        before = joined[one.label].points if one.label in joined else []
        joined[one.label] = Line(one.label, [*before, *one.points], *one.style)
    return [one for one in joined.values() if one.points]


def _beside(newest: Round) -> list[str]:
    """The timesteps on either side of each boundary."""
    answers = newest.choices[-1].answers
    found = []
    for lower, upper in pairwise(answers):
        if START in (lower.candidate, upper.candidate):
            continue
        near = {(one.low, one.high) for one in newest.losses if upper.low in (one.low, one.high)}
        ranges = sorted((low, high) for low, high in near if high - low <= BESIDE)
        rows = [
            [html.escape(name), *(number(_loss(newest, name, low, high)) for low, high in ranges)]
            for name in _names(newest)
        ]
        found.append(f"<h3>On either side of {upper.low}</h3>")
        found.append(table(["", *(f"[{low}, {high})" for low, high in ranges)], rows))
    return found


def _handover(newest: Round) -> list[str]:
    """What is handed over beside what real latents would have given: moments by channel, power by frequency."""
    if not newest.handover:
        return []
    rows, curves = [], []
    for colour, one in enumerate(newest.handover):
        for told, facts in (("drawn", one.drawn), ("real", one.real)):
            moments = [*map(number, facts.mean), *map(number, facts.variance)]
            rows.append([html.escape(one.candidate), told, *moments])
        bands = list(zip(one.drawn.power, one.real.power, strict=True))
        points = [((i + 0.5) / len(bands) / 2, a / b) for i, (a, b) in enumerate(bands) if a is not None and b]
        curves.append(Line(one.candidate, points, colour))
    first, channels = newest.handover[0], range(1, 1 + len(newest.handover[0].drawn.mean))
    head = ["above", "latents", *(f"mean {i}" for i in channels), *(f"variance {i}" for i in channels)]
    return [
        "<h2>What is handed over</h2>",
        f"<p>x_0 as it is estimated at t = {first.timestep:.0f}, the last step above the boundary: of {first.pictures} "
        "pictures drawn from noise to held-out captions, and of these held-out pictures' own latents noised to that "
        "step. Alike means that whoever answers below is given what it was trained on.</p>",
        table(head, rows, texts=2),
        line_plot("Power by frequency", curves, "cycles per latent pixel", "power, drawn / real"),
    ]


def _sweep(newest: Round) -> list[str]:
    losses = [(float(one.boundary), one.loss) for one in newest.sweep if one.loss is not None]
    if not losses:
        return []
    trained = newest.choices[-1].answers[-1].low
    mark = [(float(trained), f"trained for {trained}")]
    best = min(losses, key=lambda point: point[1])
    return [
        "<h2>Handing over elsewhere</h2>",
        f"<p>The same two experts, with the upper one answering from another timestep on. Lowest loss: "
        f"{shown(best[1])} at {best[0]:.0f}.</p>",
        line_plot("Loss by boundary", [Line("eval loss", losses, 1)], "boundary", "eval loss", mark),
    ]


def _over_rounds(report: Report) -> list[str]:
    if len(report.rounds) < 2:
        return []
    return [
        "<h2>Round by round</h2>",
        _curves(report, "Eval loss by step", "eval loss", lambda choice: choice.loss),
        _curves(report, "CLIP score by step", "CLIP score", lambda choice: choice.clip),
    ]


def _curves(report: Report, title: str, what: str, value_of: Callable[[Choice], float | None]) -> str:
    """A number of each choice over the optimizer steps that both experts have done together."""
    lines: dict[str, list[tuple[float, float]]] = {}
    for one in report.rounds:
        steps = float(sum(expert.step or 0 for expert in one.experts))
        for choice in one.choices:
            if (value := value_of(choice)) is not None:
                lines.setdefault(choice_name(choice), []).append((steps, value))
    curves = [Line(name, points, colour) for colour, (name, points) in enumerate(lines.items())]
    return line_plot(title, curves, "steps of all experts together", what)


def _names(newest: Round) -> list[str]:
    return list(dict.fromkeys(one.candidate for one in newest.losses))


def _stretch(newest: Round, name: str, low: int, high: int) -> StretchLoss | None:
    return next((one for one in newest.losses if (one.candidate, one.low, one.high) == (name, low, high)), None)


def _loss(newest: Round, name: str, low: int, high: int) -> float | None:
    found = _stretch(newest, name, low, high)
    return None if found is None else found.loss
