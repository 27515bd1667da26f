"""OUT/report.json as a page for people: one file with its plots and pictures in it, which opens without a network.

Names, captions and prompts are other people's text: every one of them is escaped.
"""

import html
from pathlib import Path

from trainer.page_drift import drift_of
from trainer.page_losses import beside_boundaries, by_timestep, over_rounds
from trainer.page_pictures import STYLE as PICTURE_STYLE
from trainer.page_pictures import pictures_of
from trainer.page_tables import STYLE as TABLE_STYLE
from trainer.page_tables import Z, mean_of, number, percent, table
from trainer.plot import Line, line_plot
from trainer.report import Choice, JudgedExpert, Report, Round

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 72rem; padding: 0 1rem; color: #222; }
h2 { margin-top: 2.2rem; } code { overflow-wrap: anywhere; } .note { color: #8a4b00; }
.plot { width: 100%; max-width: 58rem; height: auto; display: block; font: 11px system-ui, sans-serif; margin: 1rem 0; }
.plot .grid { stroke: #eee; } .plot .tick { stroke: #888; } .plot .frame { fill: none; stroke: #888; }
.plot .curve { fill: none; stroke-width: 2; } .plot line.mark { stroke: #bbb; stroke-dasharray: 2 3; }
.plot text.mark { fill: #777; } .plot .bar { stroke-width: 1; opacity: .6; }
"""


def report_page(report: Report, out: Path) -> str:
    """The whole page; `out` is where the report's pictures lie."""
    newest = report.rounds[-1]
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8><title>Experts, evaluated</title>",
        f"<style>{STYLE}{TABLE_STYLE}{PICTURE_STYLE}</style><h1>Experts, evaluated</h1>",
        *_what(report, newest),
        "<h2>Every way to fill the parts</h2>",
        *_choices(newest),
        *pictures_of(report, newest, out),
        "<h2>Loss by timestep</h2>",
        *by_timestep(newest),
        *beside_boundaries(newest),
        *_handover(newest),
        *_sweep(newest),
        *drift_of(newest),
        *over_rounds(report),
    ]
    return "\n".join(part for part in parts if part) + "\n"


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


def _choices(newest: Round) -> list[str]:
    """The table of all choices, high timesteps first, as a picture is drawn."""
    start = newest.choices[0]
    parts = list(reversed(start.answers))
    head = [f"timesteps [{part.low}, {part.high})" for part in parts]
    best_loss = min((one.loss for one in newest.choices if one.loss is not None), default=None)
    best_clip = max((one.clip for one in newest.choices if one.clip is not None), default=None)
    rows = [
        [
            *(html.escape(answer.candidate) for answer in reversed(one.answers)),
            _marked(one.loss, one.error, best_loss),
            "–" if one is start else percent(one.change, one.change_error, start.loss),
            _marked(one.clip, mean_of(one.clip_each)[1], best_clip),
            _clip_change(one, start),
        ]
        for one in newest.choices
    ]
    columns = ["eval loss", "against the start", "CLIP score", "against the start"]
    has_clip = best_clip is not None
    return [
        table(
            [*head, *columns][: None if has_clip else -2], (row[: None if has_clip else -2] for row in rows), len(parts)
        ),
        "<p>± are 1.96 standard errors, for want of held-out samples (losses) or prompts (scores). Changes are of the "
        "same draws: they are known better than what they are changes of.</p>",
    ]


def _clip_change(one: Choice, start: Choice) -> str:
    """What each picture scores above the start model's of the same prompt and seed."""
    if one is start or len(one.clip_each) != len(start.clip_each):
        return "–"
    value, error = mean_of([own - other for own, other in zip(one.clip_each, start.clip_each, strict=True)])
    return "–" if value is None else f"{value:+.2f}" + number(0.0, error)[1:]


def _marked(value: float | None, error: float | None, best: float | None) -> str:
    told = number(value, error)
    return f"<span class=best>{told}</span>" if value is not None and value == best else told


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
    """Loss by boundary, and how well it is known against that at the boundary that both were trained for."""
    known = [one for one in newest.sweep if one.loss is not None]
    if not known:
        return []
    trained = newest.choices[-1].answers[-1].low
    before = next((one.loss for one in known if one.boundary == trained), None)
    best = min(known, key=lambda one: one.loss or 0.0)
    change = percent(best.change, best.change_error, before)
    told = "" if best.boundary == trained else f", {change} against {trained}"
    points = [(float(one.boundary), one.loss) for one in known if one.loss is not None]
    bars = {float(one.boundary): Z * one.change_error for one in known if one.change_error}
    return [
        "<h2>Handing over elsewhere</h2>",
        f"<p>The same two experts, with the upper one answering from another timestep on. Lowest loss: "
        f"{number(best.loss)} at {best.boundary}{told}. Bars say how well each is known against {trained}.</p>",
        line_plot(
            "Loss by boundary",
            [Line("eval loss", points, 1, bars=bars)],
            "boundary",
            "eval loss",
            [(float(trained), f"trained for {trained}")],
        ),
    ]
