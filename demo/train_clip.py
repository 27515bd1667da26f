"""Pictures and captions of the small world -> a small CLIP, and SDXL's two text encoders out of it.

    picture (48 x 48) -> vision tower ─┬─ contrast ─ text tower 2 <- caption      the CLIP that scores pictures, and
                                       └─ contrast ─ text tower 1 <- caption      text_encoder_2; text_encoder

Radford et al. 2021, section 2.3: of all pictures of a batch, which is this caption's, and the other way round. The
second text tower belongs to the CLIP; the first learns from the same pictures and keeps no projection, as in SDXL.
First come batches of scenes that have nothing in common, then mostly batches of near relatives (demo.relatives), which
only captions tell apart that are understood word for word; at last of such that differ in what stands where alone.
The embeds are brought to a size near one at last, as CLIP's are: nothing in the contrast keeps them from growing.
"""

import functools
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from demo.captions import describe
from demo.draw import draw
from demo.fit import fit
from demo.fit_plan import FitPlan
from demo.model_files import BOS, EOS, TEXT_LENGTH, make_vocabulary, text_settings
from demo.relatives import GROUP, make_relatives
from demo.scene import Scene, Size, make_scene
from shared.seeding import make_generator

PICTURES_SEED, RELATIVES_SEED, TWINS_SEED = 102, 103, 104  # no picture that it learns from is in a data set
STRANGERS_EVERY = 4  # of so many batches in the later fits one has nothing in common
TWINS = 0.6  # of the relatives in the last fit
SIZES_HW: tuple[Size, ...] = ((64, 64), (64, 88), (88, 64))
IMAGE_PX, PATCH_PX = 48, 8
IMAGE_MEAN, IMAGE_STD = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
# `to_clip_input` as a CLIP's processor has it, for whoever loads the CLIP as any other (2: bilinear).
PREPROCESSOR = {
    "image_processor_type": "CLIPImageProcessor",
    "do_convert_rgb": True,
    "do_resize": True,
    "size": {"height": IMAGE_PX, "width": IMAGE_PX},
    "resample": 2,
    "do_center_crop": False,
    "do_rescale": True,
    "do_normalize": True,
    "image_mean": list(IMAGE_MEAN),
    "image_std": list(IMAGE_STD),
}
WIDTHS = (64, 128)  # of the two text towers
PROJECTION = 96
VISION = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 4}
FIRST = {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 3, "num_attention_heads": 2}
ADDS_TO_STREAM = ("embeddings.", ".out_proj.", ".fc2.")  # in names of a text tower's parameters
SECOND = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 3, "num_attention_heads": 4}


class TwoTexts(nn.Module):
    """A CLIP, and a first text tower that learns from the same pictures."""

    def __init__(self) -> None:
        from transformers import CLIPModel, CLIPTextModelWithProjection

        super().__init__()
        clip, first = clip_config(), first_text_config()
        for config in (clip, clip.text_config, clip.vision_config, first):
            config._attn_implementation = "eager"  # a fused backward pass is several times slower on so short texts
        self.clip = CLIPModel(clip)
        self.first = CLIPTextModelWithProjection(first)

    def forward(self, pixels: Tensor, ids: Tensor) -> Tensor:
        """The contrastive loss of pictures fp32 [B, 3, 48, 48] and the ids of their captions [B, n]."""
        pictures = self.clip.visual_projection(self.clip.vision_model(pixels).pooler_output)
        texts = (self.clip.text_projection(self.clip.text_model(ids).pooler_output), self.first(ids).text_embeds)
        scale = self.clip.logit_scale.exp().clamp(max=100)
        return sum(_contrast(pictures, text, scale) for text in texts) / len(texts)  # type: ignore[return-value]


def train_clip(
    folder: Path, plan: FitPlan, close_plan: FitPlan, twin_plan: FitPlan, device: torch.device
) -> dict[str, dict[str, Tensor]]:
    """Weights, averaged, by the names that each component's class has for them; goes on with what `folder` holds."""
    torch.manual_seed(plan.seed)  # the layers of the library draw their first weights from torch's own generator
    model = TwoTexts().to(device)

    def loss(pixels: Tensor, ids: Tensor) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16):
            value: Tensor = model(pixels.to(device), ids.to(device))
        return value

    def close(seed: int, step: int, count: int, twins: float) -> tuple[Tensor, Tensor]:
        if step % STRANGERS_EVERY == 0:
            return make_batch(seed, step, count)
        return make_close_batch(seed, step, count, twins)

    averaged = fit("clip", model, lambda step: loss(*make_batch(PICTURES_SEED, step, plan.batch)), plan, folder)
    for name, then, seed, twins in (
        ("clip-close", close_plan, RELATIVES_SEED, 0.0),
        ("clip-twins", twin_plan, TWINS_SEED, TWINS),
    ):
        model.load_state_dict(averaged)

        def close_loss(step: int, then: FitPlan = then, seed: int = seed, twins: float = twins) -> Tensor:
            return loss(*close(seed, step, then.batch, twins))

        averaged = fit(name, model, close_loss, then, folder)
    model.load_state_dict(averaged)
    captions = tokenize([describe(make_scene(PICTURES_SEED, i))[0] for i in range(plan.batch)]).to(device)
    for tower in (model.clip, model.first):
        bring_near_one(tower.text_model, captions)
    weights = {name: tensor.cpu() for name, tensor in model.state_dict().items()}
    clip = {name.removeprefix("clip."): tensor for name, tensor in weights.items() if name.startswith("clip.")}
    second = ("text_model.", "text_projection.")
    return {
        "clip": clip,
        "text_encoder_2": {name: tensor for name, tensor in clip.items() if name.startswith(second)},
        "text_encoder": {n.removeprefix("first."): t for n, t in weights.items() if n.startswith("first.text_model.")},
    }


