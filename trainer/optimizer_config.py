"""How weights are stepped: which optimizer, and its learning rate over the run."""

from typing import Literal

from pydantic import Field, model_validator

from shared.config import Config

OptimizerName = Literal["adamw", "muon", "adamw-8bit", "adafactor", "schedule-free"]


class RateConfig(Config):
    """The learning rate over the steps of the run, as a share of the configured one."""

    shape: Literal["constant", "linear", "cosine", "polynomial"] = "constant"
    """How the rate falls from the end of the warm-up to the run's last step."""
    warmup_steps: int = Field(0, ge=0)
    """Optimizer steps over which the rate rises in a line to the full one."""
    final_share: float = Field(0.0, ge=0, le=1)
    """Share of the rate that is left at the last step; "constant" keeps all of it."""
    power: float = Field(2.0, gt=0)
    """Exponent of "polynomial": 1 is a line."""


class OptimizerConfig(Config):
    """What turns gradients into steps; rates, decays and eps mean what they mean in the optimizer's own paper."""

    name: OptimizerName = "adamw"
    """"muon" takes matrices and convolutions from AdamW: fewer steps from random weights, untried in fine-tuning;
    "adamw-8bit" keeps moments in bytes, "adafactor" sums of their rows and columns, "schedule-free" an average."""
    learning_rate: float = Field(1e-5, gt=0)
    """Step size of all but Muon; may change when a run goes on."""
    muon_rate: float = Field(0.02, gt=0)
    """Step size of Muon, relative to weights of norm one; may change when a run goes on."""
    rate: RateConfig = RateConfig()
    beta1: float = Field(0.9, ge=0, lt=1)
    """Decay of the first moment; in "schedule-free" the share of the average in what is trained."""
    beta2: float = Field(0.999, ge=0, lt=1)
    """Decay of the second moment; "adafactor" has its own."""
    eps: float = Field(1e-8, gt=0)
    """Added to the root of the second moment; "adafactor" has its own."""
    weight_decay: float = Field(1e-2, ge=0)
    """Decoupled decay of the weights."""
    clip_norm: float = Field(1.0, ge=0)
    """Largest norm of all gradients together; 0 does not clip."""
    fused_backward: bool = False
    """Step each weight in the backward pass and keep no gradients; bf16-lean, without accumulation or clipping."""
    max_skipped: int = Field(100, ge=0)
    """Give up after this many steps skipped for gradients that were not finite."""

    @model_validator(mode="after")
    def _schedule_free_has_none(self) -> "OptimizerConfig":
        if self.name == "schedule-free":
            if self.rate.shape != "constant":
                raise ValueError(f"'schedule-free' takes no falling rate: leave out rate.shape = {self.rate.shape!r}")
            if self.beta1 == 0:
                raise ValueError("'schedule-free' needs a beta1 above 0")
        return self
