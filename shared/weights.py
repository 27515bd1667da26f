"""Weights on disk: which files of a model folder hold them, and a digest that names what they are, not how they lie.

Reads safetensors headers itself, so that a digest needs neither torch nor the model: reuse of a store costs seconds.
"""

import hashlib
import json
import mmap
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from shared.errors import DataError

_UNSAFE = (".bin", ".ckpt", ".pt", ".pth", ".pkl")
_MAX_HEADER_BYTES = 100_000_000  # safetensors' own limit


def find_weights(folder: Path) -> list[Path]:
    """The safetensors files that from_pretrained would load from a component's folder; raises DataError if none."""
    if not folder.is_dir():
        raise DataError(f"{folder.parent} has no folder {folder.name}/: --model wants a model in diffusers layout")
    indexes = sorted(folder.glob("*.safetensors.index.json"))
    plain = [index for index in indexes if index.name.count(".") == 3]
    if plain:
        shards = set(json.loads(plain[0].read_text())["weight_map"].values())
        return [folder / Path(shard).name for shard in sorted(shards)]
    files = sorted(folder.glob("*.safetensors"))
    files = [file for file in files if file.name.count(".") == 1] or files[:1]
    if files:
        return files[:1]
    raise DataError(_no_weights(folder))


def weights_variant(folder: Path) -> str | None:
    """The variant ("fp16") under which a folder holds its weights where it holds no plain ones."""
    middle = find_weights(folder)[0].name.removesuffix(".safetensors").split(".")[1:]
    return middle[0] if middle else None


def weights_digest(folder: Path, config_keys: Mapping[str, Any], strip_prefix: str = "") -> str:
    """blake2b-256, hex, over the settings in `config_keys` (name: default) and sorted tensors of a component's folder.

    Tensors count by name, dtype, shape and bytes, so re-sharded files are the same model; `strip_prefix` removes what
    some versions of a library put before every name. Files, paths and times do not count.
    """
    config = json.loads((folder / "config.json").read_text())
    digest = hashlib.blake2b(digest_size=32)
    settings = {key: config.get(key, default) for key, default in sorted(config_keys.items())}
    digest.update(json.dumps(settings, sort_keys=True).encode())
    for name, entry, data in _tensors(find_weights(folder), strip_prefix):
        digest.update(json.dumps([name, entry["dtype"], entry["shape"]]).encode())
        digest.update(data)
    return digest.hexdigest()


def bytes_digest(parts: Iterable[bytes]) -> str:
    """blake2b-256, hex, over `parts` with their lengths."""
    digest = hashlib.blake2b(digest_size=32)
    for part in parts:
        digest.update(struct.pack("<Q", len(part)))
        digest.update(part)
    return digest.hexdigest()


def _tensors(files: list[Path], strip_prefix: str) -> Iterable[tuple[str, dict[str, Any], memoryview]]:
    located = [
        (name.removeprefix(strip_prefix), entry, file, start)
        for file in files
        for name, entry, start in _read_header(file)
    ]
    for name, entry, file, start in sorted(located, key=lambda item: item[0]):
        begin, end = entry["data_offsets"]
        with file.open("rb") as handle, mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
            view = memoryview(mapped)[start + begin : start + end]
            try:
                yield name, entry, view
            finally:
                view.release()


def _read_header(file: Path) -> list[tuple[str, dict[str, Any], int]]:
    try:
        with file.open("rb") as handle:
            length = struct.unpack("<Q", handle.read(8))[0]
            if length > _MAX_HEADER_BYTES:
                raise ValueError("header too long")
            header = json.loads(handle.read(length))
            return [(name, entry, 8 + length) for name, entry in header.items() if name != "__metadata__"]
    except (OSError, ValueError, struct.error, AttributeError) as error:
        raise DataError(f"{file} is not a safetensors file: {error}") from None


def _no_weights(folder: Path) -> str:
    unsafe = sorted(file.name for file in folder.iterdir() if file.suffix in _UNSAFE)
    if not unsafe:
        return f"{folder} holds no .safetensors weights"
    return (
        f"{folder} holds its weights as {unsafe[0]}, which only a pickle loader can read; convert it once, in a place "
        "where you trust it: DiffusionPipeline.from_pretrained(OLD).save_pretrained(NEW, safe_serialization=True)"
    )
