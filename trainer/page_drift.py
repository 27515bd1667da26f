"""An evaluation's page: how far each expert has moved from the start model, block by block, and which layers most."""

import html
import math

from trainer.drift import Move, by_block
from trainer.page_tables import table
from trainer.report import Drifted, Round

MOST = 5  # layers named of each expert


def drift_of(newest: Round) -> list[str]:
    """The section, empty where no expert's UNet is like the start model's."""
    if not newest.drift:
        return []
    blocks = {one.candidate: {move.layer: move.drift for move in by_block(_moves(one))} for one in newest.drift}
    names = list(dict.fromkeys(block for own in blocks.values() for block in own))
    rows = [[html.escape(name), *(_share(own.get(name)) for own in blocks.values())] for name in names]
    whole = ["all", *(_share(_whole(_moves(one))) for one in newest.drift)]
    return [
        "<h2>How far they have moved</h2>",
        "<p>The distance of each expert's weights from the start model's, as a share of those. One model made of both "
        "(<code>bundle-experts --merge</code>) loses little where they have moved little.</p>",
        table(["", *map(html.escape, blocks)], [whole, *rows]),
        *(_most(one) for one in newest.drift),
    ]


def _most(one: Drifted) -> str:
    """The layers that moved most, of those that began with any weights."""
    moves = sorted((move for move in _moves(one) if move.moved and move.start), key=lambda move: -move.drift)[:MOST]
    if not moves:
        return f"<p>{html.escape(one.candidate)}: nothing has moved.</p>"
    layers = ", ".join(f"<code>{html.escape(move.layer)}</code> {_share(move.drift)}" for move in moves)
    return f"<p>{html.escape(one.candidate)}, most of all: {layers}.</p>"


def _moves(one: Drifted) -> list[Move]:
    return [Move(layer, moved, start) for layer, moved, start in one.layers if moved is not None and start is not None]


def _whole(moves: list[Move]) -> float:
    return Move("", math.hypot(*(one.moved for one in moves)), math.hypot(*(one.start for one in moves))).drift


def _share(drift: float | None) -> str:
    """In per cent; a dash where there is nothing to compare, or where it began at 0."""
    return "–" if drift is None or not math.isfinite(drift) else f"{100 * drift:.3g} %"
