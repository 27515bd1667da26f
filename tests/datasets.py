"""One data set in every form that a source reads, for tests that compare them."""

import csv
import io
import json
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq


@dataclass(frozen=True)
class Item:
    """A picture with its captions and what travels along."""

    name: str
    data: bytes
    captions: Sequence[str] = ()
    meta: Mapping[str, Any] = field(default_factory=dict)


def write_folder(root: Path, items: Sequence[Item], captions: bool = True) -> Path:
    """Pictures, with their captions in sidecar files or without."""
    root.mkdir(parents=True, exist_ok=True)
    for item in items:
        path = root / item.name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(item.data)
        if captions and item.captions:
            path.with_suffix(".txt").write_text("\n".join(item.captions), encoding="utf-8")
    return root


def jsonl(items: Sequence[Item], name: str = "file_name") -> bytes:
    """A row for each picture, by its path; captions as a list."""
    rows = [{name: item.name, "text": list(item.captions), **item.meta} for item in items]
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def csv_text(items: Sequence[Item], name: str = "file_name") -> bytes:
    """The same as CSV; several captions as lines of one field."""
    columns = list(dict.fromkeys(key for item in items for key in item.meta))
    file = io.StringIO()
    writer = csv.writer(file)
    writer.writerow([name, "text", *columns])
    for item in items:
        writer.writerow([item.name, "\n".join(item.captions), *(item.meta.get(key) for key in columns)])
    return file.getvalue().encode()


def write_parquet(path: Path, items: Sequence[Item], picture: str = "struct", group: int = 3) -> Path:
    """A Parquet file with pictures as {bytes, path}, as plain bytes, or by their paths."""
    cells: dict[str, Any] = {
        "struct": {"image": [{"bytes": item.data, "path": item.name} for item in items]},
        "binary": {"image": [item.data for item in items]},
        "path": {"file_name": [item.name for item in items]},
    }[picture]
    columns = list(dict.fromkeys(key for item in items for key in item.meta))
    cells["text"] = pa.array([list(item.captions) for item in items], pa.list_(pa.string()))
    cells |= {key: [item.meta.get(key) for item in items] for key in columns}
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(cells), path, row_group_size=group)
    return path


def write_tar(path: Path, items: Sequence[Item]) -> Path:
    """A WebDataset shard: key.EXT, key.txt and key.json together."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for item in items:
            key = item.name.rpartition(".")[0]
            add(archive, item.name, item.data)
            if item.captions:
                add(archive, key + ".txt", "\n".join(item.captions).encode())
            if item.meta:
                add(archive, key + ".json", json.dumps(dict(item.meta)).encode())
    return path


def add(archive: tarfile.TarFile, name: str, data: bytes, **fields: Any) -> None:
    """One member."""
    member = tarfile.TarInfo(name)
    member.size = len(data)
    for key, value in fields.items():
        setattr(member, key, value)
    archive.addfile(member, io.BytesIO(data))


def write_as(form: str, root: Path, items: Sequence[Item]) -> Path:
    """The data set in one of FORMS under `root`; returns the root to give to a source."""
    if form == "sidecars":
        return write_folder(root, items)
    if form.startswith("metadata"):
        write_folder(root, items, captions=False)
        _write_table(root / form, items, "file_name")
        return root
    if form == "tar":
        return write_tar(root / "shard-0.tar", items)
    if form in ("struct.parquet", "binary.parquet"):
        return write_parquet(root / "t.parquet", items, form.partition(".")[0])
    write_folder(root, items, captions=False)
    return _write_table(root / ("table." + form.partition(".")[2]), items, "image" if "jsonl" in form else "path")


def _write_table(path: Path, items: Sequence[Item], name: str) -> Path:
    if path.suffix == ".parquet":
        return write_parquet(path, items, "path")
    path.write_bytes(jsonl(items, name) if path.suffix == ".jsonl" else csv_text(items, name))
    return path


FORMS = (
    "sidecars", "metadata.jsonl", "metadata.csv", "metadata.parquet", "paths.jsonl", "paths.csv", "paths.parquet",
    "struct.parquet", "binary.parquet", "tar",
)  # fmt: skip
