"""Digests of weights: the same for the same model however its files lie, another for anything that changes it."""

import json
import shutil
import struct
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from shared.errors import DataError
from shared.weights import bytes_digest, find_weights, weights_digest, weights_variant

KEYS = {"hidden_act": "gelu", "depth": 2}
TENSORS = {
    "a.weight": torch.arange(12, dtype=torch.float32).reshape(3, 4),
    "a.bias": torch.ones(3, dtype=torch.float16),
    "b.none": torch.zeros(0, 5),
    "b.one": torch.tensor(7),
    "c.weight": torch.full((2, 2), 3.0, dtype=torch.bfloat16),
}


def write_model(
    folder: Path, tensors: Mapping[str, torch.Tensor] = TENSORS, name: str = "model.safetensors", **config: object
) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(dict(tensors), folder / name, metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps({"_class_name": "X", **config}))
    return folder


def write_shards(folder: Path, prefix: str = "", variant: str = "") -> Path:
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    names = list(TENSORS)
    weight_map = {}
    for index, part in enumerate((names[3:], names[:1], names[1:3])):
        file = f"model{variant}-{index + 1:05}-of-00003.safetensors"
        save_file({prefix + key: TENSORS[key] for key in part}, folder / file)
        weight_map |= {prefix + key: file for key in part}
    (folder / f"model.safetensors.index{variant}.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


@pytest.fixture
def reference(tmp_path: Path) -> str:
    return weights_digest(write_model(tmp_path / "reference"), KEYS)


def test_files_order_prefix_and_notes_do_not_count(tmp_path: Path, reference: str) -> None:
    reordered = write_model(tmp_path / "reordered", dict(reversed(TENSORS.items())))
    renamed = write_model(tmp_path / "renamed", TENSORS, "diffusion_pytorch_model.safetensors", extra="ignored")
    prefixed = write_model(tmp_path / "prefixed", {f"text_model.{key}": value for key, value in TENSORS.items()})
    moved = Path(shutil.copytree(reordered, tmp_path / "elsewhere" / "moved"))
    for folder in (reordered, renamed, moved, write_shards(tmp_path / "shards")):
        assert weights_digest(folder, KEYS) == reference
    for folder in (prefixed, write_shards(tmp_path / "prefixed shards", "text_model.")):
        assert weights_digest(folder, KEYS, "text_model.") == reference
        assert weights_digest(folder, KEYS) != reference


def test_defaults_are_what_a_missing_setting_means(tmp_path: Path, reference: str) -> None:
    assert weights_digest(write_model(tmp_path / "said", hidden_act="gelu", depth=2), KEYS) == reference


def test_anything_that_changes_the_model_changes_the_digest(tmp_path: Path, reference: str) -> None:
    one = TENSORS["a.weight"]
    bit = one.clone()
    bit.view(torch.int32)[2, 3] ^= 1
    changed = {
        "bit": TENSORS | {"a.weight": bit},
        "dtype": TENSORS | {"c.weight": TENSORS["c.weight"].half()},
        "dtype of the same bytes": TENSORS | {"a.weight": one.view(torch.int32)},
        "shape": TENSORS | {"a.weight": one.reshape(4, 3)},
        "shape of nothing": TENSORS | {"b.none": torch.zeros(5, 0)},
        "name": {("a.wait" if key == "a.weight" else key): value for key, value in TENSORS.items()},
        "one more": TENSORS | {"d": one.clone()},
        "fewer": {key: value for key, value in TENSORS.items() if key != "b.one"},
    }
    digests = [weights_digest(write_model(tmp_path / name, tensors), KEYS) for name, tensors in changed.items()]
    digests += [weights_digest(write_model(tmp_path / key, **{key: 5}), KEYS) for key in KEYS]
    assert len({reference, *digests}) == len(changed) + len(KEYS) + 1


def test_each_byte_of_each_tensor_counts(tmp_path: Path, reference: str) -> None:
    folder = write_model(tmp_path / "model")
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    data_at = 8 + struct.unpack("<Q", whole[:8])[0]
    assert len(whole) - data_at == sum(value.nbytes for value in TENSORS.values())
    digests = set()
    for at in range(data_at, len(whole)):
        file.write_bytes(whole[:at] + bytes([whole[at] ^ 0x80]) + whole[at + 1 :])
        digests.add(weights_digest(folder, KEYS))
    assert len(digests - {reference}) == len(whole) - data_at


def test_parts_of_bytes_are_told_apart() -> None:
    assert len({bytes_digest(parts) for parts in ([b"ab"], [b"a", b"b"], [b"", b"ab"], [b"ab", b""], [])}) == 5


# --- which files ---


def test_plain_weights_are_taken_before_a_variant(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", name="model.fp16.safetensors")
    assert weights_variant(folder) == "fp16"
    assert [file.name for file in find_weights(folder)] == ["model.fp16.safetensors"]
    write_model(folder)
    assert weights_variant(folder) is None
    assert [file.name for file in find_weights(folder)] == ["model.safetensors"]


def test_shards_of_a_variant_are_all_found(tmp_path: Path, reference: str) -> None:
    folder = write_shards(tmp_path / "shards", variant=".fp16")
    assert weights_variant(folder) == "fp16"
    assert len(find_weights(folder)) == 3
    assert weights_digest(folder, KEYS) == reference


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.ckpt", "model.pt", "model.pth", "model.pkl"])
def test_pickles_are_refused_with_the_way_to_convert_them(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"\x80\x04cos\nsystem\n")
    with pytest.raises(DataError, match=rf"{name}.*safe_serialization=True"):
        find_weights(tmp_path)


def test_folders_without_weights_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"holds no \.safetensors"):
        find_weights(tmp_path)
    with pytest.raises(DataError, match="no folder vae/"):
        find_weights(tmp_path / "vae")


# --- malformed ---


def header_of(entries: object) -> bytes:
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text


def entry(**changed: object) -> dict[str, object]:
    return {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | changed}


MALFORMED = {
    "empty": b"",
    "seven bytes": bytes(7),
    "header longer than the file": struct.pack("<Q", 1000) + b"{}",
    "header of 2**63": struct.pack("<Q", 2**63) + b"{}",
    "header not json": struct.pack("<Q", 4) + b"{{{{",
    "header not utf-8": struct.pack("<Q", 4) + b"\xff\xfe\x00\x00",
    "header a list": header_of([1, 2]),
    "header a number": header_of(5),
    "nesting bomb": struct.pack("<Q", 100_000) + b"[" * 100_000,
    "entry a list": header_of({"a": [1]}),
    "no offsets": header_of({"a": {"dtype": "F32", "shape": [2]}}) + bytes(8),
    "no dtype": header_of({"a": {"shape": [2], "data_offsets": [0, 8]}}) + bytes(8),
    "one offset": header_of(entry(data_offsets=[0])) + bytes(8),
    "offsets of text": header_of(entry(data_offsets="ab")) + bytes(8),
    "offsets past the end": header_of(entry(data_offsets=[0, 9])) + bytes(8),
    "offsets backwards": header_of(entry(data_offsets=[8, 0])) + bytes(8),
    "offsets negative": header_of(entry(data_offsets=[-8, 0])) + bytes(8),
    "cut short": header_of(entry()) + bytes(7),
    "pickle": b"\x80\x04cos\nsystem\n",
}


@pytest.mark.parametrize("content", MALFORMED.values(), ids=MALFORMED.keys())
def test_malformed_weights_are_data_errors(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(DataError, match=r"model\.safetensors"):
        weights_digest(tmp_path, KEYS)


@pytest.mark.parametrize("content", [None, b"", b"[]", b"{", b"\xff", b"[" * 100_000])
def test_a_config_that_cannot_be_read_is_a_data_error(tmp_path: Path, content: bytes | None) -> None:
    folder = write_model(tmp_path / "model")
    (folder / "config.json").unlink() if content is None else (folder / "config.json").write_bytes(content)
    with pytest.raises(DataError, match=r"config\.json"):
        weights_digest(folder, KEYS)


@pytest.mark.parametrize(
    "index", ["[]", "{}", "{", '{"weight_map": {}}', '{"weight_map": []}', '{"weight_map": {"a": 3}}']
)
def test_an_index_that_names_nothing_is_a_data_error(tmp_path: Path, index: str) -> None:
    folder = write_shards(tmp_path / "shards")
    (folder / "model.safetensors.index.json").write_text(index)
    with pytest.raises(DataError):
        weights_digest(folder, KEYS)


def test_an_index_does_not_lead_out_of_its_folder(tmp_path: Path) -> None:
    save_file({"secret": torch.ones(1)}, tmp_path / "outside.safetensors")
    folder = write_shards(tmp_path / "shards")
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"secret": "../outside.safetensors"}}')
    assert find_weights(folder) == [folder / "outside.safetensors"]
    with pytest.raises(DataError, match=r"shards/outside\.safetensors"):
        weights_digest(folder, KEYS)
