"""The only door to peft: a low-rank adapter on a UNet, its weights by the names that diffusers reads, and the switch.

    W x + alpha / rank B A x        LoRA (Hu et al. 2021), A drawn, B zero: the first step begins where the UNet stood

On disk an adapter is what diffusers' `load_lora_weights` takes: one safetensors file, with peft's settings, alpha
among them, as its metadata.
"""

import json
import math
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from shared.contract import AdapterFacts
from shared.errors import CheckpointError
from shared.seeding import make_generator
from trainer.weight_names import adapted_layers

ADAPTER_FILE = "pytorch_lora_weights.safetensors"
PREFIX = "unet."  # in the file: whose layers these are, for a file may hold those of text encoders too


def add_adapter(unet: Any, facts: AdapterFacts, layers: Iterable[str], name: str, dropout: float = 0.0) -> None:
    """Put an adapter of that name on `layers` of `unet`, in fp32, and make it the one that is used and trained.

    Everything else is frozen. Its first weights are peft's own; see `draw_adapter`.
    """
    from peft import LoraConfig

    config = LoraConfig(
        r=facts.rank,
        lora_alpha=facts.alpha,
        lora_dropout=dropout,
        target_modules=list(layers),
        use_dora=facts.kind == "dora",
    )
    unet.requires_grad_(False)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Already found a `peft_config`")  # a second adapter is what is wanted
        unet.add_adapter(config, name)
    for weight in adapter_weights(unet, name).values():
        weight.data = weight.data.float()  # peft takes the dtype of the layer


@torch.no_grad()
def draw_adapter(unet: Any, name: str, seed: int) -> None:
    """First weights as a function of (seed, layer), on any device the same: A uniform in 1 / sqrt(inputs), B zero."""
    for key, weight in adapter_weights(unet, name).items():
        if ".lora_A." in key:
            bound = 1 / math.sqrt(weight[0].numel())
            drawn = torch.rand(weight.shape, generator=make_generator(seed, "adapter", key))
            weight.copy_((2 * drawn - 1) * bound)


def adapter_weights(unet: nn.Module, name: str) -> dict[str, nn.Parameter]:
    """An adapter's parameters under the names that they have on disk."""
    named = unet.named_parameters()
    return {file_name(own, name): weight for own, weight in named if ".lora_" in own and f".{name}." in own}


def adapter_scales(unet: nn.Module, name: str) -> set[float]:
    """What an adapter's layers are scaled by: alpha / rank."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = (layer for layer in unet.modules() if isinstance(layer, BaseTunerLayer))
    return {layer.scaling[name] for layer in layers if name in layer.scaling}


def file_name(parameter: str, adapter: str) -> str:
    """What a parameter of an adapter is called on disk: without the adapter's name, its UNet's before it."""
    matrix, _, rest = parameter.partition(f".{adapter}.")
    return PREFIX + matrix + ("" if matrix.endswith("lora_magnitude_vector") else f".{rest}")


@torch.no_grad()
def set_adapter(unet: Any, name: str, tensors: Mapping[str, Tensor]) -> None:
    """Give an adapter the weights of a file; raises CheckpointError where they are not of its layers."""
    own = adapter_weights(unet, name)
    if own.keys() != tensors.keys():
        odd = sorted(own.keys() ^ tensors.keys())[0]
        raise CheckpointError(f"the adapter's weights are not those of this UNet: {odd} is in one of them alone")
    for key, weight in own.items():
        if weight.shape != tensors[key].shape:
            raise CheckpointError(f"{key} is {tuple(tensors[key].shape)}, the UNet's layer takes {tuple(weight.shape)}")
        weight.copy_(tensors[key])


def load_adapter(unet: Any, facts: AdapterFacts, name: str, tensors: Mapping[str, Tensor]) -> None:
    """Put a saved adapter on `unet`, beside those that are there."""
    add_adapter(unet, facts, adapted_layers(facts.targets, shapes_of(unet)), name)
    set_adapter(unet, name, tensors)


def shapes_of(unet: nn.Module) -> dict[str, tuple[int, ...]]:
    """Shapes of a UNet's own parameters by the names that they have without adapters."""
    own = ((name.replace(".base_layer.", "."), weight) for name, weight in unet.named_parameters())
    return {name: tuple(weight.shape) for name, weight in own if ".lora_" not in name}


def use_adapter(unet: Any, name: str) -> None:
    """Let `unet` compute with that adapter alone; nothing becomes trainable by it."""
    if unet.active_adapters() == [name]:
        return
    from peft.tuners.tuners_utils import BaseTunerLayer

    for layer in unet.modules():
        if isinstance(layer, BaseTunerLayer):
            layer.set_adapter([name], inference_mode=True)


def merge_adapter(unet: Any) -> None:
    """Add the adapter to the weights that it stands on, and take it away."""
    unet.fuse_lora()
    unet.unload_lora()


def adapter_metadata(unet: Any, name: str) -> dict[str, str]:
    """What diffusers wants to know of an adapter beside its weights: without it alpha would be lost."""
    settings: dict[str, Any] = unet.peft_config[name].to_dict()
    plain = {PREFIX + key: sorted(value) if isinstance(value, set) else value for key, value in settings.items()}
    return {"lora_adapter_metadata": json.dumps(plain, indent=2, sort_keys=True)}
