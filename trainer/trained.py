"""What of a UNet an expert trains, and how it lies on disk: all of it, named parameters, or an adapter on a frozen one.

    start, checkpoint -> load_trained -> UNet whose trained weights require gradients -> kept_weights -> unet/, ema/

What is frozen has no gradient, no optimizer state and no average; the folders hold a whole UNet all the same, or the
adapter alone.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from shared.contract import ExpertFacts
from shared.seeding import derive_seed
from shared.weights import weight_shapes
from trainer.adapter import (
    ADAPTER_FILE,
    adapter_metadata,
    adapter_weights,
    add_adapter,
    draw_adapter,
    file_name,
    load_adapter,
    merge_adapter,
    set_adapter,
)
from trainer.checkpoint import UNET_FILE, Checkpoint, Export, read_tensors
from trainer.config import ExpertConfig
from trainer.ema import Ema
from trainer.start import Start, goes_on
from trainer.unet import load_unet, read_unet_config
from trainer.weight_names import adapted_layers, trained_names

ADAPTER = "expert"  # name of the adapter that is trained, in its UNet


def check_names(config: ExpertConfig, start: Start) -> None:
    """Require that every pattern of `trainable` and `adapter.targets` names something; raises ConfigError."""
    shapes = weight_shapes(start.unet)
    trained_names(config.trainable, shapes)
    if config.adapter is not None:
        adapted_layers(config.adapter.targets, shapes)


def load_trained(config: ExpertConfig, start: Start, checkpoint: Checkpoint | None, device: torch.device) -> Any:
    """The UNet as training begins or goes on with it, in training mode; what is trained requires gradients."""
    if config.adapter is not None:
        unet = _load_adapted(config, start, checkpoint, device)
    else:
        unet = _load_whole(config, start, checkpoint, device)
        chosen = set(trained_names(config.trainable, {name: tuple(w.shape) for name, w in unet.named_parameters()}))
        for name, weight in unet.named_parameters():
            weight.requires_grad_(name in chosen)
    if config.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    return unet.train()


def frozen_dtype(config: ExpertConfig) -> torch.dtype:
    """In what the UNet under an adapter stands: it is never written back, so what computes in bf16 may stand in it."""
    return torch.float32 if config.precision == "fp32" else torch.bfloat16


def seed_layers(seed: int, place: tuple[int, int], device: torch.device) -> None:
    """Make what layers draw themselves (dropout) a function of the micro-batch, told by its first sample's place.

    torch's own generators are seeded, for dropout takes no other and gradient checkpointing replays these. Those of
    devices that nothing runs on are left alone: torch would note down from where it was asked, each time.
    """
    number = derive_seed(seed, "layers", *place)
    if device.type == "cpu":
        torch.default_generator.manual_seed(number)
    else:
        torch.manual_seed(number)


def kept_weights(unet: Any, facts: ExpertFacts, ema: Ema | None) -> dict[str, dict[str, Tensor]]:
    """Tensors of a checkpoint by folder and by the names of its files."""
    if facts.adapter is not None:
        raw: dict[str, Tensor] = {name: weight.detach() for name, weight in adapter_weights(unet, ADAPTER).items()}
    else:
        raw = unet.state_dict()
    return {"unet": raw} | ({"ema": raw | _on_disk(ema.state_dict(), facts)} if ema else {})


def restore_average(ema: Ema, checkpoint: Checkpoint) -> None:
    """Take over the average of a checkpoint."""
    ema.load(_as_named(checkpoint.weights("ema"), ema, checkpoint.card.facts))
    ema.updates = checkpoint.state.ema_updates


def export_of(unet: Any, start: Start, facts: ExpertFacts) -> Export:
    """How the weights are written."""
    if facts.adapter is not None:
        return Export(ADAPTER_FILE, adapter_metadata(unet, ADAPTER), None)
    return Export(UNET_FILE, {}, read_unet_config(start.unet))


def _load_whole(config: ExpertConfig, start: Start, checkpoint: Checkpoint | None, device: torch.device) -> Any:
    dtype = torch.bfloat16 if config.precision == "bf16-lean" else torch.float32
    if checkpoint is not None:
        return load_unet(checkpoint.path / "unet", device, dtype)
    unet = load_unet(start.unet, device, dtype)
    if start.adapter is not None:
        assert start.facts is not None
        assert start.facts.adapter is not None
        load_adapter(unet, start.facts.adapter, ADAPTER, read_tensors(start.adapter / ADAPTER_FILE))
        merge_adapter(unet)
    return unet


def _load_adapted(config: ExpertConfig, start: Start, checkpoint: Checkpoint | None, device: torch.device) -> Any:
    assert config.adapter is not None
    facts = config.adapter.facts()
    unet = load_unet(start.unet, device, frozen_dtype(config))
    layers = adapted_layers(facts.targets, weight_shapes(start.unet))
    add_adapter(unet, facts, layers, ADAPTER, config.adapter.dropout)
    if checkpoint is not None:
        set_adapter(unet, ADAPTER, checkpoint.weights("unet"))
    elif goes_on(facts, start) and start.adapter is not None:
        set_adapter(unet, ADAPTER, read_tensors(start.adapter / ADAPTER_FILE))
    else:
        draw_adapter(unet, ADAPTER, config.seed)
    return unet


def _on_disk(named: Mapping[str, Tensor], facts: ExpertFacts) -> dict[str, Tensor]:
    return {file_name(name, ADAPTER) if facts.adapter else name: tensor for name, tensor in named.items()}


def _as_named(tensors: Mapping[str, Tensor], ema: Ema, facts: ExpertFacts) -> dict[str, Tensor]:
    if facts.adapter is None:
        return dict(tensors)
    return {name: tensors[file] for name in ema.state_dict() if (file := file_name(name, ADAPTER)) in tensors}
