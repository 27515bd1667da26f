"""The card of a checkpoint (README.md): what it is, what it needs beside it, and what it was made of.

Names of experts, models and data sets are other people's text: they go into code spans, settings into a fence longer
than any in them, and the front matter into JSON strings, which are YAML too. So a card says what it says whatever they
contain.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import tomli_w

from shared.command import one_line
from shared.contract import AdapterFacts, ExpertCard, ExpertFacts, PairContract
from shared.schedule import TimestepRange
from trainer.adapter import ADAPTER_FILE
from trainer.config import ExpertConfig

_NOT_LEARNED = ("name", "timesteps", "steps", "checkpoint", "log", "eval")  # said elsewhere, or of no weight


def model_card(card: ExpertCard, config: ExpertConfig, datasets: Sequence[str], step: int) -> str:
    """README.md of the checkpoint at `step`, Markdown with a YAML front matter as the Hub reads it."""
    facts, contract = card.facts, card.contract
    sections = (
        front_matter(facts),
        f"# {code(facts.name)}, timesteps {facts.timesteps} of {contract.num_timesteps}",
        _what_it_is(facts, contract, step),
        "## How to load it",
        _loading(facts, contract, "ema" if config.ema.decay else "unet"),
        "## What it must agree on with its partners",
        "\n".join(f"- {key}: {code(_value(value))}" for key, value in contract.model_dump().items()),
        "## What it was made of",
        "\n".join(f"- {line}" for line in _made_of(facts, datasets)),
        "Settings:",
        fence(tomli_w.dumps(_settings(config)), "toml"),
    )
    return "\n\n".join(sections) + "\n"


def code(text: str) -> str:
    """`text` as a code span: on one line, in more backticks than it holds."""
    line = one_line(text)
    ticks = "`" * (1 + max((len(run) for run in re.findall("`+", line)), default=0))
    pad = " " if not line.strip() or line.startswith("`") or line.endswith("`") else ""
    return f"{ticks}{pad}{line}{pad}{ticks}"


def front_matter(facts: ExpertFacts, extra: Mapping[str, Any] | None = None) -> str:
    """The head of a card as the Hub reads it, with `extra` entries of ours."""
    entries: dict[str, Any] = {
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
        "license": facts.base_licence.partition(":")[0] or "unknown",
        "tags": ["sdxl", "expert", *([facts.adapter.kind] if facts.adapter else [])],
    }
    if facts.base_model.count("/") == 1:  # a Hub id; a folder's name would be a broken link
        entries |= {"base_model": facts.base_model, "base_model_relation": "adapter" if facts.adapter else "finetune"}
    entries |= extra or {}
    return "\n".join(["---", *(f"{key}: {json.dumps(value)}" for key, value in entries.items()), "---"])


def _what_it_is(facts: ExpertFacts, contract: PairContract, step: int) -> str:
    form = (
        _adapter(facts.adapter) if facts.adapter else f"A UNet, of which {code(', '.join(facts.trainable))} was trained"
    )
    rest = _others(facts.timesteps, contract.num_timesteps)
    needs = f"It needs a partner (or several) that answers for {rest}." if rest else "It answers for all timesteps."
    licence = code(facts.base_licence) if facts.base_licence else "unknown: see the base model"
    return (
        f"{form}, {step} optimizer steps from {code(facts.base_model or 'a model without a name')}, for the timesteps "
        f"{facts.timesteps} of the noise schedule alone (0 is clean). {needs} A pair draws one picture: each step is "
        "made by the expert whose range holds its timestep.\n\n"
        f"Licence of the base model: {licence}. What was trained from it stands under the same terms."
    )


def _adapter(adapter: AdapterFacts) -> str:
    name = {"lora": "LoRA", "dora": "DoRA"}[adapter.kind]
    return f"A {name} adapter (rank {adapter.rank}, alpha {adapter.alpha:g}, on {code(', '.join(adapter.targets))})"


def _others(own: TimestepRange, count: int) -> str:
    rest = [(0, own.low), (own.high, count)]
    return " and ".join(str(TimestepRange(low, high)) for low, high in rest if low < high)


def _loading(facts: ExpertFacts, contract: PairContract, folder: str) -> str:
    schedule = {
        "prediction_type": contract.prediction_type,
        "timestep_spacing": contract.timestep_spacing,
        "rescale_betas_zero_snr": contract.zero_terminal_snr,
    }
    settings = ", ".join(f"{key}={value!r}" for key, value in schedule.items())
    is_first = facts.high == contract.num_timesteps
    pipeline = "StableDiffusionXLPipeline" if is_first else "StableDiffusionXLImg2ImgPipeline"
    if facts.adapter:
        load = (f'pipeline.load_lora_weights(CHECKPOINT + "/{folder}", weight_name="{ADAPTER_FILE}")',)
    else:
        load = (f'pipeline.unet = UNet2DConditionModel.from_pretrained(CHECKPOINT, subfolder="{folder}")',)
    lines = (
        f"from diffusers import {pipeline}, UniPCMultistepScheduler, UNet2DConditionModel",
        "",
        f"pipeline = {pipeline}.from_pretrained(BASE_MODEL)",
        *load,
        "config = pipeline.scheduler.config",
        f"pipeline.scheduler = UniPCMultistepScheduler.from_config(config, {settings})",
    )
    fractions = [f"{key}={1 - edge / contract.num_timesteps:g}" for key, edge in _edges(facts, contract)]
    asked = f" Ask its pipeline for its own part alone: {code(', '.join(fractions))}." if fractions else ""
    averaged = "`ema/` holds averaged weights, `unet/` the raw ones." if folder == "ema" else "No average was kept."
    both = "`generate-images --expert THIS --expert PARTNER --model BASE_MODEL` of sdxl-experts"
    return f"{fence(chr(10).join(lines), 'python')}\n\n{averaged}{asked} Both parts in one loop: {both}."


def _edges(facts: ExpertFacts, contract: PairContract) -> Iterable[tuple[str, int]]:
    if facts.high < contract.num_timesteps:
        yield "denoising_start", facts.high
    if facts.low > 0:
        yield "denoising_end", facts.low


def _made_of(facts: ExpertFacts, datasets: Sequence[str]) -> Iterable[str]:
    yield f"data sets: {', '.join(map(code, datasets)) or 'none'}"
    for use in facts.manifests:
        yield f"manifest {code(use.name)} {code(use.digest)} from step {use.from_step}"
    yield f"UNet that training started from: {code(facts.start_model_digest)}"
    if facts.start:
        own = TimestepRange(facts.start.low, facts.start.high)
        yield f"weights that training started from: expert {code(facts.start.name)} {own}, step {facts.start.step}"
    if facts.exposure:
        met = f"{facts.exposure.share:.3g} of its samples, within {facts.exposure.reach} timesteps of the edge,"
        yield f"hand-over exposure: {met} came from predictions of {code(facts.exposure.partner)}"
    yield f"layout {code(facts.layout)}, null prompt {code(facts.null_prompt)}, precision {code(facts.precision)}"
    if facts.layout == "sdxl-refiner":
        yield f"aesthetic score {facts.aesthetic_score:g}, of the null prompt {facts.negative_aesthetic_score:g}"


def _settings(config: ExpertConfig) -> dict[str, Any]:
    return config.model_dump(mode="json", exclude_none=True, exclude=set(_NOT_LEARNED))


def _value(value: Any) -> str:
    return json.dumps(value, sort_keys=True) if isinstance(value, dict) else str(value)


def fence(text: str, language: str) -> str:
    """`text` as a block of code, fenced by more backticks than it holds."""
    ticks = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"{ticks}{language}\n{text.rstrip()}\n{ticks}"
