"""What do the latents hold: `cache-store show` draws cached crops, decoded, beside the pictures they were made from.

manifest -> samples spread over it -> latents -> VAE, or the stored preview -> cards -> sheet.py -> PNG
"""

import contextlib
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from cache_builder.keys import image_digest
from shared.atomic import write_atomically
from shared.beneath import read_regular
from shared.errors import ConfigError, ContractError, DataError, RecordCorrupt
from shared.manifest import Manifest, open_manifest
from shared.manifest_rows import ManifestRow
from shared.pictures import PixelLimits, PixelRules, decode
from shared.preview import preview_picture, read_preview
from shared.sheet import Card, Panel, draw_sheet
from shared.store import StoreReader

MANY = 60  # above so many cards the pictures are smaller
MAX_SOURCE_BYTES = 256 << 20

Pixels = np.ndarray[Any, np.dtype[np.uint8]]
Decoder = Callable[[np.ndarray[Any, Any]], Pixels]


@dataclass(frozen=True)
class ShowOptions:
    """What to show, and how."""

    manifest: str = "main"
    model: str | None = None
    sources: tuple[Path, ...] = ()
    count: int = 24
    device: str = "auto"


@dataclass
class Shown:
    """What was drawn."""

    out: str
    manifest: str
    digest: str
    samples: int = 0
    decoded_by: str = ""
    damaged: list[str] = field(default_factory=list)
    """Samples whose records cannot be read, and why."""
    sources_missing: int = 0

    def as_json(self) -> dict[str, Any]:
        """The account for programs."""
        return asdict(self)


def show_store(store: Path, out: Path, options: ShowOptions) -> Shown:
    """Draw a sheet of a manifest's samples into the PNG file `out`.

    Raises ConfigError where there is nothing to decode with, ContractError where --model has another VAE.
    """
    if out.is_dir():
        raise ConfigError(f"--out {out} is a folder: name a PNG file")
    for folder in options.sources:
        if not folder.is_dir():
            raise ConfigError(f"--source {folder}: there is no such folder")
    with contextlib.closing(StoreReader(store)) as reader:
        manifest = open_manifest(store, options.manifest)
        shown = Shown(str(out), manifest.name, manifest.digest)
        decoder, shown.decoded_by = _decoder(store, manifest, options)
        here = np.flatnonzero(manifest.rows_in(manifest.parts))
        rows = manifest.rows(here[_spread(len(here), options.count)])
        cards = [_card(reader, row, manifest, decoder, options, shown) for row in rows]
    shown.samples = len(cards)
    beside = "; at the right their sources" if options.sources else ""
    heading = (
        f"{manifest.name} {manifest.digest[:16]}: {len(cards)} of {len(manifest)} samples, {shown.decoded_by}{beside}"
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(out, draw_sheet(heading, cards, 256 if len(cards) <= MANY else 128))
    return shown


def _spread(total: int, count: int) -> list[int]:
    """`count` indices, evenly over rows, which are sorted by data set and bucket."""
    return sorted(set(np.linspace(0, total - 1, min(count, total)).round().astype(int).tolist())) if total else []


def _decoder(store: Path, manifest: Manifest, options: ShowOptions) -> tuple[Decoder, str]:
    known = manifest.settings
    if options.model is None:
        preview = read_preview(store, known.vae_digest)
        if preview is None:
            raise ConfigError(f"{store} has no preview of its VAE's latents: name the model it was built with, --model")
        return lambda latents: preview_picture(latents, preview), "shown by the linear preview"
    from shared.model_folder import resolve_model
    from shared.vae import read_vae_facts

    model = resolve_model(options.model, ("vae",))
    if read_vae_facts(model).digest != known.vae_digest:
        raise ContractError(f"{options.model} has another VAE than the one that made manifest {manifest.name!r}")
    return _vae_decoder(model, options.device), "decoded by the VAE"


def _vae_decoder(model: Path, device: str) -> Decoder:
    import torch

    from shared.device import choose_device
    from shared.vae import Vae

    vae = Vae(model, choose_device(device))

    def decode_latents(latents: np.ndarray[Any, Any]) -> Pixels:
        scaled = torch.from_numpy(latents.astype(np.float32))[None] * vae.scaling_factor
        return np.asarray(vae.decode(scaled)[0].numpy())

    return decode_latents


def _card(
    reader: StoreReader, row: ManifestRow, manifest: Manifest, decoder: Decoder, options: ShowOptions, shown: Shown
) -> Card:
    variant = row.variants[0]
    h, w = row.bucket_hw
    title = f"{h} x {w}  {row.split}  {row.dataset}/{row.path}"
    panels, caption = [], ""
    try:
        with reader.snapshot() as snapshot:
            caption = str(snapshot.read(row.text_keys[0]).meta.get("caption", "")) if row.text_keys else ""
            latents = snapshot.read(variant.latent_key).tensors["mean"]
        panels.append(Panel(decoder(latents)))
    except RecordCorrupt as error:
        shown.damaged.append(f"{row.dataset}/{row.path}: {error}")
        panels.append(Panel(None, str(error)))
    if options.sources:
        panels.append(_source_panel(options.sources, row, _rules(manifest, row.dataset)))
        shown.sources_missing += panels[-1].pixels is None
    return Card(tuple(panels), title, caption)


def _rules(manifest: Manifest, dataset: str) -> PixelRules:
    """As far as a picture for people needs them."""
    build = manifest.settings.build
    with contextlib.suppress(AttributeError, KeyError, TypeError, ValueError):
        red, green, blue = build.get("datasets", {}).get(dataset, build)["images"]["background"]
        return PixelRules((red, green, blue))
    return PixelRules()


def _source_panel(roots: tuple[Path, ...], row: ManifestRow, rules: PixelRules) -> Panel:
    """The picture that the row was made from, by its bytes, under any of the folders."""
    why = "the source is not there"
    for root in roots:
        try:
            data = _read_inside(root, row.path)
            if image_digest(data) == row.image_digest:
                return Panel(decode(data, rules, PixelLimits()))
            why = "the source is another picture now"
        except DataError as error:
            why = f"the source {error}"
    return Panel(None, why)


def _read_inside(root: Path, path: str) -> bytes:
    """A file under `root`, by a path that is data: it may not lead out, nor through a symbolic link."""
    parts = PurePosixPath(path).parts
    if not parts or path.startswith("/") or ".." in parts or "\0" in path:
        raise DataError("has a path that leads out of its folder")
    folder = root
    for part in parts[:-1]:
        folder = folder / part
        if folder.is_symlink():
            raise DataError("lies behind a symbolic link")
    return read_regular(str(folder / parts[-1]), MAX_SOURCE_BYTES)
