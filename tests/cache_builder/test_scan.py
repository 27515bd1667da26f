"""The first pass: what is seen becomes a sample with its keys, or is counted with its reason."""

import struct
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cache_builder.buckets import CropPlan
from cache_builder.config import BuildConfig
from cache_builder.keys import facts_key, image_digest, latent_key
from cache_builder.report import BuildReport
from cache_builder.sample import Sample
from cache_builder.samples import Samples
from cache_builder.scan import Scanner
from cache_builder.sources import Found, Skipped
from demo.draw import draw
from demo.scene import make_scene
from shared.config import load_config
from shared.errors import DataError
from shared.pictures import PixelRules
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
    return Found(path, captions, partial(bytes, data))


def scan(store: StoreWriter, *sources: ListSource, sets: Sequence[str] = ()) -> tuple[Samples, BuildReport]:
    config = load_config(BuildConfig, sets=["images.resolution=64", "images.step=16", *sets])
    report = BuildReport()
    samples = Scanner(config, VAE, "float32", {}, report).scan(sources, store)
    assert report.seen == len(samples) + report.duplicate + report.skipped.total() + len(report.quarantined)
    return samples, report


@pytest.fixture
def store(tmp_path: Path) -> Iterator[StoreWriter]:
    with StoreWriter(tmp_path / "store") as writer:
        yield writer


def test_samples_carry_their_keys(store: StoreWriter) -> None:
    data = png(0, (80, 120))
    (sample,), _ = scan(store, ListSource([found("a.png", data, "one", "two")]))
    assert (sample.dataset, sample.path, list(sample.captions)) == ("set", "a.png", ["one", "two"])
    assert (sample.digest, sample.original_hw, sample.read()) == (image_digest(data), (80, 120), data)
    rules = PixelRules()
    assert sample.facts_key == facts_key(sample.digest, rules)
    assert sample.crops[0].latent_key == latent_key(
        sample.digest, sample.crops[0].plan, rules, VAE, "float32", "moments"
    )
    assert sample.thumbnail is None


def test_every_reason_is_counted(store: StoreWriter) -> None:
    def fail() -> bytes:
        raise DataError("cannot be read: gone")

    items: list[Found | Skipped] = [
        found("good.png", png(0), "a"),
        found("good again.png", png(0), "a", "b"),
        found("bad.png", b"nothing", "a"),
        found("thin.png", png(1, (10, 700)), "a"),
        Found("gone.png", ("a",), partial(fail)),
        Skipped("link.png", "symlink"),
        Skipped("other.png", "symlink"),
        found("mute.png", png(2)),
    ]
    samples, report = scan(store, ListSource(items), sets=["captions.missing=skip"])
    assert [(sample.path, list(sample.captions)) for sample in samples] == [("good.png", ["a", "b"])]
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
    assert [list(sample.captions) for sample in samples] == [[""], ["b"], [""]]


def test_the_same_bytes_are_one_sample_in_a_data_set_and_two_in_two(store: StoreWriter) -> None:
    items = [found("a.png", png(0), "x", "y"), found("b.png", png(0), "y", "z"), found("c.png", png(0), "w")]
    samples, report = scan(store, ListSource(items, "one"), ListSource(items[1:], "two"))
    assert [(s.dataset, s.path, list(s.captions)) for s in samples] == [
        ("one", "a.png", ["x", "y", "z", "w"]),
        ("two", "b.png", ["y", "z", "w"]),
    ]
    assert samples[0].crops == samples[1].crops
    assert report.duplicate == 3


def test_what_an_earlier_build_found_out_is_used(store: StoreWriter) -> None:
    data, rules = png(0), PixelRules()
    key, thumb = facts_key(image_digest(data), rules), np.full((8, 9, 3), 7, np.uint8)
    store.put_many([(key, encode_record(key, "picture facts", {"thumbnail": thumb}, {"original_hw": [300, 100]}))])
    (sample,), _ = scan(store, ListSource([found("a.png", data, "a")]))
    assert sample.original_hw == (300, 100)  # a lie, told by the record
    assert sample.thumbnail == thumb.tobytes()
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
            sample.digest: sample.crops[0].plan.box_left
            for sample in scan(store, ListSource(items), sets=[*sets, *more])[0]
        }

    assert boxes(items) == boxes(items[::-1])
    assert boxes(items[5:]).items() < boxes(items).items()
    assert len(set(boxes(items).values())) > 5
    assert boxes(items, "seed=1") != boxes(items)


def crops_of(sample: Sample) -> list[CropPlan]:
    return [crop.plan for crop in sample.crops]


