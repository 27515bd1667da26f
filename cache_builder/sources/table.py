"""A table as a data set: one .parquet, .jsonl or .csv file, or a folder of them; pictures by path or in its rows.

root -> shards -> rows -> Columns -> Found(SHARD/ROW or the picture's path) | Skipped -> build.py

Nothing is held but the rows of one batch; a picture in a row is read again by the row's number.
"""

import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from cache_builder.captions import CaptionRules
from cache_builder.sources import Found, Skipped
from cache_builder.sources.columns import Columns, Complaints
from cache_builder.sources.files import find_shards, printable
from cache_builder.sources.parquet import Batch, Embedded, ParquetTable, PictureShelf
from cache_builder.sources.rows import BadRow, Row, csv_columns, csv_types, read_csv, read_jsonl
from cache_builder.sources.rules import TABLE_SUFFIXES, SourceRules
from cache_builder.sources.trees import FolderTree, Root, Tree, name_of, open_tree
from shared.beneath import relative_path
from shared.errors import DataError


class TableSource:
    """The pictures of a table; paths in it are relative to its folder."""

    def __init__(
        self, root: Root, dataset_id: str, rules: SourceRules, caption_rules: CaptionRules, max_bytes: int
    ) -> None:
        self.root = root
        self.dataset_id = dataset_id
        self.passed_over: Counter[str] = Counter()
        self.containers = 0
        self._rules, self._caption_rules, self._max_bytes = rules, caption_rules, max_bytes

    def scan(self) -> Iterator[Found | Skipped]:
        """Every row in order, file after file, sorted by path; raises DataError at once where there is no table."""
        self.passed_over.clear()
        self.containers = 0
        try:
            tree, name = open_tree(self.root)
            if name is None:
                found = find_shards(tree, TABLE_SUFFIXES, self.passed_over)
                return self._read_all(tree, tree, [(path, path, why) for path, why in found])
        except OSError as error:
            raise DataError(f"data set {self.dataset_id}: table {self.root}: {error.strerror}") from None
        if os.path.splitext(name_of(self.root))[1].lower() not in TABLE_SUFFIXES:
            raise DataError(
                f"data set {self.dataset_id}: table {self.root}: tables end in {', '.join(TABLE_SUFFIXES)}; "
                "source.kind says what a root is"
            )
        pictures = FolderTree(self.root.parent) if isinstance(self.root, Path) else tree  # not beside a link's target
        return self._read_all(tree, pictures, [(name_of(self.root), name, None)])

    def _read_all(
        self, folder: Tree, pictures: Tree, shards: Sequence[tuple[str, str, str | None]]
    ) -> Iterator[Found | Skipped]:
        self._pictures, self._shelf = pictures, PictureShelf(folder, self._max_bytes)
        types = _csv_types(folder, [path for name, path, why in shards if why is None and _is_csv(name)])
        for name, path, why in shards:
            label = printable(name)
            self.containers += 1
            try:
                if why is not None:
                    raise DataError(why)
                if label.lower().endswith(".parquet"):
                    yield from self._read_parquet(folder, label, path)
                else:
                    yield from self._read_lines(folder, label, path, types if _is_csv(name) else {})
            except DataError as error:
                yield Skipped(label, f"{label}: {error}")

    def _read_lines(self, folder: Tree, label: str, path: str, types: Mapping[str, type]) -> Iterator[Found | Skipped]:
        if _is_csv(label):
            with _opened(folder, path) as file:
                self._require_picture(csv_columns(file))
        columns, complaints = Columns(self._rules, self._caption_rules, types), Complaints(label, "line")
        with _opened(folder, path) as file:
            for row in read_csv(file) if _is_csv(label) else read_jsonl(file):
                yield self._picture(row, columns, complaints)

    def _read_parquet(self, folder: Tree, label: str, path: str) -> Iterator[Found | Skipped]:
        table = ParquetTable(folder, path)
        try:
            self._require_picture(table.columns)
            columns, complaints = Columns(self._rules, self._caption_rules), Complaints(label, "row")
            pictures = table.embedded(self._rules.image_columns)
            wanted = self._rules.image_columns + self._rules.caption_columns + (self._rules.meta_columns or ())
            plain = table.carried(table.columns if self._rules.meta_columns is None else dict.fromkeys(wanted))
            met: Batch | None = None
            for row, batch in table.rows(plain, pictures):
                if batch is not None and batch is not met and pictures:
                    self._shelf.put(met := batch)
                yield self._picture(row, columns, complaints, (label, path))
        finally:
            table.close()

    def _picture(
        self, row: Row | BadRow, columns: Columns, complaints: Complaints, place: tuple[str, str] = ("", "")
    ) -> Found | Skipped:
        if isinstance(row, BadRow):
            return complaints.skip(row.number, row.reason)
        try:
            column, cell = self._cell(row.values)
            if isinstance(cell, Embedded):
                label, file = place
                name, path = cell.name, f"{label}/{row.number}"
                read = partial(self._shelf.read, file, column, row.number)
            else:
                name = path = relative_path(cell)
                read = partial(self._pictures.read, path, self._max_bytes)
            captions, meta = columns.captions(row.values, name), columns.meta(row.values)
            return Found(path, captions, read, meta, is_slow=self._pictures.is_remote)
        except DataError as error:
            return complaints.skip(row.number, str(error))

    def _cell(self, values: Mapping[str, Any]) -> tuple[str, Any]:
        """The column that holds the row's picture, and what it holds; raises DataError."""
        for column in self._rules.image_columns:
            if (cell := values.get(column)) not in (None, ""):
                if not isinstance(cell, str | Embedded):
                    raise DataError(f"column {column!r} holds no picture and no path")
                return column, cell
        if not any(column in values for column in self._rules.image_columns):
            self._require_picture(list(values))
        raise DataError("no picture")

    def _require_picture(self, names: list[str]) -> None:
        if not set(names) & set(self._rules.image_columns):
            there = ", ".join(names[:12])[:300] + (", ..." if len(names) > 12 else "")
            raise DataError(
                f"no column of pictures: its columns are {there}; source.image_columns names the one that holds "
                "bytes or a path (columns are separated by commas, and addresses are not fetched)"
            )


def _csv_types(folder: Tree, paths: Sequence[str]) -> dict[str, type]:
    """The types of the columns over all CSV files of a data set."""
    types: dict[str, type] = {}
    for path in paths:
        with suppress(DataError), _opened(folder, path) as file:  # it is said when the file is read
            csv_types(file, types)
    return types


def _is_csv(name: str) -> bool:
    return name.lower().endswith(".csv")


def _opened(folder: Tree, path: str) -> BinaryIO:
    try:
        return folder.open(path)
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror}") from None
