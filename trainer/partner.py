"""The partner of an expert in training: the expert above its range, whose predictions it is exposed to (exposure.py).

    --partner RUN -> find_partner -> check_partner -> Partner on the device; at log points its newest checkpoint

A run remembers which checkpoint of the partner it asked last, and goes on with that one where it is still there.
"""

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from shared.conditioning import PromptEmbeds
from shared.contract import ExpertCard, ExposureFacts, check_same
from shared.errors import CheckpointError, ConfigError, ContractError
from shared.progress import say
from shared.weights import weight_shapes
from trainer.adapter import adapter_weights, load_adapter, set_adapter
from trainer.checkpoint import Checkpoint, open_checkpoint, open_expert
from trainer.config import ExpertConfig
from trainer.processes import Processes
from trainer.rotation import checkpoint_name, list_checkpoints
from trainer.trained import ADAPTER, frozen_dtype
from trainer.unet import ConditionedUnet, load_unet, unet_digest

if TYPE_CHECKING:
    from trainer.run import Request


def find_partner(config: ExpertConfig, path: Path | None, going_on: Checkpoint | None) -> Checkpoint | None:
    """The checkpoint of the partner that a run begins with, or that it asked last; None where it asks nobody.

    Where that one is gone it is the newest, and that is said. Raises ConfigError where `path` and loss.exposure do not
    go together, CheckpointError where `path` is no expert or the run does not say whom it asked.
    """
    if (path is None) != (config.loss.exposure.share == 0):
        raise ConfigError(
            f"loss.exposure.share = {config.loss.exposure.share:g} needs --partner RUN, the expert that hands over"
            if path is None
            else "--partner is there to be met for a share of the samples: set loss.exposure.share, or leave it out"
        )
    if path is None:
        return None
    return open_expert(path) if going_on is None else _asked_last(path, going_on)


def check_partner(card: ExpertCard, config: ExpertConfig, model: Path, partner: Checkpoint | None) -> None:
    """Require that the partner hands over to this expert; raises ContractError naming what is against it."""
    if partner is None:
        return
    own, other, reach = card.facts, partner.card.facts, config.loss.exposure.reach
    try:
        check_same(card, partner.card)
    except ContractError as error:
        raise ContractError(f"--partner: {error}") from None
    if other.low != own.high:
        raise ContractError(
            f"--partner {other.name!r} answers for {other.timesteps}: one that hands over to {own.timesteps} "
            f"begins at {own.high}"
        )
    if reach > len(other.timesteps):
        raise ConfigError(f"loss.exposure.reach {reach} goes beyond the timesteps {other.timesteps} of {other.name!r}")
    if other.adapter is not None and unet_digest(model / "unet") != other.start_model_digest:
        raise ContractError(f"--partner: the adapter {other.name!r} stands on another UNet than that of --model")


def exposure_facts(config: ExpertConfig, partner: Checkpoint | None) -> ExposureFacts | None:
    """What is recorded of whom the expert met."""
    if partner is None:
        return None
    settings = config.loss.exposure
    return ExposureFacts(share=settings.share, reach=settings.reach, partner=partner.card.facts.name)


def partner_bytes(partner: Checkpoint, model: Path, dtype: torch.dtype) -> int:
    """Bytes of the partner's weights on the device."""
    folders = {_whole_unet(partner, model), partner.weights_folder()}
    return sum(math.prod(shape) for folder in folders for shape in weight_shapes(folder).values()) * dtype.itemsize


