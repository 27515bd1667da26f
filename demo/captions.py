"""Scene -> captions, and back: what a caption asks of a picture. Both sides of the small world's language.

A caption is worked out from the scene's numbers, so it is true of the picture. `expect` reads any of them, and prompts
in the same words, for the judge.
"""

import re
from dataclasses import dataclass

from demo.scene import COLOURS, GROUNDS, KINDS, Ground, Scene, Shape, position_word, relation_word, size_word

WORDS = (  # every word that a caption may use; a tokenizer needs no others
    *COLOURS,
    *GROUNDS,
    *KINDS,
    *("a", "an", "two", "shapes", "picture", "of", "with", "and", "on", "in", "at", "the", "small", "large"),
    *("left", "right", "above", "below", "top", "bottom", "middle"),
    *("background", "stripes", "striped", "fading", "from", "to"),
)
BACK = {"left of": "right of", "above": "below"}
SIDES = {"left of": ("on the left", "on the right"), "above": ("at the top", "at the bottom")}


@dataclass(frozen=True)
class Wanted:
    """A shape that is asked for; "" where anything goes."""

    kind: str
    colour: str
    size: str = ""
    position: str = ""


@dataclass(frozen=True)
class Expectation:
    """What a caption asks for: the first shape stands in `relation` ("left of", "above" or "") to the second."""

    shapes: tuple[Wanted, ...]
    relation: str = ""
    ground: Ground | None = None


def describe(scene: Scene) -> tuple[str, ...]:
    """Four captions, from the fullest to those that leave something out."""
    on, background = _on(scene.ground), _background(scene.ground)
    if len(scene.shapes) == 1:
        (shape,) = scene.shapes
        where = _where(scene, shape)
        return (
            f"{_sized(scene, shape)} {where} {on}",
            f"{background} with {_sized(scene, shape)} {where}",
            f"a picture of {_named(shape)} {where} {on}",
            f"{_named(shape)} {on}",
        )
    first, second = scene.shapes
    forth = relation_word(first.centre_yx, second.centre_yx)
    here, there = SIDES[forth]
    return (
        f"{_sized(scene, first)} {forth} {_sized(scene, second)} {on}",
        f"{background} with {_sized(scene, first)} {here} and {_sized(scene, second)} {there}",
        f"a picture of {_named(second)} {BACK[forth]} {_named(first)} {on}",
        f"two shapes {on}: {_named(first)} and {_named(second)}",
    )


def expectation_of(scene: Scene) -> Expectation:
    """Everything that the scene shows, as if a caption had asked for it."""
    alone = len(scene.shapes) == 1
    wanted = (
        Wanted(
            shape.kind,
            shape.colour,
            size_word(shape.radius_px, scene.size_hw),
            position_word(shape.centre_yx, scene.size_hw) if alone else "",
        )
        for shape in scene.shapes
    )
    relation = "" if alone else relation_word(*(shape.centre_yx for shape in scene.shapes))
    ground = Ground(scene.ground.style, scene.ground.colour, scene.ground.other)
    return Expectation(tuple(wanted), relation, ground)


def expect(caption: str) -> Expectation:
    """What a caption in the small world's words asks for; raises ValueError where it names no shape, or more than two.

    What it does not recognise, it does not ask for.
    """
    text = " ".join(caption.lower().split())
    found = list(_SHAPE.finditer(text))
    if not 1 <= len(found) <= 2:
        raise ValueError(f"names {len(found)} shapes, not one or two: {caption!r}")
    wanted = [Wanted(match["kind"], match["colour"], match["size"] or "") for match in found]
    relation = _RELATION.search(text)
    ground = _find_ground(text)
    if len(wanted) == 1:
        position = _POSITION.search(text)
        one = Wanted(wanted[0].kind, wanted[0].colour, wanted[0].size, position[1] if position else "")
        return Expectation((one,), "", ground)
    word = _RELATIONS[relation[0]] if relation else ""
    if word in BACK.values():
        wanted.reverse()
        word = next(forth for forth, back in BACK.items() if back == word)
    return Expectation(tuple(wanted), word, ground)


_SHAPE = re.compile(rf"\b(?:(?P<size>small|large) )?(?P<colour>{'|'.join(COLOURS)}) (?P<kind>{'|'.join(KINDS)})\b")
_POSITION = re.compile(r"\b(?:at|in|on) the ((?:top|bottom)(?: (?:left|right))?|left|right|middle)\b")
_ANY_GROUND = "|".join(GROUNDS)
_STYLES = {
    "fade": re.compile(rf"\b(?:from )?({_ANY_GROUND}) (?:fading )?to ({_ANY_GROUND})\b"),
    "stripes": re.compile(rf"\b({_ANY_GROUND}) and ({_ANY_GROUND})\b"),
    "plain": re.compile(rf"\b({_ANY_GROUND})()\b"),
}
# The first shape's relation to the second, by what stands in the text.
_RELATIONS = {
    **{word: word for pair in BACK.items() for word in pair},
    **{here: forth for forth, (here, _) in SIDES.items()},
    **{there: BACK[forth] for forth, (_, there) in SIDES.items()},
}
_RELATION = re.compile("|".join(rf"\b{words}\b" for words in _RELATIONS))


def _find_ground(text: str) -> Ground | None:
    for style, pattern in _STYLES.items():
        if match := pattern.search(text):
            return Ground(style, match[1], match[2])  # type: ignore[arg-type]
    return None


def _on(ground: Ground) -> str:
    match ground.style:
        case "plain":
            return f"on {ground.colour}"
        case "stripes":
            return f"on {ground.colour} and {ground.other} stripes"
        case "fade":
            return f"on {ground.colour} fading to {ground.other}"


def _background(ground: Ground) -> str:
    match ground.style:
        case "plain":
            return f"a {ground.colour} background"
        case "stripes":
            return f"a striped background of {ground.colour} and {ground.other}"
        case "fade":
            return f"a background fading from {ground.colour} to {ground.other}"


def _where(scene: Scene, shape: Shape) -> str:
    word = position_word(shape.centre_yx, scene.size_hw)
    return f"{'in' if word == 'middle' else 'at'} the {word}"


def _sized(scene: Scene, shape: Shape) -> str:
    return _named(shape, size_word(shape.radius_px, scene.size_hw))


def _named(shape: Shape, size: str = "") -> str:
    words = f"{size} {shape.colour} {shape.kind}".strip()
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"
