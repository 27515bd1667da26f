"""How long a model is trained by `demo.fit`, and how fast."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from trainer.optimizer_config import OptimizerConfig

LAST_RATE = 0.01  # of the learning rate, at the last step


@dataclass(frozen=True)
class FitPlan:
    """How long a model is trained, and how fast: a warm-up, then a cosine down to a hundredth."""

    steps: int
    learning_rate: float
    batch: int
    muon_rate: float | None = None  # of matrices and convolutions, under Muon; None: AdamW for all
    warmup: int = 100
    ema_decay: float = 0.998
    seed: int = 0
    save_every: int = 200

    def share(self, step: int) -> float:
        """Of the learning rates, at optimizer step `step`."""
        cosine = LAST_RATE + (1 - LAST_RATE) * 0.5 * (1 + math.cos(math.pi * step / self.steps))
        return cosine * min(1.0, (step + 1) / self.warmup)

    def optimizer(self) -> "OptimizerConfig":
        """What `trainer.optim.Optimizer` is told."""
        from trainer.optimizer_config import OptimizerConfig

        muon = {} if self.muon_rate is None else {"name": "muon", "muon_rate": self.muon_rate}
        settings = {"learning_rate": self.learning_rate, "beta2": 0.99, "weight_decay": 0.0, **muon}
        return OptimizerConfig.model_validate(settings)
