"""The pictures of an evaluation's page: each prompt by every choice, held-out pictures beside their source.

Pictures stand in the page itself, made small; at full size they lie in OUT/pictures.
"""

import html
from collections.abc import Iterable, Sequence
from pathlib import Path

from shared.errors import DataError
from trainer.picture_files import inline_picture
from trainer.report import Choice, Finished, Report, Round

STYLE = """
.row { display: flex; flex-wrap: wrap; gap: .7rem; margin: .3rem 0 1.4rem; }
figure { margin: 0; width: 12rem; } figure img { width: 100%; height: auto; display: block; background: #eee; }
figcaption { font-size: 12px; line-height: 1.35; overflow-wrap: anywhere; } .prompt { margin: .2rem 0; }
"""
MOST_SHOWN = 24  # prompts, and held-out pictures, in the page
EDGE_PX = 320


def pictures_of(report: Report, newest: Round, out: Path) -> list[str]:
    """The pictures of a round, as parts of the page; none where nothing was drawn."""
    return [*_by_prompt(report, newest, out), *_held_out(newest, out)]


def choice_name(choice: Choice) -> str:
    """What a choice is called: who answers, from high timesteps to low."""
    names = [answer.candidate for answer in reversed(choice.answers)]
    return names[0] if len(set(names)) == 1 else " + ".join(names)


def _by_prompt(report: Report, newest: Round, out: Path) -> Iterable[str]:
    if not any(one.pictures for one in newest.choices):
        return
    yield f"<h2>Prompts</h2><p>{html.escape(_settings(report))}</p>"
    yield _left_out(len(report.prompts), "prompts")
    for index, prompt in list(enumerate(report.prompts))[:MOST_SHOWN]:
        yield f"<p class=prompt>{html.escape(prompt)}</p>"
        yield _row([(one.pictures[index], _told(one, index)) for one in newest.choices if one.pictures], out)


def _held_out(newest: Round, out: Path) -> Iterable[str]:
    if not newest.finished or newest.finished_from is None:
        return
    yield (
        f"<h2>Held-out pictures, finished</h2><p>Noised to t = {newest.finished_from:.0f}, the first timestep below "
        "the boundary, and drawn on from there with its caption, beside the picture itself as its latents hold it.</p>"
    )
    yield _left_out(len(newest.finished), "pictures")
    dataset = None
    for one in _spread(newest.finished)[:MOST_SHOWN]:
        if one.dataset != dataset:
            dataset = one.dataset
            yield f"<h3>Data set {html.escape(one.dataset)}</h3>"
        yield f"<p class=prompt>{html.escape(one.caption) or '(no caption)'}</p>"
        yield _row([(one.source, f"itself, {one.name}"), *((path, name) for name, path in one.pictures)], out)


def _spread(finished: Sequence[Finished]) -> list[Finished]:
    """So ordered that each data set has its share of those that are shown, and stands together among them."""
    by_set: dict[str, list[Finished]] = {}
    for one in finished:
        by_set.setdefault(one.dataset, []).append(one)
    share = max(1, MOST_SHOWN // len(by_set))
    first = [one for own in by_set.values() for one in own[:share]]
    return [*first, *(one for own in by_set.values() for one in own[share:])]


def _row(pictures: Iterable[tuple[str, str]], out: Path) -> str:
    """Paths below the report's folder, and what stands below each."""
    return f"<div class=row>{''.join(_figure(out / path, told) for path, told in pictures)}</div>"


def _figure(path: Path, told: str) -> str:
    text = html.escape(told)
    try:
        image = f'<img src="{inline_picture(path, EDGE_PX)}" alt="{text}">'
    except DataError:
        image = "<p class=note>the picture is no longer there</p>"
    return f"<figure>{image}<figcaption>{text}</figcaption></figure>"


def _told(choice: Choice, index: int) -> str:
    score = f", CLIP {choice.clip_each[index]:.1f}" if choice.clip_each else ""
    return choice_name(choice) + score


def _settings(report: Report) -> str:
    """How pictures were drawn, in words."""
    told, rescale = report.drawing, report.drawing.get("guidance_rescale")
    parts = [f"{told.get('scheduler')}, {told.get('steps')} steps", f"guidance {told.get('guidance')}"]
    parts += [] if rescale is None else [f"rescale {rescale:g}"]
    parts += [f"seed {told.get('seed')}"]
    return ", ".join(parts) + (f"; scored by {report.clip}" if report.clip else "") + "."


def _left_out(count: int, what: str) -> str:
    if count <= MOST_SHOWN:
        return ""
    return f"<p class=note>The first {MOST_SHOWN} of {count} {what}; the others lie in the folder pictures.</p>"