@torch.no_grad()
def bring_near_one(text_model: nn.Module, ids: Tensor) -> float:
    """Divide the embeds that the UNet reads, of a text tower, by a power of two near their root mean square over `ids`.

    Whatever adds to the residual stream is divided, embeddings, attention and MLP, so all of the stream is; each layer
    and the last norm begin with a LayerNorm, to which that is nothing (but for its eps). Returns the divisor.

    Embeds of size 16 and more, as the contrast leaves them, saturate a UNet's cross-attention: nearly all weight lies
    on the one token with the longest key, and no gradient takes it away again.
    """
    embeds = text_model(ids, output_hidden_states=True).hidden_states[-2]
    size = 2.0 ** round(math.log2(embeds.square().mean().sqrt().item()))
    for name, parameter in text_model.named_parameters():
        if any(part in name for part in ADDS_TO_STREAM):
            parameter.div_(size)
    return size


def clip_config() -> Any:
    """The small CLIP's configuration."""
    from transformers import CLIPConfig

    vision = {**VISION, "image_size": IMAGE_PX, "patch_size": PATCH_PX, "projection_dim": PROJECTION}
    return CLIPConfig(text_config=second_text_config().to_dict(), vision_config=vision, projection_dim=PROJECTION)


def first_text_config() -> Any:
    """The configuration of text_encoder; its padding token is the end mark, as CLIP-L's is."""
    return _text_config(pad_token=EOS, hidden_act="quick_gelu", **FIRST)


def second_text_config() -> Any:
    """The configuration of text_encoder_2 and of the CLIP's text tower."""
    return _text_config(pad_token="!", hidden_act="gelu", **SECOND)


def _text_config(pad_token: str, **settings: Any) -> Any:
    from transformers import CLIPTextConfig

    return CLIPTextConfig(**text_settings(make_vocabulary()[0], pad_token), projection_dim=PROJECTION, **settings)


def make_batch(seed: int, step: int, count: int) -> tuple[Tensor, Tensor]:
    """Pictures fp32 [B, 3, 48, 48] and the ids [B, n] of one caption of each, padded with end marks."""
    size_hw = SIZES_HW[step % len(SIZES_HW)]
    scenes = [make_scene(seed, step * count + i, sizes_hw=(size_hw,)) for i in range(count)]
    chosen = torch.randint(4, (count,), generator=make_generator(seed, "caption", step))
    captions = [describe(scene)[int(choice)] for scene, choice in zip(scenes, chosen, strict=True)]
    return _see(scenes), tokenize(captions)


def make_close_batch(seed: int, step: int, count: int, twins: float = 0.0) -> tuple[Tensor, Tensor]:
    """The same of groups of relatives; `count` is a multiple of their GROUP."""
    size_hw, groups = SIZES_HW[step % len(SIZES_HW)], count // GROUP
    pairs = [pair for i in range(groups) for pair in make_relatives(seed, step * groups + i, size_hw, twins)]
    return _see([scene for scene, _ in pairs]), tokenize([caption for _, caption in pairs])


def _see(scenes: list[Scene]) -> Tensor:
    """What the vision tower sees of scenes of one size, fp32 [B, 3, 48, 48]."""
    pixels = torch.stack([torch.frombuffer(bytearray(draw(scene).tobytes()), dtype=torch.uint8) for scene in scenes])
    return to_clip_input(pixels.view(len(scenes), *scenes[0].size_hw, 3))


def to_clip_input(pixels: Tensor) -> Tensor:
    """uint8 [B, H, W, 3] -> what the vision tower takes, fp32 [B, 3, 48, 48]: sides are pressed to a square."""
    x = pixels.permute(0, 3, 1, 2).float() / 255
    x = nn.functional.interpolate(x, (IMAGE_PX, IMAGE_PX), mode="bilinear", antialias=True, align_corners=False)
    mean, std = (torch.tensor(values)[:, None, None] for values in (IMAGE_MEAN, IMAGE_STD))
    return (x - mean) / std


def tokenize(captions: list[str]) -> Tensor:
    """Ids of captions in the small world's words, each framed and padded with end marks to the longest of them."""
    words = _word_ids()
    rows = [[words[BOS], *(words[word] for word in _split(caption)), words[EOS]] for caption in captions]
    longest = min(TEXT_LENGTH, max(map(len, rows)))
    return torch.tensor([row + [words[EOS]] * (longest - len(row)) for row in rows])


def _split(caption: str) -> list[str]:
    return caption.replace(":", " : ").split()


@functools.cache
def _word_ids() -> dict[str, int]:
    """Each word's id: every word of a caption is one token."""
    vocabulary, _ = make_vocabulary()
    whole = (token for token in vocabulary if token.endswith("</w>"))
    return {token.removesuffix("</w>"): vocabulary[token] for token in whole} | {m: vocabulary[m] for m in (BOS, EOS)}


def _contrast(pictures: Tensor, texts: Tensor, scale: Tensor) -> Tensor:
    """Cross entropy over rows and over columns of all cosines of a batch."""
    pictures, texts = (nn.functional.normalize(vectors.float(), dim=-1) for vectors in (pictures, texts))
    logits = scale * pictures @ texts.T
    own = torch.arange(len(logits), device=logits.device)
    return (nn.functional.cross_entropy(logits, own) + nn.functional.cross_entropy(logits.T, own)) / 2
