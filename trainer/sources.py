"""Pictures that drawing begins with in place of noise: files that were given, or what a store holds out.

files -> shared/pictures.py -> VAE    \\
STORE -> held-out split -> moments    -> Source -> generate.py

What is drawn is a function of the seed and of the picture: its posterior and its noise follow its label.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shared.conditioning import MicroConditioning
from shared.contract import PairContract
from shared.errors import ConfigError, ContractError, DataError, RecordCorrupt
from shared.latents import LatentMoments, sample_latents
from shared.manifest import open_manifest
from shared.parts import PINNED_SAMPLES
from shared.pictures import EXTENSIONS, PixelLimits, PixelRules, Pixels, cover, decode_image, read_size
from shared.progress import say
from shared.prompts import read_prompts_file
from shared.seeding import make_generator
from shared.store import StoreReader
from shared.vae import Vae
from trainer.eval_samples import PinnedSample, choose_samples

RULES, LIMITS = PixelRules(), PixelLimits()
MOST_ASPECT = 4  # of what is drawn; longer pictures are cut


@dataclass(frozen=True)
class Source:
    """A picture to begin with."""

    name: str
    label: bytes  # of its noise: a sample's id, or the digest of a file's bytes
    hw: tuple[int, int]  # px, of what is drawn
    sizes: MicroConditioning  # what the UNet is told
    caption: str | None
    read: Callable[[Vae], tuple[LatentMoments, Pixels]]  # moments [4, h, w], and the picture; raises DataError

    def start(self, vae: Vae, seed: int) -> tuple[Tensor, Pixels]:
        """x_0, scaled latents fp32 [4, h, w] on the CPU, and the picture that it is; raises DataError."""
        moments, pixels = self.read(vae)
        eps = torch.randn(moments.mean.shape, generator=make_generator(seed, "source posterior", self.label))
        return sample_latents(moments, vae.scaling_factor, eps), pixels

    def generator(self, seed: int) -> torch.Generator:
        """Of its noise, and then of what a scheduler draws."""
        return make_generator(seed, "source noise", self.label)


@dataclass(frozen=True)
class SizeRule:
    """How large a given picture is drawn: as asked, or with its own aspect and the area that the UNet draws."""

    height: int | None
    width: int | None
    own_px: int
    step_px: int

    def size_of(self, picture_hw: tuple[int, int]) -> tuple[int, int]:
        """(h, w), px, multiples of the step where they are not given."""
        aspect = min(max(picture_hw[1] / picture_hw[0], 1 / MOST_ASPECT), MOST_ASPECT) ** 0.5
        free = (self.own_px / aspect, self.own_px * aspect)
        return self.height or self._near(free[0]), self.width or self._near(free[1])

    def _near(self, edge_px: float) -> int:
        return max(1, round(edge_px / self.step_px)) * self.step_px


def find_sources(
    path: Path, manifest: str, rule: SizeRule, contract: PairContract, limit: int | None
) -> tuple[list[Source], int]:
    """The pictures at a path, at most `limit`: a picture, a folder of them, or a store's held-out split.

    And how many of them cannot be read, which is said of each. Some only turn out to be damaged when they are read.
    Raises ConfigError where there is nothing to begin with, DataError where none can be read or none is held out,
    ContractError where the store's latents are of another VAE.
    """
    if (path / "store.json").exists():
        if rule.height or rule.width:
            raise ConfigError("--height and --width: what a store holds has its own size")
        return _held_out(path, manifest, contract, limit), 0
    files = ([path] if path.is_file() else _pictures_in(path))[:limit]
    sources = [source for file in files if (source := _of_file(file, rule)) is not None]
    if not sources:
        raise DataError(f"--from-images {path}: no picture in it can be read")
    return sources, len(files) - len(sources)


def _pictures_in(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise ConfigError(f"--from-images {folder}: no picture, folder or store is there")
    found = sorted(file for file in folder.iterdir() if file.suffix.lower() in EXTENSIONS and not file.is_symlink())
    if not found:
        raise ConfigError(f"--from-images {folder}: no pictures in it ({', '.join(sorted(EXTENSIONS))})")
    return found


def _of_file(file: Path, rule: SizeRule) -> Source | None:
    """A file as a source; None, and a line that says why, where it is none."""
    try:
        data = _bytes_of(file)
        hw = rule.size_of(read_size(data, LIMITS))
    except DataError as error:
        say(f"passed over: {file}: {error}")
        return None
    digest = blake2b(data, digest_size=32).digest()

    def read(vae: Vae) -> tuple[LatentMoments, Pixels]:
        pixels = cover(decode_image(_bytes_of(file), RULES, LIMITS), hw)
        moments = vae.encode(torch.from_numpy(pixels.copy())[None])
        assert moments.logvar is not None
        return LatentMoments(moments.mean[0].cpu(), moments.logvar[0].cpu()), pixels

    beside = file.with_suffix(".txt")
    captions = read_prompts_file(beside) if beside.is_file() else []
    return Source(file.name, digest, hw, MicroConditioning(hw, (0, 0), hw), captions[0] if captions else None, read)


def _bytes_of(file: Path) -> bytes:
    try:
        if file.stat().st_size > LIMITS.max_bytes:
            raise DataError(f"larger than {LIMITS.max_bytes} bytes")
        return file.read_bytes()
    except OSError as error:
        raise DataError(error.strerror or str(error)) from None


def _held_out(path: Path, name: str, contract: PairContract, limit: int | None) -> list[Source]:
    manifest = open_manifest(path, name)
    if manifest.settings.vae_digest != contract.vae_digest:
        raise ContractError(f"the latents in {path} are of another VAE than the experts'")
    samples = choose_samples(manifest, limit or PINNED_SAMPLES)
    if not samples:
        raise DataError(
            f"manifest {name!r} of {path} holds no picture out (split.eval_fraction): nothing to begin with"
        )
    return [source_of_sample(lambda: StoreReader(path), sample) for sample in samples]


def source_of_sample(opened: Callable[[], AbstractContextManager[StoreReader]], sample: PinnedSample) -> Source:
    """A held-out sample of the store that is `opened`: its caption is read now, its latents when it is drawn from."""
    with opened() as store, store.snapshot() as snapshot:
        caption = str(snapshot.read(bytes.fromhex(sample.text_key)).meta["caption"])

    def read(vae: Vae) -> tuple[LatentMoments, Pixels]:
        with opened() as store, store.snapshot() as snapshot:
            tensors = snapshot.read(bytes.fromhex(sample.latent_key)).tensors
        mean, logvar = (_tensor(tensors.get(part)) for part in ("mean", "logvar"))
        if mean is None:
            raise RecordCorrupt(f"record {sample.latent_key} holds no latents")
        pixels = vae.decode(mean[None] * vae.scaling_factor)[0].numpy()
        return LatentMoments(mean, logvar if sample.has_variance else None), pixels

    sizes = MicroConditioning(sample.original_hw, sample.crop_top_left, sample.target_hw)
    return Source(sample.sample_id[:12], bytes.fromhex(sample.sample_id), sample.bucket_hw, sizes, caption, read)


def _tensor(array: "np.ndarray[Any, Any] | None") -> Tensor | None:
    return None if array is None else torch.from_numpy(np.array(array, np.float32))
