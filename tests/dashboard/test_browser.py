"""The page in a real browser: what it says while a build and two trainers run, and that no caption becomes markup.

Debian's chromium through Playwright; left out where either is missing.
"""

import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from benchmarks.dashboard_world import write_run, write_store
from shared.manifest import open_manifest
from shared.runlog import read_events
from shared.store import StoreReader
from tests.dashboard.page_process import command, page
from tests.pictures import write_shapes

pytestmark = pytest.mark.slow
playwright = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
PATIENCE_MS = 180_000
MARKUP = [
    "<script>window.hit = 1</script>", "<img src=x onerror='window.hit = 1'>", "<svg onload='window.hit = 1'>",
    "<iframe src='javascript:parent.hit = 1'></iframe>", "\"><script>window.hit = 1</script>",
    "</span><b id=made>x</b>", "<a href='javascript:window.hit = 1'>x</a>", "<style>body { display: none }</style>",
    "<base href='//evil.example/'>", "<meta http-equiv=refresh content='0;url=//evil.example/'>",
    "<form action=//evil.example><input></form>", "<object data=x></object>", "<embed src=x>",
    "<link rel=stylesheet href=//evil.example/x.css>", "<!-- x -->",
    "<math><mi xlink:href='javascript:window.hit = 1'>", "<video><source onerror='window.hit = 1'>", "&lt;b&gt;",
    "&#60;img src=x onerror=window.hit=1&#62;", "<details open ontoggle='window.hit = 1'>",
    "<body onload=window.hit=1>", "{{constructor.constructor('window.hit = 1')()}}", "${window.hit = 1}",
    "javascript:window.hit = 1", "<x id=made>", "]]><script>window.hit = 1</script>", "\u202e<b>\u2066",
    "<template><script>window.hit=1</script></template>", "<marquee onstart=window.hit=1>",
    "'-alert(1)-'<dialog open id=made>",
]  # fmt: skip
MADE = (
    "script:not([src]), iframe, svg, object, embed, form[action], video, math, marquee, details, base, template, "
    "style, body meta, body link, #made"
)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("no chromium")
    with playwright.sync_playwright() as driver:
        made = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield made
        made.close()


@contextmanager
def visit(browser: Any, address: str, **options: Any) -> Iterator[Any]:
    """An open page; nothing may go wrong in it, and nothing be asked of anybody else."""
    context = browser.new_context(**options)
    opened, wrong = context.new_page(), []
    opened.set_default_timeout(PATIENCE_MS)
    opened.on("pageerror", lambda error: wrong.append(str(error)))
    opened.on("request", lambda asked: asked.url.startswith(address) or wrong.append(asked.url))
    opened.on("console", lambda said: "Content Security" in said.text and wrong.append(said.text))
    opened.goto(address, wait_until="commit")
    opened.wait_for_selector("body[data-ready]")
    yield opened
    context.close()
    assert wrong == []


