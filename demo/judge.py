"""Does a picture show what was asked for? The small world's score for a model, without a network.

picture -> reading.read_picture -> Reading ─┐
caption -> captions.expect -> Expectation ──┴-> Verdict
"""

from dataclasses import dataclass
from itertools import permutations

from PIL import Image

from demo.captions import Expectation, Wanted, expect, expectation_of
from demo.reading import Found, Reading, read_picture
from demo.scene import Ground, Scene, relation_word

MOST_FOUND = 5  # of more shapes than these only the largest are compared; the count is wrong anyway


@dataclass(frozen=True)
class Verdict:
    """What is as asked; an aspect of which nothing was asked is."""

    count: bool
    kind: bool
    colour: bool
    relation: bool
    size: bool
    position: bool
    ground: bool

    @property
    def follows(self) -> bool:
        """As many shapes as asked, each of its kind and its colour, and standing as asked."""
        return self.count and self.kind and self.colour and self.relation

    @property
    def to_the_letter(self) -> bool:
        """Sizes, position and ground as well."""
        return self.follows and self.size and self.position and self.ground


def judge(picture: Image.Image | Reading, asked: Scene | Expectation | str) -> Verdict:
    """Compare a picture, or what was read in it, with a scene, or what a caption asks for."""
    reading = picture if isinstance(picture, Reading) else read_picture(picture)
    wanted = asked if isinstance(asked, Expectation) else expectation_of(asked) if isinstance(asked, Scene) else None
    return _compare(reading, wanted or expect(str(asked)))


def lends_its_kind(picture: Image.Image | Reading, asked: str) -> bool:
    """Whether of two shapes, told apart by their colours, one has a wrong kind that is the other's."""
    reading, shapes = picture if isinstance(picture, Reading) else read_picture(picture), expect(asked).shapes
    kinds = {shape.colour: shape.kind for shape in reading.shapes}
    return any(
        kinds.get(own.colour) == other.kind != own.kind
        for own, other in permutations(shapes, 2)
        if own.colour != other.colour
    )


def _compare(reading: Reading, asked: Expectation) -> Verdict:
    """Take found shapes for wanted ones as it suits the picture best: "follows" asks for all at once anyway."""
    seen: list[Found | None] = [*reading.shapes[:MOST_FOUND]]
    seen += [None] * (len(asked.shapes) - len(seen))
    verdicts = [
        Verdict(
            count=len(reading.shapes) == len(asked.shapes),
            kind=_all_match("kind", asked.shapes, pairing),
            colour=_all_match("colour", asked.shapes, pairing),
            relation=_stand_as_asked(asked.relation, pairing),
            size=_all_match("size", asked.shapes, pairing),
            position=_all_match("position", asked.shapes, pairing),
            ground=asked.ground is None or _same_ground(asked.ground, reading.ground),
        )
        for pairing in permutations(seen, len(asked.shapes))
    ]
    return max(verdicts, key=lambda v: (v.follows, v.kind + v.colour + v.relation, v.size + v.position))


def _all_match(aspect: str, wanted: tuple[Wanted, ...], found: tuple[Found | None, ...]) -> bool:
    """Whether every wanted shape is found with this aspect as asked."""
    return all(
        shape is not None and getattr(wish, aspect) in ("", getattr(shape, aspect))
        for wish, shape in zip(wanted, found, strict=True)
    )


def _stand_as_asked(relation: str, found: tuple[Found | None, ...]) -> bool:
    if not relation:
        return True
    first, second = found
    return first is not None and second is not None and relation_word(first.centre_yx, second.centre_yx) == relation


def _same_ground(asked: Ground, seen: Ground) -> bool:
    """Style and colours; of stripes either may come first, and how many there are is never asked."""
    colours = [[ground.colour, ground.other] for ground in (asked, seen)]
    if asked.style == "stripes":
        colours = [sorted(pair) for pair in colours]
    return asked.style == seen.style and colours[0] == colours[1]
