"""Text embeds that attention can be asked of, and heads that look from where a shape stands at the word for it."""

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

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
CAPTIONS = [describe(make_scene(5, i))[0] for i in range(32)]


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


def test_the_start_models_cross_attention_hears_the_caption() -> None:
    """What it says differs from place to place and from caption to caption; where it is saturated it says one thing."""
    unet, captions = load_unet(MODEL / "unet", torch.device("cpu")), make_prompts(8)
    said: dict[str, torch.Tensor] = {}

    def keep(name: str) -> object:
        return lambda _module, _inputs, output: said.update({name: output})

    for name, module in unet.named_modules():
        if name.endswith("attn2"):
            module.register_forward_hook(keep(name))
    text = TextEncoders(MODEL, "cpu").encode(captions)
    x_t = torch.randn(len(captions), 4, 9, 9, generator=torch.Generator().manual_seed(0))
    ids = torch.tensor([[72.0, 72, 0, 0, 72, 72]]).expand(len(captions), -1)
    added = {"text_embeds": text.pooled_prompt_embeds, "time_ids": ids}
    with torch.inference_mode():
        unet(x_t, 600, encoder_hidden_states=text.prompt_embeds, added_cond_kwargs=added)
    assert len(said) == 7
    for name, output in said.items():
        varies = (output - output.mean((0, 1))).square().mean() / output.square().mean()
        assert varies >= 0.02, name


def test_a_head_learns_to_look_at_the_right_word() -> None:
    """The UNet's other weights stay, and so does what the heads see: only queries and keys of one head are fitted."""
    unet = load_unet(MODEL / "unet", torch.device("cpu"))
    with torch.no_grad():
        for name, module in unet.named_modules():
            if name.endswith(("attn2.to_q", "attn2.to_k")):
                nn.init.normal_(module.weight, std=0.01, generator=torch.Generator().manual_seed(0))
    before = copy.deepcopy(unet.state_dict())
    schedule = NoiseSchedule(scaled_linear_betas(1000, *BETAS), zero_terminal_snr=True)
    assert TIMESTEPS.high <= len(schedule)
    right = fit_heads(MODEL, unet, schedule, count=256, steps=80)
    assert len(right) == 7
    assert sum(right.values()) / 7 >= 0.6, right  # a half is chance
    for name, tensor in unet.state_dict().items():
        fitted = name.endswith(("attn2.to_q.weight", "attn2.to_k.weight"))
        kept = slice(64, None) if fitted else slice(None)
        assert torch.equal(tensor[kept], before[name][kept])
        assert torch.equal(tensor, before[name]) != fitted
