"""OUT/results.json of experts_vs_one -> tables with intervals: what each arm gains or loses against the one model, or
against another arm.

Losses: of each seed the relative change on the same draws, then its mean over seeds with a 95 % t interval. Pictures:
of each prompt the difference, meaned over seeds, then a 95 % bootstrap interval (BCa) over prompts. Hand-overs: how far
what is handed over is from data, its own / the other's at the same boundary, and the difference over seeds. An interval
of one seed, or of prompts that do not differ, is not there.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np
from scipy import stats

from benchmarks.experts_handover import DRIFTS, drifts

ONE = "one"
SETS = ("one", "held out", "two")
Losses = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Gain:
    """A mean difference and its 95 % interval, None where none can be said."""

    mean: float
    low: float | None
    high: float | None

    @property
    def is_clear(self) -> bool:
        """Whether the interval excludes zero."""
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)

    def text(self, scale: float = 100, unit: str = " %") -> str:
        """For a cell; bold where it is clear."""
        if self.low is None or self.high is None:
            return f"{scale * self.mean:+.2f}{unit}"
        said = f"{scale * self.mean:+.2f}{unit} ({scale * self.low:+.2f} to {scale * self.high:+.2f})"
        return f"**{said}**" if self.is_clear else said


def over_seeds(values: Sequence[float]) -> Gain:
    """Mean over trainings with Student's t interval."""
    if len(values) < 2 or stdev(values) == 0:
        return Gain(fmean(values), None, None)
    low, high = stats.t.interval(0.95, len(values) - 1, loc=fmean(values), scale=stdev(values) / len(values) ** 0.5)
    return Gain(fmean(values), float(low), float(high))


def over_prompts(values: Sequence[float]) -> Gain:
    """Mean over prompts with a bootstrap interval."""
    if len(values) < 2 or max(values) == min(values):
        return Gain(fmean(values), None, None)
    found = stats.bootstrap((np.asarray(values),), np.mean, rng=np.random.default_rng(0)).confidence_interval
    return Gain(fmean(values), float(found.low), float(found.high))


def loss_gains(
    results: Mapping[str, Any], kind: str, arm: str, inside: Callable[[int, int], bool], against: str = ONE
) -> Gain:
    """Relative change of the loss, against that of the arm `against`, over the stretches [low, high) `inside`."""
    return over_seeds(
        [
            _loss(_losses(results, own), inside) / _loss(_losses(results, one), inside) - 1
            for own, one in _pairs(results, kind, arm, against)
        ]
    )


def bin_gains(results: Mapping[str, Any], kind: str, arm: str) -> list[tuple[int, int, Gain]]:
    """(low, high, relative change of the loss against the one model's) of each stretch that losses are told for."""
    pairs = [[_bins(_losses(results, each)) for each in pair] for pair in _pairs(results, kind, arm)]
    return [(*edges, over_seeds([own[edges] / one[edges] - 1 for own, one in pairs])) for edges in sorted(pairs[0][0])]


def picture_gains(
    results: Mapping[str, Any], kind: str, arm: str, which: str, what: str, against: str = ONE
) -> Gain | None:
    """Difference of a number of each picture against that of `against`, over the prompts of a set ("" for all)."""
    by_prompt: dict[str, list[float]] = {}
    for own, one in _pairs(results, kind, arm, against):
        for a, b in zip(own["pictures"], one["pictures"], strict=True):
            if which in ("", a["set"]) and a[what] is not None and b[what] is not None:
                by_prompt.setdefault(a["prompt"], []).append(float(a[what]) - float(b[what]))
    return over_prompts([fmean(values) for values in by_prompt.values()]) if by_prompt else None


def handover_gains(results: Mapping[str, Any], kind: str, arm: str, what: str, against: str = ONE) -> list[Gain]:
    """[its own drift, that of `against` at the same boundary, the difference] of what is handed over; [] where unknown.

    `what` is one of DRIFTS.
    """
    found = [
        (drifts(handed)[what], drifts(one["handover"][boundary])[what])
        for own, one in _pairs(results, kind, arm, against)
        for boundary, handed in own.get("handover", {}).items()
        if boundary in one.get("handover", {})
    ]
    if not found:
        return []
    return [over_seeds(values) for values in (*map(list, zip(*found, strict=True)), [own - one for own, one in found])]


