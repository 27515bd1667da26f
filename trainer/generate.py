"""Experts on disk to pictures on disk: check that they belong together, encode the prompts, draw, decode, save."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from shared.atomic import write_atomically
from shared.command import one_line
from shared.conditioning import PromptEmbeds
from shared.contract import ExpertFacts, PairContract, check_pair
from shared.device import choose_device
from shared.errors import CheckpointError, ConfigError, ContractError
from shared.progress import progress, say
from shared.text_encoders import TextEncoders, read_text_facts
from shared.vae import Vae, choose_encode_dtype, read_vae_facts
from trainer.checkpoint import Checkpoint, newest_checkpoint, open_checkpoint
from trainer.ensemble import DrawSettings, Expert, ExpertEnsemble, Prompt, make_scheduler
from trainer.unet import ConditionedUnet, load_unet


def generate(
    experts: Sequence[Path],
    model: Path,
    prompts: Sequence[str],
    negative_prompt: str | None,
    out: Path,
    settings: DrawSettings,
    seed: int,
    count: int,
    size_hw: tuple[int | None, int | None],
    device_setting: str,
) -> Iterator[Path]:
    """Draw `count` pictures of each prompt into `out`; yields each path once it is there.

    Raises ContractError where the experts do not belong together or to MODEL, CheckpointError where one is damaged.
    """
    checkpoints = [open_expert(path) for path in experts]
    contract = _check_together(checkpoints, model)
    make_scheduler(settings.scheduler, contract)  # refused before anything large is loaded
    device = choose_device(device_setting)
    out.mkdir(parents=True, exist_ok=True)
    embeds = _encode(checkpoints, model, prompts, negative_prompt, device)
    ensemble = ExpertEnsemble([_load(checkpoint, model, device) for checkpoint in checkpoints], contract)
    vae_facts = read_vae_facts(model)
    vae = Vae(model, device, choose_encode_dtype("auto", vae_facts, device.type))
    factor = vae_facts.downscale
    hw = _size(size_hw, ensemble.experts[0].model.unet.config.sample_size * factor, factor)
    with progress("pictures", len(prompts) * count, "images") as advance:
        for index, prompt in enumerate(prompts):
            for offset in range(count):
                generator = torch.Generator().manual_seed(seed + offset)
                shape = (1, vae_facts.latent_channels, hw[0] // factor, hw[1] // factor)
                noise = torch.randn(shape, generator=generator).to(device)
                with torch.inference_mode():
                    latents = ensemble.draw(embeds[index], hw, settings, noise, generator)
                path = out / f"{index:03d}-seed-{seed + offset}.png"
                facts = {"prompt": prompt, "negative_prompt": negative_prompt, "seed": seed + offset}
                _save(path, vae.decode(latents)[0], {**facts, **asdict(settings), "experts": _names(checkpoints)})
                advance(1)
                yield path


def open_expert(path: Path) -> Checkpoint:
    """The newest checkpoint of a run folder, or the checkpoint at `path` itself, verified."""
    if (path / "checksums.json").exists():
        return open_checkpoint(path)
    if not path.is_dir():
        raise CheckpointError(f"no run folder {path}")
    checkpoint = newest_checkpoint(path, lambda why: say(f"passed over: {why}"))
    if checkpoint is None:
        raise CheckpointError(f"{path} holds no checkpoint yet: train it first (train-expert --output {path})")
    return checkpoint


def _check_together(checkpoints: Sequence[Checkpoint], model: Path) -> PairContract:
    cards = [checkpoint.card for checkpoint in checkpoints]
    contract = cards[0].contract
    if len(cards) > 1:
        check_pair(cards)
    else:
        facts = cards[0].facts
        if len(facts.timesteps) < contract.num_timesteps:
            say(
                f"one expert alone: {facts.name} draws timesteps {facts.timesteps} of {contract.num_timesteps}, no other"
            )
    if read_vae_facts(model).digest != contract.vae_digest:
        raise ContractError(f"the VAE of {model} is not the one that the experts' latents come from")
    digests = read_text_facts(model).digests
    for part, digest in {part: d for card in cards for part, d in card.contract.text_digests.items()}.items():
        if digests[part] != digest:
            raise ContractError(f"the {part} of {model} is not the one that the experts were trained with")
    return contract


def _encode(
    checkpoints: Sequence[Checkpoint], model: Path, prompts: Sequence[str], negative: str | None, device: torch.device
) -> list[list[Prompt]]:
    """For each prompt its embeds for each expert; the text encoders are gone when this returns."""
    facts = [checkpoint.card.facts for checkpoint in checkpoints]
    encoders = TextEncoders(model, device)
    encoded: dict[tuple[str, int], PromptEmbeds] = {}

    def encode(text: str, chunks: int) -> PromptEmbeds:
        if (text, chunks) not in encoded:
            encoders.chunks = chunks
            if encoders.count(text).truncated:
                say(f"cut short to {chunks} x 75 tokens: {one_line(text)}")
            encoded[text, chunks] = encoders.encode([text])
        return encoded[text, chunks]

    def null(own: ExpertFacts) -> PromptEmbeds:
        empty = encode("", own.text_chunks)
        if own.null_prompt == "encoded":
            return empty
        return PromptEmbeds(torch.zeros_like(empty.prompt_embeds), torch.zeros_like(empty.pooled_prompt_embeds))

    return [
        [
            Prompt(
                encode(prompt, own.text_chunks),
                null(own) if negative is None else encode(negative, own.text_chunks),
            )
            for own in facts
        ]
        for prompt in prompts
    ]


def _load(checkpoint: Checkpoint, model: Path, device: torch.device) -> Expert:
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    unet = load_unet(checkpoint.weights_folder(), device, dtype)
    widths = read_text_facts(model).widths
    return Expert(checkpoint.card.facts, ConditionedUnet(unet, checkpoint.card.facts.layout, widths[1]), dtype)


def _size(asked_hw: tuple[int | None, int | None], own_px: int, factor: int) -> tuple[int, int]:
    height, width = asked_hw[0] or own_px, asked_hw[1] or own_px
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
    import io

    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_itxt("sdxl-experts", json.dumps(facts, ensure_ascii=False))
    data = io.BytesIO()
    Image.fromarray(pixels.numpy()).save(data, "PNG", pnginfo=info)
    write_atomically(path, data.getvalue())
