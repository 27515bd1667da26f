"""What one expert is told: configs/expert.toml holds what a pair shares, base.toml and refiner.toml name and range."""

from typing import Literal

from pydantic import Field, field_validator, model_validator

from shared.config import Config
from shared.contract import NullPrompt, Spacing
from shared.errors import ConfigError
from shared.parts import MOST_PARTS
from shared.schedule import HuberSchedule, PredictionType, TimestepRange, check_objective
from trainer.adapter_config import AdapterConfig
from trainer.caption_dropout import DropoutByTimestep
from trainer.data_config import DataConfig
from trainer.exposure_config import ExposureConfig, chance_in_reach
from trainer.optimizer_config import OptimizerConfig
from trainer.timestep_bias import TimestepBias, timestep_shares


class RangeConfig(Config):
    """The half-open range of timesteps that the expert answers for."""

    low: int = Field(ge=0)
    """First timestep of the range, 0 = clean."""
    high: int = Field(gt=0)
    """First timestep beyond the range."""


class ScheduleConfig(Config):
    """The noise schedule and what is predicted; equal in a pair. SDXL's betas by default."""

    num_timesteps: int = Field(1000, gt=1)
    """T, timesteps of the schedule."""
    beta_schedule: Literal["scaled_linear", "linear"] = "scaled_linear"
    """How betas run from first to last."""
    beta_start: float = Field(0.00085, gt=0, lt=1)
    """First beta."""
    beta_end: float = Field(0.012, gt=0, lt=1)
    """Last beta."""
    zero_terminal_snr: bool = False
    """Rescale the betas so that nothing of the picture is left at the last timestep."""
    prediction_type: PredictionType = "epsilon"
    """What the UNet gives."""
    timestep_spacing: Spacing = "leading"
    """How a scheduler must place its steps at inference; trailing with zero_terminal_snr."""


class LossConfig(Config):
    """The training objective."""

    type: Literal["mse", "huber"] = "mse"
    """Squared error, or pseudo-Huber, which counts errors above huber_c in proportion alone."""
    huber_c: float = Field(0.1, gt=0)
    """Error at which "huber" turns from a square into a line, at full noise; in units of what is predicted."""
    huber_schedule: HuberSchedule = "snr"
    """How that runs from 1 at no noise to huber_c at full noise; "constant" is huber_c everywhere."""
    min_snr_gamma: float | None = Field(None, gt=0)
    """Clip the weight of low-noise timesteps (min-SNR); unset: every timestep weighs the same."""
    offset_noise: float = Field(0.0, ge=0, le=1)
    """Deviation of noise that is the same all over a channel, added to the noise; learned as part of it."""
    input_perturbation: float = Field(0.0, ge=0, le=1)
    """Deviation of noise that is added to what the UNet is shown and not to what it is asked for."""
    timestep_bias: TimestepBias = TimestepBias()
    exposure: ExposureConfig = ExposureConfig()
    caption_dropout: DropoutByTimestep = DropoutByTimestep(low=0.1, high=0.1)
    """Share of samples trained without their caption, for classifier-free guidance; {low, high} runs with t."""
    null_prompt: Literal["auto", "zeros", "encoded"] = "auto"
    """What stands for no caption; "auto" is what the model's pipeline gives for an empty prompt."""
    aesthetic_score: float = 6.0
    """Score given with every sample (stock refiner layout only)."""
    negative_aesthetic_score: float = 2.5
    """Score of the null prompt at inference (stock refiner layout only)."""


class EmaConfig(Config):
    """Exponential moving average of the weights, fp32."""

    decay: float = Field(0.999, ge=0, lt=1)
    """Decay per optimizer step once warmed up; 0 keeps no average."""
    device: Literal["model", "cpu"] = "model"
    """Where it is kept: beside the model, or on the host, where it takes none of a GPU's memory."""


