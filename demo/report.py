"""OUT/images -> OUT/report.html, OUT/scores.json and a contact sheet: what the pair draws beside the start model.

`python -m demo.report OUT` judges OUT/images/pair and OUT/images/start, prints both scores, and writes a page that
needs nothing but the pictures beside it.
"""

import html
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image, ImageDraw

from demo.prompts import SETS, set_of
from demo.score import Judged, Score, judge_folder, score, score_sets
from demo.shapes import OneLineParser
from shared.atomic import write_atomically
from shared.runlog import read_events
from trainer.page_tables import STYLE as TABLE_STYLE
from trainer.page_tables import table

CLIP = Path("demo/model/clip")
DRAWERS = {"start": "start model", "pair": "both experts"}
COLUMNS = {
    "follows": "follows",
    "kind": "kind",
    "colour": "colour",
    "relation": "relation",
    "size": "size",
    "position": "position",
    "ground": "ground",
    "sharpness": "sharpness",
    "edge_error_px": "edge error, px",
    "clip": "CLIP",
}
SHARES = ("follows", "kind", "colour", "relation", "size", "position", "ground")
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 76rem; padding: 0 1rem; color: #222; }
th, td { padding: .2rem .35rem; } td.text { white-space: nowrap; }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(13.5rem, 1fr)); gap: 1rem; }
figure { margin: 0; } figure img { width: 96px; height: 96px; image-rendering: pixelated; border: 3px solid; }
.right { border-color: #2a9d4a !important; } .wrong { border-color: #d33 !important; }
figcaption { font-size: 12px; line-height: 1.35; }
"""


def write_report(out: Path) -> dict[str, dict[str, Score]]:
    """Judge what was drawn, write the page, the sheet and scores.json; returns scores by drawer and set of prompts.

    Raises ValueError where pictures are missing or do not say what they were drawn from.
    """
    judged = {drawer: judge_folder(out / "images" / drawer, CLIP) for drawer in DRAWERS}
    prompts = {drawer: [one.prompt for one in pictures] for drawer, pictures in judged.items()}
    if not prompts["start"] or prompts["start"] != prompts["pair"]:
        raise ValueError(f"{out}/images/start and pair do not hold pictures of the same prompts")
    scores = {drawer: {**score_sets(pictures), "all": score(pictures)} for drawer, pictures in judged.items()}
    as_json = {drawer: {name: of.as_json() for name, of in sets.items()} for drawer, sets in scores.items()}
    write_atomically(out / "scores.json", (json.dumps(as_json, indent=1) + "\n").encode())
    write_atomically(out / "report.html", _page(out, judged, scores).encode())
    _sheet(judged).save(out / "images" / "sheet.png")
    return scores


def main(arguments: Sequence[str] | None = None) -> int:
    """The door of `python -m demo.report`."""
    parser = OneLineParser(prog="demo.report", description="Judge what the demo drew and write a page about it.")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder of a demo that has drawn")
    options = parser.parse_args(arguments)
    try:
        scores = write_report(options.out)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    print("\n" + as_text(scores))
    return 0


def as_text(scores: Mapping[str, Mapping[str, Score]]) -> str:
    """The scores as a table for a terminal."""
    lines = [f"{'':42}{'pictures':>9}{'follows':>9}{'sharpness':>11}{'CLIP':>7}"]
    for name in (*SETS, "all"):
        for drawer, title in DRAWERS.items():
            of = scores[drawer].get(name)
            if of is not None:
                label = f"{SETS.get(name, name):28}{title:14}"
                clip = f"{of.clip:7.1f}" if of.clip is not None else ""
                lines.append(f"{label}{of.pictures:9}{of.follows:9.1%}{of.sharpness:11.3f}{clip}")
    return "\n".join(lines)


def _page(out: Path, judged: Mapping[str, list[Judged]], scores: Mapping[str, Mapping[str, Score]]) -> str:
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>",
        f"<title>The small world</title><style>{TABLE_STYLE}{STYLE}</style><h1>The small world</h1>",
        "<p>Both experts began with <code>demo/model</code> and learned their own timesteps at once. Here they draw "
        "together, beside the start model alone, from the same noise. A judge without a network reads every picture: "
        "<em>follows</em> is the number of shapes, each one's kind and colour, and how they stand, all right in one "
        "picture; <em>sharpness</em> is how steep edges are (1 = as drawn). A colour that is held out is one in which "
        "no data set shows that kind of shape. Left of each two pictures is the start model's, right the experts'; "
        "green frames follow their prompt.</p>",
        _table(scores),
        _eval_losses(out),
    ]
    pairs = list(zip(judged["start"], judged["pair"], strict=True))
    for name, title in SETS.items():
        figures = "".join(_figure(out, pair) for pair in pairs if set_of(pair[0].prompt) == name)
        parts.append(f"<h2>{html.escape(title.capitalize())}</h2><div class=grid>{figures}</div>")
    return "\n".join(parts) + "\n"


def _table(scores: Mapping[str, Mapping[str, Score]]) -> str:
    rows = []
    for name in (*SETS, "all"):
        for drawer, title in DRAWERS.items():
            if of := scores[drawer].get(name):
                cells = [_shown(column, getattr(of, column)) for column in COLUMNS]
                rows.append([html.escape(SETS.get(name, name)), title, str(of.pictures), *cells])
    return table(["", "", "pictures", *COLUMNS.values()], rows, texts=2)


def _eval_losses(out: Path) -> str:
    """What the experts' logs say of held-out pictures, averaged weights; nothing where none was measured."""
    measured: dict[str, dict[int, float]] = {}
    for path in sorted((out / "runs").glob("*/events.jsonl")):
        losses = {e["step"]: e.get("loss_ema", e["loss"]) for e in read_events(path) if e["event"] == "eval"}
        measured |= {path.parent.name: losses} if losses else {}
    if not measured:
        return ""
    steps = sorted({step for losses in measured.values() for step in losses})
    rows = [
        [html.escape(name), *(f"{losses[step]:.4f}" if step in losses else "" for step in steps)]
        for name, losses in measured.items()
    ]
    lines = table(["", *(f"step {step}" for step in steps)], rows)
    return f"<p>Loss on held-out pictures, each expert on its own timesteps:</p>{lines}"


def _shown(column: str, value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.0%}" if column in SHARES else f"{value:.1f}" if column == "clip" else f"{value:.2f}"


def _figure(out: Path, pair: tuple[Judged, Judged]) -> str:
    images = "".join(
        f"<img class={'right' if one.verdict.follows else 'wrong'} src='{html.escape(str(one.path.relative_to(out)))}' "
        f"alt='{title}'>"
        for one, title in zip(pair, DRAWERS.values(), strict=True)
    )
    return f"<figure>{images}<figcaption>{html.escape(pair[0].prompt)}</figcaption></figure>"


def _sheet(judged: Mapping[str, list[Judged]], columns: int = 12, gap_px: int = 4) -> Image.Image:
    """All pictures in pairs, the start model's above both experts', framed green where they follow."""
    pairs = list(zip(judged["start"], judged["pair"], strict=True))
    side = 96 + 2 * gap_px
    rows = -(-len(pairs) // columns)
    sheet = Image.new("RGB", (columns * side, rows * (2 * side + 2 * gap_px)), "white")
    canvas = ImageDraw.Draw(sheet)
    for number, pair in enumerate(pairs):
        x, y = number % columns * side, number // columns * (2 * side + 2 * gap_px)
        for below, one in enumerate(pair):
            top = y + below * side
            colour = (42, 157, 74) if one.verdict.follows else (221, 51, 51)
            canvas.rectangle((x + 1, top + 1, x + side - 2, top + side - 2), fill=colour)
            with Image.open(one.path) as image:
                sheet.paste(image.convert("RGB").resize((96, 96)), (x + gap_px, top + gap_px))
    return sheet


if __name__ == "__main__":
    sys.exit(main())
