"""Columns outside of memory: what was put in comes out, and nothing is left behind."""

import errno
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared import scratch
from shared.scratch import Column


@settings(max_examples=30)
@given(st.lists(st.binary(max_size=50).map(lambda data: data[: len(data) // 4 * 4]), max_size=20), st.data())
def test_what_was_appended_and_replaced_is_there(pieces: list[bytes], data: st.DataObject) -> None:
    column, wanted = Column("<u4"), bytearray()
    for piece in pieces:
        column.append(piece)
        wanted += piece
        if wanted and data.draw(st.booleans()):
            at = data.draw(st.integers(0, len(wanted) // 4 - 1))
            column.put(at, b"abcd")
            wanted[4 * at : 4 * at + 4] = b"abcd"
        if data.draw(st.booleans()):
            assert column.array.tobytes() == bytes(column.view) == wanted
    assert (len(column), column.array.tobytes()) == (len(wanted) // 4, wanted)


def test_who_has_looked_sees_what_is_replaced(tmp_path: Path) -> None:
    column = Column("u1", tmp_path)
    column.append(b"abc")
    seen = column.array
    column.put(1, b"x")
    assert seen.tobytes() == b"axc"


def test_its_file_has_no_name_and_no_memory(tmp_path: Path) -> None:
    column = Column("u1", tmp_path)
    column.append(bytes(30_000_000))
    assert list(tmp_path.iterdir()) == []
    before = private_bytes()
    assert int(column.array[::4096].astype(np.int64).sum()) == 0
    assert private_bytes() - before < 5_000_000


def test_a_full_disk_names_the_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    column = Column("u1", tmp_path)
    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OSError, match="No space left") as caught:
        column.append(bytes(scratch.WRITTEN_AT_ONCE))
    assert caught.value.filename == str(tmp_path)


def private_bytes() -> int:
    rollup = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) * 1024 for line in rollup if line.startswith("Anonymous:"))
