"""UNet -> the same UNet, where one head of each cross-attention looks from where a shape stands at the word for it.

drawn picture, caption -> x_t -> UNet -> what each cross-attention is asked from, cell by cell ─┐
                                 caption -> embeds, what it may look at ────────────────────────┴-> to_q, to_k of a head

Which word belongs to which place is what a UNet learns of captions last: the loss says what is wrong in the picture and
not where one should have looked. Here that is said: cross entropy of a head's weights with the token of the kind of the
shape that covers the cell, as the token loss of Wang et al. 2024 (TokenCompose, arXiv:2312.03626) has it, but
fitted once, to queries and keys alone: that needs no gradient of the UNet and takes minutes. What the head makes of
what it sees, `train-expert` teaches it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from demo.captions import describe
from demo.draw import draw
from demo.prompts import PICTURE_HW
from demo.scene import Scene, make_scene
from shared.conditioning import MicroConditioning
from shared.schedule import NoiseSchedule, TimestepRange, sample_timesteps
from shared.seeding import make_generator
from shared.text_encoders import TextEncoders
from shared.vae import Vae

PICTURES_SEED = 105  # no picture that it learns from is in a data set
SCENES, STEPS, BATCH = 1920, 700, 256
LEARNING_RATE = 3e-3  # of Adam, falling to nothing
TIMESTEPS = TimestepRange(100, 850)  # above, nothing can be seen of where the shapes will stand
LEAST_COVER = 0.2  # of a cell, by the shape that its words are looked for
GROUND_WEIGHT = 0.1  # of cells with no shape in them, which look at the first token


@dataclass(frozen=True)
class Looks:
    """What heads are fitted to: of each sample the embeds, and where in the picture and the caption its shapes are.

    embeds fp16 [N, n, d]; words int64 [N, 2], the tokens of both kinds; discs fp32 [N, 2, H, W], 1 where each shape is.
    A picture of one shape has it twice. asked: fp16 [N, cells, c] of each cross-attention, by its name.
    """

    embeds: Tensor
    words: Tensor
    discs: Tensor
    asked: Mapping[str, Tensor]


def fit_heads(
    model: Path, unet: Any, schedule: NoiseSchedule, count: int = SCENES, steps: int = STEPS, part: str = ""
) -> dict[str, float]:
    """Fit the first head of each cross-attention of `unet`, in place, or of those in one `part` of it.

    `model` has the VAE and the text encoders. Returns of each the share of cells, of held-out pictures of two shapes,
    from where it looks at the right shape's word more than at the other's: a half is chance.
    """
    attentions = {
        name: module for name, module in unet.named_modules() if name.endswith("attn2") and name.startswith(part)
    }
    looks = _collect(model, unet, attentions, schedule, count)
    return {name: _fit_head(attention, looks, looks.asked[name], steps) for name, attention in attentions.items()}


def _collect(model: Path, unet: Any, attentions: Mapping[str, nn.Module], schedule: NoiseSchedule, count: int) -> Looks:
    vae, texts = Vae(model, "cpu"), TextEncoders(model, "cpu")
    asked: dict[str, list[Tensor]] = {name: [] for name in attentions}

    def keep(name: str) -> Any:
        return lambda _, inputs: asked[name].append(inputs[0].half())

    hooks = [module.register_forward_pre_hook(keep(name)) for name, module in attentions.items()]
    scenes = [make_scene(PICTURES_SEED, i, sizes_hw=(PICTURE_HW,)) for i in range(count)]
    embeds = []
    for first in range(0, count, BATCH):
        some = scenes[first : first + BATCH]
        text = texts.encode([describe(scene)[0] for scene in some])
        pixels = torch.stack([torch.frombuffer(bytearray(draw(s).tobytes()), dtype=torch.uint8) for s in some])
        x_0 = vae.encode(pixels.view(len(some), *PICTURE_HW, 3)).mean * vae.scaling_factor
        generator = make_generator(PICTURES_SEED, "attention", first)
        t = sample_timesteps(TIMESTEPS, len(some), generator)
        x_t = schedule.add_noise(x_0, torch.randn(x_0.shape, generator=generator), t)
        ids = MicroConditioning(PICTURE_HW, (0, 0), PICTURE_HW).time_ids().expand(len(some), -1)
        added = {"text_embeds": text.pooled_prompt_embeds, "time_ids": ids}
        with torch.no_grad():
            unet(x_t, t, encoder_hidden_states=text.prompt_embeds, added_cond_kwargs=added)
        embeds.append(text.prompt_embeds.half())
    for hook in hooks:
        hook.remove()
    return Looks(
        torch.cat(embeds),
        torch.tensor([_words(scene) for scene in scenes]),
        torch.stack([_discs(scene) for scene in scenes]),
        {name: torch.cat(parts) for name, parts in asked.items()},
    )


def _words(scene: Scene) -> tuple[int, int]:
    """The places, in the scene's full caption, of the tokens that say the first and the last shape's kind."""
    words = describe(scene)[0].split()
    places = [words.index(shape.colour) + 2 for shape in scene.shapes]  # the kind follows; the start mark comes first
    return places[0], places[-1]


def _discs(scene: Scene) -> Tensor:
    """Circles that the first and the last shape fit in, fp32 [2, H, W]."""
    height, width = scene.size_hw
    y, x = torch.arange(height)[:, None] + 0.5, torch.arange(width)[None] + 0.5
    discs = [
        (y - shape.centre_yx[0]) ** 2 + (x - shape.centre_yx[1]) ** 2 < shape.radius_px**2 for shape in scene.shapes
    ]
    return torch.stack((discs[0], discs[-1])).float()


def _fit_head(attention: Any, looks: Looks, asked: Tensor, steps: int) -> float:
    """Fit one; returns the share of cells that look right."""
    count, cells, _ = asked.shape
    side = round(cells**0.5)
    cover = functional.adaptive_avg_pool2d(looks.discs, (side, side)).flatten(2)
    most, whose = cover.max(1)
    target = looks.words.gather(1, whose).masked_fill(most == 0, 0)
    weight = (most > LEAST_COVER).float() + GROUND_WEIGHT * (most == 0)
    width = attention.to_q.out_features // attention.heads
    head = [layer.weight.detach()[:width].clone().requires_grad_() for layer in (attention.to_q, attention.to_k)]

    def logits(rows: Tensor) -> Tensor:
        queries, keys = (x[rows].float() @ w.T for x, w in zip((asked, looks.embeds), head, strict=True))
        scaled: Tensor = queries @ keys.transpose(1, 2) * attention.scale
        return scaled

    learned = count * 7 // 8
    adam = torch.optim.Adam(head, lr=LEARNING_RATE)
    decay = torch.optim.lr_scheduler.LinearLR(adam, 1.0, 0.0, steps)
    for step in range(steps):
        rows = torch.randint(learned, (BATCH,), generator=make_generator(PICTURES_SEED, "head", step))
        losses = functional.cross_entropy(logits(rows).flatten(0, 1), target[rows].flatten(), reduction="none")
        own = weight[rows].flatten()
        adam.zero_grad()
        torch.autograd.backward((losses * own).sum() / own.sum())
        adam.step()
        decay.step()
    with torch.no_grad():
        for layer, weights in zip((attention.to_q, attention.to_k), head, strict=True):
            layer.weight[:width] = weights
        rows = torch.arange(learned, count)
        shape = logits(rows).gather(2, looks.words[rows][:, None].expand(-1, cells, -1))  # [rows, cells, 2]
        right = (shape[..., 0] > shape[..., 1]) == (whose[rows] == 0)
        two = looks.words[rows, 0] != looks.words[rows, 1]
        return float(right[(most[rows] > LEAST_COVER) & two[:, None]].float().mean())
