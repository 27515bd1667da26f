"""From a caption as it was found to the texts that are encoded: filtered, varied, with a trigger, between two ends.

captions -> filter_captions -> (policy for empty ones: scan.py) -> write_texts -> text keys

Every draw is a function of (seed, picture, caption, variant): no order of files or captions changes a text.
"""

import re
from collections.abc import Iterable, Sequence

from cache_builder.captions import CaptionRules, CaptionVariants
from cache_builder.keys import tag_draw

# Whole words; the rest of a sentence can give either of them another sense, so what is found is kept as it is.
_SIDES = re.compile(r"\b(?:left|right)(?:most|wards?)?\b", re.IGNORECASE)


def filter_captions(captions: Iterable[str], rules: CaptionRules) -> tuple[str, ...]:
    """`captions` without what the rules remove, each once; what is left of one may be empty."""
    if not rules.remove and not rules.remove_patterns:
        return tuple(dict.fromkeys(captions))
    return tuple(dict.fromkeys(_filter(caption, rules) for caption in captions))


def write_texts(captions: Sequence[str], rules: CaptionRules, seed: int, digest: bytes) -> tuple[str, ...]:
    """The texts of a picture: of each caption first itself, then its variants; each once."""
    if rules.variants.count == 1 and not (rules.trigger or rules.prefix or rules.suffix):
        return tuple(dict.fromkeys(captions))
    varied = (text for caption in captions for text in _vary(caption, rules.variants, seed, digest))
    return tuple(dict.fromkeys(_finish(text, rules) for text in varied))


def says_a_side(text: str) -> bool:
    """Whether an English text says left or right, which a mirrored picture would make a lie."""
    return _SIDES.search(text) is not None


def _filter(caption: str, rules: CaptionRules) -> str:
    left = caption
    for string in rules.remove:
        left = left.replace(string, "")
    if rules.remove_patterns:
        from cache_builder.patterns import remove_patterns

        left = remove_patterns(left, rules.remove_patterns)
    return caption if left == caption else _tidy(left, rules.variants.split_on)


def _tidy(text: str, split_on: str) -> str:
    """A text that something was taken out of: no tag that is empty, no space that is doubled."""
    return " ".join(split_on.join(tag for tag in text.split(split_on) if tag.strip()).split())


def _vary(caption: str, rules: CaptionVariants, seed: int, digest: bytes) -> list[str]:
    if rules.count == 1:
        return [caption]
    tags = [stripped for tag in caption.split(rules.split_on) if (stripped := tag.strip())]
    fixed, loose = tags[: rules.keep_first], tags[rules.keep_first :]
    texts = [caption]
    for variant in range(1, rules.count) if loose else ():
        draws = [tag_draw(seed, digest, caption, variant, index) for index in range(len(loose))]
        kept = [i for i, (_, chance) in enumerate(draws) if chance >= rules.drop]
        if not kept and not fixed:
            kept = [max(range(len(loose)), key=lambda i: draws[i][1])]
        if rules.shuffle:
            kept.sort(key=lambda i: draws[i][0])
        texts.append(_join([*fixed, *(loose[i] for i in kept)], rules.split_on))
    return texts


def _join(tags: Sequence[str], split_on: str) -> str:
    return (split_on if split_on[-1].isspace() else split_on + " ").join(tags)


def _finish(text: str, rules: CaptionRules) -> str:
    trigger = rules.trigger.strip()
    if trigger and not _begins_with(text, trigger):
        text = _join([trigger, text], rules.variants.split_on) if text else trigger
    has_ends = text and (rules.prefix or rules.suffix)
    return f"{rules.prefix}{text}{rules.suffix}".strip() if has_ends else text


def _begins_with(text: str, words: str) -> bool:
    return text.startswith(words) and not text[len(words) : len(words) + 1].isalnum()
