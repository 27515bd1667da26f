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
from shared.weights_memory import remembered_digest

_UNSAFE = (".bin", ".ckpt", ".pt", ".pth", ".pkl")
DIGEST_FORMAT = 1
_MAX_HEADER_BYTES = 100_000_000  # safetensors' own limit


def find_weights(folder: Path) -> list[Path]:
    """The safetensors files that from_pretrained would load from a component's folder; raises DataError if none."""
    if not folder.is_dir():
        raise DataError(f"{folder.parent} has no folder {folder.name}/: --model wants a model in diffusers layout")
    indexes = sorted(folder.glob("*.safetensors.index*.json"))
    files = sorted(folder.glob("*.safetensors"))
    plain_indexes = [index for index in indexes if index.name.count(".") == 3]
    plain_files = [file for file in files if file.name.count(".") == 1]
    for index in plain_indexes or ([] if plain_files else indexes):
        return _shards(index)
    if files:
        return (plain_files or files)[:1]
    raise DataError(_no_weights(folder))


def weight_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of a component's tensors by name, read off the headers alone; raises DataError where they are damaged."""
    return {name: tuple(entry["shape"]) for file in find_weights(folder) for name, entry, _ in read_header(file)}


def weights_variant(folder: Path) -> str | None:
    """The variant ("fp16") under which a folder holds its weights where it holds no plain ones."""
    middle = find_weights(folder)[0].name.removesuffix(".safetensors").split(".")[1:]
    return middle[0].partition("-")[0] if middle else None


def read_component_config(folder: Path) -> dict[str, Any]:
    """The config.json of a component's folder; raises DataError where there is none."""
    return read_json_object(folder / "config.json")


def read_json_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file of a model; raises DataError where there is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path} cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise DataError(f"{path} cannot be read: no JSON object")
    return content


def weights_digest(folder: Path, config_keys: Mapping[str, Any], strip_prefix: str = "") -> str:
    """blake2b-256, hex, over the settings in `config_keys` (name: default) and sorted tensors of a component's folder.

    Tensors count by name, dtype, shape and bytes, so re-sharded files are the same model; `strip_prefix` removes what
    some versions of a library put before every name. Files, paths and times do not count.
    """
    config = read_component_config(folder)
    settings = json.dumps(
        {key: config.get(key, default) for key, default in sorted(config_keys.items())}, sort_keys=True
    )
    files = find_weights(folder)

    def work_out() -> str:
        digest = hashlib.blake2b(settings.encode(), digest_size=32)
        for name, entry, data in _tensors(files, strip_prefix):
            digest.update(json.dumps([name, entry["dtype"], entry["shape"]]).encode())
            digest.update(data)
        return digest.hexdigest()

    try:
        return remembered_digest(json.dumps([DIGEST_FORMAT, settings, strip_prefix]), files, work_out)
    except OSError as error:
        raise DataError(f"{error.filename or folder}: {error.strerror or error}") from None


def bytes_digest(parts: Iterable[bytes]) -> str:
    """blake2b-256, hex, over `parts` with their lengths."""
    digest = hashlib.blake2b(digest_size=32)
    for part in parts:
        digest.update(struct.pack("<Q", len(part)))
        digest.update(part)
    return digest.hexdigest()


def _shards(index: Path) -> list[Path]:
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise DataError(f"{index} names no files of weights")
    return [index.with_name(Path(str(shard)).name) for shard in sorted(set(weight_map.values()), key=str)]


def _tensors(files: list[Path], strip_prefix: str) -> Iterable[tuple[str, dict[str, Any], memoryview]]:
    located = [
        (name.removeprefix(strip_prefix), entry, file, start)
        for file in files
        for name, entry, start in read_header(file)
    ]
    for name, entry, file, start in sorted(located, key=lambda item: item[0]):
        begin, end = entry["data_offsets"]
        with file.open("rb") as handle, mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
            view = memoryview(mapped)[start + begin : start + end]
            try:
                yield name, entry, view
            finally:
                view.release()


def read_header(file: Path) -> list[tuple[str, dict[str, Any], int]]:
    """(name, entry, where data begins) of each tensor of a safetensors file; raises DataError where it is not whole."""
    try:
        with file.open("rb") as handle:
            length = struct.unpack("<Q", handle.read(8))[0]
            if length > _MAX_HEADER_BYTES:
                raise ValueError("header too long")
            header = json.loads(handle.read(length))
            data_bytes = handle.seek(0, 2) - 8 - length
        if data_bytes < 0:
            raise ValueError("cut short")
        entries = [(name, entry) for name, entry in header.items() if name != "__metadata__"]
        for name, entry in entries:
            begin, end = entry["data_offsets"]
            if not (0 <= begin <= end <= data_bytes and {"dtype", "shape"} <= entry.keys()):
                raise ValueError(f"tensor {name!r} is not whole")
        return [(name, entry, 8 + length) for name, entry in entries]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error, RecursionError) as error:
        raise DataError(f"{file} is not a whole safetensors file: {error}") from None


def _no_weights(folder: Path) -> str:
    unsafe = sorted(file.name for file in folder.iterdir() if file.suffix in _UNSAFE)
    if not unsafe:
        return f"{folder} holds no .safetensors weights"
    return (
        f"{folder} holds its weights as {unsafe[0]}, which only a pickle loader can read; convert it once, in a place "
        "where you trust it: DiffusionPipeline.from_pretrained(OLD).save_pretrained(NEW, safe_serialization=True)"
    )
