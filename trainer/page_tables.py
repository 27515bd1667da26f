"""Tables of an evaluation's page, and how a number stands in them: with the interval that it lies in."""

from collections.abc import Iterable, Sequence

from trainer.plot import shown

Z = 1.96  # standard errors on either side: of many samples, 95 of 100 intervals hold what endless ones would give
FEWEST = 5  # values that say something of their spread
STYLE = """
.wide { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; } th { vertical-align: bottom; }
th, td { padding: .25rem .7rem; text-align: right; border-bottom: 1px solid #ddd; }
th.text, td.text { text-align: left; } td small { white-space: nowrap; color: #555; }
.best { font-weight: 600; background: #e8f4ec; }
"""


def table(head: Sequence[str], rows: Iterable[Sequence[str]], texts: int = 1) -> str:
    """A <table> of cells that are HTML already: `texts` columns of words, then numbers. It scrolls, not the page."""
    lines = [_row("th", head, texts), *(_row("td", row, texts) for row in rows)]
    return f"<div class=wide><table><thead>{lines[0]}</thead><tbody>{''.join(lines[1:])}</tbody></table></div>"


def number(value: float | None, error: float | None = None) -> str:
    """A number for a cell, with its interval beside it; a dash where there is none."""
    return "–" if value is None else shown(value) + _margin(error)


def percent(value: float | None, error: float | None, of: float | None) -> str:
    """A change in per cent of what it is a change of, with its interval; a dash where there is none."""
    if value is None or not of:
        return "–"
    return f"{100 * value / of:+.2f} %" + _margin(None if error is None else 100 * error / of)


def mean_of(values: Sequence[float]) -> tuple[float | None, float | None]:
    """The mean of values and its standard error, None where there are too few."""
    if not values:
        return None, None
    mean = sum(values) / len(values)
    if len(values) < FEWEST:
        return mean, None
    spread = sum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return mean, (spread / len(values)) ** 0.5


def _margin(error: float | None) -> str:
    return f" <small>± {Z * error:.2g}</small>" if error else ""


def _row(tag: str, cells: Sequence[str], texts: int) -> str:
    kinds = [" class=text" if index < texts else "" for index in range(len(cells))]
    return "<tr>" + "".join(f"<{tag}{kind}>{cell}</{tag}>" for kind, cell in zip(kinds, cells, strict=True)) + "</tr>"
