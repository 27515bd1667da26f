"""Tensors from file to file: what is written is what the library reads, whatever was done to it on the way."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from shared.errors import DataError
from shared.tensor_file import (
    LazyTensor,
    cast_to,
    file_bytes,
    from_tensor,
    joined,
    read_lazily,
    read_metadata,
    reshaped,
    rows_of,
    transposed,
    write_lazily,
)


def drawn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape))).to(dtype)


@pytest.fixture
def source(tmp_path: Path) -> dict[str, Tensor]:
    tensors = {
        "matrix": drawn(6, 4),
        "half": drawn(6, 4, dtype=torch.float16),
        "brain": drawn(3, 2, 2, 2, dtype=torch.bfloat16),
        "scalar": torch.tensor(1.5),
        "none": torch.zeros(0),
        "ids": torch.arange(7),
    }
    save_file(tensors, tmp_path / "source.safetensors", {"format": "pt", "about": "x"})
    return tensors


def rewritten(path: Path, tensors: dict[str, LazyTensor]) -> dict[str, Tensor]:
    write_lazily(path, tensors, {})
    read: dict[str, Tensor] = load_file(path)
    return read


def test_a_copy_is_the_same_to_the_library(source: dict[str, Tensor], tmp_path: Path) -> None:
    lazy = read_lazily([tmp_path / "source.safetensors"])
    copy = tmp_path / "copy.safetensors"
    write_lazily(copy, lazy, {"about": "x"})
    assert copy.read_bytes()[8:] != b""
    read = load_file(copy)
    assert read.keys() == source.keys()
    assert all(torch.equal(read[name], source[name]) and read[name].dtype == source[name].dtype for name in source)
    assert read_metadata(copy) == {"format": "pt", "about": "x"} == read_metadata(tmp_path / "source.safetensors")
    with safe_open(copy, "pt") as opened:
        assert opened.metadata() == {"format": "pt", "about": "x"}
    assert 0 <= file_bytes(lazy) - sum(t.nbytes for t in source.values()) < 2000


def test_every_tensor_lies_on_a_multiple_of_its_items_size(source: dict[str, Tensor], tmp_path: Path) -> None:
    rewritten(tmp_path / "copy.safetensors", read_lazily([tmp_path / "source.safetensors"]))
    data = (tmp_path / "copy.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    assert length % 8 == 0
    header: dict[str, Any] = json.loads(data[8 : 8 + length])
    for name, entry in header.items():
        if name != "__metadata__":
            assert entry["data_offsets"][0] % source[name].element_size() == 0


def test_what_is_done_on_the_way(source: dict[str, Tensor], tmp_path: Path) -> None:
    lazy = read_lazily([tmp_path / "source.safetensors"])
    made = rewritten(
        tmp_path / "made.safetensors",
        {
            "rows": rows_of(lazy["matrix"], 2, 5),
            "joined": joined([lazy["half"], rows_of(lazy["half"], 0, 1)]),
            "turned": transposed(lazy["half"]),
            "wide": reshaped(lazy["matrix"], 6, 4, 1, 1),
            "rounded": cast_to(lazy["matrix"], "BF16"),
            "widened": cast_to(lazy["brain"], "F32"),
            "kept": cast_to(lazy["ids"], "F16"),
            "same": cast_to(lazy["matrix"], None),
            "memory": from_tensor(source["brain"].transpose(0, 1)),
            "nothing": cast_to(lazy["none"], "F16"),
        },
    )
    expected = {
        "rows": source["matrix"][2:5],
        "joined": torch.cat([source["half"], source["half"][:1]]),
        "turned": source["half"].T,
        "wide": source["matrix"][:, :, None, None],
        "rounded": source["matrix"].bfloat16(),
        "widened": source["brain"].float(),
        "kept": source["ids"],
        "same": source["matrix"],
        "memory": source["brain"].transpose(0, 1),
        "nothing": torch.zeros(0, dtype=torch.float16),
    }
    assert made.keys() == expected.keys()
    for name, tensor in expected.items():
        assert made[name].dtype == tensor.dtype
        assert torch.equal(made[name], tensor), name


def test_what_does_not_fit_is_said(source: dict[str, Tensor], tmp_path: Path) -> None:
    lazy = read_lazily([tmp_path / "source.safetensors"])
    with pytest.raises(DataError, match=r"shape \(6, 4\) cannot be taken as \(5, 5\)"):
        reshaped(lazy["matrix"], 5, 5)
    with pytest.raises(DataError, match="short has 4 bytes"):
        write_lazily(tmp_path / "bad.safetensors", {"short": LazyTensor("F32", (2,), lambda: b"1234")}, {})
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "source.safetensors").read_bytes()[:-3])
    with pytest.raises(DataError, match="not a whole safetensors file"):
        read_lazily([tmp_path / "cut.safetensors"])
