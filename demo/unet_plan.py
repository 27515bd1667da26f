"""From what pictures, how long and how fast the small world's UNet is trained by `train-expert`, run after run."""

from dataclasses import dataclass

from demo.prompts import SIZES_HW
from demo.scene import Size

LEARNING_RATE, MUON_RATE = 2e-3, 0.02  # at a share of 1
WIDE_HW: Size = (88, 88)


@dataclass(frozen=True)
class PictureSet:
    """Pictures that a UNet learns from: how many, of which sizes, and how `cache-build` is told of those.

    wide: so many more of WIDE_HW, of each of which a window of PICTURE_HW is cut at random.
    """

    count: int
    sizes_hw: tuple[Size, ...]
    sets: tuple[str, ...] = ()
    wide: int = 0


@dataclass(frozen=True)
class UnetRun:
    """One run of `train-expert`, from the average of the one before it.

    stages: (steps in all, share of both rates up to there). sets: what else `train-expert` is told. fit_heads: whether
    a head of each cross-attention is fitted first, by demo.attention_fit.
    """

    name: str
    pictures: str
    timesteps: tuple[int, int]
    batch: int
    stages: tuple[tuple[int, float], ...]
    sets: tuple[str, ...] = ()
    fit_heads: bool = False


def _two_shapes(weight: int) -> str:
    """Pictures of two shapes come so many times as often as those of one."""
    return f"data.weights=[{{where={{meta={{shapes={{min=2}}}}}}, weight={weight}}}]"


MIDDLE = "loss.timestep_bias={strategy='logit-normal'}"  # one draw in seventy is below t = 100
HIGH = "loss.timestep_bias={strategy='later', portion=0.35, multiplier=6}"  # three draws in four are above t = 650
PICTURE_SETS = {
    "large": PictureSet(16_000, ((96, 96), (80, 112), (112, 80)), ("images.resolution=96", "images.step=16")),
    "small": PictureSet(24_000, SIZES_HW),
    "many": PictureSet(48_000, SIZES_HW, wide=6_000),
}
# The middle of the schedule, where forms are decided, is drowned by the high noise beside it: there the loss is four
# times as large and mostly what no caption tells. So the middle is dwelt on. Pictures are smaller from the fourth run
# on: half as many latents are learned from nearly twice as fast, and the VAE keeps all that captions say of them. The
# last ones have windows among them, whose corners the ids tell: without those no id would mean anything. Two shapes in
# one picture are what is learned last, so the runs from "pairs" on have more of those, and some their full captions
# alone. Which of two shapes is of which kind was hardly learned until a head of each cross-attention was shown
# where to look, before "look". Which of two colours a ground fades from is decided in the highest noise, which "look"
# left out: "grounds" makes up for that. Fine detail is left to whoever refines: few draws are below t = 100. (The
# weights in demo/model saw other embeds at first: the CLIP's second fit was made before "windows", its third before
# "twins"; and up to "close" they were some 16 in size, which saturates attention: before "attend" that began anew.)
UNET_RUNS = (
    UnetRun("whole", "large", (0, 1000), 64, ((1105, 1.0), (2000, 0.4))),
    UnetRun("middle", "large", (50, 750), 64, ((900, 0.4), (1700, 0.15))),
    UnetRun("again", "large", (0, 1000), 64, ((500, 0.1), (900, 0.03))),
    UnetRun("small", "small", (50, 900), 64, ((1500, 0.4),)),
    UnetRun("last", "small", (0, 1000), 128, ((1200, 0.4), (2000, 0.25), (2700, 0.12), (3100, 0.05), (3300, 0.02))),
    UnetRun("windows", "many", (0, 1000), 128, ((2600, 0.4), (3700, 0.25), (4300, 0.12), (4450, 0.05), (4530, 0.02))),
    UnetRun("twins", "many", (0, 1000), 128, ((1045, 0.4), (1850, 0.2), (2250, 0.1), (2480, 0.05), (2580, 0.02))),
    UnetRun("pairs", "many", (100, 900), 128, ((1300, 0.4), (2150, 0.2)), ("data.captions=first", _two_shapes(3))),
    UnetRun("end", "many", (0, 1000), 128, ((450, 0.1),), (_two_shapes(2), MIDDLE)),
    UnetRun("close", "many", (50, 1000), 128, ((250, 0.05), (400, 0.02)), (_two_shapes(2),)),
    UnetRun("attend", "many", (50, 950), 128, ((500, 0.4),), ("data.captions=first", _two_shapes(3))),
    UnetRun("look", "many", (100, 850), 128, ((1251, 0.4), (1900, 0.2)), ("data.captions=first", _two_shapes(3)), True),
    UnetRun("even", "many", (0, 1000), 128, ((500, 0.1),), (_two_shapes(2), MIDDLE)),
    UnetRun("settle", "many", (50, 1000), 128, ((250, 0.05), (400, 0.02)), (_two_shapes(2),)),
    UnetRun("grounds", "many", (0, 1000), 128, ((350, 0.2), (550, 0.08), (650, 0.02)), (_two_shapes(2), HIGH)),
)
