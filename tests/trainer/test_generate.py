"""Experts on disk to pictures on disk: what is drawn, what is refused, and that a picture is its seed's alone."""

import hashlib
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

from shared.errors import CheckpointError, ConfigError, ContractError
from trainer.drawing import GenerateRequest
from trainer.ensemble import DrawSettings
from trainer.generate import generate
from trainer.schedulers import SCHEDULERS

PROMPT = "a red circle on white"
Pair = tuple[Path, Path]
Draw = Callable[..., list[Path]]


@pytest.fixture
def draw(pair: Pair, tiny_model: Path, tmp_path: Path) -> Draw:
    def drawn(*prompts: str | tuple[str, ...], **changes: Any) -> list[Path]:
        settings = changes.pop("settings", DrawSettings(3, 4.0))
        asked: dict[str, Any] = {"experts": pair, "model": tiny_model, "out": tmp_path / "out", "device": "cpu"}
        asked |= {"height": 64, "width": 64, "prompts": prompts or (PROMPT,), "settings": settings}
        return list(generate(GenerateRequest(**(asked | changes))))

    return drawn


def pixels(path: Path) -> Any:
    with Image.open(path) as image:
        return np.asarray(image)


def test_a_picture_is_its_seeds_alone(draw: Draw, tmp_path: Path) -> None:
    for scheduler in ("unipc", "euler-a"):
        settings = DrawSettings(3, 4.0, None, scheduler)
        several = draw(PROMPT, "a blue square", settings=settings, seed=4, count=2)
        assert [path.name for path in several] == [f"{i:03d}-seed-{seed}.png" for i in (0, 1) for seed in (4, 5)]
        again = draw(settings=settings, seed=5, out=tmp_path / "alone")
        assert again[0].read_bytes() == several[1].read_bytes()
        assert len({pixels(path).tobytes() for path in several}) == 4


def test_what_a_picture_is_of_stands_in_it(draw: Draw, pair: Pair) -> None:
    path = draw("a prompt with \u201equotes\u201c and \u7ea2", negative_prompt="red", seed=3)[0]
    with Image.open(path) as image:
        facts = json.loads(image.text["sdxl-experts"])  # type: ignore[attr-defined]
    assert facts["prompt"] == "a prompt with \u201equotes\u201c and \u7ea2"
    assert (facts["negative_prompt"], facts["seed"], facts["steps"], facts["scheduler"]) == ("red", 3, 3, "unipc")
    assert (facts["format"], facts["guidance"], facts["guidance_rescale"]) == (1, 4.0, 0.7)
    assert facts["precision"] == "fp32"
    assert [expert["name"] for expert in facts["experts"]] == ["base", "refiner"]
    for expert, run in zip(facts["experts"], pair, strict=True):
        weights = run / "checkpoints" / "step-00000002" / expert["weights"] / "diffusion_pytorch_model.safetensors"
        assert hashlib.sha256(weights.read_bytes()).hexdigest() == expert["sha256"]


def test_each_expert_may_be_asked_for_its_own(draw: Draw, tmp_path: Path) -> None:
    """The same texts for each, given once or twice, are the same picture; others are not, and stand in it."""
    alike = [draw()[0], draw((PROMPT, PROMPT), negative_prompt=(None, None), out=tmp_path / "twice")[0]]
    assert np.array_equal(pixels(alike[0]), pixels(alike[1]))
    others: list[dict[str, Any]] = [
        {"prompts": [("blue", PROMPT)]},
        {"prompts": [(PROMPT, "blue")]},
        {"negative_prompt": ("red", None)},
        {"settings": DrawSettings(3, (4.0, 1.0))},
        {"settings": DrawSettings(3, (1.0, 4.0))},
    ]
    paths = [draw(**changes, out=tmp_path / str(i))[0] for i, changes in enumerate(others)]
    assert len({pixels(path).tobytes() for path in [alike[0], *paths]}) == 6
    with Image.open(paths[1]) as image:
        facts = json.loads(image.text["sdxl-experts"])  # type: ignore[attr-defined]
    assert (facts["prompt"], facts["expert_prompts"]) == (PROMPT, [PROMPT, "blue"])


def test_batches_change_nothing_but_rounding(draw: Draw, tmp_path: Path) -> None:
    prompts = (PROMPT, "a blue square", "green")
    for scheduler in ("unipc", "euler-a"):
        settings = DrawSettings(3, 4.0, None, scheduler)
        alone = draw(*prompts, settings=settings, out=tmp_path / "alone")
        together = draw(*prompts, settings=settings, batch=2, out=tmp_path / "together")
        assert [path.name for path in alone] == [path.name for path in together]
        for one, other in zip(alone, together, strict=True):
            assert np.abs(pixels(one).astype(int) - pixels(other)).max() <= 1


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_draws_nearly_the_same(draw: Draw, tmp_path: Path, precision: str) -> None:
    full, half = draw()[0], draw(precision=precision, out=tmp_path / precision)[0]
    difference = np.abs(pixels(full).astype(int) - pixels(half))
    assert 0 < difference.mean() < 3


