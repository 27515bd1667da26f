"""Rows made into columns piece by piece: the same as made at once, whatever the pieces, and never whole in memory."""

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

import shared.manifest_columns
from shared.manifest_columns import make_columns
from shared.manifest_rows import ManifestRow, column_value, schema_of
from tests.stores import row, settings

META = {"score": "float", "count": "int", "good": "bool", "artist": "string", "tags": "strings"}


def rows_of(count: int, *, with_gaps: bool) -> list[ManifestRow]:
    """Rows of two data sets whose columns that travel along have no value here and there, or always one."""
    draw = random.Random(count)
    made = []
    for index in range(count):
        meta: dict[str, Any] = {
            "score": draw.random(),
            "count": draw.randrange(-9, 9),
            "good": draw.random() < 0.5,
            "artist": "é🦊" * draw.randrange(3),
            "tags": tuple(f"tag {n}" for n in range(draw.randrange(3))),
        }
        kept = {name: value for name, value in meta.items() if not with_gaps or draw.random() < 0.7}
        own = replace(row(index, f"set {draw.randrange(3)}"), meta=kept)
        made.append(replace(own, text_keys=own.text_keys[: draw.randrange(3)]))
    return made


@pytest.mark.parametrize("with_gaps", [False, True])
@pytest.mark.parametrize(("count", "at_once"), [(0, 3), (1, 3), (3, 3), (10, 3), (40, 1), (29, 100)])
def test_pieces_make_what_all_at_once_makes(
    count: int, at_once: int, with_gaps: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared.manifest_columns, "ROWS_AT_ONCE", at_once)
    schema = schema_of(settings(meta=META))
    rows = rows_of(count, with_gaps=with_gaps)
    columns = make_columns(schema, rows, tmp_path)
    table = pa.Table.from_arrays(columns, schema=schema)
    table.validate(full=True)
    for field, column in zip(schema, columns, strict=True):
        assert column.type == field.type
        assert column.to_pylist() == pa.array([column_value(one, field.name) for one in rows]).to_pylist(), field.name
    assert list(tmp_path.iterdir()) == []  # the files have no names


def test_no_column_is_ever_whole_in_memory(tmp_path: Path) -> None:
    """Of 60,000 rows the widest column takes 3 MB, and a piece of them a fifteenth of what all columns do."""
    usual = pa.default_memory_pool()
    pa.set_memory_pool(counted := pa.proxy_memory_pool(usual))
    try:
        widest = max(column.nbytes for column in make_columns(schema_of(settings()), map(row, range(60_000)), tmp_path))
    finally:
        pa.set_memory_pool(usual)
    assert widest > 3_000_000
    assert counted.max_memory() < 1_500_000