def test_what_it_says_while_a_build_and_two_trainers_run(browser: Any, tiny_model: Path, tmp_path: Path) -> None:
    store, runs, pictures = tmp_path / "store", tmp_path / "runs", write_shapes(tmp_path / "pictures", 24)
    sets = [part for one in ("images.resolution=64", "images.step=16") for part in ("--set", one)]
    build = ["cache_builder.cli", "cache_build", pictures, "--store", store, "--model", tiny_model, *sets]
    with ExitStack() as stack:
        first = command(*build)
        stack.callback(first.wait)
        stack.callback(first.kill)
        assert first.wait(600) == 0
        write_shapes(pictures, 96)
        _, address = stack.enter_context(page(store, "--runs-under", str(runs), "--source", str(pictures)))
        for name, low, high in (("base", 350, 1000), ("refiner", 0, 350)):
            said = [f"name={name}", f"timesteps={{low={low}, high={high}}}", "steps=100000", "batch=1", "log.every=1"]
            said += ["log.trackers=[]", "eval.every=20", "eval.samples=4", "eval.share=1.0"]
            given = [part for one in said for part in ("--set", one)]
            where = ["--store", store, "--model", tiny_model, "--output", runs / name, "--device", "cpu"]
            trainer = command("trainer.cli", "train_expert", *where, *given)
            stack.callback(trainer.wait)
            stack.callback(trainer.kill)
        with visit(browser, address, viewport={"width": 1280, "height": 900}) as seen:
            seen.wait_for_function("() => document.querySelectorAll('#now .state.training').length === 2")
            seen.wait_for_selector("[data-plot=timesteps] canvas")
            again = command(*build)
            stack.callback(again.kill)
            seen.wait_for_selector("#now .state.building")
            before = {name: last_step(runs / name) for name in ("base", "refiner")}
            for name, words in (("base", "timesteps 350 to 999"), ("refiner", "timesteps 0 to 349")):
                card = seen.locator("#now article", has_text=words)
                step = int(
                    card.locator("p").first.inner_text().rpartition("step ")[2].split(" of ")[0].replace(",", "")
                )
                assert before[name] - 200 <= step <= last_step(runs / name)
                assert "of 100,000" in card.inner_text()
            assert again.wait(600) == 0
            seen.wait_for_function("() => document.querySelector('.tile b').textContent === '96'")
            with StoreReader(store) as reader:
                count = reader.count()
            manifest = open_manifest(store, "main")
            tiles = seen.locator(".tile").all_inner_texts()
            assert tiles[0].split()[0] == str(len(manifest))
            captions = len(manifest.text_keys())
            assert tiles[2].split()[0] == str(captions)
            assert tiles[3].split()[0] == f"{count:,}"
            assert seen.locator("#manifests li", has_text="newest").locator("code").inner_text() == manifest.digest[:12]
            assert seen.locator("#manifests li").count() == 2
            seen.locator("#gallery").scroll_into_view_if_needed()
            seen.wait_for_function(
                "() => [...document.querySelectorAll('.sample img')].filter((i) => i.naturalWidth).length >= 4"
            )
            seen.get_by_role("button", name="Next").click()
            seen.wait_for_function("() => document.querySelector('#gallery output').textContent.startsWith('2 of')")


def last_step(run: Path) -> int:
    return max((event["step"] for event in read_events(run / "events.jsonl") if event["event"] == "step"), default=0)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [320, 390, 768, 1280])
def test_it_fits_every_screen(browser: Any, tmp_path: Path, width: int, scheme: str) -> None:
    """No sideways scrolling, with long names and many sizes too; text stands out from what is behind it."""
    store = tmp_path / "store"
    write_store(store, 40, ["a" * 300, "word " * 200], tmp_path / "pictures")
    write_run(tmp_path / "runs" / ("long-" * 20), "n" * 80, 0, 1000, 50)
    (store / "service").mkdir()
    aside = [{"path": "/" + "p" * 300, "reason": "r" * 300}]
    status = {
        "version": 1,
        "beat_s": time.time(),
        "state": "building",
        "quarantine": aside,
        "quarantined": 1,
        "done": 1,
        "total": 2,
    }
    (store / "service" / "status.json").write_text(json.dumps(status))
    shown = ("--runs-under", str(tmp_path / "runs"), "--source", str(tmp_path / "pictures"))
    screen = {"viewport": {"width": width, "height": 800}, "color_scheme": scheme}
    with page(store, *shown) as (_, address), visit(browser, address, **screen) as seen:
        seen.wait_for_selector("[data-plot=loss] canvas")
        seen.wait_for_selector(".sample")
        assert seen.evaluate("document.documentElement.scrollWidth") <= width
        colours = "[getComputedStyle(document.body).color, getComputedStyle(document.body).backgroundColor]"
        ink, paper = (sum(map(int, each[4:-1].split(","))) for each in seen.evaluate(colours))
        assert (ink < 200 < 600 < paper) if scheme == "light" else (paper < 200 < 600 < ink)


def test_an_empty_page_says_what_to_do(browser: Any, tmp_path: Path) -> None:
    with page(tmp_path / "store") as (_, address), visit(browser, address) as seen:
        text = seen.locator("main").inner_text()
        assert "There is no store at" in text
        assert "No training is shown" in text
        assert "No service runs" in text