def test_a_sheet_of_all_pictures(draw: Draw, tmp_path: Path) -> None:
    sheet = tmp_path / "sheets" / "sheet.png"
    sheet.parent.mkdir()
    paths = draw(PROMPT, "a blue square", count=2, sheet=sheet)
    assert len(paths) == 4
    with Image.open(sheet) as image:
        assert image.size[0] >= 2 * 256
        first = np.asarray(image.convert("RGB").crop((14, 48, 14 + 256, 48 + 256)))
    large = Image.fromarray(pixels(paths[0])).resize((256, 256), Image.Resampling.BICUBIC)
    assert np.array_equal(first, np.asarray(large))


def test_cost_is_told(draw: Draw, capfd: pytest.CaptureFixture[str]) -> None:
    draw()
    assert re.search(r"1 picture in \d+ s, loading and all; at most \d+\.\d [MG]iB of memory", capfd.readouterr().err)


@pytest.mark.parametrize("scheduler", [name for name in SCHEDULERS if name != "heun"])  # refused: zero-terminal SNR
def test_every_scheduler_draws(draw: Draw, scheduler: str) -> None:
    assert pixels(draw(settings=DrawSettings(4, 5.0, None, scheduler))[0]).std() > 0


@pytest.mark.parametrize("hw", [(64, 96), (72, 40), (104, 64)])
def test_other_sizes(draw: Draw, hw: tuple[int, int]) -> None:
    path = draw(height=hw[0], width=hw[1])[0]
    assert pixels(path).shape == (*hw, 3)


def test_the_unets_own_size_is_the_default(draw: Draw) -> None:
    assert pixels(draw(height=None, width=None)[0]).shape == (128, 128, 3)


def test_the_order_of_experts_does_not_matter(draw: Draw, pair: Pair, tmp_path: Path) -> None:
    one, other = draw()[0], draw(experts=pair[::-1], out=tmp_path / "other")[0]
    assert np.array_equal(pixels(one), pixels(other))


def test_negative_prompt_guidance_and_rescale_count(draw: Draw, tmp_path: Path) -> None:
    changes: list[dict[str, Any]] = [
        {},
        {"negative_prompt": ""},  # encoded, where none given is zeros
        {"negative_prompt": "red"},
        {"settings": DrawSettings(3, 1.0)},
        {"settings": DrawSettings(3, 4.0, 0.0)},
        {"settings": DrawSettings(3, 6.0)},
    ]
    pictures = [pixels(draw(out=tmp_path / str(i), **change)[0]) for i, change in enumerate(changes)]
    assert len({picture.tobytes() for picture in pictures}) == len(changes)
    unguided = [draw(out=tmp_path / f"g{g}", settings=DrawSettings(3, g))[0] for g in (0.0, 1.0)]
    assert np.array_equal(pixels(unguided[0]), pixels(unguided[1]))


@pytest.mark.parametrize("index", [0, 1])
def test_an_expert_alone_draws_and_says_so(
    draw: Draw, pair: Pair, index: int, capfd: pytest.CaptureFixture[str]
) -> None:
    name, within = (("base", "[350, 1000)"), ("refiner", "[0, 350)"))[index]
    assert pixels(draw(experts=pair[index : index + 1], settings=DrawSettings(6, 4.0))[0]).std() > 0
    assert f"one expert alone: {name} draws timesteps {within}" in capfd.readouterr().err


def test_a_long_prompt_is_cut_and_said(draw: Draw, capfd: pytest.CaptureFixture[str]) -> None:
    draw("red " * 100)
    assert "cut short to 1 x 75 tokens: red red" in capfd.readouterr().err


def test_a_checkpoint_can_be_named_itself(draw: Draw, pair: Pair, tmp_path: Path) -> None:
    named = [run / "checkpoints" / "step-00000002" for run in pair]
    assert draw(experts=named)[0].read_bytes() == draw(out=tmp_path / "other")[0].read_bytes()


