"""LoRA on SSD-1B's own architecture, counted tensor by tensor on the meta device: nothing is allocated."""

from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.full_size import BASE, REFINER, SSD_1B
from shared.config import load_config
from trainer.adapter import adapter_weights, add_adapter, shapes_of
from trainer.config import ExpertConfig
from trainer.ema import Ema
from trainer.memory import count_memory, pass_on_meta
from trainer.trained import frozen_dtype
from trainer.unet import unet_on_meta
from trainer.weight_names import adapted_layers, trained_names

CONFIGS = Path(__file__).parents[2] / "configs" / "ssd-1b"
SETS = ("precision=bf16-mixed", "adapter.rank=16", "batch=1")


def adapted(settings: dict[str, Any]) -> tuple[Any, ExpertConfig]:
    config = load_config(ExpertConfig, [CONFIGS / "expert.toml", CONFIGS / "base.toml"], SETS)
    assert config.adapter is not None
    unet = unet_on_meta(settings, frozen_dtype(config)).train()
    facts = config.adapter.facts()
    add_adapter(unet, facts, adapted_layers(facts.targets, shapes_of(unet)), "expert")
    return unet, config


@pytest.mark.parametrize("settings", [SSD_1B, BASE, REFINER], ids=["ssd-1b", "sdxl-base", "sdxl-refiner"])
def test_the_adapter_alone_costs_state(settings: dict[str, Any]) -> None:
    unet, _ = adapted(settings)
    own = adapter_weights(unet, "expert")
    assert {weight.dtype for weight in own.values()} == {torch.float32}
    frozen = [weight for weight in unet.parameters() if not weight.requires_grad]
    assert {weight.dtype for weight in frozen} == {torch.bfloat16}
    elements = sum(weight.numel() for weight in own.values())
    assert elements == sum(weight.numel() for weight in unet.parameters() if weight.requires_grad)
    assert elements < 0.02 * sum(weight.numel() for weight in frozen)
    assert len(Ema(unet, 0.9).state_dict()) == len(own)
    attention = trained_names(["attention"], shapes_of(unet))
    assert len(own) == 2 * sum(name.endswith(".weight") for name in attention)


@pytest.mark.slow
def test_lora_on_ssd_1b_takes_12_gb_at_most() -> None:
    """1024 px, batch 1, activations checkpointed: frozen weights in bf16; adapter, AdamW and average in fp32."""
    from tests.trainer.test_memory import SETTINGS

    unet, config = adapted(SSD_1B)
    known = SETTINGS.model_copy(update={"text_widths": (768, 1280), "pooled_width": 1280})
    memory = count_memory(unet, config, pass_on_meta(unet, config, known, (1024, 1024)))
    assert memory.weights < 2.8e9
    assert memory.total <= 12e9, memory
