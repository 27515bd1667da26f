"""`evaluate-experts`: what both experts are worth, each alone and both together, beside the start model.

    experts on disk -> line-up -> losses on one axis -> every way to fill the parts -> OUT/report.json, OUT/report.html
                               -> pictures by each of these ways, their CLIP scores -> OUT/pictures

A process of its own: it reads the store and the run folders, and writes nothing but OUT.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TypeVar

import torch

from shared.contract import ExpertFacts
from shared.device import choose_device
from shared.model_folder import model_name
from shared.progress import progress
from shared.schedule import TimestepRange
from shared.store import StoreReader
from trainer.bench import Bench, open_bench
from trainer.checkpoint import Checkpoint, open_expert
from trainer.drift import layer_moves
from trainer.easel import Drawn, draw_round
from trainer.error_bars import between, difference, mean, standard_error
from trainer.eval_axis import Losses, choice_change, measure, pair_loss, stretches, sweep
from trainer.eval_loss import EvalLoss
from trainer.gallery import Gallery, Pictures, PictureWish, open_gallery
from trainer.lineup import START, Candidate, LineUp, line_up, notes_on
from trainer.report import (
    Answerer,
    Choice,
    Drifted,
    JudgedExpert,
    Report,
    Round,
    StretchLoss,
    SweepPoint,
    write_report,
)
from trainer.report_page import report_page

Given = TypeVar("Given")
Result = TypeVar("Result")


@dataclass(frozen=True)
class EvaluateRequest:
    """What an `evaluate-experts` command asks for."""

    experts: Sequence[Path]
    store: Path
    model: Path
    out: Path
    manifest: str | None = None
    device: str = "auto"
    draws: int = 256
    batch: int = 4
    base: Path | None = None  # what adapters stand on, if it is not the model's UNet
    pictures: PictureWish = field(default_factory=PictureWish)


def evaluate(request: EvaluateRequest) -> Path:
    """Judge the experts once and write the report; returns the page.

    Raises ContractError where the experts do not belong together or to the store, CheckpointError where one is
    damaged, DataError where nothing is held out.
    """
    checkpoints = [open_expert(path) for path in request.experts]
    device = choose_device(request.device)
    with StoreReader(request.store) as store:
        bench = open_bench(request.store, store, request.manifest, checkpoints)
        is_whole = len(checkpoints) > 1
        line = line_up(checkpoints, request.model, request.base, bench.manifest.settings, is_whole=is_whole)
        request.out.mkdir(parents=True, exist_ok=True)
        gallery = open_gallery(request.pictures, request.model, store, request.out, bench, line, device)
        states = [judged(path, one) for path, one in zip(request.experts, checkpoints, strict=True)]
        report = begin_report(request, bench, line).with_round(judge(request, bench, line, gallery, states, device, 1))
    return write_report(request.out, report, report_page(report, request.out))[1]


def begin_report(request: EvaluateRequest, bench: Bench, line: LineUp) -> Report:
    """A report without rounds."""
    return Report(
        model=model_name(request.model),
        manifest=bench.manifest.name,
        digest=bench.manifest.digest,
        samples=len(bench.samples),
        draws=request.draws,
        prompts=list(request.pictures.prompts),
        clip=None if request.pictures.clip is None else model_name(request.pictures.clip),
        drawing=asdict(request.pictures.settings) | {"seed": request.pictures.seed},
        notes=[*bench.notes, *notes_on(line)],
    )


def judge(
    request: EvaluateRequest,
    bench: Bench,
    line: LineUp,
    gallery: Gallery | None,
    states: Sequence[JudgedExpert],
    device: torch.device,
    number: int,
    check: Callable[[], None] = lambda: None,
) -> Round:
    """One round: everybody's losses, what follows from them for every way to fill the parts, and pictures of each.

    `check` is called between batches; what it raises ends the round.
    """
    began_s = time.perf_counter()
    total = sum(stretches(line, request.draws).values()) * len(line.candidates)
    with progress("eval loss", total, "draws") as advance:
        losses = measure(
            line,
            bench.samples,
            _checked(bench.read, check),
            draws=request.draws,
            batch=request.batch,
            device=device,
            advance=advance,
        )
    drawn = _draw(gallery, line, number, check)
    return Round(
        number=number,
        at=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        took_s=round(time.perf_counter() - began_s, 2),
        experts=list(states),
        losses=[
            stretch_loss(name, within, one, losses[START][within])
            for name, of in losses.items()
            for within, one in of.items()
        ],
        choices=[_choice(choice, line, losses, own) for choice, own in zip(line.choices(), drawn.choices, strict=True)],
        sweep=[SweepPoint(**asdict(one)) for one in sweep(line, losses)],
        drift=_drift(line),
        finished=drawn.finished,
        finished_from=drawn.finished_from,
        handover=drawn.handover,
    )


def judged(path: Path, checkpoint: Checkpoint) -> JudgedExpert:
    """How an expert stands in a round's report."""
    facts: ExpertFacts = checkpoint.card.facts
    folder = checkpoint.weights_folder().name
    return JudgedExpert(
        name=facts.name,
        run=str(path),
        state="judged",
        low=facts.low,
        high=facts.high,
        step=checkpoint.state.step,
        weights="ema" if folder == "ema" else "unet",
    )


def stretch_loss(name: str, within: TimestepRange, one: EvalLoss, start: EvalLoss) -> StretchLoss:
    """A measured stretch as the report has it, beside the start model's."""
    bins = [(part.low, part.high, part.loss, part.samples) for part in one.bins]
    change = difference(one.each, start.each)
    both = [(between(one.each, low, high), between(change, low, high)) for low, high, *_ in bins]
    return StretchLoss(
        candidate=name,
        low=within.low,
        high=within.high,
        loss=one.loss,
        draws=one.draws,
        lost=one.lost,
        bins=bins,
        error=standard_error([(1.0, one.each)]),
        change=mean(change),
        change_error=standard_error([(1.0, change)]),
        bin_errors=[(standard_error([(1.0, own)]), standard_error([(1.0, more)])) for own, more in both],
    )


def _checked(act: Callable[[Given], Result], check: Callable[[], None]) -> Callable[[Given], Result]:
    def checked(given: Given) -> Result:
        check()
        return act(given)

    return checked


def _drift(line: LineUp) -> list[Drifted]:
    start, *experts = line.candidates
    moves = [(one.name, layer_moves(start, one)) for one in experts]
    return [
        Drifted(candidate=name, layers=[(one.layer, one.moved, one.start) for one in layers])
        for name, layers in moves
        if layers is not None
    ]


def _draw(gallery: Gallery | None, line: LineUp, number: int, check: Callable[[], None]) -> Drawn:
    if gallery is None:
        return Drawn([Pictures([], []) for _ in line.choices()], [], None, [])
    with progress("pictures", gallery.count(line), "images") as advance:
        return draw_round(gallery, line, number, _checked(advance, check))


def _choice(choice: Sequence[Candidate], line: LineUp, losses: Losses, drawn: Pictures) -> Choice:
    answers = [
        Answerer(low=part.within.low, high=part.within.high, candidate=one.name)
        for part, one in zip(line.parts, choice, strict=True)
    ]
    score = sum(drawn.scores) / len(drawn.scores) if drawn.scores else None
    error, change, change_error = choice_change(choice, line, losses)
    return Choice(
        answers=answers,
        loss=pair_loss(choice, line, losses),
        error=error,
        change=change,
        change_error=change_error,
        clip=score,
        clip_each=drawn.scores,
        pictures=drawn.paths,
    )