@pytest.fixture
def forge(pair: Pair, tmp_path: Path) -> Callable[..., Path]:
    """A copy of the refiner whose card says something else."""

    def forged(part: str, **changes: Any) -> Path:
        run = shutil.copytree(pair[1], tmp_path / "forged")
        folder = run / "checkpoints" / "step-00000002"
        card = json.loads((folder / "expert.json").read_text())
        card[part] |= changes
        data = json.dumps(card).encode()
        (folder / "expert.json").write_bytes(data)
        sums = json.loads((folder / "checksums.json").read_text())
        sums["expert.json"] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        (folder / "checksums.json").write_text(json.dumps(sums))
        return Path(run)

    return forged


@pytest.mark.parametrize(
    ("part", "changes", "message"),
    [
        ("contract", {"prediction_type": "sample"}, "differ in prediction_type: v_prediction against sample"),
        ("contract", {"zero_terminal_snr": False}, "differ in zero_terminal_snr"),
        ("contract", {"beta_end": 0.02}, "differ in beta_end"),
        ("contract", {"scaling_factor": 0.18215}, "differ in scaling_factor"),
        ("contract", {"vae_digest": "00"}, "differ in vae_digest"),
        ("contract", {"text_digests": {"text_encoder_2": "00"}}, r"differ in text_digests\.text_encoder_2"),
        ("facts", {"high": 300}, r"no expert answers for timesteps \[300, 350\)"),
        ("facts", {"high": 400}, r"two experts answer for timesteps \[350, 400\)"),
        ("facts", {"low": 1}, r"no expert answers for timesteps \[0, 1\)"),
    ],
)
def test_experts_that_do_not_belong_together_are_refused(
    draw: Draw, pair: Pair, forge: Callable[..., Path], part: str, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ContractError, match=message):
        draw(experts=(pair[0], forge(part, **changes)))


@pytest.mark.parametrize("part", ["vae", "text_encoder", "text_encoder_2"])
def test_another_model_is_refused(draw: Draw, tiny_model: Path, tmp_path: Path, part: str) -> None:
    model = shutil.copytree(tiny_model, tmp_path / "model")
    path = next((model / part).glob("*.safetensors"))
    weights = load_file(path)
    weights[min(weights)] += 1
    save_file(weights, path, {"format": "pt"})
    with pytest.raises(ContractError, match=f"the {part}|the VAE"):
        draw(model=model)


def test_three_experts_draw_as_two_do(draw: Draw, pair: Pair, forge: Callable[..., Path], tmp_path: Path) -> None:
    low = forge("facts", high=100)
    high = shutil.copytree(low, tmp_path / "high")
    shutil.rmtree(high)
    shutil.move(str(low), tmp_path / "low")
    high = forge("facts", low=100)
    three = draw(experts=(pair[0], tmp_path / "low", high), settings=DrawSettings(12, 3.0))
    two = draw(settings=DrawSettings(12, 3.0), out=tmp_path / "two")
    assert np.array_equal(pixels(three[0]), pixels(two[0]))


def test_what_cannot_be_drawn_is_said(draw: Draw, tmp_path: Path, world: Any) -> None:
    with pytest.raises(ConfigError, match="--height 60: sizes are multiples of 8 pixels"):
        draw(height=60)
    with pytest.raises(ConfigError, match="--scheduler plms: known are"):
        draw(settings=DrawSettings(3, 4.0, None, "plms"))
    with pytest.raises(ConfigError, match="--precision int4: known are auto, fp32"):
        draw(precision="int4")
    with pytest.raises(ConfigError, match="--offload keeps UNets in main memory"):
        draw(offload=True)
    with pytest.raises(ConfigError, match="--guidance is given 3 times for 2 experts"):
        draw(settings=DrawSettings(3, (1.0, 2.0, 3.0)))
    with pytest.raises(ConfigError, match="--negative-prompt is given 3 times for 2 experts"):
        draw(negative_prompt=("a", "b", "c"))
    with pytest.raises(ConfigError, match="--expert-prompt is given 3 times for 2 experts"):
        draw(("a", "b", "c"))
    with pytest.raises(CheckpointError, match="no run folder"):
        draw(experts=(tmp_path / "nowhere",))
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="holds no checkpoint yet"):
        draw(experts=(tmp_path / "empty",))
    assert not (tmp_path / "out").exists()


def test_a_damaged_newest_checkpoint_is_passed_over_and_a_named_one_refused(
    draw: Draw, world: Any, pair: Pair, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = shutil.copytree(pair[1], tmp_path / "run")
    newest = shutil.copytree(run / "checkpoints" / "step-00000002", run / "checkpoints" / "step-00000003")
    (newest / "ema" / "diffusion_pytorch_model.safetensors").write_bytes(b"")
    draw(experts=(pair[0], run))
    assert "passed over: " in capfd.readouterr().err
    with pytest.raises(CheckpointError, match="is damaged: it is not what was saved"):
        draw(experts=(pair[0], newest))
