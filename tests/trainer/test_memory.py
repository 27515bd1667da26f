"""Memory that is counted without a GPU: by hand, against what optimizers really keep, and the recipes' figures."""

from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import nn

from benchmarks.full_size import SSD_1B
from shared.config import load_config
from tests.shared.test_manifest import SETTINGS
from tests.test_configs import CONFIGS
from trainer.config import ExpertConfig
from trainer.memory import (
    FusedAttention,
    LiveBytes,
    Memory,
    count_memory,
    pass_on_meta,
    state_bytes,
    training_memory,
)
from trainer.optim import Optimizer
from trainer.optimizer_config import OptimizerConfig
from trainer.unet import unet_on_meta


@pytest.mark.parametrize("name", ["adamw", "muon", "adamw-8bit", "adafactor", "schedule-free", "bf16-lean"])
def test_state_bytes_are_what_is_kept(name: str) -> None:
    model: nn.Module = nn.Sequential(nn.Conv2d(16, 24, 3), nn.Linear(24, 640), nn.Linear(640, 4))
    is_lean = name == "bf16-lean"
    model = model.bfloat16() if is_lean else model
    config = OptimizerConfig() if is_lean else OptimizerConfig(name=name)  # type: ignore[arg-type]
    optimizer = Optimizer(model.parameters(), config, is_lean=is_lean)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step_unless_bad(torch.tensor(0.0))
    kept = {key: t for key, t in optimizer.tensors().items() if t.ndim and not key.endswith(".trained")}
    counted = sum(state_bytes(parameter, config, is_lean) for parameter in model.parameters())
    assert counted == sum(tensor.nbytes for tensor in kept.values())


def test_storages_are_counted_while_they_live() -> None:
    with LiveBytes() as live:
        a = torch.zeros(1000, device="meta")
        b = a + 1
        assert live.now == 8000
        view = b[:10]
        del b
        assert live.now == 8000
        del view
        assert live.now == 4000
        a.add_(1)
        assert live.now == 4000
    assert live.peak == 8000


def test_attention_counts_without_scores() -> None:
    q, k, v = (torch.zeros(1, 2, 512, 8, device="meta", requires_grad=True) for _ in range(3))
    with FusedAttention(), LiveBytes() as live:
        output = torch.nn.functional.scaled_dot_product_attention(q, k, v)
        assert live.peak == q.nbytes + 2 * 512 * 4
        torch.autograd.backward(output.sum())
    assert k.grad is not None
    assert live.peak < 2 * 512 * 512 * 4  # a head's scores


def count(settings: dict[str, Any], *sets: str, hw: int = 128, rank: int | None = None) -> Memory:
    """Of pictures of 8 hw px."""
    files = [CONFIGS / "ssd-1b" / "expert.toml", CONFIGS / "ssd-1b" / "base.toml"]
    config = load_config(ExpertConfig, files, ["batch=1", "accumulation=8", *sets])
    pooled = settings["projection_class_embeddings_input_dim"] - 6 * settings["addition_time_embed_dim"]
    widths = (settings["cross_attention_dim"] - pooled, pooled)
    known = SETTINGS.model_copy(update={"text_widths": widths, "pooled_width": pooled})
    if rank is None:
        return training_memory(settings, config, known, (8 * hw, 8 * hw))
    unet = unet_on_meta(settings, torch.bfloat16).train()
    unet.requires_grad_(False)
    unet.add_adapter(LoraConfig(r=rank, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    return count_memory(unet, config, pass_on_meta(unet, config, known, (8 * hw, 8 * hw)))


TINY = {
    "sample_size": 16,
    "norm_num_groups": 8,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (16, 32),
    "attention_head_dim": (1, 2),
    "cross_attention_dim": 32,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 16 + 48,
}


def test_settings_that_save_memory_do() -> None:
    plain = ("precision=fp32", "gradient_checkpointing=false")
    fp32, saved = count(TINY, *plain, hw=64), count(TINY, plain[0], "gradient_checkpointing=true", hw=64)
    lean = count(TINY, "precision=bf16-lean", "gradient_checkpointing=false", "ema.device=cpu", hw=64)
    small = count(TINY, *plain, "optimizer.name=adamw-8bit", hw=64)
    assert saved.passes < 0.8 * fp32.passes
    assert saved.weights == fp32.weights
    assert fp32.state == 2 * fp32.weights
    assert (lean.weights, lean.state, lean.average) == (fp32.weights // 2, 2 * fp32.weights, 0)
    assert lean.passes == pytest.approx(fp32.passes / 2, rel=0.1)
    assert small.state < 0.5 * fp32.state
    fused = ("optimizer.fused_backward=true", "optimizer.clip_norm=0", "accumulation=1")
    assert (
        count(TINY, "precision=bf16-lean", *fused, hw=16).passes
        < 0.7 * count(TINY, fused[2], "precision=bf16-lean", hw=16).passes
    )


def test_without_checkpointing_activations_grow_with_the_picture() -> None:
    small, large = (count(TINY, "precision=fp32", "gradient_checkpointing=false", hw=hw).passes for hw in (32, 64))
    gradients = count(TINY, "precision=fp32", hw=32).weights
    assert (large - gradients) / (small - gradients) == pytest.approx(4, rel=0.15)


@pytest.mark.slow
def test_the_recipes_fit_their_cards() -> None:
    """SSD-1B at 1024 px, batch 1 accumulated to 8, checkpointing, bf16-lean, the average on the CPU; and LoRA."""
    recipe = count(SSD_1B, "precision=bf16-lean", "ema.device=cpu")
    assert recipe.total <= 22e9
    assert count(SSD_1B, "precision=bf16-lean", rank=16).total <= 12e9