def tables(results: Mapping[str, Any], against: str = ONE) -> str:
    """All tables, as Markdown, of every arm against one of them."""
    parts = []
    for kind in dict.fromkeys(arm["kind"] for arm in results["arms"]):
        names = [
            name
            for name in dict.fromkeys(arm["name"] for arm in results["arms"] if arm["kind"] == kind)
            if name != against
        ]
        seeds = len({arm["seed"] for arm in results["arms"] if arm["kind"] == kind})
        parts += [
            f"### {kind}, {seeds} seeds",
            "",
            *_loss_table(results, kind, names, against),
            "",
            *_picture_table(results, kind, names, against),
            "",
            *_handover_table(results, kind, names, against),
            "",
        ]
    return "\n".join(parts)


def _loss_table(results: Mapping[str, Any], kind: str, names: Iterable[str], against: str) -> list[str]:
    cuts = sorted((tuple(map(int, key.split("-"))) for key in results["start"]["losses"]), key=lambda cut: cut[0])
    head = [f"loss against {_called(against)}", *(f"[{low}, {high})" for low, high in cuts), "all"]
    rows = [
        [
            name,
            *(loss_gains(results, kind, name, lambda a, b, cut=cut: (a, b) == cut, against).text() for cut in cuts),
            loss_gains(results, kind, name, lambda a, b: True, against).text(),
        ]
        for name in names
    ]
    return _table(head, rows)


def _picture_table(results: Mapping[str, Any], kind: str, names: Iterable[str], against: str) -> list[str]:
    head = [
        f"pictures against {_called(against)}",
        *(f"follows, {which}" for which in SETS),
        "sharpness",
        "corner error, px",
    ]
    rows = []
    for name in names:
        follows = (picture_gains(results, kind, name, which, "follows", against) for which in SETS)
        detail = (picture_gains(results, kind, name, "", what, against) for what in ("sharpness", "corner_error_px"))
        cells = [gain.text() if gain else "–" for gain in follows]
        rows.append([name, *cells, *(gain.text(1, "") if gain else "–" for gain in detail)])
    return _table(head, rows)


def _handover_table(results: Mapping[str, Any], kind: str, names: Iterable[str], against: str) -> list[str]:
    rows = []
    for name in names:
        found = [handover_gains(results, kind, name, what, against) for what in DRIFTS]
        if all(found):
            cells = [
                f"{100 * one.mean:.1f} / {100 * other.mean:.1f} %, {change.text()}" for one, other, change in found
            ]
            rows.append([name, *cells])
    return _table([f"drift at the hand-over / of {_called(against)}", *DRIFTS], rows) if rows else []


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    return [_row(head), _row(["---"] * len(head)), *map(_row, rows)]


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _called(against: str) -> str:
    return f"the {against}"


def _pairs(results: Mapping[str, Any], kind: str, name: str, against: str = ONE) -> Iterable[tuple[Any, Any]]:
    """(an arm, the one it is compared with) of each seed."""
    arms = {(arm["name"], arm["seed"]): arm for arm in results["arms"] if arm["kind"] == kind}
    for (own, seed), arm in arms.items():
        if own == name:
            # Variations of full experts stand beside the one that is trained as they are.
            yield arm, arms[against, seed]


def _losses(results: Mapping[str, Any], arm: Mapping[str, Any]) -> Losses:
    """Of each stretch, by whoever answers for it."""
    return {key: one for name in arm["runs"] for key, one in results["runs"][name]["losses"].items()}


def _bins(losses: Losses) -> dict[tuple[int, int], float]:
    return {(low, high): loss for one in losses.values() for low, high, loss, _ in one["bins"]}


def _loss(losses: Losses, inside: Callable[[int, int], bool]) -> float:
    """Mean over the timesteps of some stretches."""
    found = [(int(low), int(high), one["loss"]) for key, one in losses.items() for low, high in [key.split("-")]]
    chosen = [(high - low, loss) for low, high, loss in found if inside(low, high)]
    return float(sum(count * loss for count, loss in chosen) / sum(count for count, _ in chosen))


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the tables of a results file."""
    parser = argparse.ArgumentParser(prog="benchmarks.experts_table", description="Tables of experts_vs_one.")
    parser.add_argument("results", type=Path, metavar="FILE", help="OUT/results.json")
    parser.add_argument("--against", default=ONE, metavar="ARM", help="what every arm is compared with (default: one)")
    options = parser.parse_args(arguments)
    print(tables(json.loads(options.results.read_text()), options.against))
    return 0


if __name__ == "__main__":
    sys.exit(main())
