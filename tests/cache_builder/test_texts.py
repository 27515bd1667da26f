"""From captions to the texts that are encoded: nothing is lost or made up, and every draw has its place."""

import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cache_builder.captions import MAX_CAPTION_BYTES, CaptionRules, CaptionVariants
from cache_builder.texts import filter_captions, says_a_side, write_texts
from shared.config import load_config
from shared.errors import ConfigError

PICTURE, OTHER = b"\1" * 32, b"\2" * 32
TAGS = "1girl, red hat, standing, from above, blurry, night"


def rules(**values: Any) -> CaptionRules:
    variants = CaptionVariants(**values.pop("variants", {}))
    return CaptionRules(**values, variants=variants)


def write(caption: str, digest: bytes = PICTURE, seed: int = 0, **values: Any) -> list[str]:
    return list(write_texts([caption], rules(**values), seed, digest))


@given(st.lists(st.text(max_size=40), max_size=5))
def test_without_rules_a_caption_stays_letter_for_letter(captions: list[str]) -> None:
    plain = CaptionRules()
    assert filter_captions(captions, plain) == tuple(dict.fromkeys(captions))
    assert list(write_texts(captions, plain, 0, PICTURE)) == list(dict.fromkeys(captions))


def test_trigger_prefix_and_suffix() -> None:
    assert write("a cat", trigger="sks") == ["sks, a cat"]
    assert write("sks, a cat", trigger="sks") == ["sks, a cat"]
    assert write("sksy cat", trigger="sks") == ["sks, sksy cat"]
    assert write("a cat", prefix="photo of ", suffix=".") == ["photo of a cat."]
    assert write("a cat", trigger="sks", prefix="(", suffix=")") == ["(sks, a cat)"]
    assert write("", prefix="photo of ", suffix=".") == [""]  # the empty caption stays what stands for none
    assert write("", trigger="sks", suffix=".") == ["sks."]


def test_strings_and_patterns_are_taken_out() -> None:
    strings = rules(remove=["watermark", "jpeg artifacts"])
    assert filter_captions(["a cat, watermark, jpeg artifacts, night", "a dog"], strings) == ("a cat, night", "a dog")
    assert filter_captions(["watermark", " watermark ,"], strings) == ("",)
    assert filter_captions(["1,000  cats", "1,000 watermark cats"], strings) == ("1,000  cats", "1,000 cats")
    patterns = rules(remove_patterns=[r"(?i)\bby [a-z]+ [a-z]+", r"\s*\([^)]*\)"])
    assert filter_captions(["a hill by Paul Klee (1920), oil"], patterns) == ("a hill, oil",)
    assert filter_captions(["né à 北京 (x)"], patterns) == ("né à 北京",)
    both = rules(remove=["a"], remove_patterns=["^bc$"])
    assert filter_captions(["abc"], both) == ("",)


def test_a_pattern_cannot_hang_a_build() -> None:
    """Each of them takes Python's own `re` longer than the age of the world."""
    text = "a" * (MAX_CAPTION_BYTES - 1) + "b"
    started_s = time.monotonic()
    for pattern in (r"(a+)+c", r"(a|aa)+$c", r"(.*a){20}x", r".*.*.*.*=.*"):
        assert filter_captions([text], rules(remove_patterns=[pattern])) == (text,)
    assert time.monotonic() - started_s < 5


