"""A small training loop for what `train-expert` does not train: the VAE and the CLIP of the small world.

Step s is a function of (weights before it, seed, s), so a run that was killed goes on from its newest checkpoint as if
it had not been; bit for bit with the same number of threads.

    NAME.safetensors   weights, their average, the optimizer's state, the step
    NAME.jsonl         the losses
"""

import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn

from demo.fit_plan import FitPlan
from shared.atomic import write_atomically
from shared.errors import CheckpointError
from shared.progress import progress, say
from shared.runlog import RunLog
from trainer.ema import Ema
from trainer.optim import Optimizer

LOG_EVERY = 50
CLIP_NORM = 1.0


def fit(name: str, model: nn.Module, loss: Callable[[int], Tensor], plan: FitPlan, folder: Path) -> dict[str, Tensor]:
    """Train `model` on loss(0), loss(1), ... and return its averaged weights; goes on with what `folder` holds.

    Raises CheckpointError where that is of another model.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.safetensors"
    parameters = list(model.parameters())
    optimizer = Optimizer(parameters, plan.optimizer())
    ema = Ema(model, plan.ema_decay)
    first = _load(path, model, optimizer, ema) if path.exists() else 0
    if first:
        say(f"{name} goes on after step {first}")
    with closing(RunLog(folder / f"{name}.jsonl")) as log, progress(name, plan.steps, "steps", first) as advance:
        total, began_s = torch.zeros(()), time.monotonic()
        for step in range(first, plan.steps):
            value = loss(step)
            torch.autograd.backward(value)
            torch.nn.utils.clip_grad_norm_(parameters, CLIP_NORM)
            optimizer.scale_rates(plan.share(step))
            optimizer.step_unless_bad(torch.zeros((), device=value.device))
            optimizer.zero_grad()
            ema.update()
            total = total + value.detach().cpu()
            advance(1)
            done = step + 1
            if done % LOG_EVERY == 0:
                elapsed_s = time.monotonic() - began_s
                log.write(
                    "step", step=done, loss=float(total) / LOG_EVERY, samples_per_s=plan.batch * LOG_EVERY / elapsed_s
                )
                total, began_s = torch.zeros(()), time.monotonic()
            if done % plan.save_every == 0 or done == plan.steps:
                _save(path, model, optimizer, ema, done)
    return {key: tensor.clone() for key, tensor in ema.state_dict().items()}


def _save(path: Path, model: nn.Module, optimizer: Optimizer, ema: Ema, step: int) -> None:
    parts = {"model": model.state_dict(), "ema": ema.state_dict(), "optimizer": optimizer.tensors()}
    tensors = {f"{part}/{key}": tensor for part, content in parts.items() for key, tensor in content.items()}
    write_atomically(path, save(tensors, metadata={"step": str(step), "ema_updates": str(ema.updates)}))


def _load(path: Path, model: nn.Module, optimizer: Optimizer, ema: Ema) -> int:
    parts: dict[str, dict[str, Tensor]] = {"model": {}, "ema": {}, "optimizer": {}}
    with safe_open(path, "pt") as file:
        facts = file.metadata()
        for key in file.keys():  # noqa: SIM118 -- no dict
            part, _, name = key.partition("/")
            parts[part][name] = file.get_tensor(key)
    try:
        model.load_state_dict(parts["model"])
    except RuntimeError as error:
        raise CheckpointError(f"{path} is of another model; name another folder: {error}") from None
    optimizer.load(parts["optimizer"])
    ema.load(parts["ema"])
    ema.updates = int(facts["ema_updates"])
    return int(facts["step"])
