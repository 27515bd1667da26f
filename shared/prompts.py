"""Prompts for people's eyes, of a text file or a table, read alike by the builder and by generation.

.csv .tsv .parquet    the column `prompt`, else `caption`, else `text`, in upper or lower case (PartiPrompts' tsv)
any other             text, a prompt on each line
"""

import csv
import io
from collections.abc import Sequence
from pathlib import Path

from shared.errors import ConfigError, DataError

COLUMNS = ("prompt", "caption", "text")
MOST_BYTES = 256 << 20


def read_prompts_file(path: Path) -> list[str]:
    """The prompts in a file, without those that are empty; raises ConfigError (cannot be read) or DataError."""
    try:
        if path.stat().st_size > MOST_BYTES:
            raise DataError(f"{path} is larger than {MOST_BYTES >> 20} MiB: no list of prompts")
        data = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"--prompts {path}: {error.strerror}") from None
    kind = path.suffix.lower()
    if kind == ".parquet":
        found = _of_parquet(path, data)
    elif kind in (".csv", ".tsv"):
        found = _of_table(path, _text(path, data), "\t" if kind == ".tsv" else ",")
    else:
        found = _text(path, data).splitlines()
    return [stripped for one in found if (stripped := one.strip())]


def _text(path: Path, data: bytes) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text (at byte {error.start})") from None


def _of_table(path: Path, text: str, delimiter: str) -> list[str]:
    try:
        rows = list(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True))
    except csv.Error as error:
        raise DataError(f"{path} is not a table: {error}") from None
    if not rows:
        return []
    column = rows[0].index(_column(path, rows[0]))
    return [row[column] for row in rows[1:] if len(row) > column]


def _of_parquet(path: Path, data: bytes) -> list[str]:
    import pyarrow as pa
    import pyarrow.parquet

    try:
        file = pa.parquet.ParquetFile(pa.BufferReader(data))
        name = _column(path, file.schema_arrow.names)
        cells = file.read(columns=[name])[name].to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path} is not a Parquet file: {str(error).splitlines()[0]}") from None
    if not all(cell is None or isinstance(cell, str) for cell in cells):
        raise DataError(f"{path}: its column {name!r} holds no text")
    return [cell for cell in cells if cell is not None]


def _column(path: Path, names: Sequence[str]) -> str:
    known = {name.strip().lower(): name for name in reversed(names)}
    for wanted in COLUMNS:
        if wanted in known:
            return known[wanted]
    raise DataError(f"{path} has no column {' or '.join(COLUMNS)}; it has {', '.join(names)[:200]}")
