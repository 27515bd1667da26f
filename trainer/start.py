"""What training starts from: the UNet of `--model`, or the weights of another expert (`--start`), whole or an adapter.

A run remembers the very checkpoint that it started from: the same command goes on though that expert has moved on.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from shared.contract import AdapterFacts, ExpertCard, StartFacts, check_same
from shared.errors import CheckpointError, ConfigError, ContractError, DataError
from shared.schedule import PredictionType
from shared.weights import read_json_object
from trainer.adapter import ADAPTER_FILE
from trainer.checkpoint import UNET_FILE, Checkpoint, open_checkpoint, open_expert
from trainer.config import ExpertConfig
from trainer.rotation import checkpoint_name


@dataclass(frozen=True)
class Start:
    """Folders of the weights that training starts from."""

    unet: Path  # a whole UNet: what is trained, or what an adapter stands on
    adapter: Path | None = None  # an adapter on it: to go on with, or to be merged into what is trained
    card: ExpertCard | None = None  # of the expert that was started from
    facts: StartFacts | None = None


def choose_start(config: ExpertConfig, model: Path, start: Path | None) -> Start:
    """The start of a new run; raises CheckpointError where `start` is no expert, ConfigError where it does not fit."""
    if start is None:
        return Start(model / "unet")
    return _from_expert(config, model, open_expert(start))


def told_prediction(model: Path) -> PredictionType | None:
    """What a model's UNet predicts, as its scheduler says, or None; raises DataError where that is nothing known."""
    path = model / "scheduler" / "scheduler_config.json"
    if not path.exists():
        return None
    said = read_json_object(path).get("prediction_type", "epsilon")
    if said not in get_args(PredictionType):
        raise DataError(f"{path}: prediction_type {said!r} is none of {', '.join(get_args(PredictionType))}")
    return said  # type: ignore[no-any-return]


def start_advice(config: ExpertConfig, model: Path, start: Path | None) -> list[str]:
    """A line where training has to unlearn what the model's UNet predicts; what another expert predicts is compared."""
    told, wanted = told_prediction(model), config.schedule.prediction_type
    if start is not None or told in (None, wanted):
        return []
    return [
        f"schedule.prediction_type = {wanted!r}, while {model} predicts {told}: "
        + (
            "an adapter on it has all of that to undo"
            if config.adapter
            else "the UNet first has to unlearn that, which takes thousands of steps"
        )
    ]


def same_start(config: ExpertConfig, model: Path, start: Path | None, facts: StartFacts | None) -> Start | None:
    """The start of a run that goes on, None where its checkpoint is gone.

    Raises ConfigError where the command names none and the run had one, or the other way round.
    """
    if (start is None) != (facts is None):
        had = f"from step {facts.step} of {facts.name}: name it with --start" if facts else "from --model alone"
        raise ConfigError(f"this run started {had}; anything else is another run with another --output")
    if start is None or facts is None:
        return Start(model / "unet")
    path = start if (start / "checksums.json").exists() else start / "checkpoints" / checkpoint_name(facts.step)
    if not path.is_dir():
        return None
    again = _from_expert(config, model, open_checkpoint(path))
    if again.facts != facts:
        raise ContractError(f"{path} is not step {facts.step} of {facts.name}, which this run started from")
    return again


def check_start(card: ExpertCard, start: Start) -> None:
    """Require that an expert's weights mean in the new run what they meant; raises ContractError naming the field."""
    if start.card is None:
        return
    try:
        check_same(card, start.card)
    except ContractError as error:
        raise ContractError(f"--start: {error}") from None
    if start.adapter is not None and start.card.facts.start_model_digest != card.facts.start_model_digest:
        raise ContractError(
            f"--start: the adapter {start.card.facts.name!r} stands on another UNet than that of --model"
        )


def goes_on(adapter: AdapterFacts | None, start: Start) -> bool:
    """Whether the new expert is the adapter that it starts from, further trained."""
    return start.facts is not None and adapter is not None and start.facts.adapter == adapter


def _from_expert(config: ExpertConfig, model: Path, checkpoint: Checkpoint) -> Start:
    known = checkpoint.card.facts
    folder = checkpoint.path / "unet" if config.start.weights == "raw" else checkpoint.weights_folder()
    file = folder / (ADAPTER_FILE if known.adapter else UNET_FILE)
    sums = json.loads((checkpoint.path / "checksums.json").read_text())
    facts = StartFacts(
        name=known.name,
        low=known.low,
        high=known.high,
        step=checkpoint.state.step,
        weights="ema" if folder.name == "ema" else "unet",
        sha256=sums[f"{folder.name}/{file.name}"]["sha256"],
        adapter=known.adapter,
    )
    if known.adapter is None:
        return Start(folder, None, checkpoint.card, facts)
    if known.start is not None and known.start.adapter is None:
        raise CheckpointError(
            f"{checkpoint.path} is an adapter on {known.start.name!r}, not on a model: start from that"
        )
    begun = Start(model / "unet", folder, checkpoint.card, facts)
    if config.adapter is not None and not goes_on(config.adapter.facts(), begun):
        raise ConfigError(f"--start is an adapter with other settings ({known.adapter!r}): set adapter to the same")
    return begun
