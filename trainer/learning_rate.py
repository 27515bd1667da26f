"""The learning rate as a pure function of the step: a run that goes on needs nothing of it but the step it is at."""

import math

from trainer.optimizer_config import RateConfig


def rate_share(step: int, steps: int, rate: RateConfig) -> float:
    """Share of the configured learning rate at optimizer step `step`, from 0, of a run of `steps`.

    Rises in a line over `warmup_steps`, the first step taking 1 / warmup_steps; then falls so that the step that would
    follow the last has `final_share`. Raising `steps` stretches what is left and changes nothing that is done.
    """
    if step < rate.warmup_steps:
        return (step + 1) / rate.warmup_steps
    if rate.shape == "constant":
        return 1.0
    done = min(1.0, (step - rate.warmup_steps) / max(1, steps - rate.warmup_steps))
    if rate.shape == "cosine":
        left = (1 + math.cos(math.pi * done)) / 2
    else:
        left = (1 - done) ** (rate.power if rate.shape == "polynomial" else 1.0)
    return rate.final_share + (1 - rate.final_share) * left
