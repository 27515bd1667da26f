"""Memory of drawing with a pair, counted tensor by tensor on torch's meta device: ours, and two pipelines in a row.

Every stage is counted: what weights are on the device, and the most that one pass of it makes at a time. Attention
counts as the fused kernels do it. Two pipelines hold everything twice, from first to last.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from benchmarks.inference_world import INFERENCE_SHAPES, LORA, text_configs, vae_config
from benchmarks.train_world import DOWNSCALE
from trainer.adapter import adapter_weights, add_adapter, shapes_of
from trainer.memory import FusedAttention, LiveBytes
from trainer.unet import unet_on_meta
from trainer.weight_names import adapted_layers

VOCABULARY = {"vocab_size": 49408, "max_position_embeddings": 77}


@dataclass(frozen=True)
class Stages:
    """Bytes of weights, and of what a pass makes; passes with guidance, of one picture."""

    unet: int
    adapters: int  # both
    text: int  # both encoders
    vae: int
    text_pass: int
    unet_pass: int
    decode_pass: int


@functools.cache
def count_stages(name: str, dtype: torch.dtype, rest: torch.dtype) -> Stages:
    """UNet in `dtype`, VAE and text encoders in `rest`."""
    from diffusers import AutoencoderKL
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    shape, towers = INFERENCE_SHAPES[name]
    with torch.device("meta"):
        vae = AutoencoderKL(**vae_config(towers)).to(rest)
        configs = [CLIPTextConfig(**given) for given in text_configs(shape, towers, VOCABULARY)]
        text = [CLIPTextModel(configs[0]).to(rest), CLIPTextModelWithProjection(configs[1]).to(rest)]
    unet, edge = unet_on_meta(dict(shape.unet), dtype).eval(), shape.size_px // DOWNSCALE

    def zeros(*size: int, of: torch.dtype = dtype) -> torch.Tensor:
        return torch.zeros(size, dtype=of, device="meta")

    def predict() -> Any:
        added = {"text_embeds": zeros(2, shape.pooled_width), "time_ids": zeros(2, 6, of=torch.float32)}
        embeds = zeros(2, 77, sum(shape.text_widths))
        return unet(zeros(2, 4, edge, edge), zeros(2), embeds, added_cond_kwargs=added, return_dict=False)

    return Stages(
        unet=_bytes_of(unet),
        adapters=2 * _adapter_bytes(name, dtype),
        text=sum(_bytes_of(tower) for tower in text),
        vae=_bytes_of(vae),
        text_pass=max(_peak(lambda t=tower: t(zeros(1, 77, of=torch.int64))) for tower in text),  # type: ignore[misc]
        unet_pass=_peak(predict),
        decode_pass=_peak(lambda: vae.decode(zeros(1, 4, edge, edge, of=rest), return_dict=False)),
    )


def our_peaks(full: Stages) -> dict[str, dict[str, int]]:
    """Bytes on the device in each stage of ours: a whole pair, an adapter pair, a whole pair with --offload."""
    encode, decode = full.text + full.text_pass, full.vae + full.decode_pass
    unets = {"pair": 2 * full.unet, "adapters": full.unet + full.adapters, "offload": full.unet}
    return {kind: {"encode": encode, "draw": own + full.unet_pass, "decode": decode} for kind, own in unets.items()}


def script_peak(half: Stages, is_adapter: bool, decode_pass: int) -> int:
    """Bytes at the peak of two pipelines."""
    weights = 2 * (half.unet + half.text + half.vae) + (half.adapters if is_adapter else 0)
    return weights + max(half.text_pass, half.unet_pass, decode_pass)


def compare(name: str) -> dict[str, Any]:
    """Ours as it is on CUDA (UNets in bf16, the rest in fp32) against two pipelines all in bf16, and in fp16.

    In fp16 the pipeline brings SDXL's VAE to fp32 to decode.
    """
    ours = count_stages(name, torch.bfloat16, torch.float32)
    half = count_stages(name, torch.bfloat16, torch.bfloat16)
    peaks = our_peaks(ours)
    compared: dict[str, Any] = {}
    for kind, stages in peaks.items():
        bf16 = script_peak(half, kind == "adapters", half.decode_pass)
        fp16 = script_peak(half, kind == "adapters", ours.decode_pass + (ours.vae - half.vae))
        peak = max(stages.values())
        compared[kind] = {**stages, "peak": peak, "script_bf16": bf16, "script_fp16": fp16,
                          "ratio_bf16": peak / bf16, "ratio_fp16": peak / fp16}  # fmt: skip
    return compared


def _adapter_bytes(name: str, dtype: torch.dtype) -> int:
    unet = unet_on_meta(dict(INFERENCE_SHAPES[name][0].unet), dtype)
    add_adapter(unet, LORA, adapted_layers(LORA.targets, shapes_of(unet)), "expert")
    return sum(weight.numel() for weight in adapter_weights(unet, "expert").values()) * dtype.itemsize


def _bytes_of(module: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))


def _peak(work: Callable[[], Any]) -> int:
    live = LiveBytes()
    with torch.no_grad(), FusedAttention(), live:
        work()
    return live.peak