def test_several_crops_of_a_picture(store: StoreWriter) -> None:
    items = [found("wide.png", png(0, (70, 300)), "a"), found("fits.png", png(1, (64, 64)), "a")]
    sets = ["images.crop=random", "images.max_aspect=1", "images.variants=4"]
    (wide, fits), _ = scan(store, ListSource(items), sets=sets)
    assert len(wide.crops) == len({crop.latent_key for crop in wide.crops}) == 4
    assert len(fits.crops) == 1  # there is but one crop of it
    fewer, _ = scan(store, ListSource(items), sets=[*sets, "images.variants=2"])
    assert fewer[0].crops == wide.crops[:2]
    (one, _), _ = scan(store, ListSource(items), sets=sets[:2])
    assert one.crops == wide.crops[:1]  # more variants leave the first as it was
    (corner, _), _ = scan(store, ListSource(items), sets=["images.crop=corner", *sets[1:]])
    free = corner.crops[0].plan.resize_hw[1] - 64
    assert {plan.box_left for plan in crops_of(corner)} == {0, free}
    assert len(corner.crops) == 2  # the other two corners are the same crops: its height is all used


def test_square_and_off(store: StoreWriter) -> None:
    items = [found("a.png", png(0, (70, 300)), "a"), found("b.png", png(1, (190, 101)), "a")]
    square, _ = scan(store, ListSource(items), sets=["images.crop=square"])
    assert [plan.target_hw for sample in square for plan in crops_of(sample)] == [(64, 64)] * 2
    whole, report = scan(store, ListSource(items), sets=["images.crop=off"])
    assert [crops_of(sample) for sample in whole] == [[CropPlan((90, 48), 1, 0, (88, 48))]]
    assert report.skipped == {'longer than images.max_aspect = 4.0, and crop = "off" cuts nothing': 1}


def test_given_buckets_are_the_only_ones(store: StoreWriter) -> None:
    items = [found("a.png", png(0, (70, 300)), "a"), found("b.png", png(1, (300, 100)), "a")]
    samples, _ = scan(store, ListSource(items), sets=["images.buckets=[[64, 128], [96, 64]]"])
    assert [plan.target_hw for sample in samples for plan in crops_of(sample)] == [(64, 128), (96, 64)]


SKIPPED = {
    "images.skip.min_size=100": ("small.png", "smaller than images.skip.min_size = 100"),
    "images.skip.max_size=150": ("large.png", "larger than images.skip.max_size = 150"),
    "images.skip.max_aspect=2.5": ("wide.png", "wider than images.skip.max_aspect = 2.5"),
    "images.skip.min_aspect=0.4": ("high.png", "narrower than images.skip.min_aspect = 0.4"),
    "images.skip.max_upscale=1.25": ("small.png", "would be enlarged by more than images.skip.max_upscale = 1.25"),
}


@pytest.mark.parametrize("setting", SKIPPED)
def test_what_is_left_out_is_counted_with_its_reason(setting: str, store: StoreWriter) -> None:
    sizes = {"small": (50, 50), "fits": (110, 110), "large": (200, 200), "wide": (75, 200), "high": (200, 75)}
    items = [found(f"{name}.png", png(index, size), "a") for index, (name, size) in enumerate(sizes.items())]
    samples, report = scan(store, ListSource(items), sets=[setting])
    path, reason = SKIPPED[setting]
    assert {sample.path for sample in samples} == {item.path for item in items} - {path}
    assert report.skipped == {reason: 1}


def test_what_is_left_out_is_not_unusable(store: StoreWriter) -> None:
    items = [found("thin.png", png(0, (700, 10)), "a"), found("good.png", png(1), "a")]
    _, report = scan(store, ListSource(items), sets=["images.skip.min_aspect=0.5"])
    assert (report.skipped.total(), report.quarantined) == (1, [])
    _, report = scan(store, ListSource(items))
    assert (report.skipped.total(), len(report.quarantined)) == (0, 1)


def test_sizes_are_measured_as_the_resolution_is(store: StoreWriter) -> None:
    items = [found("wide.png", png(0, (70, 140)), "a")]
    for kind, px in (("area", 98), ("edge", 70), ("long_edge", 140)):
        sets = [f"images.resolution_type={kind}", f"images.skip.max_size={px + 1}"]
        assert len(scan(store, ListSource(items), sets=[*sets, f"images.skip.min_size={px}"])[0]) == 1
        with pytest.raises(DataError, match=r"1 smaller than images\.skip\.min_size"):
            scan(store, ListSource(items), sets=[*sets, f"images.skip.min_size={px + 1}"])


