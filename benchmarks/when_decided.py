"""At which timestep a picture's shapes are decided: prompts whose shapes have each other's kinds until t, or colours.

    python -m benchmarks.when_decided [--model demo/model] [--prompts 96] [--until 800 600 400 300 200 100]

    t >= until: the exchanged prompt -> t < until: the prompt itself -> which of the two does the judge see?

What a prompt asks for and the exchanged one does not can come from the timesteps below `until` alone. One JSON object.
"""

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import count, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from demo.captions import describe
from demo.judge import judge
from demo.model_card import GUIDANCE, STEPS
from demo.pipeline import open_pipeline
from demo.prompts import PICTURE_HW, PROMPTS_SEED
from demo.scene import Scene, make_scene

if TYPE_CHECKING:
    from PIL import Image

BATCH = 24
What = Literal["kind", "colour"]
WHAT: tuple[What, ...] = ("kind", "colour")


def exchange(scene: Scene, what: What) -> Scene:
    """The same scene with the kinds, or the colours, of its two shapes in exchange."""
    first, second = scene.shapes
    own, other = getattr(first, what), getattr(second, what)
    return replace(scene, shapes=(replace(first, **{what: other}), replace(second, **{what: own})))


def pairs(wanted: int, what: What) -> list[tuple[str, str]]:
    """Prompts of two shapes that differ in `what`, each with its exchanged one."""

    def found() -> Iterator[tuple[str, str]]:
        for index in count():
            scene = make_scene(PROMPTS_SEED, index, sizes_hw=(PICTURE_HW,))
            if len({getattr(shape, what) for shape in scene.shapes}) == 2:
                yield describe(scene)[0], describe(exchange(scene, what))[0]

    return list(islice(found(), wanted))


def draw_in_two(
    pipeline: Any, above: Sequence[str], below: Sequence[str], until: int, steps: int = STEPS
) -> "list[Image.Image]":
    """A picture of each pair of prompts: from `above` at the first step and while t >= until, then from `below`.

    Picture i begins with the noise of seed i.
    """
    from trainer.ensemble import ZERO_TERMINAL_RESCALE

    pictures: list[Image.Image] = []
    for first in range(0, len(above), BATCH):
        rows = slice(first, first + BATCH)
        own, null, pooled, null_pooled = pipeline.encode_prompt(
            list(below[rows]), device=pipeline.device, num_images_per_prompt=1, do_classifier_free_guidance=True
        )
        then = {"prompt_embeds": torch.cat([null, own]), "add_text_embeds": torch.cat([null_pooled, pooled])}

        def change(
            pipeline: Any, i: int, _t: Any, tensors: dict[str, Any], then: dict[str, Any] = then
        ) -> dict[str, Any]:
            ahead = pipeline.scheduler.timesteps[i + 1 :]
            return tensors | then if len(ahead) and ahead[0] < until else tensors

        pictures += pipeline(
            list(above[rows]),
            height=PICTURE_HW[0],
            width=PICTURE_HW[1],
            num_inference_steps=steps,
            guidance_scale=GUIDANCE,
            guidance_rescale=ZERO_TERMINAL_RESCALE,
            generator=[torch.Generator().manual_seed(seed) for seed in range(len(above))[rows]],
            callback_on_step_end=change,
            callback_on_step_end_tensor_inputs=list(then),
        ).images
    return pictures


def measure(model: Path, wanted: int, until: Sequence[int], what: What) -> list[dict[str, float]]:
    """Of each `until` the shares of pictures that follow the prompt, and that follow the exchanged one."""
    pipeline, rows = open_pipeline(model), []
    prompts = pairs(wanted, what)
    for t in until:
        drawn = draw_in_two(pipeline, [other for _, other in prompts], [own for own, _ in prompts], t)
        follows, other = (
            sum(judge(picture, pair[which]).follows for picture, pair in zip(drawn, prompts, strict=True)) / wanted
            for which in (0, 1)
        )
        rows.append({"until": t, "follows": follows, "follows_exchanged": other})
    return rows


def main() -> None:
    """The door of `python -m benchmarks.when_decided`."""
    parser = argparse.ArgumentParser(prog="benchmarks.when_decided", description="When a picture's shapes are decided.")
    parser.add_argument("--model", type=Path, default=Path("demo/model"))
    parser.add_argument("--prompts", type=int, default=96)
    parser.add_argument("--until", type=int, nargs="+", default=[950, 900, 800, 700, 600, 500, 400, 300, 200, 100])
    options = parser.parse_args()
    found = {what: measure(options.model, options.prompts, options.until, what) for what in WHAT}
    print(json.dumps({"model": str(options.model), "prompts": options.prompts, **found}, indent=1))


if __name__ == "__main__":
    main()
