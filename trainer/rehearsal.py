"""`train-expert --dry-run`: what a run would do, how long it would take and what it needs; nothing is written.

request -> the run it would open -> its view and order -> memory counted, a few real steps timed -> report
"""

import shutil
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shared.amounts import duration_text, size_text
from shared.device import choose_device
from shared.errors import StoreFull
from shared.progress import say
from shared.store import StoreReader
from trainer.advice import objective_advice
from trainer.config import ExpertConfig
from trainer.data import BatchReader, read_null_text
from trainer.exposure import exposure_to
from trainer.loop import predict_in_precision
from trainer.loss import DenoisingLoss
from trainer.memory import count_memory, pass_on_meta, state_bytes
from trainer.optim import Optimizer
from trainer.partitions import PartitionedOrder, partitions_held
from trainer.partner import partner_bytes, stand_by
from trainer.rotation import WITH_OPTIMIZER
from trainer.run import Prospect, Request, look_at_run
from trainer.sampler import Pool
from trainer.start import start_advice
from trainer.trained import frozen_dtype, load_trained
from trainer.unet import ConditionedUnet
from trainer.view import row_count, view_of

WARM_UP, TIMED = 1, 3  # optimizer steps


@dataclass(frozen=True)
class Rehearsal:
    """What a run would do; sizes in bytes, times in seconds."""

    name: str
    timesteps: str
    goes_on_after: int
    steps: int
    samples: int
    samples_in_manifest: int
    buckets: dict[str, int]
    steps_per_epoch: float
    epochs: float
    parameters: int
    parameters_trained: int
    device: str
    memory_bytes: int
    partner_bytes: int
    checkpoint_bytes: int
    kept_bytes: int
    bytes_free: int
    step_s: float | None
    notes: list[str] = field(default_factory=list)

    @property
    def left_s(self) -> float | None:
        """Seconds of training that are left, without evaluation and saving."""
        return None if self.step_s is None else self.step_s * (self.steps - self.goes_on_after)

    def as_json(self) -> dict[str, Any]:
        """For programs."""
        return asdict(self) | {"left_s": self.left_s}

    def lines(self) -> list[str]:
        """For people."""
        buckets = ", ".join(f"{name} ({count})" for name, count in self.buckets.items())
        begins = f"goes on after step {self.goes_on_after}" if self.goes_on_after else "begins"
        timing = "" if self.step_s is None else f"{self.step_s:.2f} s a step, {duration_text(self.left_s or 0)} left"
        return [
            f"{self.name}: timesteps {self.timesteps}, {begins}, {self.steps} steps",
            f"samples      {self.samples} of {self.samples_in_manifest}; buckets {buckets}",
            f"epochs       {self.epochs:.1f}, of {self.steps_per_epoch:.1f} steps",
            f"parameters   {self.parameters_trained / 1e6:.2f} M trained of {self.parameters / 1e6:.2f} M",
            f"memory       {size_text(self.memory_bytes)} on {self.device}, counted for the largest bucket",
            *([f"partner      {size_text(self.partner_bytes)} of that"] if self.partner_bytes else []),
            f"disk         {size_text(self.checkpoint_bytes)} a checkpoint, {size_text(self.kept_bytes)} for all kept; "
            f"{size_text(self.bytes_free)} free",
            *([f"time         {timing}"] if timing else []),
            *(f"note: {note}" for note in self.notes),
        ]


def rehearse(request: Request, *, with_timing: bool = True) -> Rehearsal:
    """What `train-expert` would do with `request`.

    Raises what it would raise: errors of the run, StoreFull where the checkpoints that it keeps would find no room.
    """
    config, device = request.config, choose_device(request.device)
    found = look_at_run(request)
    held = partitions_held(found.manifest, config.partitions)
    pools = view_of(found.manifest, config.data, held, config.partitions)
    order = _order(config, held, pools)
    done = found.checkpoint.state.step if found.checkpoint else 0
    unet = load_trained(config, found.start, found.checkpoint, torch.device("cpu"))
    parameters = list(unet.parameters())
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    whole = sum(p.nbytes for p in (trained if config.adapter else parameters))
    average = 4 * sum(p.numel() for p in trained) if config.ema.decay else 0
    state = sum(state_bytes(p, config.optimizer, config.precision == "bf16-lean") for p in trained)
    averaged = (average if config.adapter else max(average, whole)) if average else 0
    keeps = config.checkpoint.keep + config.checkpoint.keep_best
    of_partner = partner_bytes(found.partner, request.model, frozen_dtype(config)) if found.partner else 0
    per_epoch = order.per_epoch(8) / config.accumulation
    return Rehearsal(
        name=config.name,
        timesteps=str(config.range),
        goes_on_after=done,
        steps=config.steps,
        samples=sum(map(row_count, pools)),
        samples_in_manifest=sum(map(len, found.manifest.buckets("train"))),
        buckets=_count(pools),
        steps_per_epoch=per_epoch,
        epochs=config.steps / per_epoch,
        parameters=sum(p.numel() for p in parameters),
        parameters_trained=sum(p.numel() for p in trained),
        device=str(device),
        step_s=_time(request, found, held, pools, device) if with_timing else None,
        memory_bytes=_memory(config, found, pools, unet) + of_partner,
        partner_bytes=of_partner,
        checkpoint_bytes=whole + averaged + state,
        kept_bytes=keeps * (whole + averaged) + min(keeps, WITH_OPTIMIZER) * state,
        bytes_free=shutil.disk_usage(_there(request.output)).free,
        notes=[*objective_advice(config), *start_advice(config, request.model, request.start)],
    )


