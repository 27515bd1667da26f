"""Lines of untrusted text to rows: JSON lines and CSV, streamed; a broken line costs that line and is named.

file -> _lines (bounded) -> Row(number, values) | BadRow(number, reason) -> table.py, metadata.py
"""

import csv
import json
import re
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

from shared.errors import DataError

_Line = tuple[int, str | DataError]

MAX_LINE_BYTES = 1 << 20
MAX_RECORD_LINES = 256  # lines of one quoted CSV record; beyond, its quote was never closed
_BOM = b"\xef\xbb\xbf"
_WHOLE = re.compile(r"-?(0|[1-9][0-9]{0,18})")  # 007 is no number: its zeros would be lost
_NUMBER = re.compile(r"-?(0|[1-9][0-9]{0,18})(\.[0-9]{1,40})?([eE][+-]?[0-9]{1,3})?")


@dataclass(frozen=True)
class Row:
    """One row; `number` is its line, from 1, or its place in a Parquet file, from 0."""

    number: int
    values: Mapping[str, Any]


@dataclass(frozen=True)
class BadRow:
    """A row that cannot be read, and why."""

    number: int
    reason: str


def read_jsonl(file: BinaryIO) -> Iterator[Row | BadRow]:
    """Each line that is not blank, as a JSON object."""
    for number, line in _lines(file):
        if isinstance(line, DataError):
            yield BadRow(number, str(line))
        elif line.strip():
            yield _json_row(number, line.rstrip())


def _json_row(number: int, line: str) -> Row | BadRow:
    try:
        values = json.loads(line)
    except json.JSONDecodeError as error:
        return BadRow(number, f"not JSON at column {error.pos + 1}: {error.msg}")
    except (ValueError, RecursionError) as error:
        return BadRow(number, f"not JSON: {str(error)[:80]}")
    return Row(number, values) if isinstance(values, dict) else BadRow(number, "not a JSON object")


def read_csv(file: BinaryIO) -> Iterator[Row | BadRow]:
    """Each record under a header of column names; values are text, None where a field is empty.

    Raises DataError where there is no header. A record may go over several lines; `number` is its first.
    """
    records = _records(file)
    header = csv_header(records)
    for number, fields in records:
        if isinstance(fields, DataError):
            yield BadRow(number, str(fields))
        elif len(fields) != len(header):
            yield BadRow(number, f"{len(fields)} fields, the header has {len(header)}")
        else:
            yield Row(number, {name: field or None for name, field in zip(header, fields, strict=True)})


def csv_header(records: Iterator[tuple[int, list[str] | DataError]]) -> list[str]:
    """The column names in the first record; raises DataError."""
    _, header = next(records, (0, DataError("it is empty")))
    if isinstance(header, DataError):
        raise DataError(f"no header of column names: {header}")
    names = [name.strip() for name in header]  # "file_name, text" is what people write
    if len(set(names)) != len(names):
        raise DataError("a column name stands in its header twice")
    return names


def csv_columns(file: BinaryIO) -> list[str]:
    """The column names of a CSV file; raises DataError."""
    return csv_header(_records(file))


def csv_types(file: BinaryIO, types: dict[str, type] | None = None) -> dict[str, type]:
    """For each column, bool, int or float where every filled field reads as one, else str; added to `types`."""
    types = {} if types is None else types
    for row in read_csv(file):
        if isinstance(row, Row):
            for name, field in row.values.items():
                if field is not None and types.get(name) is not str:
                    types[name] = _wider(types.get(name), _csv_type(field))
    return types


def csv_value(field: str, kind: type) -> Any:
    """A field of a column of type `kind`."""
    return field.lower() == "true" if kind is bool else kind(field)


def _csv_type(field: str) -> type:
    if field.lower() in ("true", "false"):
        return bool
    if _WHOLE.fullmatch(field):
        return int if -(2**63) <= int(field) < 2**63 else str
    return float if _NUMBER.fullmatch(field) else str


def _wider(one: type | None, other: type) -> type:
    if one in (None, other):
        return other
    return float if {one, other} == {int, float} else str


def _records(file: BinaryIO) -> Iterator[tuple[int, list[str] | DataError]]:
    """(line, fields) of each record. A broken record costs its first line, not the lines that its quote ran over."""
    lines, again = _lines(file), deque[_Line]()
    while (line := again.popleft() if again else next(lines, None)) is not None:
        number, text = line
        if isinstance(text, DataError):
            yield number, text
        elif text.strip():
            taken = [line]
            while (fields := _fields(taken)) is None and len(taken) < MAX_RECORD_LINES:
                if (following := again.popleft() if again else next(lines, None)) is None:
                    break
                taken.append(following)
            if not isinstance(fields, list):
                again.extendleft(reversed(taken[1:]))
            yield number, DataError("a quote that is never closed") if fields is None else fields


def _fields(taken: list[_Line]) -> list[str] | DataError | None:
    """The fields of one record, None where its last one is still open."""
    texts = []
    for _, text in taken:
        if isinstance(text, DataError):
            return text
        texts.append(text)
    try:
        return next(csv.reader(texts, strict=True))
    except csv.Error as error:
        return None if str(error) == "unexpected end of data" else DataError(f"not CSV: {error}")


def _lines(file: BinaryIO) -> Iterator[_Line]:
    """(number from 1, text or what is wrong with it) of each line; never more than a line in memory."""
    number = 0
    while raw := file.readline(MAX_LINE_BYTES + 1):
        number += 1
        if len(raw) > MAX_LINE_BYTES:
            while raw and not raw.endswith(b"\n"):
                raw = file.readline(MAX_LINE_BYTES)
            yield number, DataError(f"more than {MAX_LINE_BYTES} bytes")
            continue
        try:
            yield number, (raw.removeprefix(_BOM) if number == 1 else raw).decode()
        except UnicodeDecodeError as error:
            yield number, DataError(f"not UTF-8 at byte {error.start}")
