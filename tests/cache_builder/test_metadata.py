"""metadata.jsonl, .csv and .parquet in a folder of pictures, and captions from names."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cache_builder.captions import CaptionRules
from cache_builder.sources import Found, Skipped
from cache_builder.sources.folder import FolderSource
from cache_builder.sources.rules import SourceRules


def make_source(root: Path, missing: Any = "error", **rules: Any) -> FolderSource:
    return FolderSource(root, "set", CaptionRules(missing=missing), 1000, SourceRules(**rules))


def found(source: FolderSource) -> list[tuple[str, tuple[str, ...], dict[str, Any]]]:
    return [(item.path, item.captions, dict(item.meta)) for item in source.scan() if isinstance(item, Found)]


def reasons(source: FolderSource) -> list[str]:
    return [item.reason for item in source.scan() if isinstance(item, Skipped)]


def touch(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(name.encode())


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        path.write_text("\n".join(",".join(map(str, row)) for row in [rows[0], *(row.values() for row in rows)]))


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_rows_name_pictures_here_and_below(tmp_path: Path, suffix: str) -> None:
    touch(tmp_path, "a.png", "sub/b.png", "sub/deep/c.png", "d.png", "e.png")
    (tmp_path / "d.txt").write_text("from a sidecar")
    write(
        tmp_path / f"metadata{suffix}",
        [
            {"file_name": "sub/b.png", "text": "b", "score": 2},
            {"file_name": "./a.png", "text": "a", "score": 1},
            {"file_name": "d.png", "text": "", "score": 4},
        ],
    )
    write(tmp_path / f"sub/metadata{suffix}", [{"file_name": "deep/c.png", "text": "c", "score": 3}])
    assert found(make_source(tmp_path)) == [
        ("a.png", ("a",), {"score": 1}),
        ("d.png", ("from a sidecar",), {"score": 4}),
        ("e.png", (), {}),
        ("sub/b.png", ("b",), {"score": 2}),
        ("sub/deep/c.png", ("c",), {"score": 3}),
    ]
    assert make_source(tmp_path, metadata=[]).scan()
    assert found(make_source(tmp_path, metadata=[]))[0] == ("a.png", (), {})


def test_one_metadata_file_is_read_the_others_are_tallied(tmp_path: Path) -> None:
    touch(tmp_path, "a.png")
    for suffix in ("parquet", "csv", "jsonl"):
        write(tmp_path / f"metadata.{suffix}", [{"file_name": "a.png", "text": suffix}])
    source = make_source(tmp_path)
    assert found(source) == [("a.png", ("jsonl",), {})]
    assert source.passed_over == {".csv": 1, ".parquet": 1}
    assert found(make_source(tmp_path, metadata=["metadata.csv"])) == [("a.png", ("csv",), {})]


def test_a_picture_named_twice_is_seen_twice(tmp_path: Path) -> None:
    """The builder then finds the same bytes again: one sample, the captions of both rows, one duplicate."""
    touch(tmp_path, "a.png")
    write(tmp_path / "metadata.jsonl", [{"file_name": "a.png", "text": t} for t in ("one", "two")])
    assert found(make_source(tmp_path)) == [("a.png", ("one",), {}), ("a.png", ("two",), {})]


def test_rows_without_a_picture_are_named(tmp_path: Path) -> None:
    touch(tmp_path, "a.png", ".hidden.png", "notes.txt")
    rows = [{"file_name": name, "text": "x"} for name in ("gone.png", "a.png", ".hidden.png", "notes.txt", "../a.png")]
    write(tmp_path / "metadata.jsonl", [*rows, {"text": "no name"}, {"file_name": 5}])
    with (tmp_path / "metadata.jsonl").open("a") as file:
        file.write("not json\n")
    source = make_source(tmp_path)
    assert [path for path, _, _ in found(source)] == ["a.png"]
    assert sorted(reasons(source)) == [
        "metadata.jsonl line 1: there is no picture gone.png",
        "metadata.jsonl line 3: there is no picture .hidden.png",
        "metadata.jsonl line 4: there is no picture notes.txt",
        "metadata.jsonl line 5: ../a.png leaves the data set's folder",
        "metadata.jsonl line 6: no column file_name that names a picture",
        "metadata.jsonl line 7: no column file_name that names a picture",
        "metadata.jsonl line 8: not JSON at column 1: Expecting value",
    ]


def test_a_metadata_file_that_is_none_leaves_the_pictures(tmp_path: Path) -> None:
    touch(tmp_path, "a.png", "b/c.png")
    (tmp_path / "metadata.parquet").write_bytes(b"no parquet")
    (tmp_path / "b/metadata.csv").write_bytes(b"")
    (tmp_path / "b/metadata.jsonl").mkdir()
    source = make_source(tmp_path, metadata=["metadata.csv", "metadata.parquet"])
    assert [path for path, _, _ in found(source)] == ["a.png", "b/c.png"]
    one, two = reasons(source)
    assert one.startswith("metadata.parquet: damaged, or not a Parquet file")
    assert two == "b/metadata.csv: no header of column names: it is empty"


def test_captions_from_names(tmp_path: Path) -> None:
    touch(tmp_path, "a_red_cat.png", "sub/A man, on a horse.v2.jpg", "_.png")
    (tmp_path / "a_red_cat.txt").write_text("not this")
    write(tmp_path / "metadata.jsonl", [{"file_name": "a_red_cat.png", "text": "nor this", "score": 1}])
    assert found(make_source(tmp_path, captions_from="name")) == [
        ("_.png", (), {}),
        ("a_red_cat.png", ("a red cat",), {"score": 1}),
        ("sub/A man, on a horse.v2.jpg", ("A man, on a horse.v2",), {}),
    ]
