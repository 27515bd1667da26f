"""What a configuration does not do in the expert's own range, or does at a price: said in a line each before a run.

A setting that is right over all timesteps may be idle or harmful over a part of them. What cannot be is refused by
trainer/config.py; what may be meant is named here, for the trainer and for whoever rehearses a run.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from shared.schedule import BETAS, STRATUM_BITS, NoiseSchedule, TimestepRange, cumulate
from trainer.config import ExpertConfig
from trainer.exposure_config import chance_in_reach
from trainer.timestep_bias import timestep_shares

FAINT = 10.0  # a pseudo-Huber c above this bends no error of latents, whose deviation is about 1
IDLE = "changes nothing"


def objective_advice(config: ExpertConfig) -> list[str]:
    """One line for each setting of the objective that is idle in the expert's range, or that costs something there."""
    return [line for part in _PARTS for line in part(config)]


def _min_snr(config: ExpertConfig) -> Iterator[str]:
    """Where the clip acts, and what share of the plain squared error is left (Hang et al. 2023, arXiv:2303.09556)."""
    gamma, kind = config.loss.min_snr_gamma, config.schedule.prediction_type
    if gamma is None:
        return
    schedule, t = _schedule(config), _timesteps(config)
    weights, snr = schedule.min_snr_weight(kind, gamma, t), schedule.snr(t)
    setting = f"loss.min_snr_gamma = {gamma:g}"
    if kind == "epsilon":
        if bool((weights == 1).all()):
            yield f"{setting} {IDLE}: over {config.range} the SNR is at most {float(snr.max()):.3g}"
        return
    mean = float((weights.double() * timestep_shares(config.loss.timestep_bias, config.range)).sum())
    clip = "" if float(snr.max()) > gamma else f"; it clips nothing, the SNR is at most {float(snr.max()):.3g}"
    low, high = config.range.low, config.range.high
    yield (
        f"{setting} weighs the error of {kind} by {mean:.2g} on average over {config.range}, "
        f"by {float(weights[0]):.2g} at t = {low} and {float(weights[-1]):.2g} at t = {high - 1}{clip}"
    )


def _huber(config: ExpertConfig) -> Iterator[str]:
    if config.loss.type == "mse":
        return
    c = _schedule(config).huber_c(config.loss.huber_schedule, config.loss.huber_c, _timesteps(config))
    if float(c.min()) >= FAINT:
        yield f"loss.type = 'huber' {IDLE}: over {config.range} errors below {float(c.min()):.3g} count squared"
    elif config.loss.huber_schedule != "constant":
        yield f"loss.type = 'huber' bends at errors of {float(c[0]):.2g} to {float(c[-1]):.2g} over {config.range}"


def _offset_noise(config: ExpertConfig) -> Iterator[str]:
    """It teaches brightness as a whole, which is decided where no picture is left to tell it."""
    if not config.loss.offset_noise:
        return
    setting = f"loss.offset_noise = {config.loss.offset_noise:g}"
    if config.range.high < config.schedule.num_timesteps:
        snr = float(_schedule(config).snr(_timesteps(config)[-1]))
        yield (
            f"{setting} teaches nothing to an expert of {config.range}: brightness stands by SNR {snr:.2g}, "
            "and inputs in drawing have no such noise"
        )
    elif config.schedule.zero_terminal_snr:
        yield f"{setting} beside zero_terminal_snr = true is a second cure of the same fault, and bends the first"


def _input_perturbation(config: ExpertConfig) -> Iterator[str]:
    if not (gamma := config.loss.input_perturbation):
        return
    added = gamma * _schedule(config).sigma(_timesteps(config))
    more = (1 + gamma**2) ** 0.5 - 1
    yield (
        f"loss.input_perturbation = {gamma:g} shows {more:.1%} more noise than t says, {float(added.min()):.2g} "
        f"to {float(added.max()):.2g} of a latent's deviation over {config.range}"
        + ("; drawing begins there with no error to learn from" if _is_first(config) else "")
    )


def _timestep_bias(config: ExpertConfig) -> Iterator[str]:
    bias = config.loss.timestep_bias
    if bias.strategy == "none":
        return
    setting = f"loss.timestep_bias.strategy = {bias.strategy!r}"
    drawn = cumulate(timestep_shares(bias, config.range)).diff(prepend=torch.zeros(1, dtype=torch.int64))
    if int(drawn.max() - drawn.min()) <= 1:
        yield f"{setting} {IDLE}: every timestep of {config.range} is drawn as often"
        return
    expected = drawn.double() / (1 << STRATUM_BITS) * config.steps * config.batch * config.accumulation
    for count, what in (
        (drawn == 0, "never drawn"),
        ((drawn > 0) & (expected < 1), f"rarer than once in {config.steps} steps"),
    ):
        if bool(count.any()):
            places = torch.nonzero(count).flatten() + config.range.low
            yield (
                f"{setting}: {len(places)} of {len(config.range)} timesteps of {config.range} are {what}, "
                f"the first t = {int(places[0])}, the last t = {int(places[-1])}; nobody else answers for them"
            )


def _exposure(config: ExpertConfig) -> Iterator[str]:
    """How often the partner is asked, and where."""
    own, bias = config.loss.exposure, config.loss.timestep_bias
    if own.share:
        chance = chance_in_reach(own, bias, config.range, config.schedule.num_timesteps)
        near = TimestepRange(config.range.high - own.reach, config.range.high)
        yield f"loss.exposure.share = {own.share:g} takes {chance:.1%} of the samples in {near} from the partner"


def _spacing(config: ExpertConfig) -> Iterator[str]:
    """Steps that a spacing never takes at inference are trained for nothing; SDXL's own `leading` is left alone."""
    schedule = config.schedule
    if schedule.timestep_spacing == "trailing" and not schedule.zero_terminal_snr and _is_first(config):
        snr = float(_schedule(config).snr(_timesteps(config)[-1]))
        yield (
            f"schedule.timestep_spacing = 'trailing' begins drawing from noise alone, while at t = "
            f"{config.range.high - 1} training shows SNR {snr:.2g}: zero_terminal_snr closes that gap"
        )


def _caption_dropout(config: ExpertConfig) -> Iterator[str]:
    ends = (config.loss.caption_dropout.low, config.loss.caption_dropout.high)
    if max(ends) == 0:
        yield "loss.caption_dropout = 0 never trains the null prompt, which guidance above 1 draws with"
    if min(ends) == 1:
        yield "loss.caption_dropout = 1 never shows a caption"


_PARTS = (
    _min_snr,
    _huber,
    _offset_noise,
    _input_perturbation,
    _timestep_bias,
    _exposure,
    _spacing,
    _caption_dropout,
)


def _schedule(config: ExpertConfig) -> NoiseSchedule:
    own = config.schedule
    betas = BETAS[own.beta_schedule](own.num_timesteps, own.beta_start, own.beta_end)
    return NoiseSchedule(betas, zero_terminal_snr=own.zero_terminal_snr)


def _timesteps(config: ExpertConfig) -> Tensor:
    return torch.arange(config.range.low, config.range.high)


def _is_first(config: ExpertConfig) -> bool:
    """Whether drawing begins in the expert's range."""
    return config.range.high == config.schedule.num_timesteps
