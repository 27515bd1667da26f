"""What an evaluation found, as a file: OUT/report.json, and the page that is made of it.

    OUT/report.json      {"format": 1, ..., "rounds": [...]}: a round is one judgement of certain checkpoints
    OUT/report.html      the same for people, with plots and pictures in it (trainer/report_page.py)
    OUT/pictures/        what was drawn, named in report.json by paths below OUT

Numbers that are not finite are null: JSON knows no others.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError, field_validator

from shared.atomic import write_atomically
from shared.errors import DataError

REPORT_FORMAT = 1
REPORT_FILE, PAGE_FILE = "report.json", "report.html"


def _finite(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    @field_validator("*", mode="before")
    @classmethod
    def _finite(cls, value: Any) -> Any:
        return _finite(value)


class JudgedExpert(_Part):
    """An expert as it stood in a round."""

    name: str
    """What it is called."""
    run: str
    """Where it was looked for."""
    state: Literal["judged", "not started", "no checkpoint yet"]
    """Whether there was a checkpoint to judge."""
    low: int | None = None
    """First timestep of its range."""
    high: int | None = None
    """First timestep beyond it."""
    step: int | None = None
    """Optimizer step of the checkpoint."""
    weights: Literal["ema", "unet"] | None = None
    """Averaged weights or raw ones."""


class StretchLoss(_Part):
    """The eval loss of one candidate over one stretch of timesteps [low, high)."""

    candidate: str
    """Name of the expert, or "start model"."""
    low: int
    """First timestep."""
    high: int
    """First timestep beyond."""
    loss: float | None
    """Mean squared error, in units of what is predicted."""
    draws: int
    """Draws of a sample, a timestep and noise."""
    lost: int
    """Draws whose records could not be read."""
    bins: list[tuple[int, int, float | None, int]]
    """[low, high, loss, draws] of stretches of 50 timesteps."""
    error: float | None = None
    """Standard error of the loss, for want of held-out samples."""
    change: float | None = None
    """What it is above the start model's loss, by the draws that both have."""
    change_error: float | None = None
    """Standard error of that."""
    bin_errors: list[tuple[float | None, float | None]] = []
    """Standard errors of the loss and of the change, in the order of `bins`."""


class Answerer(_Part):
    """Who answers for a part of the schedule."""

    low: int
    """First timestep."""
    high: int
    """First timestep beyond."""
    candidate: str
    """Name of the expert, or "start model"."""


class Choice(_Part):
    """One way to fill the parts of the schedule, and how it does."""

    answers: list[Answerer]
    """From low timesteps to high."""
    loss: float | None
    """Eval loss over the whole schedule."""
    error: float | None = None
    """Standard error of the loss, for want of held-out samples."""
    change: float | None = None
    """What it is above the start model's loss, by the draws that both have."""
    change_error: float | None = None
    """Standard error of that."""
    clip: float | None = None
    """Mean CLIP score of its pictures, where there was a CLIP."""
    clip_each: list[float] = []
    """100 times the cosine of each picture and its prompt, in the order of the prompts."""
    pictures: list[str] = []
    """Its pictures, in the order of the prompts, as paths below the report's folder."""


class Finished(_Part):
    """A held-out picture, noised to the first timestep below the lowest boundary and finished by others."""

    dataset: str
    """Data set that it is of."""
    name: str
    """Beginning of its sample id, hex."""
    caption: str
    """What they were told."""
    source: str
    """Itself, decoded from its latents, as a path below the report's folder."""
    pictures: list[tuple[str, str]]
    """Who finished it, and what came of it."""


class LatentFacts(_Part):
    """What some latents are like, over all their pixels."""

    mean: list[float | None]
    """Of each channel."""
    variance: list[float | None]
    """Of each channel."""
    power: list[float | None]
    """In equal bands of spatial frequency from 0 to half a cycle; white noise of variance 1 has 1 in each."""


