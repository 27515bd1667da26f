"""A file of SDXL's original layout taken apart: its tensors under the names that diffusers and transformers give them.

    read_lazily(file) -> read_parts -> {unet, vae, text_encoder, text_encoder_2: settings and tensors}

The way back of original_layout.py, by the same tables.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from shared.errors import DataError
from shared.original_layout import (
    BIG_G,
    BIG_G_OUTSIDE,
    UNET_PREFIX,
    VAE_PREFIX,
    original_name,
    unet_modules,
    vae_modules,
)
from shared.original_settings import clip_settings, unet_settings, vae_settings
from shared.tensor_file import LazyTensor, reshaped, rows_of, transposed

_CLIP_L_PREFIX = "conditioner.embedders.0.transformer."
_BIG_G_PREFIXES = ("conditioner.embedders.1.model.", "conditioner.embedders.0.model.")  # the second is the refiner's
_UNUSED = ("position_ids", "logit_scale", "attn_mask")  # what the libraries make anew or never read
MARKS = ("v_pred", "ztsnr")  # empty tensors by which ComfyUI knows the schedule
_EDM = ("edm_mean", "edm_vpred.sigma_max")
Tensors = Mapping[str, LazyTensor]


@dataclass(frozen=True)
class Part:
    """A component of a model: what its shapes say of its settings, and its tensors by the library's names."""

    settings: dict[str, Any]
    tensors: dict[str, LazyTensor]


def read_parts(tensors: Tensors) -> dict[str, Part]:
    """The parts that a file holds, by folder of a diffusers model; raises DataError where it holds no SDXL."""
    if any(name in tensors for name in _EDM):
        raise DataError("it is trained on EDM's schedule, which no expert here can share")
    big_g = next((prefix for prefix in _BIG_G_PREFIXES if f"{prefix}text_projection" in tensors), _BIG_G_PREFIXES[0])
    readers: dict[str, tuple[str, Callable[[Tensors], Part]]] = {
        "unet": (UNET_PREFIX, _unet),
        "vae": (VAE_PREFIX, _vae),
        "text_encoder": (_CLIP_L_PREFIX, _clip_l),
        "text_encoder_2": (big_g, _big_g),
    }
    parts = {}
    for part, (prefix, read) in readers.items():
        own = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        own = {name: tensor for name, tensor in own.items() if not name.endswith(_UNUSED)}
        if own:
            parts[part] = _read(part, read, own)
    if "unet" not in parts:
        raise DataError(f"no tensor of it is called {UNET_PREFIX}...: it holds no UNet in SDXL's original layout")
    return parts


def foreign_names(tensors: Tensors) -> list[str]:
    """Names of tensors that are no part of SDXL: averages, losses, another program's marks."""
    known = (UNET_PREFIX, VAE_PREFIX, _CLIP_L_PREFIX, *_BIG_G_PREFIXES)
    return [name for name in tensors if name not in MARKS and not name.startswith(known)]


def _read(part: str, read: Callable[[Tensors], Part], own: Tensors) -> Part:
    try:
        return read(own)
    except (KeyError, IndexError, TypeError, ValueError, StopIteration) as error:
        raise DataError(f"its {part} is not SDXL's: {type(error).__name__} {error}") from None


def _unet(own: Tensors) -> Part:
    settings = unet_settings(_shapes(own))
    if (settings["in_channels"], settings["out_channels"]) != (4, 4):
        channels = f"{settings['in_channels']} channels and gives {settings['out_channels']}"
        raise DataError(f"its UNet takes {channels}, SDXL's takes and gives 4: it is for something else than drawing")
    back = _back(unet_modules(settings))
    return Part(settings, {_named(name, back): tensor for name, tensor in own.items()})


def _vae(own: Tensors) -> Part:
    settings = vae_settings(_shapes(own))
    back = _back(vae_modules(settings))
    tensors = {_named(name, back): tensor for name, tensor in own.items()}
    return Part(settings, {name: _linear(name, tensor) for name, tensor in tensors.items()})


def _clip_l(own: Tensors) -> Part:
    tensors = {name: tensor for name, tensor in own.items() if name.startswith("text_model.")}
    return Part(clip_settings(_shapes(tensors)), tensors)


def _big_g(own: Tensors) -> Part:
    text = {name: tensor for name, tensor in own.items() if not name.startswith("visual.")}
    tensors = dict(_from_open_clip(text))
    if "text_projection.weight" not in tensors:
        raise DataError("its second text encoder has no text_projection: not SDXL's")
    return Part(clip_settings(_shapes(tensors)), tensors)


def _from_open_clip(own: Tensors) -> Iterator[tuple[str, LazyTensor]]:
    """OpenCLIP's text tower as transformers names it: q, k and v apart, the projection turned."""
    outside = _back(BIG_G_OUTSIDE)
    inside = _back(BIG_G)
    for name, tensor in own.items():
        if name == "text_projection":
            yield "text_projection.weight", transposed(tensor)
        elif name in outside:
            yield f"text_model.{outside[name]}", tensor
        else:
            layer, _, rest = name.removeprefix("transformer.resblocks.").partition(".")
            place = f"text_model.encoder.layers.{int(layer)}"
            if rest.startswith("attn.in_proj_"):
                rows = tensor.shape[0] // 3
                for index, which in enumerate("qkv"):
                    third = rows_of(tensor, index * rows, (index + 1) * rows)
                    yield f"{place}.self_attn.{which}_proj.{rest.removeprefix('attn.in_proj_')}", third
            else:
                yield f"{place}.{_named(rest, inside)}", tensor


def _linear(name: str, tensor: LazyTensor) -> LazyTensor:
    """A VAE's attention is made of matrices now, of 1 x 1 convolutions there."""
    is_convolution = ".attentions." in name and len(tensor.shape) == 4
    return reshaped(tensor, *tensor.shape[:2]) if is_convolution else tensor


def _back(modules: Mapping[str, str]) -> dict[str, str]:
    """Original module paths to the library's; of several names for one, the first, which is today's."""
    return {there: own for own, there in reversed([*modules.items()])}


def _named(name: str, back: Mapping[str, str]) -> str:
    try:
        return original_name(name, back)
    except DataError:
        raise DataError(f"{name} is no tensor of SDXL's") from None


def _shapes(tensors: Tensors) -> dict[str, tuple[int, ...]]:
    return {name: tensor.shape for name, tensor in tensors.items()}
