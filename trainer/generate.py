"""Experts on disk to pictures on disk: check that they belong together, encode the prompts, draw, decode, save.

checkpoints, model -> _plan: what cannot be drawn is refused before anything large is loaded
prompts            -> embeds (prompt_embeds.py); the text encoders go
drawings           -> pictures (rounds.py), each with what it was drawn from (picture_files.py)
"""

import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from shared.amounts import duration_text, size_text
from shared.contract import ExpertFacts, PairContract, check_model, check_pair
from shared.device import choose_device
from shared.errors import ConfigError, DataError
from shared.progress import progress, say
from shared.prompts import read_prompts_file
from shared.sheet import Card
from shared.text_encoders import TextFacts, read_text_facts
from shared.vae import Vae, VaeFacts, choose_encode_dtype, read_vae_facts
from trainer.checkpoint import Checkpoint, open_expert
from trainer.drawing import Drawing, GenerateRequest, batches, first_timestep, plan_drawings
from trainer.drawn import check_base, choose_dtype, find_bases, load_experts, precision_name
from trainer.ensemble import ExpertEnsemble, plan_steps
from trainer.offload import Berth, OffloadedUnet
from trainer.picture_files import card_of, common_facts, drawing_facts, save_picture, save_sheet
from trainer.prompt_embeds import encode_prompts
from trainer.rounds import Rounds
from trainer.schedulers import scheduler_warnings
from trainer.unet import ConditionedUnet, read_unet_config


@dataclass(frozen=True)
class _Plan:
    """What is drawn and with what, once nothing stands against it; nothing of it is loaded."""

    checkpoints: Sequence[Checkpoint]
    folders: Sequence[Path]  # of each expert's UNet
    contract: PairContract
    vae: VaeFacts
    text: TextFacts
    device: torch.device
    dtype: torch.dtype
    negatives: tuple[str | None, ...]  # of each expert
    from_t: float | None
    first_t: float
    drawings: Sequence[Drawing]
    unreadable: int  # further pictures that could not be begun with

    @property
    def experts(self) -> list[ExpertFacts]:
        return [checkpoint.card.facts for checkpoint in self.checkpoints]


def generate(request: GenerateRequest) -> Iterator[Path]:
    """Draw what is asked for into `out`; yields each path once it is there.

    Raises ContractError where the experts do not belong together or to the model, CheckpointError where one is damaged,
    and at the end DataError where a given picture could not be read: the others are drawn.
    """
    began_s, plan, cards = time.monotonic(), _plan(request), dict[str, Card]()
    done = 0
    for folder in (request.out, *([] if request.sheet is None else [request.sheet.parent])):
        folder.mkdir(parents=True, exist_ok=True)
    rounds = _load(request, plan)
    common = common_facts(request.settings, precision_name(plan.dtype), plan.contract, plan.checkpoints)
    with progress("pictures", len(plan.drawings), "images") as advance:
        for drawn in rounds.draw(list(batches(plan.drawings, request.batch)), advance):
            if drawn.pixels is None:
                continue
            done += 1
            path = request.out / f"{drawn.drawing.name}.png"
            save_picture(path, drawn.pixels, common | drawing_facts(drawn.drawing, plan.negatives, plan.first_t))
            if request.sheet is not None:
                cards[drawn.drawing.name] = card_of(drawn.drawing, drawn.pixels, drawn.source, plan.first_t)
            yield path
    if request.sheet is not None and cards:
        save_sheet(request.sheet, [cards[name] for name in sorted(cards)], common, plan.negatives)
    _say_cost(done, time.monotonic() - began_s, plan.device)
    every = len(plan.drawings) + plan.unreadable
    if done < every:
        raise DataError(f"{every - done} of {every} pictures could not be begun with; the others are drawn")


def read_prompts(given: Sequence[str], path: Path | None) -> list[str]:
    """Prompts that were given, then those of a file (shared/prompts.py).

    Raises ConfigError where that makes none or the file cannot be read, DataError where it is no list of prompts.
    """
    found = read_prompts_file(path) if path is not None else []
    if path is not None and not found:
        raise DataError(f"{path} holds no prompt: nothing to draw")
    if not given and not found:
        raise ConfigError("nothing to draw: give --prompt TEXT or --prompts FILE")
    return [*given, *found]


