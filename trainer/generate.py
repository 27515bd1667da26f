"""Experts on disk to pictures on disk: check that they belong together, encode the prompts, draw, decode, save."""

import functools
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from shared.atomic import write_atomically
from shared.command import one_line
from shared.conditioning import MicroConditioning, PromptEmbeds
from shared.contract import ExpertFacts, PairContract, check_pair
from shared.device import choose_device
from shared.errors import ConfigError, ContractError
from shared.progress import progress, say
from shared.prompts import read_prompts_file
from shared.text_encoders import TextEncoders, TextFacts, read_text_facts
from shared.vae import Vae, VaeFacts, choose_encode_dtype, read_vae_facts
from trainer.checkpoint import Checkpoint, open_expert
from trainer.drawn import find_bases, load_experts
from trainer.ensemble import DrawSettings, ExpertEnsemble, Prompt
from trainer.schedulers import make_scheduler, scheduler_warnings
from trainer.unet import read_unet_config


@dataclass(frozen=True)
class GenerateRequest:
    """What a `generate-images` command asks for."""

    experts: Sequence[Path]
    model: Path
    prompts: Sequence[str]
    out: Path
    settings: DrawSettings = field(default_factory=DrawSettings)
    negative_prompt: str | None = None
    seed: int = 0
    count: int = 1
    height: int | None = None
    width: int | None = None
    device: str = "auto"
    base: Path | None = None  # what adapters stand on, if it is not the model's UNet


def generate(request: GenerateRequest) -> Iterator[Path]:
    """Draw `count` pictures of each prompt into `out`; yields each path once it is there.

    Raises ContractError where the experts do not belong together or to the model, CheckpointError where one is damaged.
    """
    checkpoints = [open_expert(path) for path in request.experts]
    vae_facts, text_facts = read_vae_facts(request.model), read_text_facts(request.model)
    contract = _check_together(checkpoints, request.model, vae_facts, text_facts)
    make_scheduler(request.settings.scheduler, contract)  # refused before anything large is loaded
    for line in scheduler_warnings(request.settings.scheduler, contract):
        say(line)
    device = choose_device(request.device)
    folders = find_bases(checkpoints, request.model, request.base)
    embeds = _encode(checkpoints, request, device)
    ensemble = ExpertEnsemble(load_experts(checkpoints, folders, text_facts.widths[1], device), contract)
    vae = Vae(request.model, device, choose_encode_dtype("auto", vae_facts, device.type))
    factor = vae_facts.downscale
    hw = _size(request, int(read_unet_config(folders[0])["sample_size"]) * factor, factor)
    size = MicroConditioning(hw, (0, 0), hw)
    shape = (1, vae_facts.latent_channels, hw[0] // factor, hw[1] // factor)
    request.out.mkdir(parents=True, exist_ok=True)
    with progress("pictures", len(request.prompts) * request.count, "images") as advance:
        for index, prompt in enumerate(request.prompts):
            for seed in range(request.seed, request.seed + request.count):
                generator = torch.Generator().manual_seed(seed)
                noise = torch.randn(shape, generator=generator).to(device)
                with torch.inference_mode():
                    latents = ensemble.draw(embeds[index], [size], request.settings, noise, [generator])
                facts: dict[str, Any] = asdict(request.settings) | {"experts": _names(checkpoints)}
                facts |= {"prompt": prompt, "negative_prompt": request.negative_prompt, "seed": seed}
                path = request.out / f"{index:03d}-seed-{seed}.png"
                _save(path, vae.decode(latents)[0], facts)
                advance(1)
                yield path


def read_prompts(given: Sequence[str], path: Path | None) -> list[str]:
    """Prompts that were given, then those of a text file, one a line, empty lines left out.

    Raises ConfigError where that makes none or the file cannot be read, DataError where it is not text.
    """
    prompts = [*given, *(read_prompts_file(path) if path is not None else [])]
    if not prompts:
        raise ConfigError("nothing to draw: give --prompt TEXT or --prompts FILE with a prompt on each line")
    return prompts


def _check_together(checkpoints: Sequence[Checkpoint], model: Path, vae: VaeFacts, text: TextFacts) -> PairContract:
    cards = [checkpoint.card for checkpoint in checkpoints]
    contract = cards[0].contract
    if len(cards) > 1:
        check_pair(cards)
    elif len(cards[0].facts.timesteps) < contract.num_timesteps:
        facts = cards[0].facts
        say(f"one expert alone: {facts.name} draws timesteps {facts.timesteps} and leaves the others out")
    if vae.digest != contract.vae_digest:
        raise ContractError(f"the VAE of {model} is not the one that the experts' latents come from")
    for card in cards:
        for part, digest in card.contract.text_digests.items():
            if text.digests[part] != digest:
                raise ContractError(f"the {part} of {model} is not the one that {card.facts.name} was trained with")
    return contract


def _encode(checkpoints: Sequence[Checkpoint], request: GenerateRequest, device: torch.device) -> list[list[Prompt]]:
    """For each prompt its embeds for each expert; the text encoders are gone when this returns."""
    encoders = TextEncoders(request.model, device)

    @functools.cache
    def encode(text: str, chunks: int) -> PromptEmbeds:
        encoders.chunks = chunks
        if encoders.count(text).truncated:
            say(f"cut short to {chunks} x 75 tokens: {one_line(text)}")
        return encoders.encode([text])

    def against(own: ExpertFacts) -> PromptEmbeds:
        if request.negative_prompt is not None:
            return encode(request.negative_prompt, own.text_chunks)
        empty = encode("", own.text_chunks)
        if own.null_prompt == "encoded":
            return empty
        return PromptEmbeds(torch.zeros_like(empty.prompt_embeds), torch.zeros_like(empty.pooled_prompt_embeds))

    facts = [checkpoint.card.facts for checkpoint in checkpoints]
    return [[Prompt(encode(prompt, own.text_chunks), against(own)) for own in facts] for prompt in request.prompts]


def _size(request: GenerateRequest, own_px: int, factor: int) -> tuple[int, int]:
    height, width = request.height or own_px, request.width or own_px
    for name, value in (("--height", height), ("--width", width)):
        if value % factor:
            raise ConfigError(f"{name} {value}: sizes are multiples of {factor} pixels")
    return height, width


def _names(checkpoints: Sequence[Checkpoint]) -> list[dict[str, Any]]:
    return [
        {"name": c.card.facts.name, "timesteps": [c.card.facts.low, c.card.facts.high], "step": c.state.step}
        for c in checkpoints
    ]


def _save(path: Path, pixels: torch.Tensor, facts: dict[str, Any]) -> None:
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_itxt("sdxl-experts", json.dumps(facts, ensure_ascii=False))
    data = io.BytesIO()
    Image.fromarray(pixels.numpy()).save(data, "PNG", pnginfo=info)
    write_atomically(path, data.getvalue())
