"""Past the page cache or not, a file holds what was written into it."""

from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from cache_builder import direct_file
from cache_builder.direct_file import BLOCK_BYTES, BUFFER_BYTES, DirectFile

LENGTHS = [0, 1, BLOCK_BYTES - 1, BLOCK_BYTES, BLOCK_BYTES + 1, BUFFER_BYTES, 2 * BUFFER_BYTES + 5]
DATA = np.random.default_rng(3).bytes(max(LENGTHS))


def write(path: Path, data: bytes, piece: int) -> None:
    with closing(DirectFile(path)) as file:
        for start in range(0, len(data), piece):
            assert file.write(memoryview(data)[start : start + piece]) == len(data[start : start + piece])
        assert file.tell() == len(data)
        file.finish()
    assert file.closed


@pytest.mark.parametrize("length", LENGTHS)
def test_pieces_of_any_length_make_the_same_file(tmp_path: Path, length: int) -> None:
    for piece in (999_983, BUFFER_BYTES, length or 1):
        (tmp_path / "x").write_bytes(b"what was there before" * 99)
        write(tmp_path / "x", DATA[:length], piece)
        assert (tmp_path / "x").read_bytes() == DATA[:length]


def test_a_disk_that_wants_other_blocks_gets_plain_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(direct_file, "BLOCK_BYTES", 1)  # no disk takes such
    write(tmp_path / "x", DATA[: BUFFER_BYTES + 77], 999_983)
    assert (tmp_path / "x").read_bytes() == DATA[: BUFFER_BYTES + 77]


def test_a_system_that_knows_no_such_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(direct_file, "_DIRECT", 0)
    write(tmp_path / "x", DATA[:77_777], 5_000)
    assert (tmp_path / "x").read_bytes() == DATA[:77_777]


def test_what_is_not_finished_is_not_padded_with_what_was_never_written(tmp_path: Path) -> None:
    with closing(DirectFile(tmp_path / "x")) as file:
        file.write(DATA[:10])
    assert (tmp_path / "x").read_bytes() == b""