@pytest.mark.parametrize(
    ("said", "badge", "words"),
    [
        ({"state": "waiting"}, "starting", "Not known yet: no build has looked"),
        (
            {"state": "waiting", "builds": 1, "quarantined": 0},
            "up to date",
            "every picture that was found could be used",
        ),
        ({"state": "waiting", "builds": 1, "last_error": "no space left"}, "failed", "no space left"),
        ({"state": "waiting", "phase": "another writer: pid 3"}, "waiting", "Another writer: pid 3"),
        ({"state": "quiet", "changed": 3}, "changes seen", "3 paths have changed"),
        ({"state": "building", "phase": "pictures", "done": 5, "total": 20, "images_per_s": 3}, "building", "5 of 20"),
        ({"state": "building", "beat_s": 5.0}, "building", "said nothing since"),
        ({"state": "stopped"}, "no service", "The service is not running"),
    ],
    ids=lambda value: value if isinstance(value, str) and " of " not in value else "",
)
def test_the_build_card_says_how_the_service_is(
    browser: Any, tmp_path: Path, said: dict[str, Any], badge: str, words: str
) -> None:
    (tmp_path / "service").mkdir()
    status = {"version": 1, "beat_s": time.time() + 300, "pid": os.getpid(), "host": os.uname().nodename}
    (tmp_path / "service/status.json").write_text(json.dumps(status | said))
    with page(tmp_path) as (_, address), visit(browser, address) as seen:
        seen.wait_for_selector("#now article")
        assert seen.locator("#now .state").inner_text() == badge
        assert words in seen.locator("main").inner_text()


def test_30_captions_with_markup_stay_text(browser: Any, tmp_path: Path) -> None:
    """In the gallery, in the closer look, among events, among what was set aside, under pictures of the pair."""
    assert len(MARKUP) == 30
    store, out = tmp_path / "store", tmp_path / "runs" / "evaluation"
    write_store(store, len(MARKUP), MARKUP)
    write_run(tmp_path / "runs" / "run", MARKUP[1], 0, 1000, 3)
    out.mkdir()
    choice = {"answers": [{"candidate": MARKUP[2]}], "loss": 1.0, "pictures": ["x.png"] * 24}
    report = {"prompts": MARKUP[:24], "rounds": [{"number": 1, "at": MARKUP[3], "experts": [], "choices": [choice]}]}
    (out / "report.json").write_text(json.dumps(report))
    (store / "service").mkdir()
    aside = [{"path": text, "reason": text} for text in MARKUP]
    status = {
        "version": 1,
        "beat_s": time.time(),
        "state": "building",
        "phase": MARKUP[0],
        "quarantine": aside,
        "last_error": MARKUP[1],
    }
    (store / "service" / "status.json").write_text(json.dumps(status | {"quarantined": 30, "folders": MARKUP}))
    events = [{"time_s": 1.0, "event": "build_failed", "message": text} for text in MARKUP]
    (store / "service" / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    found: set[str] = set()
    with page(store, "--runs-under", str(tmp_path / "runs")) as (_, address), visit(browser, address) as seen:
        seen.wait_for_selector("#events li")
        seen.wait_for_selector(".drawn")
        for number in (1, 2):
            seen.wait_for_function(
                f"() => document.querySelector('#gallery output').textContent.startsWith('{number} of')"
            )
            found |= set(seen.evaluate("[...document.querySelectorAll('.sample .caption')].map((e) => e.textContent)"))
            seen.locator(".sample").first.click()
            seen.keyboard.press("Escape")
            if number == 1:
                seen.locator("#gallery button[name=next]").click()
        assert found == set(MARKUP)
        assert seen.evaluate(f"document.querySelectorAll({json.dumps(MADE)}).length") == 0
        names = seen.evaluate("[...document.querySelectorAll('*')].flatMap((e) => e.getAttributeNames())")
        assert not [name for name in names if name.startswith("on")]
        images = seen.evaluate("[...document.images].map((image) => new URL(image.src).pathname)")
        assert not [path for path in images if not path.startswith("/picture/")]
        assert seen.evaluate("window.hit") is None
        assert len(seen.evaluate("[...document.querySelectorAll('#events li')].map((e) => e.textContent)")) >= 30
        assert seen.url == address