@pytest.mark.parametrize(
    ("sets", "said"),
    [
        (["remove_patterns=['(']"], r"remove_patterns: '\(' is not a regular expression that RE2 knows: missing \)"),
        ([r"remove_patterns=['(a)\1']"], "that RE2 knows: invalid escape"),
        (["remove_patterns=['(?<=a)b']"], "that RE2 knows: invalid perl operator"),
        (["remove_patterns=['((a{100}){100}){100}']"], "that RE2 knows: invalid repetition size"),
        (["remove=['']"], "remove: the empty string"),
        (['trigger="a\\nb"'], "trigger: a caption is one line"),
        (['suffix="\\u0000"'], "suffix: a caption is one line"),
        (["variants.count=2", "variants.shuffle=false"], "variants: count = 2 would store one text"),
        (["variants.count=0"], "variants.count: .*greater than or equal to 1"),
        (["variants.drop=1.0"], "variants.drop: .*less than 1"),
        (['variants.split_on=""'], "variants.split_on: .*at least 1 character"),
        (["empty=error"], "empty: .*'missing', 'skip' or 'empty'"),
    ],
)
def test_wrong_rules_are_named(sets: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        load_config(CaptionRules, sets=sets)
    assert "\n" not in str(caught.value)


def test_variants_shuffle_what_may_move() -> None:
    texts = write(TAGS, variants={"count": 6, "keep_first": 2})
    assert texts[0] == TAGS
    assert 4 <= len(texts) <= 6  # of 24 orders; one that comes twice is stored once
    for text in texts:
        tags = text.split(", ")
        assert tags[:2] == ["1girl", "red hat"]
        assert sorted(tags) == sorted(TAGS.split(", "))


def test_variants_thin_and_keep_the_order_unless_they_shuffle() -> None:
    tags = TAGS.split(", ")
    texts = write(TAGS, variants={"count": 40, "drop": 0.5, "shuffle": False})
    assert texts[0] == TAGS
    assert len(texts) > 20
    for text in texts:
        assert [tag for tag in tags if tag in text.split(", ")] == text.split(", ")
    kept = sum(len(text.split(", ")) for text in texts[1:]) / len(tags) / (len(texts) - 1)
    assert 0.35 < kept < 0.65
    assert all(write("a, b", variants={"count": 64, "drop": 0.999}))  # one tag always stays
    assert write("a, b", variants={"count": 64, "drop": 0.999, "keep_first": 1})[1:] == ["a"]


def test_a_caption_without_tags_to_move_is_one_text() -> None:
    for caption in ("a cat", "", ", ,", "a, b"):
        assert write(caption, variants={"count": 9, "keep_first": 2}) == [caption]
    assert write("a cat", variants={"count": 9}) == ["a cat"]


def test_separators() -> None:
    texts = write("One. Two. Three", variants={"count": 20, "split_on": ". "})
    assert len(texts) > 4
    assert all(sorted(text.split(". ")) == ["One", "Three", "Two"] for text in texts)
    assert set(write("a|b", variants={"count": 20, "split_on": "|"})) == {"a|b", "a| b", "b| a"}
    assert write("a cat", trigger="sks", variants={"split_on": "|"}) == ["sks| a cat"]


tags = st.lists(st.text("abcdé ", min_size=1, max_size=5), min_size=1, max_size=8).map(",".join)
variants = st.fixed_dictionaries({"count": st.integers(1, 6), "keep_first": st.integers(0, 3), "drop": st.just(0.3)})


@given(st.lists(tags, min_size=1, max_size=4, unique=True), variants, st.integers(0, 3), st.randoms())
def test_texts_do_not_depend_on_order_or_company(captions: list[str], given: Any, seed: int, random: Any) -> None:
    own = rules(variants=given)
    together = list(write_texts(captions, own, seed, PICTURE))
    alone = [text for caption in captions for text in write_texts([caption], own, seed, PICTURE)]
    assert together == list(dict.fromkeys(alone))
    shuffled = list(captions)
    random.shuffle(shuffled)
    assert set(write_texts(shuffled, own, seed, PICTURE)) == set(together)
    assert set(captions) <= set(together)


def test_pictures_seeds_and_variants_have_draws_of_their_own() -> None:
    values = {"count": 4}
    one = write(TAGS, variants=values)
    assert len(set(one)) == 4
    assert write(TAGS, variants=values) == one
    assert write(TAGS, OTHER, variants=values)[1:] != one[1:]
    assert write(TAGS, seed=1, variants=values)[1:] != one[1:]
    assert write(TAGS, variants={"count": 9})[:4] == one  # more variants leave those before as they were


@pytest.mark.parametrize(
    "text", ["a cat on the left", "RIGHT side", "left-handed", "leftmost", "it moves rightwards", "left"]
)
def test_left_and_right_are_found(text: str) -> None:
    assert says_a_side(text)


@pytest.mark.parametrize("text", ["a bright copyright", "cleft", "leftover", "", "rights"])
def test_other_words_are_no_sides(text: str) -> None:
    assert not says_a_side(text)
