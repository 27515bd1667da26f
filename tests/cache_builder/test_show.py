"""cache-store show: what is on the sheet, and that nothing in a store can make it say or read anything else."""

import io
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cache_builder.report import BuildReport
from cache_builder.show import ShowOptions, show_store
from shared.errors import ConfigError, ContractError, ManifestMismatch
from shared.manifest import open_manifest, seal_manifest
from shared.sheet import CAPTION_LINES, LARGE_PX, SMALL_PX, WORDS_GAP_PX, Card, Panel, _line_px, draw_sheet
from shared.store import StoreWriter
from shared.store_card import read_card, write_card
from tests.pictures import write_shapes

Build = Callable[..., BuildReport]
MODEL = Path(__file__).parents[2] / "demo/model"  # trained: what it decodes looks like what it encoded


@pytest.fixture(scope="module")
def before(tmp_path_factory: pytest.TempPathFactory, run_build: Build) -> Path:
    place = tmp_path_factory.mktemp("before")
    run_build([write_shapes(place / "set", 6)], place / "store", MODEL)
    return place


@pytest.fixture
def store(before: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(before / "store", tmp_path / "store"))


def pixels_of(png: Path | bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png) if isinstance(png, bytes) else png))


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Card]:
    """The cards of the last sheet; it is drawn all the same."""
    cards: list[Card] = []

    def draw(heading: str, given: list[Card], box_px: int) -> bytes:
        cards[:] = given
        return draw_sheet(heading, given, box_px)

    monkeypatch.setattr("cache_builder.show.draw_sheet", draw)
    return cards


def psnr_db(one: np.ndarray, other: np.ndarray) -> float:
    size = min(one.shape[1], other.shape[1], 24), min(one.shape[0], other.shape[0], 24)
    resized = (Image.fromarray(picture).resize(size, Image.Resampling.BOX) for picture in (one, other))
    small = [np.asarray(picture).astype(float) for picture in resized]
    return float(10 * np.log10(255**2 / np.mean((small[0] - small[1]) ** 2)))


