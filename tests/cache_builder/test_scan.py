"""The first pass: what is seen becomes a sample with its keys, or is counted with its reason."""

import struct
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cache_builder.config import BuildConfig
from cache_builder.keys import facts_key, image_digest, latent_key
from cache_builder.pixels import PixelRules
from cache_builder.report import BuildReport
from cache_builder.scan import Sample, Scanner
from cache_builder.sources import Found, Skipped
from demo.draw import draw
from demo.scene import make_scene
from shared.config import load_config
from shared.errors import DataError
from shared.record import encode_record
from shared.store import StoreWriter

VAE = "ab" * 32


class ListSource:
    """A data set that is a list."""

    def __init__(self, items: Sequence[Found | Skipped], dataset_id: str = "set") -> None:
        self.dataset_id, self.passed_over, self._items = dataset_id, Counter[str](), items
        self.containers = 0

    def scan(self) -> Iterator[Found | Skipped]:
        return iter(self._items)


def png(index: int, size_hw: tuple[int, int] | None = None) -> bytes:
    import io

    file, image = io.BytesIO(), draw(make_scene(0, index))
    (image.resize(size_hw[::-1]) if size_hw else image).save(file, format="PNG")
    return file.getvalue()


def found(path: str, data: bytes, *captions: str) -> Found:
    return Found(path, captions, lambda: data)


def scan(store: StoreWriter, *sources: ListSource, sets: Sequence[str] = ()) -> tuple[list[Sample], BuildReport]:
    config = load_config(BuildConfig, sets=["images.resolution=64", "images.step=16", *sets])
    report = BuildReport()
    samples = Scanner(config, VAE, "float32", report).scan(sources, store)
    assert report.seen == len(samples) + report.duplicate + report.skipped.total() + len(report.quarantined)
    return samples, report


@pytest.fixture
def store(tmp_path: Path) -> Iterator[StoreWriter]:
    with StoreWriter(tmp_path / "store") as writer:
        yield writer


def test_samples_carry_their_keys(store: StoreWriter) -> None:
    data = png(0, (80, 120))
    (sample,), _ = scan(store, ListSource([found("a.png", data, "one", "two")]))
    assert (sample.dataset, sample.path, sample.captions) == ("set", "a.png", ["one", "two"])
    assert (sample.digest, sample.original_hw, sample.read()) == (image_digest(data), (80, 120), data)
    rules = PixelRules()
    assert sample.facts_key == facts_key(sample.digest, rules)
    assert sample.latent_key == latent_key(sample.digest, sample.plan, rules, VAE, "float32", "moments")
    assert sample.thumbnail is None


def test_every_reason_is_counted(store: StoreWriter) -> None:
    def fail() -> bytes:
        raise DataError("cannot be read: gone")

    items: list[Found | Skipped] = [
        found("good.png", png(0), "a"),
        found("good again.png", png(0), "a", "b"),
        found("bad.png", b"nothing", "a"),
        found("thin.png", png(1, (10, 700)), "a"),
        Found("gone.png", ("a",), fail),
        Skipped("link.png", "symlink"),
        Skipped("other.png", "symlink"),
        found("mute.png", png(2)),
    ]
    samples, report = scan(store, ListSource(items), sets=["captions.missing=skip"])
    assert [(sample.path, sample.captions) for sample in samples] == [("good.png", ["a", "b"])]
    assert report.duplicate == 1
    assert report.skipped == {"symlink": 2, "no caption": 1}
    assert dict(report.quarantined)["gone.png"] == "cannot be read: gone"
    assert dict(report.quarantined)["thin.png"] == "10 x 700 px is too long and thin for any bucket"
    assert "damaged" in dict(report.quarantined)["bad.png"]


def test_missing_captions(store: StoreWriter) -> None:
    items = [found("a.png", png(0)), found("b.png", png(1), "b"), found("a\x1b.png", png(2))]
    with pytest.raises(DataError, match=r"2 of 3 pictures have no caption \(a.png, a\x1b.png\): .*=skip"):
        scan(store, ListSource(items))
    samples, _ = scan(store, ListSource(items), sets=["captions.missing=empty"])
    assert [sample.captions for sample in samples] == [[""], ["b"], [""]]