class HandOver(_Part):
    """x_0 at the lowest boundary as whoever answers above it estimates it: of what it drew, and of real latents."""

    candidate: str
    """Who answers above."""
    timestep: float
    """Its last step, at which both are estimated."""
    pictures: int
    """Held-out pictures, and as many that were drawn to their captions."""
    drawn: LatentFacts
    """Of latents that it drew from noise."""
    real: LatentFacts
    """Of the pictures' own latents, noised to that step."""


class Drifted(_Part):
    """How far an expert's weights have moved from the start model's."""

    candidate: str
    """Name of the expert."""
    layers: list[tuple[str, float | None, float | None]]
    """[name, Frobenius norm of the difference, and of the start model's weights] of each layer."""


class SweepPoint(_Part):
    """Both experts handing over at another timestep."""

    boundary: int
    """The upper expert answers from this timestep on."""
    loss: float | None = None
    """Eval loss over the whole schedule."""
    error: float | None = None
    """Standard error of `loss`; None where draws are too few to tell."""
    change: float | None = None
    """What `loss` is above that at the boundary that both were trained for, over the same draws."""
    change_error: float | None = None
    """Standard error of `change`."""


class Round(_Part):
    """One judgement of certain checkpoints."""

    number: int
    """From 1 on."""
    at: str
    """When it ended, UTC."""
    took_s: float
    """Seconds that it took."""
    experts: list[JudgedExpert]
    """The experts, in the order of the command line."""
    losses: list[StretchLoss]
    """Every candidate over every part, and over 50 timesteps on either side of each boundary."""
    choices: list[Choice]
    """Every way to fill the parts: the start model alone first, the experts last."""
    sweep: list[SweepPoint] = []
    """The same two experts with other boundaries."""
    finished: list[Finished] = []
    """Held-out pictures of each data set, finished from below the lowest boundary."""
    finished_from: float | None = None
    """Timestep that they were noised to."""
    drift: list[Drifted] = []
    """Of every expert whose UNet is like the start model's."""
    handover: list[HandOver] = []
    """What is handed over at the lowest boundary, by everybody who may answer above it."""


class Report(_Part):
    """All of an evaluation."""

    format: Literal[1] = 1
    """Version of this file."""
    model: str
    """The start model."""
    manifest: str
    """Manifest whose held-out samples were used."""
    digest: str
    """Its digest, hex."""
    samples: int
    """Held-out samples that draws were made of."""
    draws: int
    """Draws over each part of the schedule."""
    prompts: list[str] = []
    """What was drawn."""
    clip: str | None = None
    """The CLIP that scored pictures."""
    drawing: dict[str, Any] = {}
    """Steps, scheduler, guidance and seed of the pictures."""
    notes: list[str] = []
    """What a reader should know besides."""
    rounds: list[Round] = []
    """Oldest first."""

    def with_round(self, round_: Round) -> "Report":
        """The same with one more round."""
        return self.model_copy(update={"rounds": [*self.rounds, round_]})


def read_report(out: Path) -> Report | None:
    """The report in a folder, None where there is none; raises DataError where it cannot be read."""
    path = out / REPORT_FILE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(content, dict) and content.get("format") != REPORT_FORMAT:
            raise DataError(
                f"{path} is of report format {content.get('format')}; this program goes on with format "
                f"{REPORT_FORMAT}: name another --out"
            )
        return Report.model_validate(content)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, ValidationError) as error:
        raise DataError(f"{path} is damaged: {str(error).splitlines()[0]}; name another --out") from None


def write_report(out: Path, report: Report, page: str) -> Sequence[Path]:
    """Write both files, the page last; returns where they are."""
    json_path, page_path = out / REPORT_FILE, out / PAGE_FILE
    write_atomically(json_path, report.model_dump_json(indent=1).encode() + b"\n")
    write_atomically(page_path, page.encode())
    return json_path, page_path
