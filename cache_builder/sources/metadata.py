"""Tables that stand in a folder of pictures, in the form of Hugging Face's imagefolder: metadata.jsonl, .csv, .parquet.

metadata file -> rows by the picture they name -> folder.py, which meets the pictures and asks for their rows
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from cache_builder.captions import CaptionRules
from cache_builder.sources import MetaValue, Skipped
from cache_builder.sources.columns import Columns, Complaints, first_filled
from cache_builder.sources.parquet import ParquetTable
from cache_builder.sources.rows import BadRow, Row, csv_types, read_csv, read_jsonl
from cache_builder.sources.rules import SourceRules
from cache_builder.sources.trees import Tree
from shared.beneath import relative_path
from shared.errors import DataError


@dataclass(frozen=True)
class Entry:
    """What a metadata file says of one picture, and where."""

    file: str
    unit: str
    number: int
    captions: tuple[str, ...]
    meta: Mapping[str, MetaValue]


def read_metadata(
    tree: Tree, path: str, rules: SourceRules, caption_rules: CaptionRules
) -> Iterator[tuple[str, Entry] | Skipped]:
    """(picture, entry) of each row of the metadata file `path`, in order; all relative to the root."""
    folder = path.rpartition("/")[0]
    unit = "row" if path.lower().endswith(".parquet") else "line"
    complaints = Complaints(path, unit)
    try:
        columns, rows = _rows(tree, path, rules, caption_rules)
        for row in rows:
            if isinstance(row, BadRow):
                yield complaints.skip(row.number, row.reason)
                continue
            try:
                picture = "/".join(filter(None, (folder, _file_name(row.values, rules))))
                captions, meta = columns.captions(row.values, picture), columns.meta(row.values)
                yield picture, Entry(path, unit, row.number, captions, meta)
            except DataError as error:
                yield complaints.skip(row.number, str(error))
    except OSError as error:
        yield Skipped(path, f"{path}: cannot be read: {error.strerror}")
    except DataError as error:
        yield Skipped(path, f"{path}: {error}")


def _rows(
    tree: Tree, path: str, rules: SourceRules, caption_rules: CaptionRules
) -> tuple[Columns, Iterator[Row | BadRow]]:
    if path.lower().endswith(".csv"):
        with tree.open(path) as file:
            types = csv_types(file)
        return Columns(rules, caption_rules, types), _stream(tree, path)
    rows = _parquet(tree, path) if path.lower().endswith(".parquet") else _stream(tree, path)
    return Columns(rules, caption_rules), rows


def _stream(tree: Tree, path: str) -> Iterator[Row | BadRow]:
    with tree.open(path) as file:
        yield from read_csv(file) if path.lower().endswith(".csv") else read_jsonl(file)


def _parquet(tree: Tree, path: str) -> Iterator[Row | BadRow]:
    table = ParquetTable(tree, path)
    try:
        yield from (row for row, _ in table.rows(table.carried(table.columns)))
    finally:
        table.close()


def _file_name(values: Mapping[str, Any], rules: SourceRules) -> str:
    name = first_filled(values, ("file_name", *rules.image_columns))
    if not isinstance(name, str):
        raise DataError("no column file_name that names a picture")
    return relative_path(name)
