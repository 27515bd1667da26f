"""A table as a data set: rows become pictures, by path or by bytes, a batch at a time, and can be read again."""

import json
import os
import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cache_builder.captions import CaptionRules
from cache_builder.sources import Found, Skipped
from cache_builder.sources import parquet as parquet_door
from cache_builder.sources.rules import SourceRules
from cache_builder.sources.table import TableSource
from cache_builder.sources.trees import Tree
from shared.errors import DataError
from tests.datasets import Item, csv_text, jsonl, write_folder, write_parquet

ITEMS = [
    Item(f"below/{index:02}.png", bytes([index]) * (50 + index), [f"caption {index}", "both"], {"score": index / 4})
    for index in range(20)
]


def make_source(root: Path, max_bytes: int = 1000, lines: Any = "all", **rules: Any) -> TableSource:
    return TableSource(root, "set", SourceRules(**rules), CaptionRules(lines=lines), max_bytes)


def found(source: TableSource) -> list[Found]:
    items = list(source.scan())
    assert all(isinstance(item, Found) for item in items), [item for item in items if isinstance(item, Skipped)]
    return [item for item in items if isinstance(item, Found)]


def reasons(source: TableSource) -> list[str]:
    return [item.reason for item in source.scan() if isinstance(item, Skipped)]


def test_a_hub_data_set_from_its_files(tmp_path: Path) -> None:
    """data/train-00000-of-00002.parquet and its like, with {bytes, path} and a caption: rows are named by shard."""
    root = tmp_path / "pseudo-camera"
    for shard in range(2):
        write_parquet(root / f"data/train-0000{shard}-of-00002.parquet", ITEMS[shard * 10 :][:10])
    (root / "README.md").write_text("---")
    (root / ".cache").mkdir()
    write_parquet(root / ".cache/x.parquet", ITEMS)
    source = make_source(root, kind="table")
    items = found(source)
    assert [item.path for item in items[:2]] == [f"data/train-00000-of-00002.parquet/{row}" for row in range(2)]
    assert [item.path for item in items[-1:]] == ["data/train-00001-of-00002.parquet/9"]
    assert [item.read() for item in items] == [item.data for item in ITEMS]
    assert [item.captions for item in items] == [tuple(item.captions) for item in ITEMS]
    assert [item.meta for item in items] == [{"score": index / 4} for index in range(20)]
    assert source.passed_over == {".md": 1, "(hidden)": 1}


def test_rows_are_read_again_in_any_order_and_from_any_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet_door, "SHELF_BYTES", 300)  # so that little is kept
    monkeypatch.setattr(parquet_door, "BATCH_BYTES", 200)
    for shard in range(2):
        write_parquet(tmp_path / f"{shard}.parquet", ITEMS[shard * 10 :][:10], group=4)
    items = found(make_source(tmp_path, kind="table"))
    order = list(range(20)) * 5
    random.Random(0).shuffle(order)
    assert [items[index].read() for index in order] == [ITEMS[index].data for index in order]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda index: items[index].read(), order)) == [ITEMS[index].data for index in order]


def test_one_pass_over_a_file_reads_it_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading in the order of the scan, a few rows apart, goes forward through the file; nothing begins again."""
    monkeypatch.setattr(parquet_door, "SHELF_BYTES", 300)
    monkeypatch.setattr(parquet_door, "BATCH_BYTES", 200)
    opened: list[str] = []
    table = parquet_door.ParquetTable

    def counted(tree: Tree, path: str) -> parquet_door.ParquetTable:
        opened.append(path)
        return table(tree, path)

    items = found(make_source(write_parquet(tmp_path / "t.parquet", ITEMS, group=5)))
    monkeypatch.setattr(parquet_door, "ParquetTable", counted)
    for start in range(3):  # three buckets, each a pass
        assert [items[index].read() for index in range(start, 20, 3)] == [ITEMS[i].data for i in range(start, 20, 3)]
    assert len(opened) <= 3


def test_a_file_that_changed_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet_door, "SHELF_BYTES", 1)
    monkeypatch.setattr(parquet_door, "BATCH_BYTES", 1)
    path = write_parquet(tmp_path / "t.parquet", ITEMS)
    items = found(make_source(path))
    write_parquet(path, ITEMS[:3])
    with pytest.raises(DataError, match="its row is no longer in the file"):
        items[10].read()
    path.write_bytes(b"PAR1 no longer")
    with pytest.raises(DataError, match="not a Parquet file"):
        items[5].read()
    path.unlink()
    with pytest.raises(DataError, match="No such file"):
        items[1].read()


def test_pictures_by_path_are_read_below_the_tables_folder(tmp_path: Path) -> None:
    write_folder(tmp_path, ITEMS, captions=False)
    for name, data in {"a.jsonl": jsonl(ITEMS), "a.csv": csv_text(ITEMS, "image_path")}.items():
        (tmp_path / name).write_bytes(data)
        items = found(make_source(tmp_path / name))
        assert [(item.path, item.read()) for item in items] == [(item.name, item.data) for item in ITEMS]
        assert items[3].captions == ("caption 3", "both")
        assert items[3].meta == {"score": 0.75}


def test_the_table_itself_may_be_a_link(tmp_path: Path) -> None:
    """As in the Hub's cache, where blobs have no suffix."""
    (tmp_path / "blobs").mkdir()
    write_parquet(tmp_path / "blobs/t.parquet", ITEMS).rename(tmp_path / "blobs/abc")
    (tmp_path / "snapshot").mkdir()
    (tmp_path / "snapshot/t.parquet").symlink_to("../blobs/abc")
    assert [item.read() for item in found(make_source(tmp_path / "snapshot/t.parquet"))] == [i.data for i in ITEMS]


