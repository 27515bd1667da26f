"""Prompts that change on the way: both are captions of the same scene but for one thing, and each has its steps."""

from pathlib import Path

import numpy as np
import pytest

from benchmarks.when_decided import WHAT, What, draw_in_two, exchange, pairs
from demo.captions import expect
from demo.pipeline import draw_with_pipeline, open_pipeline
from demo.prompts import PICTURE_HW
from demo.scene import make_scene

MODEL = Path(__file__).parents[2] / "demo" / "model"
STEPS = 4


@pytest.mark.parametrize("what", WHAT)
def test_prompts_differ_in_what_is_exchanged_alone(what: What) -> None:
    prompts = pairs(40, what)
    assert len(prompts) == len(set(prompts)) == 40
    for own, other in prompts:
        a, b = expect(own), expect(other)
        assert (a.relation, a.ground) == (b.relation, b.ground)
        assert [getattr(s, what) for s in a.shapes] == [getattr(s, what) for s in reversed(b.shapes)]
        (kept,) = set(WHAT) - {what}
        assert [getattr(s, kept) for s in a.shapes] == [getattr(s, kept) for s in b.shapes]
        assert own != other


def test_an_exchange_undoes_itself() -> None:
    scene = next(scene for i in range(100) if len((scene := make_scene(3, i)).shapes) == 2)
    assert exchange(exchange(scene, "kind"), "kind") == scene


def test_each_prompt_has_its_own_steps() -> None:
    above, below = (list(side) for side in zip(*pairs(2, "colour"), strict=True))
    pipeline = open_pipeline(MODEL)
    alone = draw_with_pipeline(MODEL, above, PICTURE_HW, steps=STEPS, guidance=2.5, seeds=range(2))
    never, late, early = (draw_in_two(pipeline, above, below, until, STEPS) for until in (0, 300, 900))
    for i in range(2):
        assert never[i].tobytes() == alone[i].tobytes()
        moved = [np.abs(np.asarray(other[i], float) - np.asarray(alone[i], float)).mean() for other in (late, early)]
        assert 0 < moved[0] < moved[1]
