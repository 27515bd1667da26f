"""Builds of damaged pictures: the builder lives, each one is accounted for, and nothing that is stored is broken."""

import io
import os
import random
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cache_builder.report import BuildReport
from shared.manifest import open_manifest
from shared.pictures import PictureError, PixelLimits, PixelRules, decode
from shared.store import StoreReader

Build = Callable[..., BuildReport]
SUFFIXES = {"PNG": "png", "JPEG": "jpg", "WEBP": "webp", "GIF": "gif", "BMP": "bmp", "TIFF": "tiff", "AVIF": "avif"}
MODES = ("RGB", "L", "P", "RGBA", "1", "I;16", "CMYK")
LENIENT = ("captions.missing=empty", "max_quarantined=1", "encode.batch=32")
PILLOW = "SDXL_EXPERTS_PILLOW_SOURCE"


def good_pictures() -> dict[str, list[bytes]]:
    """For each format, a few sound files of the modes that it has."""
    rng = np.random.default_rng(0)
    found: dict[str, list[bytes]] = {}
    for form in SUFFIXES:
        for index, mode in enumerate(MODES):
            height, width = 40 + 9 * index, 88 - 7 * index
            soft = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)).resize((width, height))
            file = io.BytesIO()
            try:
                (soft.convert("L") if mode == "I;16" else soft).convert(mode).save(file, format=form)
            except (OSError, ValueError, KeyError):
                continue  # a mode that this format has not
            found.setdefault(form, []).append(file.getvalue())
    return found


def corrupt(good: bytes, rng: random.Random) -> bytes:
    """One way to lose a file: cut, bits, zeros, bytes too many or too few, another's head, nothing at all."""
    data, at = bytearray(good), rng.randrange(len(good))
    span = rng.choice([1, 4, 64, 512])
    match rng.randrange(8):
        case 0:
            return good[:at]
        case 1:
            for _ in range(rng.choice([1, 3, 30])):
                data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        case 2:
            data[at : at + span] = bytes(len(data[at : at + span]))
        case 3:
            data[at:at] = rng.randbytes(span)
        case 4:
            del data[at : at + span]
        case 5:
            data[:at] = rng.randbytes(at)
        case 6:
            head = rng.randrange(min(64, len(data)))
            data[head : head + 4] = rng.choice([b"\xff" * 4, b"\0" * 4, b"\x7f\xff\xff\xff", b"\x01\0\0\0"])
        case 7:
            data = bytearray(rng.choice([b"", b"\0" * 64, good[:8] * 40, good * 2]))
    return bytes(data)


def write_corrupt(folder: Path, count: int) -> None:
    """`count` files, as many of each format, and no two the same; every twentieth is sound."""
    folder.mkdir()
    pictures, rng = good_pictures(), random.Random(16)
    assert pictures.keys() == SUFFIXES.keys()
    for index in range(count):
        form = list(SUFFIXES)[index % len(SUFFIXES)]
        good = rng.choice(pictures[form])
        data = good + index.to_bytes(4, "little") if index % 20 == 0 else corrupt(good, rng)
        (folder / f"{index:05}.{SUFFIXES[form]}").write_bytes(data)


def decodes(data: bytes) -> tuple[int, int] | None:
    """Height and width of what is decoded; None where it cannot be."""
    try:
        height, width, _ = decode(data, PixelRules(), PixelLimits()).shape
    except PictureError:
        return None
    return height, width


def check(folder: Path, store: Path, report: BuildReport) -> dict[str, tuple[int, int]]:
    """Require that the account is exact and the store whole; returns the sizes of the samples by their paths."""
    report.check()
    names = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert report.seen == len(names)
    manifest = open_manifest(store, "main")
    rows = {row.path: row for row in manifest.rows(range(len(manifest)))}
    lost = dict(report.quarantined)
    assert not rows.keys() & lost.keys()
    assert len(rows) + len(lost) + report.duplicate + report.skipped.total() == len(names)
    assert all(why and len(why.splitlines()) == 1 for why in lost.values())
    with StoreReader(store) as reader, reader.snapshot() as snapshot:
        for row in rows.values():
            for variant in row.variants:
                tensors = snapshot.read(variant.latent_key).tensors
                assert all(np.isfinite(tensor).all() for tensor in tensors.values()), row.path
                assert tensors["mean"].shape[-2:] == tuple(n // 8 for n in variant.target_hw), row.path
    for path, row in rows.items():
        assert decodes(names[path]) == row.original_hw, path
    assert all(decodes(names[path]) is None for path, why in lost.items() if "too long and thin" not in why)
    return {path: row.original_hw for path, row in rows.items()}


@pytest.mark.parametrize("count", [300, pytest.param(5000, marks=pytest.mark.slow)])
def test_corrupt_pictures_cost_themselves(tmp_path: Path, tiny_model: Path, run_build: Build, count: int) -> None:
    write_corrupt(tmp_path / "set", count)
    report = run_build([tmp_path / "set"], tmp_path / "store", tiny_model, *LENIENT)
    usable = check(tmp_path / "set", tmp_path / "store", report)
    assert count // 20 <= len(usable) < count  # the sound ones, and those whose damage shows in pixels only
    assert len(report.quarantined) > count // 4


def pillow_images(tmp_path: Path) -> Path:
    """The folder of test pictures in Pillow's source, from where the environment says or from the package index."""
    if given := os.environ.get(PILLOW):
        (images,) = [path for path in (Path(given), *Path(given).glob("**/Tests/images")) if path.name == "images"][:1]
        return images
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", ":all:", "pillow"]
    try:
        subprocess.run([*command, "-d", str(tmp_path)], capture_output=True, check=True, timeout=300)
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired):
        pytest.skip(f"no package index gives Pillow's source: unpack it and name the folder in {PILLOW}")
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as file:
        file.extractall(tmp_path, filter="data")
    return next(tmp_path.glob("*/Tests/images"))


@pytest.mark.slow
def test_pillows_own_pictures(tmp_path: Path, tiny_model: Path, run_build: Build) -> None:
    """Some 800 pictures of every mode and format, bombs and broken ones among them, each under a name we read."""
    images, folder = pillow_images(tmp_path), tmp_path / "set"
    files = [path for path in sorted(images.rglob("*")) if path.is_file()]
    assert len(files) > 500
    folder.mkdir()
    for index, path in enumerate(files):
        suffix = "" if path.suffix.lower() in {".png", ".jpg", ".webp", ".gif", ".bmp", ".tif", ".avif"} else ".png"
        (folder / f"{index:04} {path.name.lstrip('.')}{suffix}").write_bytes(path.read_bytes())
    report: Any = run_build([folder], tmp_path / "store", tiny_model, *LENIENT)
    usable = check(folder, tmp_path / "store", report)
    assert len(usable) > 300
