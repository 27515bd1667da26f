"""Hostile names, links and files in every kind of source: nothing outside the root is opened, all is accounted for."""

import io
import os
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from cache_builder.config import BuildConfig
from cache_builder.datasets import open_sources
from cache_builder.report import BuildReport
from cache_builder.samples import Samples
from cache_builder.scan import Scanner
from shared.config import validate
from shared.store import StoreWriter
from tests.datasets import Item, add, csv_text, jsonl, write_folder, write_parquet, write_tar


def picture(shade: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (64, 64), (shade, 0, 0)).save(file, format="PNG")
    return file.getvalue()


GOOD, SECRET = picture(10), picture(200)
NAMES = {
    "up": "../secret/secret.png",
    "up later": "below/../../secret/secret.png",
    "up, dotted": "./.././secret/secret.png",
    "absolute": "{secret}/secret.png",
    "absolute, doubled": "//{secret}/secret.png",
    "passwd": "/etc/passwd",
    "home": "~/secret.png",
    "address": "file://{secret}/secret.png",
    "drive": "C:\\secret\\secret.png",
    "share": "\\\\host\\secret.png",
    "backslashes": "..\\secret\\secret.png",
    "link": "link.png",
    "link to nothing": "dangling.png",
    "through a link": "linked/secret.png",
    "through two links": "linked/up/secret/secret.png",
    "self": "linked/../../secret/secret.png",
    "NUL": "link.png\0.txt",
    "NUL first": "\0link.png",
    "dot": ".",
    "dots": "..",
    "root": "/",
    "a folder": "folder.png",
    "a pipe": "fifo.png",
    "a device": "/dev/zero",
    "long": "a/" * 3000 + "x.png",
    "long name": "x" * 300 + ".png",
    "line end": "../secret/secret.png\n",
    "not there": "nowhere.png",
}
FORMS = ("table.jsonl", "table.csv", "table.parquet", "metadata.jsonl", "metadata.csv", "metadata.parquet", "tar")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StoreWriter]:
    with StoreWriter(tmp_path_factory.mktemp("hostile") / "store") as writer:
        yield writer


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Where every file that is opened really lies."""
    seen: list[str] = []
    real_open = os.open

    def watched(*arguments: Any, **options: Any) -> int:
        descriptor = real_open(*arguments, **options)
        name = os.readlink(f"/proc/self/fd/{descriptor}")
        seen.extend([] if name.endswith(" (deleted)") else [name])  # an unnamed file is a column of the samples
        return descriptor

    monkeypatch.setattr(os, "open", watched)
    return seen


def scan(root: Path, store: StoreWriter, **source: Any) -> tuple[Samples, BuildReport]:
    """The samples under `root`, each read once more as the second pass does."""
    data = {
        "images": {"resolution": 64, "step": 16},
        "captions": {"missing": "empty"},
        "datasets": [{"id": "set", "root": str(root), "source": source}],
    }
    config, report = validate(BuildConfig, data), BuildReport()
    samples = Scanner(config, "ab" * 32, "float32", {}, report).scan(open_sources(config.datasets), store)
    assert report.seen == len(samples) + report.duplicate + report.skipped.total() + len(report.quarantined)
    for sample in samples:
        assert sample.read()
    return samples, report


def make_root(tmp_path: Path) -> tuple[Path, Path]:
    """A root with links out of it, and what lies outside."""
    root = write_folder(tmp_path / "root", [Item("good.png", GOOD, ["good"])], captions=False)
    secret = write_folder(tmp_path / "secret", [Item("secret.png", SECRET, ["secret"])])
    (root / "link.png").symlink_to(secret / "secret.png")
    (root / "dangling.png").symlink_to("nowhere at all")
    (root / "linked").symlink_to(secret)
    (secret / "up").symlink_to("..")
    (root / "folder.png").mkdir()
    os.mkfifo(root / "fifo.png")
    return root, secret


def write_hostile(form: str, root: Path, name: str) -> Path:
    items = [Item(name, b"", ["hostile"]), Item("good.png", GOOD, ["good"])]
    if form == "tar":
        return write_tar(root / "shard.tar", [Item(name, SECRET, ["hostile"]), items[1]])
    path = root / form
    if form.endswith("parquet"):
        write_parquet(path, items, "path")
    else:
        path.write_bytes(jsonl(items) if form.endswith("jsonl") else csv_text(items))
    return root if form.startswith("metadata") else path


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", NAMES)
def test_no_name_leads_out_of_the_root(
    tmp_path: Path, store: StoreWriter, opened: list[str], name: str, form: str
) -> None:
    root, secret = make_root(tmp_path)
    hostile = NAMES[name].replace("{secret}", str(secret))
    samples, report = scan(write_hostile(form, root, hostile), store)
    outside = [path for path in opened if not path.startswith(str(root)) and not path.startswith(str(store.path))]
    assert outside == []
    if form == "tar":  # what is in the shard may be read, under no name that leads out of it
        assert {sample.path.partition("/")[0] for sample in samples} == {"shard.tar"}
        assert not any(".." in sample.path.split("/") for sample in samples)
    else:
        assert [(sample.path, sample.read(), list(sample.captions)) for sample in samples] == [
            ("good.png", GOOD, ["good"])
        ]
        assert report.seen >= 2
    assert all(reason.isprintable() or "\n" in hostile for reason in report.skipped)


MEMBERS: dict[str, dict[str, Any]] = {
    "symlink": {"type": tarfile.SYMTYPE, "linkname": "../secret/secret.png"},
    "hard link": {"type": tarfile.LNKTYPE, "linkname": "/etc/passwd"},
    "link to another member": {"type": tarfile.LNKTYPE, "linkname": "good.png"},
    "device": {"type": tarfile.CHRTYPE, "devmajor": 1, "devminor": 5},
    "block device": {"type": tarfile.BLKTYPE, "devmajor": 8, "devminor": 0},
    "pipe": {"type": tarfile.FIFOTYPE},
    "old sparse": {"type": tarfile.GNUTYPE_SPARSE},
    "unknown": {"type": b"?"},
}


@pytest.mark.parametrize("kind", MEMBERS)
@pytest.mark.parametrize("name", ["bad.png", "good.txt"])
def test_members_that_are_no_files(tmp_path: Path, store: StoreWriter, opened: list[str], kind: str, name: str) -> None:
    root, _ = make_root(tmp_path)
    with tarfile.open(root / "shard.tar", "w") as archive:
        add(archive, "early.png", picture(30))
        add(archive, name, b"", **MEMBERS[kind])
        add(archive, "good.png", GOOD)
    samples, _ = scan(root / "shard.tar", store)
    expected = {"shard.tar/early.png", "shard.tar/good.png"}
    assert {sample.path for sample in samples} - {"shard.tar/bad.png"} <= expected
    assert "shard.tar/early.png" in {sample.path for sample in samples}
    assert all(path.startswith((str(root), str(store.path))) for path in opened)
    assert all("hostile" not in caption for sample in samples for caption in sample.captions)


def broken_header(data: bytes, at: int, new: bytes) -> bytes:
    """An archive of which the second member's header is changed at `at`, with a checksum that is right again."""
    start = 512 + (len(GOOD) + 511) // 512 * 512
    header = bytearray(data[start : start + 512])
    header[at : at + len(new)] = new
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return data[:start] + bytes(header) + data[start + 512 :]


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "cut in a header": lambda data: data[: 512 + (len(GOOD) + 511) // 512 * 512 + 100],
    "cut in a picture": lambda data: data[: 1024 + (len(GOOD) + 511) // 512 * 512 + 60],
    "garbage for a header": lambda data: broken_header(data, 0, b"x") [:148] + data[148:1024] + b"\xff" * 5000,
    "a size below zero": lambda data: broken_header(data, 124, b"\xff" * 11 + b"\x00"),
    "a size of petabytes": lambda data: broken_header(data, 124, b"\x80\0\0\0" + b"\x7f" * 8),
    "a header of gigabytes": lambda data: broken_header(broken_header(data, 156, b"x"), 124, b"77777777777\0"),
    "a long name of gigabytes": lambda data: broken_header(broken_header(data, 156, b"L"), 124, b"77777777777\0"),
    "a size that is text": lambda data: broken_header(data, 124, b"manybytes\0\0\0"),
    "another archive behind it": lambda data: data + data,
    "gzip": lambda data: __import__("gzip").compress(data),
    "nothing": lambda data: b"",
    "no archive": lambda data: b"x" * 4096,
}  # fmt: skip


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_shards_cost_what_is_damaged(tmp_path: Path, store: StoreWriter, kind: str) -> None:
    """What stands before the damage is used, the rest is one thing that was skipped, and said."""
    root = tmp_path / "root"
    write_tar(root / "a.tar", [Item("good.png", GOOD), Item("more.png", picture(77))])
    write_tar(root / "b.tar", [Item("last.png", picture(99), ["last"])])
    data = (root / "a.tar").read_bytes()
    (root / "a.tar").write_bytes(DAMAGE[kind](data))
    samples, report = scan(root, store, kind="webdataset")
    assert samples[-1].path == "b.tar/last.png"
    assert list(samples[-1].captions) == ["last"]
    assert report.skipped.total() + len(report.quarantined) == 1
    (reason,) = [*report.skipped, *(reason for _, reason in report.quarantined)]
    assert reason.startswith("a.tar")
    assert kind in ("nothing", "no archive", "gzip") or samples[0].path == "a.tar/good.png"


def test_shards_and_tables_that_are_links_are_not_followed(
    tmp_path: Path, store: StoreWriter, opened: list[str]
) -> None:
    outside = tmp_path / "outside"
    secret = [Item("secret.png", SECRET, ["secret"])]
    write_tar(outside / "x.tar", secret)
    write_parquet(outside / "x.parquet", secret)
    for kind, suffix in (("webdataset", "tar"), ("table", "parquet")):
        root = tmp_path / kind
        items = [Item("good.png", GOOD)]
        write_tar(root / "good.tar", items) if suffix == "tar" else write_parquet(root / "good.parquet", items)
        (root / f"x.{suffix}").symlink_to(outside / f"x.{suffix}")
        (root / "below").symlink_to(outside)
        (root / f"folder.{suffix}").mkdir()
        os.mkfifo(root / f"pipe.{suffix}")
        samples, report = scan(root, store, kind=kind)
        assert [sample.read() for sample in samples] == [GOOD]
        assert set(report.skipped) == {f"x.{suffix}: symlink", f"pipe.{suffix}: not a regular file"}
    root = write_folder(tmp_path / "folder", [Item("good.png", GOOD)])
    (outside / "metadata.csv").write_bytes(csv_text([Item("good.png", b"", ["secret"])]))
    (root / "metadata.csv").symlink_to(outside / "metadata.csv")
    samples, report = scan(root, store)
    assert [list(sample.captions) for sample in samples] == [[""]]
    assert report.skipped == {"metadata.csv: symlink": 1}
    assert not [path for path in opened if path.startswith(str(outside))]


def test_what_changes_into_a_link_after_the_scan_is_not_followed(tmp_path: Path, store: StoreWriter) -> None:
    root, secret = make_root(tmp_path)
    (root / "below").mkdir()
    (root / "below/good.png").write_bytes(GOOD)
    (root / "t.jsonl").write_bytes(jsonl([Item("below/good.png", b"")]))
    (sample,), _ = scan(root / "t.jsonl", store)
    (root / "below").rename(root / "gone")
    (root / "below").symlink_to(secret)
    (secret / "good.png").write_bytes(SECRET)
    with pytest.raises(Exception, match="cannot be read"):
        sample.read()
