"""Text embeds that attention can be asked of, and heads that look from where a shape stands at the word for it."""

from pathlib import Path

import pytest
import torch

from demo.attention_fit import TIMESTEPS, fit_heads
from demo.captions import describe
from demo.model_files import BETAS
from demo.prompts import make_prompts
from demo.scene import make_scene
from demo.train_clip import WIDTHS, TwoTexts, bring_near_one, tokenize
from shared.schedule import NoiseSchedule, scaled_linear_betas
from shared.text_encoders import TextEncoders
from trainer.unet import load_unet

MODEL = Path(__file__).parents[2] / "demo" / "model"
LAST = "up_blocks.1.attentions.1.transformer_blocks.0.attn2"
HEAD = 64  # the width of one
CAPTIONS = [describe(make_scene(5, i))[0] for i in range(32)]


@pytest.fixture(scope="module")
def schedule() -> NoiseSchedule:
    return NoiseSchedule(scaled_linear_betas(1000, *BETAS), zero_terminal_snr=True)


@pytest.mark.parametrize("size", [1.0, 16.0, 1000.0])
def test_embeds_are_brought_near_one_and_the_contrast_does_not_notice(size: float) -> None:
    torch.manual_seed(0)
    tower, ids = TwoTexts().first, tokenize(CAPTIONS)
    with torch.no_grad():
        for name, parameter in tower.text_model.named_parameters():
            if any(part in name for part in ("embeddings.", ".out_proj.", ".fc2.")):
                parameter *= 50 * size  # first weights of the library are far below one
        before = tower(ids).text_embeds
        bring_near_one(tower.text_model, ids)
        embeds = tower(ids, output_hidden_states=True).hidden_states[-2]
        after = tower(ids).text_embeds
    assert 0.7 <= embeds.square().mean().sqrt() <= 1.42
    assert torch.allclose(after, before, atol=1e-2 * float(before.abs().max()))  # a LayerNorm has an eps


def test_the_start_models_embeds_are_near_one() -> None:
    """At sixteen, as they once were, they saturated the UNet's cross-attention."""
    embeds = TextEncoders(MODEL, "cpu").encode(make_prompts(8)).prompt_embeds
    for tower in torch.split(embeds, list(WIDTHS), dim=-1):
        assert 0.5 <= tower.square().mean().sqrt() <= 2


def test_a_head_of_the_start_model_looks_at_the_right_word(schedule: NoiseSchedule) -> None:
    """Where attention is saturated it looks at one token from everywhere, and shapes have each other's kinds."""
    unet = load_unet(MODEL / "unet", torch.device("cpu"))
    right = fit_heads(MODEL, unet, schedule, count=256, steps=0)
    assert len(right) == 7
    assert max(right.values()) >= 0.9, right


def test_a_head_learns_to_look_at_the_right_word(schedule: NoiseSchedule) -> None:
    """Only queries and keys of that head are fitted."""
    unet = load_unet(MODEL / "unet", torch.device("cpu"))
    attention = unet.get_submodule(LAST)
    with torch.no_grad():
        for layer in (attention.to_q, attention.to_k):
            layer.weight.copy_(0.02 * torch.randn(layer.weight.shape, generator=torch.Generator().manual_seed(0)))
    before = {name: tensor.clone() for name, tensor in unet.state_dict().items()}
    assert TIMESTEPS.high <= len(schedule)
    right = fit_heads(MODEL, unet, schedule, count=512, steps=150, part=LAST)
    assert right[LAST] >= 0.65  # a half is chance
    for name, tensor in unet.state_dict().items():
        if name in (f"{LAST}.to_q.weight", f"{LAST}.to_k.weight"):
            assert torch.equal(tensor[HEAD:], before[name][HEAD:])
            assert not torch.equal(tensor[:HEAD], before[name][:HEAD])
        else:
            assert torch.equal(tensor, before[name])
