"""Which records the manifests of a store name, as sorted arrays: a million samples are 16 bytes a key.

verify (is it all there), gc (what may go) and stats (what belongs to what) stand on this.
"""

from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from cache_builder.key_arrays import KEY_DTYPE, Keys, as_keys, each
from cache_builder.keys import facts_key, text_facts_key
from shared.errors import ManifestMismatch
from shared.manifest import Manifest
from shared.parts import Mask
from shared.pictures import PixelRules


def latent_keys(manifest: Manifest, rows: Mask | None = None) -> Keys:
    """Keys of the latents that a manifest names, or those of its `rows` do; sorted, once each."""
    keys = manifest.latent_keys()
    return _sorted(keys if rows is None else keys[np.repeat(rows, manifest.variant_counts())])


def text_keys(manifest: Manifest, rows: Mask | None = None) -> Keys:
    """Keys of the texts of a manifest or of its `rows`, with its prompts' and the empty one's, sorted, once each."""
    keys = manifest.text_keys()
    keys = keys if rows is None else keys[np.repeat(rows, manifest.caption_counts())]
    return _sorted(np.concatenate([keys, common_keys(manifest)]))


def common_keys(manifest: Manifest) -> Keys:
    """Keys of what belongs to no sample: the embeds of the empty prompt and of the prompts for validation."""
    settings = manifest.settings
    return as_keys([bytes.fromhex(key) for key in (settings.null_text_key, *settings.prompts.values())])


def needed_keys(manifest: Manifest) -> Keys:
    """Keys of the latents and texts that must be in the store for what it has of a manifest: all, or some parts."""
    rows = manifest.rows_in(manifest.parts) if manifest.parts else None
    return union([latent_keys(manifest, rows), text_keys(manifest, rows)])


def facts_keys(manifest: Manifest, rows: Mask | None = None) -> Keys:
    """Keys of what is known of pictures and captions: they spare the next build decoding and counting."""
    digests = manifest.image_digests() if rows is None else manifest.image_digests(np.flatnonzero(rows).tolist())
    captions = (text_facts_key(key) for key in each(text_keys(manifest, rows)))
    return _sorted(as_keys([*picture_facts_keys(manifest, digests), *captions]))


def picture_facts_keys(manifest: Manifest, digests: Sequence[bytes]) -> Iterator[bytes]:
    """Keys of what is known of each picture, under each of the manifest's rules for pixels in turn."""
    return (facts_key(digest, rules) for rules in pixel_rules(manifest) for digest in digests)


def union(keys: Iterable[Keys]) -> Keys:
    """All of them, sorted, once each."""
    return _sorted(np.concatenate([np.zeros(0, KEY_DTYPE), *keys]))


def _sorted(keys: Keys) -> Keys:
    return np.unique(keys)


def pixel_rules(manifest: Manifest) -> list[PixelRules]:
    """Those of all data sets; a key that is none costs nothing here."""
    try:
        build = manifest.settings.build
        images = [build["images"], *(rules["images"] for rules in build.get("datasets", {}).values())]
        return list(dict.fromkeys(PixelRules(tuple(of["background"]), of["resample"]) for of in images))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ManifestMismatch(f"manifest {manifest.name!r} does not say its pixel rules ({error!r})") from None
