"""What models are asked to draw when they are judged: captions of scenes that nobody learns from, in three sets."""

import sys
from collections.abc import Sequence
from pathlib import Path

from demo.captions import describe, expect
from demo.scene import Size, held_out_combinations, make_scene
from demo.shapes import OneLineParser

PROMPTS_SEED = 7  # no data set is drawn with it
PICTURE_HW: Size = (72, 72)
SIZES_HW: tuple[Size, ...] = (PICTURE_HW, (64, 80), (80, 64))  # what the start model was last trained to draw
SETS = {
    "one": "one shape",
    "held out": "one, colour held out",  # for this kind
    "two": "two shapes",
}


def make_prompts(count: int, seed: int = PROMPTS_SEED) -> list[str]:
    """`count` captions of each set, the sets one after another."""
    return [prompt for name in SETS for prompt in _of_set(name, count, seed)]


def set_of(prompt: str) -> str:
    """The set that a prompt belongs to; raises ValueError where it asks for no shapes."""
    asked = expect(prompt).shapes
    if len(asked) == 2:
        return "two"
    return "held out" if (asked[0].kind, asked[0].colour) in held_out_combinations() else "one"


def _of_set(name: str, count: int, seed: int) -> list[str]:
    prompts: list[str] = []
    index = 0
    while len(prompts) < count:
        scene = make_scene(seed, index, held_out=name == "held out", sizes_hw=(PICTURE_HW,))
        if len(scene.shapes) == (2 if name == "two" else 1):
            prompts.append(describe(scene)[0])
        index += 1
    return prompts


def main(arguments: Sequence[str] | None = None) -> int:
    """The door of `python -m demo.prompts`."""
    parser = OneLineParser(prog="demo.prompts", description="Write prompts to judge a model with, one a line.")
    parser.add_argument("out", type=Path, metavar="FILE", help="file to write")
    parser.add_argument("--count", type=int, default=24, help="prompts of each set (default: %(default)s)")
    options = parser.parse_args(arguments)
    if options.count < 1:
        parser.error(f"argument --count: must be at least 1, not {options.count}")
    prompts = make_prompts(options.count)
    try:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text("".join(f"{prompt}\n" for prompt in prompts), encoding="utf-8")
    except OSError as error:
        parser.error(f"cannot write {options.out}: {error.strerror or error}")
    print(f"{len(prompts)} prompts in {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
