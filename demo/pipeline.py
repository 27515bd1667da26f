"""Draw with a model folder by diffusers' own pipeline: how the start model is judged, and proof that others load it.

`python -m demo.pipeline MODEL --prompts FILE --out DIR` leaves what `generate-images` with the same options would,
from the same noise.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from demo.prompts import PICTURE_HW
from demo.scene import Size
from demo.shapes import OneLineParser

if TYPE_CHECKING:
    from PIL import Image

BATCH = 12


def open_pipeline(model: Path) -> Any:
    """diffusers' own, in fp32, with UniPC."""
    import torch
    from diffusers import StableDiffusionXLPipeline, UniPCMultistepScheduler

    pipeline = StableDiffusionXLPipeline.from_pretrained(model, use_safetensors=True, dtype=torch.float32)
    pipeline.scheduler = UniPCMultistepScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw_with_pipeline(
    model: Path, prompts: Sequence[str], size_hw: Size, *, steps: int, guidance: float, seeds: Sequence[int]
) -> "list[Image.Image]":
    """A picture of each prompt, from the noise of its seed; UniPC, guidance rescaled as for zero-terminal SNR."""
    import torch

    from trainer.ensemble import ZERO_TERMINAL_RESCALE

    pipeline = open_pipeline(model)
    pictures: list[Image.Image] = []
    for first in range(0, len(prompts), BATCH):
        some, own_seeds = list(prompts[first : first + BATCH]), seeds[first : first + BATCH]
        pictures += pipeline(
            some,
            height=size_hw[0],
            width=size_hw[1],
            num_inference_steps=steps,
            guidance_scale=guidance,
            guidance_rescale=ZERO_TERMINAL_RESCALE,
            generator=[torch.Generator().manual_seed(seed) for seed in own_seeds],
        ).images
    return pictures


def main(arguments: Sequence[str] | None = None) -> int:
    """The door of `python -m demo.pipeline`."""
    parser = OneLineParser(prog="demo.pipeline", description="Draw with a model folder by diffusers' pipeline.")
    parser.add_argument("model", type=Path, metavar="MODEL", help="model in SDXL's diffusers layout")
    parser.add_argument("--prompts", type=Path, required=True, metavar="FILE", help="text file, a prompt on each line")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the pictures")
    parser.add_argument("--steps", type=int, default=30, help="default: %(default)s")
    parser.add_argument("--guidance", type=float, default=2.5, help="default: %(default)s")
    parser.add_argument("--height", type=int, default=PICTURE_HW[0], help="pixels (default: %(default)s)")
    parser.add_argument("--width", type=int, default=PICTURE_HW[1], help="pixels (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    options = parser.parse_args(arguments)
    from shared.errors import ExpertsError
    from trainer.generate import read_prompts

    try:
        prompts = read_prompts([], options.prompts)
        options.out.mkdir(parents=True, exist_ok=True)
    except ExpertsError as error:
        parser.exit(error.exit_code, f"{parser.prog}: {error}\n")
    except OSError as error:
        parser.error(f"{error.filename}: {error.strerror}")
    size_hw = (options.height, options.width)
    settings = {"steps": options.steps, "guidance": options.guidance}
    seeds = [options.seed] * len(prompts)
    pictures = draw_with_pipeline(options.model, prompts, size_hw, **settings, seeds=seeds)
    for index, (prompt, picture) in enumerate(zip(prompts, pictures, strict=True)):
        _save(
            picture,
            options.out / f"{index:03d}-seed-{options.seed}.png",
            {**settings, "seed": options.seed, "prompt": prompt},
        )
    print(f"{len(pictures)} pictures in {options.out}")
    return 0


def _save(picture: "Image.Image", path: Path, facts: dict[str, object]) -> None:
    from PIL.PngImagePlugin import PngInfo

    from demo.score import METADATA

    info = PngInfo()
    info.add_itxt(METADATA, json.dumps(facts))
    picture.save(path, pnginfo=info)


if __name__ == "__main__":
    sys.exit(main())