def test_what_is_enlarged_is_told(store: StoreWriter) -> None:
    items = [found("small.png", png(0, (40, 40)), "a"), found("fits.png", png(1, (64, 64)), "a")]
    _, report = scan(store, ListSource(items))
    assert (report.enlarged, report.most_enlarged) == (1, 1.6)
    assert "  enlarged 1, at most 1.60 times: they will look soft" in report.as_text().splitlines()


def test_some_samples_are_always_the_same_ones(store: StoreWriter) -> None:
    items = [found(f"{i}.png", png(i), "a") for i in range(12)]
    items.append(found("twin.png", png(3), "b"))

    def chosen(items: Sequence[Any], most: int, *more: str) -> set[str]:
        samples, report = scan(store, ListSource(items), sets=[f"images.skip.max_samples={most}", *more])
        assert report.skipped == {f"beyond images.skip.max_samples = {most}": 12 - most}
        assert report.duplicate == 1
        return {sample.digest.hex() for sample in samples}

    assert chosen(items, 5) == chosen(items[::-1], 5)
    assert chosen(items, 5) < chosen(items, 8)
    assert chosen(items, 5, "seed=1") != chosen(items, 5)
    assert len(scan(store, ListSource(items), sets=["images.skip.max_samples=12"])[0]) == 12


def test_mirrored_crops_stand_beside_the_others_unless_a_caption_would_lie(store: StoreWriter) -> None:
    items = [
        found("plain.png", png(0, (70, 110)), "a cat"),
        found("sided.png", png(1, (70, 110)), "a cat", "a cat on the left"),
        found("twin.png", png(2, (70, 110)), "a cat"),
        found("twin again.png", png(2, (70, 110)), "to the Right"),
    ]
    sets = ["images.crop=random", "images.variants=2", "images.max_aspect=1"]
    off, _ = scan(store, ListSource(items), sets=sets)
    on, report = scan(store, ListSource(items), sets=[*sets, "images.flip=on"])
    force, forced = scan(store, ListSource(items), sets=[*sets, "images.flip=force"])
    assert (report.sided, forced.sided) == (2, 2)
    assert [sum(plan.flip for plan in crops_of(sample)) for sample in on] == [2, 0, 0]
    assert [sum(plan.flip for plan in crops_of(sample)) for sample in force] == [2, 2, 2]
    for without, mirrored in zip(off, force, strict=True):
        assert mirrored.crops[:2] == without.crops
        assert [replace(plan, flip=False) for plan in crops_of(mirrored)[2:]] == crops_of(without)
    assert any("sided 2: a caption says left or right" in line for line in report.as_text().splitlines())


def test_empty_captions_have_a_policy_of_their_own(store: StoreWriter) -> None:
    items = [found("a.png", png(0)), found("b.png", png(1), ""), found("c.png", png(2), "bad", "c")]
    items.append(found("d.png", png(3), "bad"))
    sets = ["captions.remove=['bad']", "captions.missing=skip"]
    samples, report = scan(store, ListSource(items), sets=sets)
    assert [(sample.path, list(sample.captions)) for sample in samples] == [("c.png", ["c"])]
    assert report.skipped == {"no caption": 1, "empty caption": 2}
    samples, report = scan(store, ListSource(items), sets=[*sets, "captions.empty=empty"])
    assert [(sample.path, list(sample.captions)) for sample in samples] == [
        ("b.png", [""]),
        ("c.png", ["c"]),
        ("d.png", [""]),
    ]
    samples, report = scan(store, ListSource(items), sets=["captions.missing=empty", "captions.empty=skip"])
    assert (len(samples), report.skipped) == (3, {"empty caption": 1})
    samples, _ = scan(store, ListSource(items), sets=["captions.missing=empty", "captions.trigger=sks"])
    assert [list(sample.captions) for sample in samples][:2] == [["sks"], ["sks"]]


def test_tags_are_shuffled_by_picture(store: StoreWriter) -> None:
    items = [found(f"{i}.png", png(i), "a, b, c, d, e, f") for i in range(3)]
    sets = ["captions.variants={count = 3, keep_first = 1}"]
    samples, _ = scan(store, ListSource(items), sets=sets)
    backwards, _ = scan(store, ListSource(items[::-1]), sets=sets)
    assert {s.digest: s.captions for s in samples} == {s.digest: s.captions for s in backwards}
    assert len({tuple(sample.captions) for sample in samples}) == 3
    assert {sample.captions[0] for sample in samples} == {"a, b, c, d, e, f"}


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
