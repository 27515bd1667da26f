"""Which weights of a UNet a config means: names read off the files' headers, before anything large is loaded.

["attention", "mid_block.*"] -> names of parameters (`trainable`) or of layers (`adapter.targets`)
"""

import difflib
from collections.abc import Collection, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase

from shared.errors import ConfigError

PRESETS: dict[str, tuple[str, ...]] = {
    "full": ("*",),
    "attention": ("*.attn1.*", "*.attn2.*"),
    "cross-attention": ("*.attn2.*",),
    "biases": ("*.bias",),
    "norms": ("*norm*.weight", "*norm*.bias"),
}
_LAYER_DIMS = (2, 4)  # weights of linear layers [out, in] and of convolutions [out, in, h, w]


def trained_names(trainable: Sequence[str], shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """Names among `shapes` that `trainable` means, in their order; raises ConfigError where a pattern means none."""
    return _matching("trainable", trainable, shapes)


def adapted_layers(targets: Sequence[str], shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """Layers that `targets` means, linear ones and convolutions, of a UNet whose weights have these `shapes` by name.

    Raises ConfigError where a pattern means none.
    """
    weights = (name for name, shape in shapes.items() if name.endswith(".weight") and len(shape) in _LAYER_DIMS)
    return _matching("adapter.targets", targets, [name.removesuffix(".weight") for name in weights])


def _matching(setting: str, patterns: Iterable[str], names: Collection[str]) -> list[str]:
    chosen: set[str] = set()
    for pattern in patterns:
        found = {name for own in PRESETS.get(pattern, (pattern,)) for name in names if _means(own, name)}
        if not found:
            raise ConfigError(f"{setting}: {pattern!r} names nothing in this UNet{_nearest(pattern, names)}")
        chosen |= found
    return [name for name in names if name in chosen]


def _means(pattern: str, name: str) -> bool:
    """Whether a pattern of the shell means a name, or a part of the UNet in which it lies."""
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*")


def _nearest(pattern: str, names: Collection[str]) -> str:
    split = [name.split(".") for name in names]
    known = [*PRESETS, *sorted({".".join(parts[:end]) for parts in split for end in range(1, len(parts) + 1)})]
    plain = pattern.replace("*", "").strip(".")
    near = difflib.get_close_matches(plain, known, n=3, cutoff=0.5) or [name for name in known if plain in name][:3]
    if near:
        return f"; near it: {', '.join(near)}"
    return f"; presets are {', '.join(PRESETS)}, patterns look like 'up_blocks.1.*'"