def _plan(request: GenerateRequest) -> _Plan:
    checkpoints = [open_expert(path) for path in request.experts]
    facts = [checkpoint.card.facts for checkpoint in checkpoints]
    vae, text = read_vae_facts(request.model), read_text_facts(request.model)
    contract = _check_together(checkpoints)
    check_model([checkpoint.card for checkpoint in checkpoints], str(request.model), vae.digest, text.digests)
    negatives = request.negative_prompt
    _check_counts(request, len(facts))
    from_t = first_timestep(request, facts, contract)
    steps = plan_steps(facts, contract, request.settings, from_t)
    for line in scheduler_warnings(request.settings.scheduler, contract):
        say(line)
    device = choose_device(request.device)
    dtype = choose_dtype(request.precision, device)
    if request.offload and device.type == "cpu":
        raise ConfigError("--offload keeps UNets in main memory until they are needed; on a CPU they are there anyway")
    if request.sheet is not None and request.sheet.is_dir():
        raise ConfigError(f"--sheet {request.sheet} is a folder; it names a PNG")
    check_base(checkpoints, request.base)
    folders = find_bases(checkpoints, request.model, request.base)
    own_px, step_px = _own_sizes(folders[0], vae.downscale)
    drawings, unreadable = plan_drawings(request, contract, len(facts), own_px, (vae.downscale, step_px))
    if from_t is not None:
        say(f"{_pictures(len(drawings))}, each from t = {steps[0][1]:.0f} on in {len(steps)} evaluations")
    return _Plan(
        checkpoints, folders, contract, vae, text, device, dtype,
        negatives if isinstance(negatives, tuple) else (negatives,) * len(facts),
        from_t, steps[0][1], drawings, unreadable,
    )  # fmt: skip


def _load(request: GenerateRequest, plan: _Plan) -> Rounds:
    """Embeds first, and the encoders gone; then UNets and VAE into main memory, from where they come to the device."""
    texts = [drawing.prompts for drawing in plan.drawings]
    prompts = encode_prompts(request.model, texts, plan.negatives, plan.experts, plan.device)
    cpu, berth = torch.device("cpu"), Berth(plan.device)
    experts = load_experts(plan.checkpoints, plan.folders, plan.text.widths[1], cpu, plan.dtype)
    models = [expert.model for expert in experts if isinstance(expert.model, ConditionedUnet)]
    unets = list({id(model.unet): model.unet for model in models}.values())
    if request.offload:
        turns = [OffloadedUnet(model, berth) for model in models]
        experts = [replace(expert, model=turn) for expert, turn in zip(experts, turns, strict=True)]
    vae = Vae(request.model, cpu, choose_encode_dtype("auto", plan.vae, plan.device.type))
    vae.device = plan.device
    return Rounds(
        ExpertEnsemble(experts, plan.contract), request.settings, prompts, vae, plan.vae.downscale,
        plan.vae.latent_channels, [] if request.offload else unets, berth, plan.from_t,
    )  # fmt: skip


def _check_together(checkpoints: Sequence[Checkpoint]) -> PairContract:
    """The contract of experts that tile the schedule, or of one alone."""
    cards = [checkpoint.card for checkpoint in checkpoints]
    contract = cards[0].contract
    if len(cards) > 1:
        check_pair(cards)
    elif len(cards[0].facts.timesteps) < contract.num_timesteps:
        facts = cards[0].facts
        say(f"one expert alone: {facts.name} draws timesteps {facts.timesteps} and leaves the others out")
    return contract


def _check_counts(request: GenerateRequest, experts: int) -> None:
    """What may differ by expert is given once, or once for each."""
    given = {"--guidance": request.settings.guidance, "--negative-prompt": request.negative_prompt}
    for option, value in given.items():
        if isinstance(value, tuple) and len(value) != experts:
            raise ConfigError(f"{option} is given {len(value)} times for {experts} experts: once, or once for each")
    for texts in request.prompts:
        if isinstance(texts, tuple) and len(texts) != experts:
            raise ConfigError(f"--expert-prompt is given {len(texts)} times for {experts} experts: once for each")


def _own_sizes(unet: Path, downscale: int) -> tuple[int, int]:
    """Edge of the pictures that a UNet was made for, and what edges are best multiples of; px."""
    config = read_unet_config(unet)
    return int(config["sample_size"]) * downscale, downscale * 2 ** (len(config["block_out_channels"]) - 1)


def _pictures(count: int) -> str:
    return f"{count} picture{'' if count == 1 else 's'}"


def _say_cost(count: int, took_s: float, device: torch.device) -> None:
    """Time and memory of the whole command."""
    if device.type == "cuda":
        memory = f"{size_text(torch.cuda.max_memory_allocated(device))} of {device}'s memory"
    else:
        import resource

        unit = 1 if sys.platform == "darwin" else 1024
        memory = f"{size_text(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)} of memory"
    say(f"{_pictures(count)} in {duration_text(took_s)}, loading and all; at most {memory}")
