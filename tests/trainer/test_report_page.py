"""The page of an evaluation, in a real browser where there is one: all of it is shown, and no name is run."""

import html
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from trainer.lineup import START
from trainer.plot import Line, line_plot, log_ticks, tick_texts, ticks
from trainer.report import (
    Answerer,
    Choice,
    HandOver,
    JudgedExpert,
    LatentFacts,
    Report,
    Round,
    StretchLoss,
    SweepPoint,
    read_report,
)
from trainer.report_page import report_page

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
HOSTILE = "<script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">&\u202e"


def stretch(name: str, low: int, high: int, loss: float | None) -> StretchLoss:
    bins = [(a, min(a + 50, high), loss, 3) for a in range(low, high, 50)]
    errors = [(0.02, 0.001)] * len(bins)
    known = {"error": 0.01, "change": -0.004, "change_error": 0.0005, "bin_errors": errors} if loss else {}
    return StretchLoss(candidate=name, low=low, high=high, loss=loss, draws=64, lost=0, bins=bins, **known)


def round_of(number: int, name: str = "base", loss: float | None = 0.2) -> Round:
    answers = [Answerer(low=0, high=350, candidate="refiner"), Answerer(low=350, high=1000, candidate=name)]
    starts = [Answerer(low=low, high=high, candidate="start model") for low, high in ((0, 350), (350, 1000))]
    ranges = ((0, 350), (350, 1000), (300, 350), (350, 400))
    return Round(
        number=number,
        at="2026-01-01T00:00:00Z",
        took_s=3.0,
        experts=[
            JudgedExpert(name=name, run="runs/base", state="judged", low=350, high=1000, step=9, weights="ema"),
            JudgedExpert(name="", run="runs/refiner", state="not started"),
        ],
        losses=[stretch(one, *range_, loss) for one in ("start model", name, "refiner") for range_ in ranges],
        choices=[
            Choice(answers=starts, loss=0.25, error=0.02, change=0.0, change_error=0.0),
            Choice(answers=answers, loss=loss, error=0.02, change=-0.05, change_error=0.001),
        ],
        sweep=[
            SweepPoint(boundary=at, loss=0.2 + at / 1e4, error=0.02, change=(at - 350) / 1e4, change_error=0.001)
            for at in range(0, 1001, 50)
        ],
    )


def report(*rounds: Round, **fields: object) -> Report:
    given = {"model": "tiny", "manifest": "main", "digest": "ab" * 32, "samples": 5, "draws": 64} | fields
    return Report(**given, rounds=list(rounds))  # type: ignore[arg-type]


def opened(page: str, folder: Path) -> str:
    """The page as a browser without a network has it after its scripts, if it had any."""
    path = folder / "report.html"
    path.write_text(page)
    assert BROWSER is not None
    flags = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder}/browser", "--dump-dom"]
    nowhere = "--host-resolver-rules=MAP * ~NOTFOUND"
    done = subprocess.run(
        [BROWSER, *flags, nowhere, path.as_uri()], capture_output=True, text=True, check=True, timeout=120
    )
    return done.stdout


needs_browser = pytest.mark.skipif(BROWSER is None, reason="no chromium here")


@needs_browser
def test_a_browser_shows_the_whole_page(tmp_path: Path) -> None:
    seen = opened(report_page(report(round_of(1), round_of(2)), tmp_path), tmp_path)
    assert seen.count("<svg") == 5
    assert seen.count("<table") == 4
    for heading in ("Every way to fill the parts", "Loss by timestep", "On either side of 350", "Round by round"):
        assert heading in seen
    assert "not started" in seen
    assert not re.search(r"(src|href)=\"(?!data:)", seen)


@needs_browser
def test_the_page_does_not_scroll_sideways(tmp_path: Path) -> None:
    """Its widest table, of what is handed over, scrolls by itself. Widths of the page's content and of its window."""
    facts = LatentFacts(mean=[-0.58141] * 4, variance=[12.3456] * 4, power=[1.0] * 8)
    over = [HandOver(candidate=name, timestep=366.0, pictures=8, drawn=facts, real=facts) for name in (START, "a" * 40)]
    page = html.escape(report_page(report(round_of(1).model_copy(update={"handover": over})), tmp_path))
    widths = (1100, 500)
    frames = [f'<iframe style="width: {px}px; height: 99999px; border: 0" srcdoc="{page}"></iframe>' for px in widths]
    sizes = "[one.contentDocument.documentElement.scrollWidth, one.clientWidth]"
    asked = f"[...document.querySelectorAll('iframe')].flatMap(one => {sizes}).join()"
    seen = opened(
        f"<title>-</title>{''.join(frames)}<script>onload = () => document.title = {asked}</script>", tmp_path
    )
    assert f"<title>{widths[0]},{widths[0]},{widths[1]},{widths[1]}</title>" in seen


