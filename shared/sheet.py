"""Draws a contact sheet: cards of pictures side by side with words under them, as one PNG.

It draws what is given as arrays and never opens a file. Words are data: control characters
and what the font cannot draw are written as escapes, and a card's words stay inside the card.
"""

import contextlib
import functools
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from shared.command import one_line

Pixels = np.ndarray[Any, np.dtype[np.uint8]]

GAP_PX, PANEL_GAP_PX, WORDS_GAP_PX = 14, 6, 6
LARGE_PX, SMALL_PX = 15, 12  # of letters
LEAST_WIDTH_PX = 480
MOST_CHARACTERS = 400  # of a caption that are looked at
CAPTION_LINES, HEADING_LINES = 3, 3
PAPER, INK, FAINT, ALARM, EMPTY = "#ffffff", "#1c1c1c", "#6b6b6b", "#b3261e", "#ececec"
FONTS = ("NotoSansCJK-Regular.ttc", "DejaVuSans.ttf", "Arial Unicode.ttf", "Arial.ttf")  # else Pillow's own: English
_NOT_DRAWN = "\U000f0000"  # of a private plane: no font has it


@dataclass(frozen=True)
class Panel:
    """A picture of any size, or why there is none."""

    pixels: Pixels | None
    why: str = ""


@dataclass(frozen=True)
class Card:
    """One sample: its panels, a title and a caption."""

    panels: tuple[Panel, ...]
    title: str
    caption: str


def draw_sheet(heading: str, cards: Sequence[Card], box_px: int = 256) -> bytes:
    """PNG of `cards`, each picture fitted into a square of `box_px`; a row is as high as its highest picture."""
    panels = max((len(card.panels) for card in cards), default=1)
    width = panels * box_px + (panels - 1) * PANEL_GAP_PX
    columns = max(1, round(math.sqrt(len(cards) * 1.6 * box_px / width)))
    rows = [cards[start : start + columns] for start in range(0, len(cards), columns)]
    heights = [max(_height(panel, box_px) for card in row for panel in card.panels) for row in rows]
    words = WORDS_GAP_PX + (1 + CAPTION_LINES) * _line_px(SMALL_PX)
    sheet_width = max(LEAST_WIDTH_PX, GAP_PX + columns * (width + GAP_PX))
    inner = sheet_width - 2 * GAP_PX
    lines = max(1, len(_wrap(_drawable(heading, LARGE_PX), _font(LARGE_PX), inner, HEADING_LINES)))
    top = 2 * GAP_PX + lines * _line_px(LARGE_PX)
    sheet = Image.new("RGB", (sheet_width, top + sum(height + words + GAP_PX for height in heights)), PAPER)
    _write(sheet, heading, (GAP_PX, GAP_PX), inner, LARGE_PX, lines, INK)
    for row, height in zip(rows, heights, strict=True):
        for number, card in enumerate(row):
            _draw_card(sheet, card, (GAP_PX + number * (width + GAP_PX), top), (width, height), box_px)
        top += height + words + GAP_PX
    data = io.BytesIO()
    sheet.save(data, "PNG")
    return data.getvalue()


def _draw_card(sheet: Image.Image, card: Card, at: tuple[int, int], size: tuple[int, int], box_px: int) -> None:
    (x, y), (width, height) = at, size
    for number, panel in enumerate(card.panels):
        left = x + number * (box_px + PANEL_GAP_PX)
        ImageDraw.Draw(sheet).rectangle((left, y, left + box_px - 1, y + height - 1), fill=EMPTY)
        if panel.pixels is None:
            lines = max(1, (height - 8) // _line_px(SMALL_PX))
            _write(sheet, panel.why, (left + 8, y + 8), box_px - 16, SMALL_PX, lines, ALARM)
        else:
            picture = _fitted(panel.pixels, box_px)
            sheet.paste(picture, (left + (box_px - picture.width) // 2, y + (height - picture.height) // 2))
    words = y + height + WORDS_GAP_PX
    _write(sheet, card.title, (x, words), width, SMALL_PX, 1, FAINT)
    _write(sheet, card.caption, (x, words + _line_px(SMALL_PX)), width, SMALL_PX, CAPTION_LINES, INK)


def shrunk(pixels: Pixels, box_px: int = 256) -> Pixels:
    """A picture as a sheet of such boxes shows it, to be kept until the sheet is drawn; small ones as they are."""
    return pixels if max(pixels.shape[:2]) <= box_px else np.asarray(_fitted(pixels, box_px))


def _height(panel: Panel, box_px: int) -> int:
    if panel.pixels is None:
        return 6 * _line_px(SMALL_PX)
    h, w = panel.pixels.shape[:2]
    return max(1, round(box_px * int(h) / int(max(h, w))))


def _fitted(pixels: Pixels, box_px: int) -> Image.Image:
    image = Image.fromarray(pixels)
    scale = box_px / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.resize(size, Image.Resampling.LANCZOS if scale < 1 else Image.Resampling.BICUBIC)


def _write(sheet: Image.Image, text: str, at: tuple[int, int], width: int, size: int, lines: int, ink: str) -> None:
    """`text` in at most `lines` lines of `width` px; whatever the font makes of it, nothing is drawn outside."""
    font = _font(size)
    strip = Image.new("RGB", (width, lines * _line_px(size)), EMPTY if ink == ALARM else PAPER)
    draw = ImageDraw.Draw(strip)
    for number, line in enumerate(_wrap(_drawable(text, size), font, width, lines)):
        draw.text((0, number * _line_px(size)), line, ink, font)
    sheet.paste(strip, at)


def _wrap(text: str, font: Any, width: int, lines: int) -> list[str]:
    """`text` cut into lines at spaces, or inside a word that is longer than a line; the last one may end in dots."""
    wrapped: list[str] = []
    rest = text.strip()
    while rest and len(wrapped) < lines:
        fits = _fitting(rest, font, width)
        if fits < len(rest):
            if len(wrapped) == lines - 1:
                return [*wrapped, rest[: _fitting(rest, font, width - int(font.getlength("...")))].rstrip() + "..."]
            space = rest.rfind(" ", 0, fits + 1)
            fits = space if space > 0 else fits
        wrapped.append(rest[:fits].rstrip())
        rest = rest[fits:].lstrip()
    return wrapped


def _fitting(text: str, font: Any, width: int) -> int:
    """How many characters fit, at least one."""
    low, high = 1, len(text)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if font.getlength(text[:middle]) <= width else (low, middle - 1)
    return low


def _drawable(text: str, size: int) -> str:
    cut = text[:MOST_CHARACTERS] + ("..." if len(text) > MOST_CHARACTERS else "")
    return "".join(char if _has_glyph(char, size) else _escaped(char) for char in one_line(cut))


def _escaped(char: str) -> str:
    return char.encode("unicode_escape").decode()


@functools.lru_cache(maxsize=4096)
def _has_glyph(char: str, size: int) -> bool:
    if char < "\x7f":
        return True
    mask = _font(size).getmask(char)
    absent = _font(size).getmask(_NOT_DRAWN)
    return bool(mask.size != absent.size or bytes(mask) != bytes(absent))


@functools.lru_cache(maxsize=8)
def _font(size: int) -> Any:
    for name in FONTS:
        with contextlib.suppress(OSError):
            return ImageFont.truetype(name, size, layout_engine=ImageFont.Layout.BASIC)
    return ImageFont.load_default(size)


def _line_px(size: int) -> int:
    return math.ceil(1.3 * size)
