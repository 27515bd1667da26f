"""The card of a checkpoint says what it is whatever people called their experts, models and data sets."""

import json

import pytest

from shared.contract import AdapterFacts, ExpertCard, ExpertFacts, PairContract
from shared.model_folder import read_licence
from trainer.config import ExpertConfig
from trainer.model_card import code, model_card

HOSTILE = [
    "`` ` ```",
    "---\nlicense: mit\n---",
    "# not a heading\n\n| a | b |",
    "<script>alert(1)</script>",
    "\x1b[2J",
    " ",
]


def card_of(name: str = "base", **facts: object) -> ExpertCard:
    contract = PairContract(
        num_timesteps=1000,
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        zero_terminal_snr=True,
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        scaling_factor=0.13025,
        vae_digest="v",
        text_digests={},
    )
    known = {
        "low": 350,
        "high": 1000,
        "layout": "sdxl",
        "null_prompt": "zeros",
        "text_chunks": 1,
        "aesthetic_score": 6.0,
        "negative_aesthetic_score": 2.5,
        "precision": "fp32",
        "start_model_digest": "d",
        "manifests": (),
    }
    return ExpertCard(contract=contract, facts=ExpertFacts.model_validate({"name": name, **known, **facts}))


def written(card: ExpertCard, datasets: tuple[str, ...] = ("art",)) -> str:
    config = ExpertConfig.model_validate({"name": "x", "timesteps": {"low": 350, "high": 1000}, "steps": 1})
    return model_card(card, config, datasets, 7)


@pytest.mark.parametrize("text", HOSTILE)
def test_what_people_write_stays_inside_its_span(text: str) -> None:
    plain, hostile = written(card_of()), written(card_of(text, base_model=text, base_licence=text), (text, text))
    shape = [
        [line[:2] for line in card.splitlines() if line.startswith(("#", "---", "```"))] for card in (plain, hostile)
    ]
    assert shape[0] == shape[1]
    assert all(char.isprintable() or char == "\n" for char in hostile)
    front = hostile.split("---\n")[1].splitlines()
    entries = {key: json.loads(value) for key, _, value in (line.partition(": ") for line in front)}
    assert set(entries) <= {"library_name", "pipeline_tag", "license", "tags", "base_model", "base_model_relation"}


@pytest.mark.parametrize("text", HOSTILE)
def test_a_span_is_longer_than_what_it_holds(text: str) -> None:
    span = code(text)
    ticks = len(span) - len(span.lstrip("`"))
    assert "\n" not in span
    assert "`" * ticks not in span[ticks:-ticks]


def test_it_says_range_partner_and_how_to_load() -> None:
    whole = written(card_of(base_model="segmind/SSD-1B", base_licence="apache-2.0"))
    for said in ('base_model: "segmind/SSD-1B"', 'license: "apache-2.0"', "[350, 1000)", "answers for [0, 350)"):
        assert said in whole
    assert "denoising_end=0.65" in whole
    assert "UNet2DConditionModel.from_pretrained" in whole
    low = written(card_of(low=0, high=350, adapter=AdapterFacts(kind="dora", rank=4, alpha=4, targets=("attention",))))
    for said in (
        "A DoRA adapter (rank 4",
        "denoising_start=0.65",
        "load_lora_weights",
        "StableDiffusionXLImg2ImgPipeline",
    ):
        assert said in low
    assert "unknown: see the base model" in low


@pytest.mark.parametrize(
    ("readme", "licence"),
    [
        ("---\nlicense: openrail++\ntags:\n- a\n---\n# x", "openrail++"),
        ("---\nlicense: other\nlicense_name: 'sai-nc'\nlicense_link: https://x/y\n---\n", "other: sai-nc, https://x/y"),
        ("# no front matter\nlicense: mit", ""),
        ("---\nlicense: mit\nnever closed", ""),
        ("", ""),
        (None, ""),
    ],
)
def test_a_licence_is_what_the_model_says(tmp_path, readme, licence) -> None:  # type: ignore[no-untyped-def]
    if readme is not None:
        (tmp_path / "README.md").write_text(readme)
    assert read_licence(tmp_path) == licence


def test_a_licence_may_stand_in_the_index(tmp_path) -> None:  # type: ignore[no-untyped-def]
    (tmp_path / "model_index.json").write_text('{"license": "mit"}')
    assert read_licence(tmp_path) == "mit"