class CheckpointConfig(Config):
    """When an expert is saved."""

    every: int = Field(500, ge=1)
    """Optimizer steps between checkpoints; the last step is always saved."""
    every_minutes: float = Field(60, gt=0)
    """Minutes after which a run is saved though fewer steps are done."""
    keep: int = Field(3, ge=2)
    """Newest checkpoints that are kept; optimizer state is kept in the last two."""
    keep_best: int = Field(1, ge=0)
    """Checkpoints of the lowest eval loss that are kept besides."""


class EvalConfig(Config):
    """The loss on held-out samples, measured the same way every time."""

    every: int = Field(500, ge=1)
    """Optimizer steps between evaluations; each checkpoint is evaluated besides."""
    samples: int = Field(256, ge=0, le=256)
    """Draws of a sample, a timestep and noise each time; of fewer samples some are drawn again. 0 never evaluates."""
    share: float = Field(0.02, gt=0, le=1)
    """Largest share of the run's time; an evaluation that would take more is left out. 1 sets no limit."""


class LogConfig(Config):
    """What is told of a run while it trains."""

    every: int = Field(10, ge=1)
    """Optimizer steps between log lines."""
    trackers: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ("tensorboard",)
    """Where curves are drawn; each is an extra of its name."""
    project: str = Field("sdxl-experts", min_length=1, max_length=100)
    """What W&B and trackio file the run under."""


class StartConfig(Config):
    """What is taken of an expert that training starts from (`--start`)."""

    weights: Literal["ema", "raw"] = "ema"
    """Averaged weights, or the weights themselves."""