class Partner:
    """The partner on the device, without gradients; of a run folder the newest checkpoint whenever it is renewed."""

    def __init__(
        self,
        path: Path,
        checkpoint: Checkpoint,
        model: Path,
        refiner_width: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self._path, self._seen = path, checkpoint.path.name
        facts, self._dtype = checkpoint.card.facts, dtype
        unet = load_unet(_whole_unet(checkpoint, model), device, dtype)
        if facts.adapter is not None:
            load_adapter(unet, facts.adapter, ADAPTER, _weights(checkpoint))
            for weight in adapter_weights(unet, ADAPTER).values():
                weight.data = weight.data.to(dtype)
        adapter = ADAPTER if facts.adapter else None
        self._model = ConditionedUnet(unet.eval(), facts.layout, refiner_width, adapter)
        self._checkpoint, self.sha256 = checkpoint, partner_sha256(checkpoint)  # kept: its files may go any time

    @property
    def step(self) -> int:
        """Optimizer step of its checkpoint."""
        return self._checkpoint.state.step

    def fields(self) -> dict[str, Any]:
        """For the log of events: whom the run asks from here on."""
        return {"partner": self._checkpoint.card.facts.name, "partner_step": self.step, "sha256": self.sha256}

    def predict(self, x: Tensor, t: Tensor, text: PromptEmbeds, time_ids: Tensor) -> Tensor:
        """Its output [B, 4, h, w] at x [B, 4, h, w] and t [B], in its own dtype."""
        return self._model(x.to(self._dtype), t, text, time_ids, self._checkpoint.card.facts.aesthetic_score)

    def renew(self, processes: Processes) -> float:
        """Take over a newer checkpoint, the same in all processes; seconds that took, 0 where there is none.

        One that is damaged, or gone before it was read, is passed over.
        """
        began_s = time.perf_counter()
        newer = self._newer() if processes.is_first else None
        if processes.count > 1:
            told = (
                processes.tell({"path": newer and str(newer.checkpoint.path)})
                if processes.is_first
                else processes.tell()
            )
            newer = newer or (_Read.of(Path(told["path"])) if told["path"] else None)
        if newer is None:
            return 0.0
        if self._model.adapter is None:
            self._model.unet.load_state_dict(newer.weights)
        else:
            set_adapter(self._model.unet, self._model.adapter, newer.weights)
        self._checkpoint, self.sha256 = newer.checkpoint, newer.sha256
        return time.perf_counter() - began_s

    def _newer(self) -> "_Read | None":
        """A newer checkpoint of the run folder, looked at once."""
        newest = next(iter(list_checkpoints(self._path)), None)
        if newest is None or newest.name <= self._seen:
            return None
        self._seen = newest.name
        try:
            return _Read.of(newest)
        except (CheckpointError, OSError) as error:
            say(f"--partner: passed over: {error}")
            return None


@dataclass(frozen=True)
class _Read:
    """A checkpoint of the partner, all that is needed of it in memory."""

    checkpoint: Checkpoint
    sha256: str
    weights: dict[str, Tensor]

    @classmethod
    def of(cls, path: Path) -> "_Read":
        checkpoint = open_checkpoint(path)
        return cls(checkpoint, partner_sha256(checkpoint), _weights(checkpoint))


def stand_by(found: Checkpoint | None, asked: "Request", refiner_width: int, device: torch.device) -> Partner | None:
    """The partner that a run found, loaded in the precision that the run computes in; None where there is none."""
    if found is None or asked.partner is None:
        return None
    return Partner(asked.partner, found, asked.model, refiner_width, device, frozen_dtype(asked.config))


def _whole_unet(checkpoint: Checkpoint, model: Path) -> Path:
    """The folder of its UNet, or of the one that it is an adapter on."""
    return model / "unet" if checkpoint.card.facts.adapter else checkpoint.weights_folder()


def _weights(checkpoint: Checkpoint) -> dict[str, Tensor]:
    return checkpoint.weights(checkpoint.weights_folder().name)


def _asked_last(path: Path, going_on: Checkpoint) -> Checkpoint:
    state = going_on.state
    if state.partner_step is None or state.partner_sha256 is None:
        raise CheckpointError(
            f"{going_on.path} does not say which checkpoint of the partner it asked: it is incomplete"
        )
    own = path / "checkpoints" / checkpoint_name(state.partner_step)
    try:
        found = open_checkpoint(own) if own.is_dir() else open_expert(path)
    except CheckpointError as error:
        say(f"--partner: passed over: {error}")
        found = open_expert(path)
    if (found.state.step, partner_sha256(found)) != (state.partner_step, state.partner_sha256):
        say(
            f"--partner {path} no longer holds step {state.partner_step} as it was asked before: going on with "
            f"step {found.state.step}, not bit for bit what it would have been"
        )
    return found


def partner_sha256(partner: Checkpoint) -> str:
    """sha256 of the weights that predict, hex."""
    return partner.weights_sha256(partner.weights_folder().name)
