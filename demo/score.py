"""Generated pictures -> numbers: how many show what their prompt asks for, how sharp they are, what a CLIP thinks.

picture + the prompt in its metadata -> judge -> Verdict ─┐
                                     -> detail -> Detail ─┼-> a Score for each set of prompts
                                     -> small CLIP ───────┘
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean

from PIL import Image

from demo.detail import Detail, measure_detail
from demo.draw import draw
from demo.judge import Verdict, judge
from demo.prompts import SETS, set_of
from demo.reading import read_picture

METADATA = "sdxl-experts"  # where generate-images keeps what a picture was drawn from
ASPECTS = ("follows", "count", "kind", "colour", "relation", "size", "position", "ground", "to_the_letter")


@dataclass(frozen=True)
class Judged:
    """One picture and what is thought of it; no detail where no shape is seen."""

    path: Path
    prompt: str
    verdict: Verdict
    detail: Detail | None
    clip: float | None = None


@dataclass(frozen=True)
class Score:
    """Shares of pictures, 0 to 1, and means over them.

    sharpness and edge_error_px are of the pictures in which a shape is seen (demo.detail); clip is the mean cosine of
    picture and prompt, times 100 (Hessel et al. 2021 without its weight), None without a CLIP.
    """

    pictures: int
    follows: float
    count: float
    kind: float
    colour: float
    relation: float
    size: float
    position: float
    ground: float
    to_the_letter: float
    sharpness: float
    edge_error_px: float
    clip: float | None

    def as_json(self) -> dict[str, float | None]:
        """Rounded to what such counts can say."""
        return {key: value if value is None else round(value, 4) for key, value in asdict(self).items()}


def judge_folder(folder: Path, clip: Path | None = None) -> list[Judged]:
    """Judge every picture that `generate-images` left in `folder`, by the prompt in its metadata.

    Raises ValueError where there are none, or where one has no prompt, or one that asks for no shapes.
    """
    paths = sorted(folder.glob("*.png"))
    if not paths:
        raise ValueError(f"no pictures in {folder}")
    pictures, prompts = [], []
    for path in paths:
        with Image.open(path) as image:
            facts = getattr(image, "text", {}).get(METADATA)
            if facts is None:
                raise ValueError(f"{path} does not say what it was drawn from")
            pictures.append(image.convert("RGB"))
            prompts.append(str(json.loads(facts)["prompt"]))
    return judge_pictures(pictures, prompts, paths, clip)


def judge_pictures(
    pictures: Sequence[Image.Image], prompts: Sequence[str], paths: Sequence[Path], clip: Path | None = None
) -> list[Judged]:
    """Judge pictures of these prompts; with the folder of a CLIP, by it as well."""
    cosines: Sequence[float | None] = [None] * len(pictures)
    if clip is not None:
        from demo.clip_score import clip_cosines

        cosines = clip_cosines(clip, pictures, prompts)
    return [
        Judged(path, prompt, judge(picture, prompt), _detail_of(picture), cosine)
        for path, prompt, picture, cosine in zip(paths, prompts, pictures, cosines, strict=True)
    ]


def score_sets(judged: Iterable[Judged]) -> dict[str, Score]:
    """A score for each set of prompts that there are pictures of."""
    judged = list(judged)
    sets = {name: [one for one in judged if set_of(one.prompt) == name] for name in SETS}
    return {name: score(of_set) for name, of_set in sets.items() if of_set}


def score(judged: Sequence[Judged]) -> Score:
    """The score of pictures, at least one."""
    shares = {name: fmean(getattr(one.verdict, name) for one in judged) for name in ASPECTS}
    details = [one.detail for one in judged if one.detail]
    cosines = [one.clip for one in judged if one.clip is not None]
    return Score(
        pictures=len(judged),
        **shares,
        sharpness=fmean(d.sharpness for d in details) if details else 0.0,
        edge_error_px=fmean(d.edge_error_px for d in details) if details else 0.0,
        clip=fmean(cosines) if cosines else None,
    )


def _detail_of(picture: Image.Image) -> Detail | None:
    """How fine the picture is, against the drawing of what is seen in it."""
    scene = read_picture(picture).scene()
    return measure_detail(picture, draw(scene)) if scene.shapes else None
