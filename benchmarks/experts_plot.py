"""results.json of experts_vs_one -> pictures for docs/evidence.md: the loss timestep by timestep, and prompts followed.

`python -m benchmarks.experts_plot FILE.json --out DIR` writes DIR/FILE-loss-KIND.svg and DIR/FILE-pictures-KIND.svg.
Bands and bars are the 95 % intervals of benchmarks.experts_table.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib

from benchmarks.experts_table import ONE, SETS, Gain, bin_gains, picture_gains

matplotlib.use("svg")
matplotlib.rcParams |= {"svg.hashsalt": "evidence", "svg.fonttype": "none", "font.size": 9, "font.family": "sans-serif"}

import matplotlib.pyplot as plt  # noqa: E402 - the back end is chosen first

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")  # Okabe and Ito (2008)


def plot_losses(results: Mapping[str, Any], kind: str, path: Path) -> Path:
    """Of each pair the change of the loss against the one model's in stretches of timesteps; a panel for a boundary."""
    panels: dict[str, list[str]] = {}
    for name in arm_names(results, kind):
        if "," in name:  # a variation of a pair
            continue
        panels.setdefault(name.split()[-1], []).append(name)
    figure, axes = plt.subplots(len(panels), 1, figsize=(7.6, 2.4 * len(panels)), sharex=True, squeeze=False)
    for axis, (boundary, names) in zip(axes[:, 0], panels.items(), strict=True):
        axis.axvline(int(boundary), color="black", linestyle="dotted", linewidth=1)
        for name, colour in zip(names, COLOURS, strict=False):
            _draw_bins(axis, name, bin_gains(results, kind, name), colour)
        axis.axhline(0, color="grey", linewidth=0.8)
        axis.set_ylabel("loss against\nthe one, %")
        axis.legend(frameon=False, loc="best", ncols=2)
    axes[-1, 0].set_xlabel("timestep (0 is clean; dotted: where the pair hands over)")
    axes[-1, 0].set_xlim(0, 1000)
    return _save(figure, path)


def plot_pictures(results: Mapping[str, Any], kind: str, path: Path) -> Path:
    """Of each pair how many more prompts of each set it follows than the one model, in points."""
    names = arm_names(results, kind)
    figure, axis = plt.subplots(figsize=(7.6, 0.8 + 0.55 * len(names)))
    for at, which in enumerate(SETS):
        gains = [picture_gains(results, kind, name, which, "follows") or Gain(0.0, None, None) for name in names]
        rows = [row + 0.2 * (at - 1) for row in range(len(names))]
        reach = [
            [100 * (gain.mean - (gain.mean if gain.low is None else gain.low)) for gain in gains],
            [100 * ((gain.mean if gain.high is None else gain.high) - gain.mean) for gain in gains],
        ]
        means = [100 * gain.mean for gain in gains]
        axis.errorbar(means, rows, xerr=reach, fmt="o", markersize=4, capsize=2, color=COLOURS[at], label=which)
    axis.axvline(0, color="grey", linewidth=0.8)
    axis.set_yticks(range(len(names)), names)
    axis.invert_yaxis()
    axis.set_xlabel("prompts followed, points more than the one")
    axis.legend(frameon=False, loc="best")
    return _save(figure, path)


def arm_names(results: Mapping[str, Any], kind: str) -> list[str]:
    """All arms of that kind but the one model, in their order."""
    return [
        name for name in dict.fromkeys(arm["name"] for arm in results["arms"] if arm["kind"] == kind) if name != ONE
    ]


def _draw_bins(axis: "Axes", name: str, gains: Sequence[tuple[int, int, Gain]], colour: str) -> None:
    middles = [(low + high) / 2 for low, high, _ in gains]
    axis.plot(middles, [100 * gain.mean for *_, gain in gains], marker=".", color=colour, label=name)
    if all(gain.low is not None for *_, gain in gains):
        low, high = ([100 * (getattr(gain, end) or 0.0) for *_, gain in gains] for end in ("low", "high"))
        axis.fill_between(middles, low, high, color=colour, alpha=0.2, linewidth=0)


def _save(figure: Any, path: Path) -> Path:
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
    return path


def main(arguments: Sequence[str] | None = None) -> int:
    """Write both pictures of each kind that was trained."""
    parser = argparse.ArgumentParser(prog="benchmarks.experts_plot", description="Pictures of experts_vs_one.")
    parser.add_argument("results", type=Path, metavar="FILE", help="OUT/results.json")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the pictures")
    options = parser.parse_args(arguments)
    results = json.loads(options.results.read_text())
    options.out.mkdir(parents=True, exist_ok=True)
    for kind in dict.fromkeys(arm["kind"] for arm in results["arms"]):
        name = options.results.stem
        print(plot_losses(results, kind, options.out / f"{name}-loss-{kind}.svg"))
        print(plot_pictures(results, kind, options.out / f"{name}-pictures-{kind}.svg"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
