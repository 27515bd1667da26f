"""Captions are read as written, or refused with a reason."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cache_builder.captions import MAX_CAPTION_BYTES, CaptionRules, parse_caption
from shared.config import load_config
from shared.errors import ConfigError, DataError

ALL = CaptionRules()


@pytest.mark.parametrize(
    ("data", "captions"),
    [
        (b"a cat", ("a cat",)),
        (b"  a  cat \r\n\r\n a dog\ra  cat\n", ("a  cat", "a dog")),
        (b"\xef\xbb\xbfa cat\n", ("a cat",)),
        (b"", ()),
        (b" \n\t\r\n", ()),
        (b"\xef\xbb\xbf", ()),
        ("e\u0301 \u00e9 \u2028 one line".encode(), ("e\u0301 \u00e9 \u2028 one line",)),
        (b"<script>alert(1)</script>", ("<script>alert(1)</script>",)),
    ],
)
def test_every_line_is_a_caption(data: bytes, captions: tuple[str, ...]) -> None:
    assert parse_caption(data, ALL) == captions


def test_first_and_whole() -> None:
    data = b"\n a  cat\n\ton a mat \n"
    assert parse_caption(data, CaptionRules(lines="first")) == ("a  cat",)
    assert parse_caption(data, CaptionRules(lines="whole")) == ("a cat on a mat",)
    assert parse_caption(b" \n ", CaptionRules(lines="whole")) == ()


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"a\0cat", "NUL"),
        ("a cat".encode("utf-16"), "UTF-16"),
        (b"caf\xe9", "not UTF-8 at byte 3"),
        (b"\xed\xa0\x80", "not UTF-8"),
        (b"x" * (MAX_CAPTION_BYTES + 1), "65537 bytes"),
    ],
)
def test_what_is_not_a_caption_is_refused(data: bytes, reason: str) -> None:
    with pytest.raises(DataError, match=reason):
        parse_caption(data, ALL)


@given(st.binary(max_size=200), st.sampled_from(["all", "first", "whole"]))
def test_any_bytes_give_clean_captions_or_a_reason(data: bytes, lines: Any) -> None:
    try:
        captions = parse_caption(data, CaptionRules(lines=lines))
    except DataError:
        return
    assert len(set(captions)) == len(captions)
    assert all(caption and caption == caption.strip() and "\n" not in caption for caption in captions)


@pytest.mark.parametrize("extension", ["txt", "", ".", ".txt.", "./../x", ".a/b", ".\0"])
def test_extensions_are_suffixes(extension: str) -> None:
    with pytest.raises(ConfigError, match="suffix"):
        load_config(
            CaptionRules, sets=[f'extensions=["{extension}"]'] if "\0" not in extension else [r'extensions=["\u0000"]']
        )


def test_extensions_from_toml() -> None:
    assert load_config(CaptionRules, sets=['extensions=[".tags.txt"]']).extensions == (".tags.txt",)
