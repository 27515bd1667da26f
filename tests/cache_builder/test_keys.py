"""Keys name what a record depends on: every field counts, nothing else does, and no refactor changes one."""

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cache_builder.buckets import CropPlan
from cache_builder.keys import crop_draw, facts_key, image_digest, latent_key, sample_id, text_facts_key, text_key
from shared.pictures import PixelRules

DIGEST = image_digest(b"a picture")
PLAN = CropPlan((80, 64), 8, 0, (64, 64))
RULES = PixelRules()
TEXT_DIGESTS = {"text_encoder": "aa", "text_encoder_2": "bb", "tokenizer": "cc", "tokenizer_2": "dd"}
LATENT: dict[str, Any] = {
    "digest": DIGEST,
    "plan": PLAN,
    "rules": RULES,
    "vae_digest": "ab" * 32,
    "encode_dtype": "float32",
    "latents": "moments",
}


def test_known_answers() -> None:
    """Stores that exist name their records by these: a change here encodes every data set again."""
    text = text_key("a cat", 1, TEXT_DIGESTS)
    assert DIGEST.hex() == "2831e05f5b0544ead83f0a832b6790634a7c9ba8bfb92a341a52181e752d262f"
    assert latent_key(**LATENT).hex() == "06e248127acbb58b1dd02b75843e95b5"
    assert facts_key(DIGEST, RULES).hex() == "5d07306a190a09cdd7cf9849d46d7bd5"
    assert text.hex() == "b5273d2257b18a094183730ba905bae5"
    assert text_facts_key(text).hex() == "377d6c526f90e1dbdf358c5429484d2c"
    assert sample_id("cats", DIGEST).hex() == "e2cb47457b113635de3cb5f470acfcb9"
    assert crop_draw(0, DIGEST, 0) == pytest.approx((0.6423123393705659, 0.6630506328652821), abs=1e-14)


@pytest.mark.parametrize(
    "change",
    [
        {"digest": image_digest(b"a picturf")},
        {"plan": replace(PLAN, resize_hw=(81, 64))},
        {"plan": replace(PLAN, box_top=9)},
        {"plan": replace(PLAN, box_left=1)},
        {"plan": replace(PLAN, target_hw=(64, 48))},
        {"plan": replace(PLAN, flip=True)},
        {"rules": PixelRules(background_rgb=(255, 255, 254))},
        {"rules": PixelRules(resample="bicubic")},
        {"vae_digest": "ac" * 32},
        {"encode_dtype": "bfloat16"},
        {"latents": "mean"},
    ],
    ids=str,
)
def test_everything_that_latents_depend_on_counts(change: dict[str, Any]) -> None:
    assert latent_key(**(LATENT | change)) != latent_key(**LATENT)


def test_facts_of_a_picture_know_of_pixels_alone() -> None:
    keys = {facts_key(DIGEST, RULES), facts_key(image_digest(b""), RULES)}
    keys |= {facts_key(DIGEST, rules) for rules in (PixelRules((0, 0, 0)), PixelRules(resample="bicubic"))}
    assert len(keys) == 4


@pytest.mark.parametrize("part", TEXT_DIGESTS)
def test_each_encoder_and_tokenizer_counts(part: str) -> None:
    assert text_key("a cat", 1, TEXT_DIGESTS | {part: "ee"}) != text_key("a cat", 1, TEXT_DIGESTS)


def test_the_order_of_encoders_does_not_count() -> None:
    assert text_key("a", 1, dict(reversed(TEXT_DIGESTS.items()))) == text_key("a", 1, TEXT_DIGESTS)


pixels = st.integers(0, 4096)
sizes = st.tuples(pixels, pixels)
plans = st.builds(CropPlan, sizes, pixels, pixels, sizes, st.booleans())
rules = st.builds(PixelRules, st.tuples(*[st.integers(0, 255)] * 3), st.sampled_from(["lanczos", "bicubic"]))
latents = st.tuples(
    st.binary(min_size=32, max_size=32),
    plans,
    rules,
    st.text("0123456789abcdef", min_size=64, max_size=64),
    st.sampled_from(["float32", "bfloat16", "float16"]),
    st.sampled_from(["moments", "mean"]),
)


@given(latents, latents, st.lists(st.booleans(), min_size=6, max_size=6))
def test_latents_that_differ_anywhere_have_other_keys(one: Any, other: Any, taken: list[bool]) -> None:
    mixed = tuple(b if take else a for a, b, take in zip(one, other, taken, strict=True))
    assert (latent_key(*mixed) == latent_key(*one)) == (mixed == one)


texts = st.tuples(st.text(max_size=20), st.integers(1, 3), st.fixed_dictionaries(dict.fromkeys("abcd", st.text("01"))))


@given(texts, texts)
def test_texts_that_differ_anywhere_have_other_keys(one: Any, other: Any) -> None:
    assert (text_key(*one) == text_key(*other)) == (one == other)


@given(st.text(max_size=8), st.binary(max_size=8), st.text(max_size=8), st.binary(max_size=8))
def test_samples_are_pictures_of_data_sets(dataset: str, data: bytes, dataset_2: str, data_2: bytes) -> None:
    same = (dataset, data) == (dataset_2, data_2)
    assert (sample_id(dataset, image_digest(data)) == sample_id(dataset_2, image_digest(data_2))) == same


def test_kinds_of_keys_never_meet() -> None:
    keys = {latent_key(**LATENT), facts_key(DIGEST, RULES), sample_id("a", DIGEST), text_key("a", 1, {})}
    assert len(keys | {text_facts_key(text_key("a", 1, {}))}) == 5


def test_crops_are_drawn_evenly_and_by_the_seed() -> None:
    draws = [crop_draw(0, image_digest(bytes([i, j])), 0) for i in range(32) for j in range(32)]
    for axis in range(2):
        values = [draw[axis] for draw in draws]
        assert 0 <= min(values) < 0.01
        assert 0.99 < max(values) < 1
        assert sum(values) / len(values) == pytest.approx(0.5, abs=0.04)
    assert crop_draw(0, DIGEST, 0) == crop_draw(0, DIGEST, 0)
    assert len({crop_draw(0, DIGEST, 0), crop_draw(1, DIGEST, 0), crop_draw(0, DIGEST, 1)}) == 3
