"""Pairs of experts: refused when they cannot work together, with the field or the gap in the message."""

import json
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from shared.contract import ExpertCard, ExpertFacts, ManifestUse, PairContract, check_pair
from shared.errors import ContractError

CONTRACT: dict[str, Any] = {
    "num_timesteps": 1000,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "zero_terminal_snr": True,
    "prediction_type": "v_prediction",
    "timestep_spacing": "trailing",
    "scaling_factor": 0.13025,
    "vae_digest": "aa",
    "text_digests": {"text_encoder": "bb", "text_encoder_2": "cc", "tokenizer": "dd", "tokenizer_2": "ee"},
}
FACTS: dict[str, Any] = {
    "layout": "sdxl",
    "null_prompt": "zeros",
    "text_chunks": 1,
    "aesthetic_score": 6.0,
    "negative_aesthetic_score": 2.5,
    "precision": "bf16",
    "start_model_digest": "ff",
    "manifests": (ManifestUse(name="train", digest="11", from_step=0, from_epoch=0),),
}
OTHER = {
    "num_timesteps": 1001,
    "beta_schedule": "linear",
    "beta_start": 0.001,
    "beta_end": 0.02,
    "zero_terminal_snr": False,
    "prediction_type": "sample",
    "timestep_spacing": "leading",
    "scaling_factor": 0.18215,
    "vae_digest": "ab",
    "text_digests": CONTRACT["text_digests"] | {"tokenizer": "xx"},
}
SECOND_TOWER = {"text_encoder_2": "cc", "tokenizer_2": "ee"}


def card(name: str, low: int, high: int, *, facts: dict[str, Any] | None = None, **contract: Any) -> ExpertCard:
    return ExpertCard(
        contract=PairContract(**CONTRACT | contract),
        facts=ExpertFacts(**FACTS | (facts or {}), name=name, low=low, high=high),
    )


def test_a_pair_that_fits() -> None:
    check_pair([card("base", 350, 1000), card("refiner", 0, 350)])
    check_pair([card("all", 0, 1000)])
    check_pair([card("low", 0, 200), card("high", 600, 1000), card("middle", 200, 600)])


def test_facts_may_differ() -> None:
    own = {"layout": "sdxl-refiner", "null_prompt": "encoded", "precision": "fp32", "start_model_digest": "00"}
    check_pair([card("base", 350, 1000), card("refiner", 0, 350, facts=own, text_digests=SECOND_TOWER)])


@pytest.mark.parametrize("field", sorted(PairContract.model_fields))
def test_each_field_that_differs_is_named(field: str) -> None:
    with pytest.raises(ContractError, match=rf"'base' and 'refiner' differ in {field}"):
        check_pair([card("base", 350, 1000), card("refiner", 0, 350, **{field: OTHER[field]})])


def test_every_field_of_the_contract_is_covered_above() -> None:
    assert OTHER.keys() == CONTRACT.keys() == PairContract.model_fields.keys()


def test_gaps_and_overlaps_are_named() -> None:
    with pytest.raises(ContractError, match=r"\[340, 350\)"):
        check_pair([card("base", 350, 1000), card("refiner", 0, 340)])
    with pytest.raises(ContractError, match=r"two experts .*\[340, 350\)"):
        check_pair([card("base", 340, 1000), card("refiner", 0, 350)])


def test_text_digests_are_compared_where_both_use_them() -> None:
    check_pair([card("base", 350, 1000), card("refiner", 0, 350, text_digests=SECOND_TOWER)])
    other = SECOND_TOWER | {"text_encoder_2": "zz"}
    with pytest.raises(ContractError, match=r"text_digests\.text_encoder_2"):
        check_pair([card("base", 350, 1000), card("refiner", 0, 350, text_digests=other)])


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2)])
def test_any_two_of_three_are_compared(order: tuple[int, ...]) -> None:
    """The first has no text encoder in common with the two that differ."""
    cards = [
        card("refiner", 0, 200, text_digests={"text_encoder_2": "cc"}),
        card("middle", 200, 600, text_digests={"text_encoder": "bb"}),
        card("high", 600, 1000, text_digests={"text_encoder": "zz"}),
    ]
    with pytest.raises(ContractError, match=r"text_digests\.text_encoder:"):
        check_pair([cards[index] for index in order])


def test_card_survives_json() -> None:
    before = card("base", 350, 1000)
    assert ExpertCard.model_validate_json(before.model_dump_json()) == before
    assert ExpertCard.model_validate(json.loads(before.model_dump_json())) == before


@pytest.mark.parametrize("overlap", [None, {"width": 50, "jitter": False}])
def test_a_file_that_tells_of_a_band_beyond_the_range_is_read(overlap: Any) -> None:
    known = card("base", 350, 1000)
    written = known.model_dump(mode="json")
    written["facts"]["overlap"] = overlap
    assert ExpertCard.model_validate_json(json.dumps(written)) == known


@pytest.mark.parametrize("place", ["", "contract", "facts"])
def test_unknown_fields_and_other_formats_are_refused(place: str) -> None:
    content = json.loads(card("base", 350, 1000).model_dump_json())
    (content[place] if place else content)["surprise"] = 1
    with pytest.raises(ValidationError, match="surprise"):
        ExpertCard.model_validate(content)
    newer = json.loads(card("base", 350, 1000).model_dump_json()) | {"format": 2}
    with pytest.raises(ValidationError, match="format"):
        ExpertCard.model_validate(newer)


def test_contract_makes_its_schedule() -> None:
    schedule = card("base", 350, 1000).contract.schedule()
    assert len(schedule) == 1000
    assert float(schedule.snr(torch.tensor(999))) == 0
    assert card("base", 350, 1000).facts.timesteps.low == 350