@needs_browser
def test_names_are_text_and_nothing_else(tmp_path: Path) -> None:
    page = report_page(report(round_of(1, HOSTILE), model=HOSTILE, notes=[HOSTILE]), tmp_path)
    seen = opened(page, tmp_path)
    assert "<title>Experts, evaluated</title>" in seen
    assert "<script" not in seen
    assert "onerror" in seen
    assert '<img src="x"' not in seen


def test_losses_and_changes_have_their_intervals(tmp_path: Path) -> None:
    """1.96 standard errors, in tables and as bars; a change in per cent of the start model's loss."""
    page = report_page(report(round_of(1), round_of(2)), tmp_path)
    assert "<span class=best>0.2 <small>± 0.039</small></span>" in page
    assert "-20.00 % <small>± 0.78</small>" in page
    assert "0.2 <small>± 0.02</small><br>-2.00 % <small>± 0.49</small>" in page
    assert page.count("<line class=bar") > 3 * 20
    assert "base: 0.2 ± 0.039 at 375" in page
    alone = report_page(report(round_of(1, loss=None)), tmp_path)
    assert alone.count("± 0.039") == 1  # the start model's


def test_another_boundary_is_told_with_its_change(tmp_path: Path) -> None:
    page = report_page(report(round_of(1)), tmp_path)
    assert "Lowest loss: 0.2 at 0, -14.89 % <small>± 0.83</small> against 350." in page


def test_bars_lie_within_the_frame() -> None:
    line = Line("a", [(0, 0.1), (1, 0.2)], 0, bars={0: 0.5, 1: 0.01})
    ends = re.findall(
        r'class=bar x1="[\d.]+" x2="[\d.]+" y1="([\d.]+)" y2="([\d.]+)"', line_plot("t", [line], "x", "y")
    )
    assert len(ends) == 2
    assert all(34 <= float(y) <= 258 for pair in ends for y in pair)
    assert float(ends[0][0]) - float(ends[0][1]) > 20 * (float(ends[1][0]) - float(ends[1][1]))


def test_a_loss_that_is_not_there_is_a_dash(tmp_path: Path) -> None:
    page = report_page(report(round_of(1, loss=None)), tmp_path)
    assert ">–<" in page
    assert "None" not in page
    assert "nan" not in page.lower().replace("nano", "")


def test_infinite_losses_are_null_in_the_file(tmp_path: Path) -> None:
    one = report(round_of(1, loss=float("nan")))
    (tmp_path / "report.json").write_text(one.model_dump_json())
    assert read_report(tmp_path) == one
    assert one.rounds[0].losses[0].bins[0] == (0, 50, None, 3)


def test_ticks_are_round_and_within() -> None:
    assert ticks(0, 1000, 12) == [0, 100, 200, 300, 400, 500, 600, 700, 800, 900, 1000]
    assert ticks(0.2151, 0.2156) == [0.2151, 0.2152, 0.2153, 0.2154, 0.2155, 0.2156]
    assert ticks(3, 3) == [3]
    assert log_ticks(0.02, 3) == pytest.approx([0.02, 0.05, 0.1, 0.2, 0.5, 1, 2])
    assert len(set(tick_texts(ticks(0.21512, 0.21518)))) == len(ticks(0.21512, 0.21518))


def test_a_plot_lies_within_its_frame_and_takes_a_logarithm_where_values_spread() -> None:
    lines = [Line("a", [(0, 0.01), (500, 3.0), (1000, float("inf"))], 0), Line("b", [(0, 0.5)], 1, is_dashed=True)]
    svg = line_plot("t", lines, "x", "y")
    circles = re.findall(r'cx="([\d.]+)" cy="([\d.]+)"', svg)
    assert len(circles) == 3
    assert all(64 <= float(x) <= 744 and 34 <= float(y) <= 258 for x, y in circles)
    middle = [float(y) for _, y in circles]
    assert middle[1] < middle[2] < middle[0]
    assert abs(middle[2] - middle[1]) < 0.5 * abs(middle[0] - middle[1])  # linear, 0.5 would lie low
    assert line_plot("t", [Line("a", [], 0)], "x", "y") == ""


def test_a_legend_of_long_names_takes_more_rows_and_names_what_is_there(tmp_path: Path) -> None:
    lines = [Line(f"an expert with a long name, number {i}", [(0, 1.0), (1, 2.0)], i) for i in range(4)]
    svg = line_plot("t", [*lines, Line("nobody", [], 5)], "x", "y")
    assert "nobody" not in svg
    rows = {float(y) for y in re.findall(r'<text x="[\d.]+" y="(\d+)">an expert', svg)}
    assert len(rows) == 2
    height, down = (int(re.search(pattern, svg)[1]) for pattern in (r"0 0 760 (\d+)", r"translate\(0 (\d+)\)"))  # type: ignore[index]
    assert height - 300 == down > 0
    assert max(rows) < down + 34
    assert "translate(0 0)" in line_plot("t", lines[:1], "x", "y")
