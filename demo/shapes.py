"""Draw captioned pictures of simple shapes: the data set of the small world.

`python -m demo.shapes OUT` writes what `cache-build` reads first: `shape-00000.png` with `shape-00000.txt` beside it,
one caption a line. Nothing here knows of models, so it starts in a blink.

    (seed, index) -> scene.make_scene -> draw.draw         -> shape-00000.png
                                      -> captions.describe -> shape-00000.txt
"""

import argparse
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from demo.captions import describe
from demo.draw import draw
from demo.scene import SIZES_HW, Size, make_scene

EXIT_USAGE = 64


class OneLineParser(argparse.ArgumentParser):
    """An argument parser that says what is wrong in one line, without the usage text, and exits with 64."""

    def error(self, message: str) -> NoReturn:
        self.exit(EXIT_USAGE, f"{self.prog}: {message}\n")


def write_shapes(
    out: Path,
    count: int = 512,
    seed: int = 0,
    *,
    held_out: bool = False,
    sizes_hw: Sequence[Size] = SIZES_HW,
    metadata: bool = False,
) -> Path:
    """Write `count` pictures and their captions into the folder `out`, over those of the same name.

    With `held_out` every picture shows a combination of kind and colour that is in none of the others. With `metadata`
    a metadata.jsonl says how many `shapes` each one shows on which `ground`, for trainers that select or weigh by it.
    """
    out.mkdir(parents=True, exist_ok=True)
    rows = []
    for index in range(count):
        scene = make_scene(seed, index, held_out=held_out, sizes_hw=sizes_hw)
        # The captions go first: whoever watches the folder never finds a picture without one.
        (out / f"shape-{index:05d}.txt").write_text("\n".join(describe(scene)) + "\n", encoding="utf-8")
        draw(scene).save(out / f"shape-{index:05d}.png")
        facts = {"shapes": len(scene.shapes), "ground": scene.ground.style}
        rows.append(json.dumps({"file_name": f"shape-{index:05d}.png", **facts}))
    if metadata:
        (out / "metadata.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    return out


def main(arguments: Sequence[str] | None = None) -> int:
    """The door of `python -m demo.shapes`."""
    parser = OneLineParser(prog="demo.shapes", description="Draw captioned pictures of simple shapes.")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to write into; made if missing")
    parser.add_argument("--count", type=int, default=512, help="pictures to draw (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="another seed, other pictures (default: %(default)s)")
    parser.add_argument(
        "--size",
        type=_size,
        action="append",
        metavar="HxW",
        help="height and width of pictures in px, 64 to 128; may be given again (default: nine sizes)",
    )
    parser.add_argument("--held-out", action="store_true", help="only what is held out: to judge with, not to train on")
    parser.add_argument("--metadata", action="store_true", help="metadata.jsonl too: shapes, kind of ground")
    options = parser.parse_args(arguments)
    if options.count < 1:
        parser.error(f"argument --count: must be at least 1, not {options.count}")
    sizes_hw = options.size or SIZES_HW
    try:
        write_shapes(
            options.out,
            options.count,
            options.seed,
            held_out=options.held_out,
            sizes_hw=sizes_hw,
            metadata=options.metadata,
        )
    except OSError as error:
        parser.error(f"cannot write to {options.out}: {error.strerror or error}")
    print(f"{options.count} pictures in {options.out}")
    return 0


def _size(text: str) -> Size:
    sides = re.fullmatch(r"(\d+)x(\d+)", text)
    if not sides or not all(64 <= int(side) <= 128 for side in sides.groups()):
        raise argparse.ArgumentTypeError(f"must be HxW with sides of 64 to 128, such as 96x128, not {text!r}")
    return int(sides[1]), int(sides[2])


if __name__ == "__main__":
    sys.exit(main())