def test_the_same_bytes_are_one_sample_in_a_data_set_and_two_in_two(store: StoreWriter) -> None:
    items = [found("a.png", png(0), "x", "y"), found("b.png", png(0), "y", "z"), found("c.png", png(0), "w")]
    samples, report = scan(store, ListSource(items, "one"), ListSource(items[1:], "two"))
    assert [(s.dataset, s.path, s.captions) for s in samples] == [
        ("one", "a.png", ["x", "y", "z", "w"]),
        ("two", "b.png", ["y", "z", "w"]),
    ]
    assert samples[0].latent_key == samples[1].latent_key
    assert report.duplicate == 3


def test_what_an_earlier_build_found_out_is_used(store: StoreWriter) -> None:
    data, rules = png(0), PixelRules()
    key, thumb = facts_key(image_digest(data), rules), np.full((8, 9, 3), 7, np.uint8)
    store.put_many([(key, encode_record(key, "picture facts", {"thumbnail": thumb}, {"original_hw": [300, 100]}))])
    (sample,), _ = scan(store, ListSource([found("a.png", data, "a")]))
    assert sample.original_hw == (300, 100)  # a lie, told by the record
    np.testing.assert_array_equal(sample.thumbnail, thumb)
    (sample,), _ = scan(store, ListSource([found("a.png", data, "a")]), sets=["images.resample=bicubic"])
    assert sample.original_hw != (300, 100)


def test_a_damaged_fact_is_found_out_again(store: StoreWriter) -> None:
    data = png(0)
    key = facts_key(image_digest(data), PixelRules())
    framed = bytearray(encode_record(key, "picture facts", {"thumbnail": np.zeros((8, 9, 3), np.uint8)}, {}))
    framed[60] ^= 1
    store.put_many([(key, bytes(framed))])
    (sample,), _ = scan(store, ListSource([found("a.png", data, "a")]))
    assert sample.original_hw == draw(make_scene(0, 0)).size[::-1]
    assert sample.thumbnail is None


def test_random_crops_follow_the_picture_and_the_seed(store: StoreWriter) -> None:
    items = [found(f"{i}.png", png(i, (70, 110)), "a") for i in range(12)]
    sets = ["images.crop=random", "images.max_aspect=1"]

    def boxes(items: Sequence[Any], *more: str) -> dict[bytes, int]:
        return {
            sample.digest: sample.plan.box_left for sample in scan(store, ListSource(items), sets=[*sets, *more])[0]
        }

    assert boxes(items) == boxes(items[::-1])
    assert boxes(items[5:]).items() < boxes(items).items()
    assert len(set(boxes(items).values())) > 5
    assert boxes(items, "seed=1") != boxes(items)


def test_a_bomb_costs_one_picture(store: StoreWriter) -> None:
    """A header of 10,000 x 10,000 pixels over a few bytes: refused from the header, nothing is decoded."""
    header = struct.pack(">IIBBBBB", 10_000, 10_000, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(bytes(30_001))), (b"IEND", b"")]
    bomb = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )
    samples, report = scan(store, ListSource([found("a.png", png(0), "a"), found("bomb.png", bomb, "boom")]))
    assert len(samples) == 1
    assert report.quarantined == [("bomb.png", "10000 x 10000 px, more than 64000000 pixels")]


def test_nothing_to_train_on_says_what_was_seen(store: StoreWriter) -> None:
    with pytest.raises(DataError, match=r"no pictures in set: it holds no files; pictures end in \.avif, .*\.webp$"):
        scan(store, ListSource([]))
    items: list[Found | Skipped] = [found("a.png", b"", "a"), Skipped("b.png", "symlink"), Skipped("c.png", "symlink")]
    with pytest.raises(DataError, match=r"no picture of set can be used: 3 seen; 2 symlink; a.png: damaged"):
        scan(store, ListSource(items))


def test_pillow_sees_no_more_than_a_header(store: StoreWriter, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("a picture was decoded"))
    samples, _ = scan(store, ListSource([found("a.png", PNG_ONE, "a")]))
    assert len(samples) == 1


PNG_ONE = png(1)
