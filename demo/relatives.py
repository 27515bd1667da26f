"""Scenes that are nearly the same, and captions that tell them apart: what a CLIP must look closely for.

In a batch of scenes that have nothing in common, ground and colour alone find the right caption, and a CLIP learns no
more than it must: its text encoders gave "star", "triangle" and "crescent" nearly one vector. Beside relatives of its
own, a picture is found by the kinds, sizes and places in its caption, and by which shape has which colour. (Such
captions are the hard negatives of Yuksekgonul et al. 2023, section 4.)
"""

import random
from dataclasses import replace

from demo.captions import describe
from demo.scene import COLOURS, KINDS, Scene, Shape, Size, held_out_combinations, make_scene, place_shapes

GROUP = 8  # scenes that are relatives of each other
FULL = 0  # of a scene's captions, the one that leaves nothing out
PATIENCE = 40  # draws after which a group is told by its full captions


def make_relatives(seed: int, index: int, size_hw: Size, twins: float = 0.0) -> list[tuple[Scene, str]]:
    """Group number `index`: GROUP scenes on one ground and a caption of each, no two captions equal.

    `twins` of them differ from the first in one thing alone: where something stands, or what stands where.
    """
    base = make_scene(seed, index, sizes_hw=(size_hw,))
    rng = random.Random(f"relatives {seed} {index}")
    group: dict[str, Scene] = {}
    scene, draws = base, 0
    while len(group) < GROUP:
        style = rng.randrange(len(describe(scene))) if draws < PATIENCE else FULL
        group.setdefault(describe(scene)[style], scene)
        scene, draws = (_turn if rng.random() < twins else _redraw)(base, rng), draws + 1
    return [(scene, caption) for caption, scene in group.items()]


def _turn(scene: Scene, rng: random.Random) -> Scene:
    """The same shapes elsewhere, or of two shapes the kinds, the colours or both in exchange."""
    if len(scene.shapes) == 1 or rng.random() < 0.25:
        places = place_shapes(len(scene.shapes), scene.size_hw, rng)
        return replace(
            scene, shapes=tuple(Shape(s.kind, s.colour, *p) for s, p in zip(scene.shapes, places, strict=True))
        )
    first, second = scene.shapes
    kinds, colours = rng.choice(((True, True), (True, False), (False, True)))
    changed = [
        replace(one, kind=(other if kinds else one).kind, colour=(other if colours else one).colour)
        for one, other in ((first, second), (second, first))
    ]
    if {(shape.kind, shape.colour) for shape in changed} & set(held_out_combinations()):
        return scene
    return replace(scene, shapes=tuple(changed))


def _redraw(scene: Scene, rng: random.Random) -> Scene:
    """The same ground, and some of what stands on it drawn anew; never a held-out combination."""
    names = None
    while names is None:
        names = _rename(scene, rng)
    places = [(shape.centre_yx, shape.radius_px) for shape in scene.shapes]
    if rng.random() < 0.4:
        places = place_shapes(len(names), scene.size_hw, rng)
    return replace(scene, shapes=tuple(Shape(*name, *place) for name, place in zip(names, places, strict=True)))


def _rename(scene: Scene, rng: random.Random) -> list[tuple[str, str]] | None:
    """Kinds and colours, some of them new, or of two shapes each other's; None where that is no scene's."""
    names = [
        (
            rng.choice(KINDS) if rng.random() < 0.5 else shape.kind,
            rng.choice(list(COLOURS)) if rng.random() < 0.25 else shape.colour,
        )
        for shape in scene.shapes
    ]
    if len(names) == 2 and rng.random() < 0.3:
        (kind, colour), (other_kind, other_colour) = names
        swapped = [(other_kind, other_colour), (kind, colour)]
        names = swapped if rng.random() < 0.5 else [(kind, other_colour), (other_kind, colour)]
    colours = {colour for _, colour in names}
    return names if len(colours) == len(names) and not set(names) & set(held_out_combinations()) else None