def require_room(report: Rehearsal, output: Path) -> None:
    """Raises StoreFull where the checkpoints that are kept do not fit the disk."""
    if report.goes_on_after == 0 and report.kept_bytes > report.bytes_free:
        raise StoreFull(
            f"{output}: {size_text(report.kept_bytes)} of checkpoints would be kept, "
            f"{size_text(report.bytes_free)} are free: free some, or lower checkpoint.keep"
        )


def _count(pools: list[Pool]) -> dict[str, int]:
    counts: Counter[str] = Counter()
    for pool in pools:
        counts[f"{pool.hw[1]} x {pool.hw[0]}"] += row_count(pool)
    return dict(counts)


def _memory(config: ExpertConfig, found: Prospect, pools: list[Pool], unet: Any) -> int:
    """Bytes of the device at the peak, counted on the meta device for the largest bucket."""
    largest = max((pool.hw for pool in pools), key=lambda hw: hw[0] * hw[1])
    requires = [parameter.requires_grad for parameter in unet.parameters()]
    meta = unet.to("meta")
    if config.precision == "bf16-mixed":
        meta = meta.to(torch.bfloat16)
    for parameter, needed in zip(meta.parameters(), requires, strict=True):
        parameter.grad = None
        parameter.requires_grad_(needed)
    return count_memory(meta, config, pass_on_meta(meta, config, found.manifest.settings, largest)).total


def _order(config: ExpertConfig, held: list[int], pools: list[Pool]) -> PartitionedOrder:
    return PartitionedOrder(pools, config.batch, config.seed, partitions=held, count=config.partitions)


def _time(request: Request, found: Prospect, held: list[int], pools: list[Pool], device: torch.device) -> float:
    """Seconds of an optimizer step, of a few that are really taken on the first micro-batches, in memory alone.

    The UNet is one of its own: an optimizer may leave hooks on it, which counting memory must not meet.
    """
    config, settings = request.config, found.manifest.settings
    unet = load_trained(config, found.start, found.checkpoint, device)
    model = ConditionedUnet(unet, found.card.facts.layout, settings.text_widths[1])
    predict = partial(predict_in_precision, model, config, device)
    trained = [parameter for parameter in unet.parameters() if parameter.requires_grad]
    optimizer = Optimizer(trained, config.optimizer, is_lean=config.precision == "bf16-lean")
    order = _order(config, held, pools)
    schedule = found.card.contract.schedule(device)
    partner = stand_by(found.partner, request, settings.text_widths[1], device)
    with StoreReader(request.store) as store:
        loss = DenoisingLoss(
            schedule,
            config.range,
            config.schedule.prediction_type,
            settings.scaling_factor,
            config.loss,
            config.seed,
            read_null_text(store, found.manifest, found.card.facts.null_prompt, device),
            exposure_to(partner.predict, config, schedule) if partner else None,
        )
        reader = BatchReader(
            store,
            found.manifest,
            pools,
            captions=config.data.captions,
            seed=config.seed,
            pin_memory=device.type == "cuda",
            on_corrupt=lambda path, why: say(f"corrupt: {path}: {why}"),
        )
        steps, partitions = (WARM_UP + TIMED) * config.accumulation, config.partitions
        # Those of partitions that are elsewhere are stood in for.
        turns = (
            index if index % partitions in held else index - index % partitions + held[0] for index in range(steps)
        )
        batches = (reader.read(order[index]) for index in turns)
        began_s = time.perf_counter()
        for step in range(WARM_UP + TIMED):
            if step == WARM_UP:
                began_s = _now_s(device)
            t = loss.timesteps(step, config.batch * config.accumulation, device).view(-1, config.batch)
            for batch, t_micro in zip(islice(batches, config.accumulation), t, strict=True):
                value: Tensor = loss(predict, batch.to(device), t_micro).mean() / config.accumulation
                torch.autograd.backward(value)
            norm = optimizer.clip(config.optimizer.clip_norm)
            optimizer.step_unless_bad((~torch.isfinite(norm)).float())
            optimizer.zero_grad()
        return (_now_s(device) - began_s) / TIMED


def _now_s(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _there(folder: Path) -> Path:
    """The nearest folder that exists."""
    return next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
