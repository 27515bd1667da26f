"""Which records the manifests of a store name, as sorted arrays: a million samples are 16 bytes a key.

verify (is it all there), gc (what may go) and stats (what belongs to what) stand on this.
"""

from collections.abc import Iterable

import numpy as np

from cache_builder.key_arrays import KEY_DTYPE, Keys, as_keys, each
from cache_builder.keys import facts_key, text_facts_key
from shared.errors import ManifestMismatch
from shared.manifest import Manifest
from shared.pictures import PixelRules


def latent_keys(manifest: Manifest) -> Keys:
    """Keys of the latents that a manifest names, sorted, once each."""
    return _sorted(manifest.latent_keys())


def text_keys(manifest: Manifest) -> Keys:
    """Keys of the texts that a manifest names, with those of its prompts and of the empty one, sorted, once each."""
    settings = manifest.settings
    others = [bytes.fromhex(key) for key in (settings.null_text_key, *settings.prompts.values())]
    return _sorted(np.concatenate([manifest.text_keys(), as_keys(others)]))


def facts_keys(manifest: Manifest) -> Keys:
    """Keys of what is known of a manifest's pictures and captions: they spare the next build decoding and counting."""
    pictures = (facts_key(digest, rules) for rules in _pixel_rules(manifest) for digest in manifest.image_digests())
    captions = (text_facts_key(key) for key in each(text_keys(manifest)))
    return _sorted(as_keys([*pictures, *captions]))


def union(keys: Iterable[Keys]) -> Keys:
    """All of them, sorted, once each."""
    return _sorted(np.concatenate([np.zeros(0, KEY_DTYPE), *keys]))


def _sorted(keys: Keys) -> Keys:
    return np.unique(keys)


def _pixel_rules(manifest: Manifest) -> set[PixelRules]:
    """Those of all data sets; a key that is none costs nothing here."""
    try:
        build = manifest.settings.build
        images = [build["images"], *(rules["images"] for rules in build.get("datasets", {}).values())]
        return {PixelRules(tuple(of["background"]), of["resample"]) for of in images}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ManifestMismatch(f"manifest {manifest.name!r} does not say its pixel rules ({error!r})") from None