def test_columns_by_name(tmp_path: Path) -> None:
    rows = [
        {"pic": "a.png", "tags_text": ["x", "y"], "artist": "A", "extra": {"deep": 1}, "none": None, "n": 1},
        {"pic": "b.png", "tags_text": "z\nw", "artist": "B", "list": [1, 2], "tags": ["p", "q"], "n": 2.5},
    ]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    items = found(make_source(tmp_path / "t.jsonl", image_columns=["pic"], caption_columns=["tags_text"]))
    assert [item.captions for item in items] == [("x", "y"), ("z", "w")]
    assert [item.meta for item in items] == [{"artist": "A", "n": 1}, {"artist": "B", "tags": ("p", "q"), "n": 2.5}]
    only = make_source(tmp_path / "t.jsonl", image_columns=["pic"], meta_columns=["n", "absent"])
    assert [(item.captions, item.meta) for item in found(only)] == [((), {"n": 1}), ((), {"n": 2.5})]
    first = make_source(tmp_path / "t.jsonl", lines="first", image_columns=["pic"], caption_columns=["tags_text"])
    assert [item.captions for item in found(first)] == [("x",), ("z",)]
    named = make_source(tmp_path / "t.jsonl", image_columns=["pic"], captions_from="name")
    assert [item.captions for item in found(named)] == [("a",), ("b",)]


def test_a_column_of_csv_has_one_type_in_all_files(tmp_path: Path) -> None:
    for index, value in enumerate(("1", "2.5", "")):
        (tmp_path / f"{index}.csv").write_text(f"path,score,tag\n{index}.png,{value},{'x' if index else 7}\n")
    items = found(make_source(tmp_path, kind="table"))
    assert [item.meta for item in items] == [{"score": 1.0, "tag": "7"}, {"score": 2.5, "tag": "x"}, {"tag": "x"}]


def test_types_of_parquet_columns(tmp_path: Path) -> None:
    table = pa.table(
        {
            "image": pa.array([b"a", b"b", None], pa.large_binary()),
            "caption": pa.array(["x", None, "z"], pa.large_string()),
            "half": pa.array([0.5, float("nan"), 1.0], pa.float32()),
            "count": pa.array([1, None, 255], pa.uint8()),
            "kind": pa.array(["k", "l", "k"]).dictionary_encode(),
            "tags": pa.array([["p"], [], None], pa.list_(pa.string())),
            "embedding": pa.array([[0.1], [0.2], [0.3]], pa.list_(pa.float32())),
            "when": pa.array([1, 2, 3], pa.timestamp("s")),
            "raw": pa.array([b"\xff", b"", b""]),
        }
    )
    pq.write_table(table, tmp_path / "t.parquet")
    source = make_source(tmp_path / "t.parquet")
    assert reasons(source) == ["t.parquet row 2: no picture"]
    one, two = (item for item in source.scan() if isinstance(item, Found))
    assert (one.captions, one.meta) == (("x",), {"half": 0.5, "count": 1, "kind": "k", "tags": ("p",)})
    assert (two.captions, two.meta) == ((), {"kind": "l", "tags": ()})