class ExpertConfig(Config):
    """One expert."""

    name: str = Field(min_length=1, max_length=100)
    """What the expert is called; nothing is decided by it."""
    timesteps: RangeConfig
    """The timesteps it answers for."""
    steps: int = Field(ge=1)
    """Optimizer steps of the whole run; may be raised later."""
    batch: int = Field(1, ge=1)
    """Samples in a micro-batch, all of one bucket."""
    accumulation: int = Field(1, ge=1)
    """Micro-batches in an optimizer step, of all processes together: on one GPU or four, it is the same run."""
    partitions: int = Field(1, ge=1, le=MOST_PARTS)
    """Parts of the manifest that micro-batches are taken from in turns, so that a machine needs its part alone."""
    seed: int = 0
    """Seed of order, timesteps, noise and dropout."""
    precision: Literal["fp32", "bf16-mixed", "bf16-lean"] = "fp32"
    """"bf16-mixed" keeps fp32 weights and computes under autocast; "bf16-lean" keeps bf16 weights and, for AdamW,
    what rounding takes from their steps: 12 bytes a parameter for weight, gradient and moments (extra: lean)."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    trainable: tuple[str, ...] = Field(("full",), min_length=1)
    """Parameters that are trained: "full", "attention", "cross-attention", "biases", "norms", or patterns of names."""
    adapter: AdapterConfig | None = None
    """Train an adapter on a frozen UNet instead of the UNet's own parameters."""
    start: StartConfig = StartConfig()
    channels_last: bool = False
    """Keep weights and pictures with channels innermost, which convolutions on a GPU prefer."""
    compile: bool = False
    """Compile the UNet's repeated blocks, for every bucket before the first step (torch.compile)."""
    schedule: ScheduleConfig = ScheduleConfig()
    loss: LossConfig = LossConfig()
    data: DataConfig = DataConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    ema: EmaConfig = EmaConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    eval: EvalConfig = EvalConfig()
    log: LogConfig = LogConfig()

    @field_validator("precision", mode="before")
    @classmethod
    def _no_plain_bf16(cls, precision: object) -> object:
        if precision in ("bf16", "bfloat16", "fp16"):
            raise ValueError(
                f"weights of {precision} alone do not move at the learning rates of fine-tuning: a step is far below "
                "the distance to their neighbours. Use 'bf16-lean', which keeps what rounding takes, or 'bf16-mixed'"
            )
        return precision

    @field_validator("schedule")
    @classmethod
    def _objective(cls, schedule: ScheduleConfig) -> ScheduleConfig:
        try:
            check_objective(schedule.prediction_type, schedule.zero_terminal_snr)
        except ConfigError as error:
            raise ValueError(str(error)) from None
        if schedule.zero_terminal_snr and schedule.timestep_spacing != "trailing":
            raise ValueError("zero_terminal_snr needs timestep_spacing = 'trailing': others never start at the last t")
        return schedule

    @model_validator(mode="after")
    def _range_fits(self) -> "ExpertConfig":
        if self.timesteps.low >= self.timesteps.high:
            raise ValueError(f"timesteps.low {self.timesteps.low} is not below timesteps.high {self.timesteps.high}")
        if self.timesteps.high > self.schedule.num_timesteps:
            raise ValueError(
                f"timesteps.high {self.timesteps.high} is beyond the {self.schedule.num_timesteps} there are"
            )
        if self.accumulation % self.partitions:
            fitting = -(-self.accumulation // self.partitions) * self.partitions
            raise ValueError(
                f"accumulation {self.accumulation} is not a multiple of partitions {self.partitions}, which each give "
                f"equally many micro-batches of an optimizer step: accumulation = {fitting} would do"
            )
        self._check_weights()
        if self.adapter is not None and self.trainable != ("full",):
            raise ValueError(
                "adapter and trainable exclude each other: an adapter's UNet is frozen, set adapter.targets"
            )
        if self.adapter is not None and self.precision == "bf16-lean":
            raise ValueError("an adapter has fp32 weights: precision = 'bf16-mixed' keeps the UNet under it in bf16")
        self._check_optimizer()
        return self

    def _check_optimizer(self) -> None:
        if self.precision == "bf16-lean" and self.optimizer.name != "adamw":
            raise ValueError(
                f"precision = 'bf16-lean' is a way of AdamW: {self.optimizer.name!r} would lose its steps to rounding. "
                "Use 'bf16-mixed', or optimizer.name = 'adamw'"
            )
        fused = self.optimizer.fused_backward
        if fused and (self.precision != "bf16-lean" or self.accumulation > 1 or self.optimizer.clip_norm > 0):
            raise ValueError(
                "optimizer.fused_backward steps before all gradients are known: it needs precision = 'bf16-lean', "
                "accumulation = 1 and optimizer.clip_norm = 0"
            )

    def _check_weights(self) -> None:
        """Something must be left to learn: draws inside the range, and weights above zero."""
        is_last_alone = self.timesteps.low == self.schedule.num_timesteps - 1
        if is_last_alone and self.schedule.zero_terminal_snr and self.loss.min_snr_gamma is not None:
            raise ValueError("loss.min_snr_gamma weighs the last timestep by its SNR, which zero_terminal_snr makes 0")
        try:
            timestep_shares(self.loss.timestep_bias, self.range)
            if self.loss.exposure.share:
                chance_in_reach(self.loss.exposure, self.loss.timestep_bias, self.range, self.schedule.num_timesteps)
        except ConfigError as error:
            raise ValueError(str(error)) from None

    @property
    def range(self) -> TimestepRange:
        """The range as the schedule knows it."""
        return TimestepRange(self.timesteps.low, self.timesteps.high)


# What may change when a run goes on: how long it is, how often it speaks and saves, and how fast it learns.
MAY_CHANGE = (
    "steps",
    "checkpoint.every",
    "checkpoint.every_minutes",
    "checkpoint.keep",
    "checkpoint.keep_best",
    "eval.every",
    "eval.share",
    "ema.device",
    "log.every",
    "log.trackers",
    "log.project",
    "optimizer.learning_rate",
    "optimizer.muon_rate",
    "optimizer.rate.shape",
    "optimizer.rate.warmup_steps",
    "optimizer.rate.final_share",
    "optimizer.rate.power",
    "optimizer.max_skipped",
)


def resolve_null_prompt(setting: str, zeros_for_empty_prompt: bool) -> NullPrompt:
    """The null prompt of "auto" is the one that the model's own pipeline uses."""
    if setting == "auto":
        return "zeros" if zeros_for_empty_prompt else "encoded"
    return "zeros" if setting == "zeros" else "encoded"
