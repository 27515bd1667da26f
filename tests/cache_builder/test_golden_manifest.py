"""What a scan makes of fixed bytes, as the digest of a manifest: a change of how samples are kept must not move it."""

import json
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from cache_builder.config import BuildConfig
from cache_builder.datasets import open_sources
from cache_builder.meta import meta_types
from cache_builder.report import BuildReport
from cache_builder.scan import Scanner
from cache_builder.sealing import SampleRows
from shared.config import load_config
from shared.manifest_rows import ManifestSettings, manifest_digest
from shared.store import StoreWriter

SETTINGS = ManifestSettings(
    vae_digest="ab" * 32,
    scaling_factor=0.13025,
    latent_channels=4,
    downscale=8,
    latents="moments",
    text_digests={"text_encoder": "cd" * 32, "tokenizer": "ef" * 32},
    text_widths=(768, 1280),
    pooled_width=1280,
    text_chunks=1,
    null_text_key="00" * 16,
    zeros_for_empty_prompt=True,
    datasets=("folder", "table"),
    build={},
)
RULES = {
    "plain": (),
    "crops": ("images.crop=random", "images.variants=3", "images.flip=on", "images.max_aspect=2", "seed=5"),
    "texts": ("captions.variants={count = 3, drop = 0.2}", "captions.trigger=sks", "captions.remove=['blue']"),
    "some": ("images.skip.max_samples=7", "images.flip=force", "images.crop=corner", "images.variants=2"),
    "off": ("images.crop=off", "images.skip.min_size=50"),
}
GOLDEN = {
    "plain": "91af7fe540b82f779bc51e8a153e0af5f324f02675a10bc90e3bbf01fbe87827",
    "crops": "0095880010a642e31087feed93de1cbdc8a1c8df3121be7fa2c55c657baee786",
    "texts": "625917c1478781c89d45d45c54dd44bfff300790e4f5f3d6444a8b98d66c9a8c",
    "some": "9ba361848f7e707b06aa3d943fac8ed33e47fe2ca1d86060a1070da25fa6d237",
    "off": "2aeb60cbb451db1c3320cc6e775dc01dea280178441b62a4b7b898cf516aeaf0",
}


def bmp(number: int, width: int, height: int) -> bytes:
    """A picture of one colour whose bytes nobody's encoder decides."""
    row = bytes([number, 255 - number, number * 7 % 256]) * width
    pixels = (row + bytes(-len(row) % 4)) * height
    head = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 24, 0, len(pixels), 2835, 2835, 0, 0)
    return b"BM" + struct.pack("<IHHI", 54 + len(pixels), 0, 0, 54) + head + pixels


def picture(number: int) -> bytes:
    return bmp(number, 40 + 13 * (number % 7), 40 + 17 * (number % 5))


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("golden")
    folder, table = root / "folder", root / "table"
    for number in range(16):
        place = folder / f"{number % 3}"
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{number}.bmp").write_bytes(picture(number % 12))  # four of them stand twice
        side = "to the left, " if number in (3, 13) else ""
        (place / f"{number}.txt").write_text(f"{side}number {number % 9}, red, blue, ümlaut\nsecond line {number % 4}")
    table.mkdir()
    rows = []
    for number in range(8, 20):
        (table / f"{number}.bmp").write_bytes(picture(number))
        meta = {"score": number / 4 if number % 2 else number, "tags": ["a", f"t{number}"], "kept": number > 10}
        rows.append({"file_name": f"{number}.bmp", "text": f"row {number}", **(meta if number % 3 else {})})
    rows.append({"file_name": "9.bmp", "text": "row again", "only": "here"})
    (table / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder, table


@pytest.fixture
def store(tmp_path: Path) -> Iterator[StoreWriter]:
    with StoreWriter(tmp_path / "store") as writer:
        yield writer


def digest_of(places: tuple[Path, Path], store: StoreWriter, sets: tuple[str, ...]) -> str:
    folder, table = places
    second = f'{{id = "table", root = "{table}", source = {{kind = "table"}}}}'
    datasets = f'datasets=[{{id = "folder", root = "{folder}"}}, {second}]'
    config = load_config(BuildConfig, sets=["images.resolution=64", "images.step=16", *sets, datasets])
    report = BuildReport()
    scanner = Scanner(config, SETTINGS.vae_digest, "float32", SETTINGS.text_digests, report)
    samples = scanner.scan(open_sources(config.datasets), store)
    settings = SETTINGS.model_copy(update={"meta": meta_types(samples)})
    held_out = [index % 5 == 0 for index in range(len(samples))]
    return manifest_digest(settings, SampleRows(samples, held_out, settings.meta))


@pytest.mark.parametrize("rules", RULES)
def test_a_manifest_is_what_it_was(rules: str, places: tuple[Path, Path], store: StoreWriter) -> None:
    assert digest_of(places, store, RULES[rules]) == GOLDEN[rules]