@pytest.mark.parametrize("model", [None, str(MODEL)])
def test_crops_look_like_their_sources(before: Path, tmp_path: Path, drawn: list[Card], model: str | None) -> None:
    options = ShowOptions(model=model, sources=(before / "set",), device="cpu")
    shown = show_store(before / "store", tmp_path / "new/sheet.png", options)
    assert (shown.samples, shown.damaged, shown.sources_missing) == (6, [], 0)
    rows = open_manifest(before / "store", "main").rows(range(6))
    for row, card in zip(rows, drawn, strict=True):
        crop, source = (panel.pixels for panel in card.panels)
        assert crop is not None
        assert source is not None
        assert crop.shape[:2] == (row.bucket_hw if model else tuple(n // 8 for n in row.bucket_hw))
        (h, w), (source_h, source_w) = row.bucket_hw, source.shape[:2]
        scale = max(h / source_h, w / source_w)  # the crop is the middle of the source
        cut_h, cut_w = round(h / scale), round(w / scale)
        top, left = (source_h - cut_h) // 2, (source_w - cut_w) // 2
        assert psnr_db(crop, source[top : top + cut_h, left : left + cut_w]) > (18 if model is None else 23)
        assert card.title == f"{h} x {w}  {row.split}  set/{row.path}"
        captions = (before / "set" / row.path).with_suffix(".txt").read_text().splitlines()
        assert card.caption == captions[0]
    assert pixels_of(tmp_path / "new/sheet.png").shape[2] == 3


def test_samples_are_spread_over_the_manifest(before: Path, tmp_path: Path, drawn: list[Card]) -> None:
    assert show_store(before / "store", tmp_path / "s.png", ShowOptions(count=3)).samples == 3
    rows = open_manifest(before / "store", "main").rows([0, 2, 5])
    assert [card.title.rsplit("/", 1)[1] for card in drawn] == [row.path for row in rows]


def test_nothing_to_decode_with(store: Path, tmp_path: Path, tiny_model: Path) -> None:
    with pytest.raises(ContractError, match="another VAE"):
        show_store(store, tmp_path / "s.png", ShowOptions(model=str(tiny_model)))
    card = read_card(store)
    card.pop("previews")
    write_card(store, card)
    with pytest.raises(ConfigError, match=r"no preview.*--model"):
        show_store(store, tmp_path / "s.png", ShowOptions())
    with pytest.raises(ConfigError, match="is a folder"):
        show_store(store, tmp_path, ShowOptions())
    with pytest.raises(ManifestMismatch, match="there are: main"):
        show_store(store, tmp_path / "s.png", ShowOptions(manifest="other"))
    assert not (tmp_path / "s.png").exists()


def test_a_damaged_record_is_said_in_its_place(store: Path, tmp_path: Path, drawn: list[Card]) -> None:
    row = open_manifest(store, "main").rows([2])[0]
    with StoreWriter(store) as writer:
        writer.delete_many([row.variants[0].latent_key])
        writer.put_many([(row.variants[0].latent_key, b"bad")])
    shown = show_store(store, tmp_path / "s.png", ShowOptions())
    (damaged,) = shown.damaged
    assert damaged.startswith(f"set/{row.path}: record ")
    assert [card.panels[0].pixels is None for card in drawn] == [index == 2 for index in range(6)]


def test_sources_that_are_not_what_was_built(before: Path, tmp_path: Path, drawn: list[Card]) -> None:
    folder = Path(shutil.copytree(before / "set", tmp_path / "set"))
    gone, changed, link = (folder / f"shape-0000{number}.png" for number in range(3))
    gone.unlink()
    changed.write_bytes(changed.read_bytes() + b"\0")
    link.rename(tmp_path / "outside.png")
    link.symlink_to(tmp_path / "outside.png")
    shown = show_store(before / "store", tmp_path / "s.png", ShowOptions(sources=(folder,)))
    assert shown.sources_missing == 3
    why = {card.title.rsplit("/", 1)[1]: card.panels[1].why for card in drawn}
    assert "No such file" in why[gone.name]
    assert "another picture" in why[changed.name]
    assert "cannot be read" in why[link.name]


@pytest.mark.parametrize("path", ["../outside.png", "/{}/outside.png", "sub/../../outside.png", "link/outside.png"])
def test_a_path_in_a_manifest_does_not_lead_out_of_the_folder(
    path: str, store: Path, before: Path, tmp_path: Path, drawn: list[Card]
) -> None:
    manifest = open_manifest(store, "main")
    folder, row = tmp_path / "set", manifest.rows([0])[0]
    (folder / "sub").mkdir(parents=True)
    (folder / "link").symlink_to(tmp_path)
    shutil.copy(before / "set" / row.path, tmp_path / "outside.png")  # the very picture, but not in the folder
    hostile = replace(row, path=path.format(str(tmp_path).strip("/")))
    seal_manifest(store, "hostile", manifest.settings, [hostile])
    show_store(store, tmp_path / "s.png", ShowOptions(manifest="hostile", sources=(folder,)))
    assert drawn[0].panels[1].pixels is None


# --- the sheet ---

HOSTILE = (
    "\x1b[31mred\x1b[0m\nsecond line\r\u202egnp.exe", "x" * 70_000, "z" + "\u0301" * 500, "日本語 émile ñ 😀 مرحبا",
    "\0\x07\x7f\u2028",    "%s {0} [bold] <b>", "\ud800", "a " * 5000, "\U000f0000\U0010ffff", "ﷺ" * 40, "\t" * 300,
)  # fmt: skip


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_words_stay_inside_their_card(text: str) -> None:
    """Whatever the first card says, only the strips of its words change."""
    source = np.random.default_rng(1)
    panels = tuple(Panel(source.integers(0, 256, (40, 60, 3), dtype=np.uint8)) for _ in range(2))

    def sheet(title: str, caption: str) -> np.ndarray:
        return pixels_of(draw_sheet("h", [Card(panels, title, caption), *[Card(panels, "t", "c")] * 5], 90))

    changed = np.argwhere((sheet(text, text) != sheet("t", "c")).any(axis=2))
    assert len(changed)
    (top, left), (bottom, right) = changed.min(axis=0), changed.max(axis=0)
    assert left >= 14
    assert right < 14 + 2 * 90 + 6
    assert bottom - top < (1 + CAPTION_LINES) * _line_px(SMALL_PX) + WORDS_GAP_PX


def test_an_empty_sheet_and_odd_pictures() -> None:
    assert pixels_of(draw_sheet("nothing", [])).shape[1] >= 480
    odd = [Panel(np.zeros(shape, np.uint8)) for shape in ((1, 1, 3), (1, 300, 3), (900, 2, 3))]
    assert pixels_of(draw_sheet("odd", [Card((panel,), "t", "c") for panel in odd])).ndim == 3


def test_a_long_heading_takes_the_lines_it_needs() -> None:
    cards = [Card((Panel(np.full((32, 32, 3), 200, np.uint8)),), "t", "c")]
    heights = [pixels_of(draw_sheet("word " * count, cards)).shape[0] for count in (1, 20, 40, 400)]
    line = _line_px(LARGE_PX)
    assert [height - heights[0] for height in heights[:2]] == [0, line]
    assert heights[-1] - heights[0] == 2 * line  # three lines at most, the last with dots