BAD_ROWS: dict[str, tuple[dict[str, Any], str]] = {
    "no picture": ({"text": "x"}, "no column of pictures: its columns are text; source.image_columns names"),
    "null": ({"image": None}, "no picture"),
    "a number": ({"image": 5}, "column 'image' holds no picture and no path"),
    "a caption that is a number": ({"image": "a.png", "text": 5}, "caption: a int, not text"),
    "a caption with NUL": ({"image": "a.png", "text": "a\0"}, "caption: holds a NUL byte"),
    "a long caption": ({"image": "a.png", "text": "x" * 70_000}, "caption: 70000 bytes, more than 65536"),
    "half a pair": ({"image": "a.png", "text": "\ud800"}, "caption: holds half a surrogate pair"),
    "a name with half a pair": ({"image": "\ud800.png"}, "its name is not UTF-8"),
    "a column with half a pair": ({"image": "a.png", "\ud800": 1}, "column '\\ud800': holds half a surrogate pair"),
    "a value with half a pair": ({"image": "a.png", "x": ["\udc80"]}, "column 'x': holds half a surrogate pair"),
    "a number beyond 64 bits": ({"image": "a.png", "x": 2**64}, "column 'x': a whole number beyond 64 bits"),
    "a long value": ({"image": "a.png", "x": "y" * 70_000}, "column 'x': 70000 bytes, more than 65536"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_ROWS)
def test_bad_rows_are_named(tmp_path: Path, name: str) -> None:
    values, reason = BAD_ROWS[name]
    (tmp_path / "t.jsonl").write_text(json.dumps({"image": "good.png"}) + "\n" + json.dumps(values) + "\n")
    good, bad = make_source(tmp_path / "t.jsonl").scan()
    assert isinstance(good, Found)
    assert isinstance(bad, Skipped)
    assert (bad.path, bad.reason.startswith(f"t.jsonl line 2: {reason}")) == ("t.jsonl/2", True), bad.reason


def test_many_bad_rows_make_a_small_report(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text("no json\n" * 5000)
    assert len(reasons(make_source(tmp_path / "t.jsonl"))) == 5000
    assert len(set(reasons(make_source(tmp_path / "t.jsonl")))) == 101
    assert reasons(make_source(tmp_path / "t.jsonl"))[-1] == "t.jsonl: more lines that cannot be used"


def test_files_that_are_no_tables(tmp_path: Path) -> None:
    contents = {
        "a.parquet": b"not parquet at all, but long enough",
        "b.parquet": b"",
        "c.csv": b"",
        "d.csv": b"url;text\nhttp://x/a.png;a\n",
        "e.jsonl": b"",
    }
    for name, data in contents.items():
        (tmp_path / name).write_bytes(data)
    write_parquet(tmp_path / "z.parquet", ITEMS[:1])
    source = make_source(tmp_path, kind="table")
    assert [item.path for item in source.scan() if isinstance(item, Found)] == ["z.parquet/0"]
    one, two, three, four = reasons(source)
    assert one.startswith("a.parquet: damaged, or not a Parquet file: ")
    assert two.startswith("b.parquet: damaged, or not a Parquet file: ")
    assert three == "c.csv: no header of column names: it is empty"
    assert four.startswith("d.csv: no column of pictures: its columns are url;text; source.image_columns names")


def test_a_damaged_row_group_costs_its_rows(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "t.parquet", ITEMS, group=5)
    data = bytearray(path.read_bytes())
    at = pq.ParquetFile(path).metadata.row_group(1).column(0).data_page_offset
    data[at : at + 30] = b"\xff" * 30
    path.write_bytes(data)
    source = make_source(path)
    (reason,) = reasons(source)
    assert reason.startswith("t.parquet row 5: rows 5 to 9 cannot be read: damaged")
    assert len([item for item in source.scan() if isinstance(item, Found)]) == 15


def test_text_that_is_not_utf8_costs_its_row(tmp_path: Path) -> None:
    texts = pa.array([b"good", b"caf\xe9", b"fine"]).view(pa.string())
    pq.write_table(pa.table({"image": [b"a", b"b", b"c"], "text": texts}), tmp_path / "t.parquet")
    source = make_source(tmp_path / "t.parquet")
    assert reasons(source) == ["t.parquet row 1: column 'text' is not UTF-8"]


def test_a_picture_that_is_too_large_is_the_builders_to_set_aside(tmp_path: Path) -> None:
    items = found(make_source(write_parquet(tmp_path / "t.parquet", ITEMS), max_bytes=60))
    assert items[0].read() == ITEMS[0].data
    with pytest.raises(DataError, match="69 bytes, more than 60"):
        items[19].read()


def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    """Rows of 100 KB in groups of 20: a hundred groups take what a few take."""
    peaks = []
    for count in (100, 1000):
        items = [Item(f"{index}.png", os.urandom(100_000)) for index in range(count)]
        path = write_parquet(tmp_path / f"{count}.parquet", items, "binary", group=20)
        del items
        base, peak = pa.total_allocated_bytes(), 0
        for item in make_source(path, max_bytes=1 << 20).scan():
            assert isinstance(item, Found)
            item.read()
            peak = max(peak, pa.total_allocated_bytes() - base)
        peaks.append(peak)
    assert peaks[1] < 1.2 * peaks[0] + (60 << 20)
    assert peaks[1] < 100 << 20


def test_equal_pictures_do_not_fill_the_memory(tmp_path: Path) -> None:
    """Four hundred rows of one picture of a megabyte take a megabyte on disk."""
    path = write_parquet(tmp_path / "t.parquet", [Item("a.png", bytes(1 << 20))] * 400, "binary", group=400)
    assert path.stat().st_size < 2 << 20
    base, peak = pa.total_allocated_bytes(), 0
    for item in make_source(path, max_bytes=1 << 20).scan():
        peak = max(peak, pa.total_allocated_bytes() - base)
        assert isinstance(item, Found)
    assert peak < 300 << 20


@pytest.mark.parametrize(("name", "reason"), [("nowhere.csv", "No such file"), ("x.txt", "tables end in .csv")])
def test_a_root_that_is_no_table_is_said_at_once(tmp_path: Path, name: str, reason: str) -> None:
    (tmp_path / "x.txt").touch()
    with pytest.raises(DataError, match=f"data set set: table .*{reason}"):
        make_source(tmp_path / name).scan()
