"""Lines of untrusted text to rows: a broken line costs that line, whatever it holds."""

import csv
import io
import json
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cache_builder.sources.rows import BadRow, Row, csv_types, csv_value, read_csv, read_jsonl
from shared.errors import DataError

Reader = Callable[[BinaryIO], Iterator[Row | BadRow]]


def rows(read: Reader, data: bytes) -> list[tuple[int, Any]]:
    """(number, values) or (number, reason)."""
    return [(row.number, row.values if isinstance(row, Row) else row.reason) for row in read(io.BytesIO(data))]


def test_jsonl() -> None:
    data = b'\xef\xbb\xbf{"a": 1}\r\n\n  \n{"a": "\xc3\xa9"}\n[1]\n{"a": \n"text"\n\xff\n{"a": NaN}'
    found = rows(read_jsonl, data)
    assert found[:2] == [(1, {"a": 1}), (4, {"a": "é"})]
    assert found[2] == (5, "not a JSON object")
    assert found[3] == (6, "not JSON at column 6: Expecting value")
    assert found[4:6] == [(7, "not a JSON object"), (8, "not UTF-8 at byte 0")]
    assert found[6][0] == 9


@pytest.mark.parametrize("deep", [b"[" * 100_000, b'{"a":' * 100_000, b"9" * 5000, b"{" + b" " * 2_000_000 + b"}"])
def test_hostile_json_costs_its_line(deep: bytes) -> None:
    (bad, _), (good, values) = rows(read_jsonl, deep + b'\n{"a": 1}\n')
    assert (bad, good, values) == (1, 2, {"a": 1})


def test_csv() -> None:
    data = b'\xef\xbb\xbfname, text\r\na.png,"one, ""two""\nthree"\n\nb.png,\n  \nc.png,5" disk\n"d.png",x'
    assert rows(read_csv, data) == [
        (2, {"name": "a.png", "text": 'one, "two"\nthree'}),
        (5, {"name": "b.png", "text": None}),
        (7, {"name": "c.png", "text": '5" disk'}),
        (8, {"name": "d.png", "text": "x"}),
    ]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"a", "1 fields, the header has 2"),
        (b"a,b,c", "3 fields, the header has 2"),
        (b'"a"b,c', "not CSV: ',' expected after '\"'"),
        (b'a,"never closed', "a quote that is never closed"),
        (b"\xff,a", "not UTF-8 at byte 0"),
        (b"x" * 2_000_000, "more than 1048576 bytes"),
        (b"a," + b"x" * 200_000, "not CSV: field larger than field limit (131072)"),
    ],
)
def test_a_broken_record_costs_its_line(line: bytes, reason: str) -> None:
    data = b"name,text\nfirst,1\n" + line + b"\nsecond,2\nthird,3\n"
    found = rows(read_csv, data)
    assert [values["name"] for _, values in found if isinstance(values, dict)] == ["first", "second", "third"]
    assert [(number, why) for number, why in found if isinstance(why, str)] == [(3, reason)]


def test_a_quote_that_swallows_a_whole_table_costs_one_line() -> None:
    lines = b"".join(b"p%d.png,caption %d\n" % (i, i) for i in range(1000))
    found = rows(read_csv, b'name,text\nbad,"open\n' + lines)
    assert [number for number, why in found if isinstance(why, str)] == [2]
    assert len(found) == 1001


@pytest.mark.parametrize(
    ("data", "reason"),
    [(b"", "it is empty"), (b"\xff\n", "not UTF-8"), (b"a,b,a\n", "twice"), (b'"a\n', "a quote that is never closed")],
)
def test_a_header_that_is_none(data: bytes, reason: str) -> None:
    with pytest.raises(DataError, match=reason):
        rows(read_csv, data)


@given(st.lists(st.lists(st.text(st.characters(exclude_categories=("Cs",)), max_size=9), min_size=2, max_size=2)))
def test_what_pythons_writer_writes_is_read_back(records: list[list[str]]) -> None:
    file = io.StringIO(newline="")
    writer = csv.writer(file, quoting=csv.QUOTE_ALL)
    writer.writerows([["name", "text"], *records])
    found = rows(read_csv, file.getvalue().encode())
    assert [list(values.values()) for _, values in found] == [[field or None for field in record] for record in records]


@given(st.binary(max_size=300))
def test_no_bytes_raise_anything_else(data: bytes) -> None:
    for read in (read_jsonl, read_csv):
        try:
            found = rows(read, b"a,b\n" + data)
        except DataError:
            continue
        assert len(found) <= data.count(b"\n") + 2


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        (["1", "-20", "0"], [1, -20, 0]),
        (["1", "2.5", "1e-3"], [1.0, 2.5, 0.001]),
        (["true", "False"], [True, False]),
        (["007", "008"], ["007", "008"]),
        (["1", "x"], ["1", "x"]),
        (["1", "true"], ["1", "true"]),
        (["1234567890123456789"], [1234567890123456789]),
        (["12345678901234567890", "1"], ["12345678901234567890", "1"]),
        (["", "3"], [None, 3]),
        (["nan", "1"], ["nan", "1"]),
        (["1_000"], ["1_000"]),
        (["٣"], ["٣"]),
        (["1٣"], ["1٣"]),
    ],
)
def test_a_column_of_csv_is_of_the_narrowest_type(fields: list[str], expected: list[Any]) -> None:
    data = ("x,y\n" + "".join(f'k,"{field}"\n' for field in fields)).encode()
    kind = csv_types(io.BytesIO(data))["y"]
    values = [row.values["y"] for row in read_csv(io.BytesIO(data)) if isinstance(row, Row)]
    assert [None if value is None else csv_value(value, kind) for value in values] == expected


def test_values_of_json_keep_their_types() -> None:
    values = {"a": 1, "b": 1.5, "c": True, "d": "x", "e": ["y"], "f": None}
    assert rows(read_jsonl, json.dumps(values).encode()) == [(1, values)]
