"""The drawn data set: captions true of the pixels, and every file a function of (seed, index)."""

import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from demo.captions import WORDS, describe
from demo.draw import draw, draw_ground, draw_mask
from demo.scene import (
    COLOURS,
    GROUNDS,
    KINDS,
    RADII,
    SIZES_HW,
    Ground,
    Scene,
    Shape,
    held_out_combinations,
    make_scene,
)
from demo.shapes import main, write_shapes

SIZED = rf"an? (?:(small|large) )?({'|'.join(COLOURS)}) ({'|'.join(KINDS)})"
GROUND = r"(?:on |background of |background fading from |a )(\w+)(?:(?: and | fading to | to )(\w+))?"
SCENES = [make_scene(seed, index) for seed in (0, 1) for index in range(150)]
ONE = [scene for scene in SCENES if len(scene.shapes) == 1]
TWO = [scene for scene in SCENES if len(scene.shapes) == 2]


def pixels_of(scene: Scene, colour: str) -> tuple[np.ndarray, np.ndarray]:
    """Where, in the drawn picture, this exact colour stands: ys and xs."""
    picture = np.asarray(draw(scene))
    assert picture.shape == (*scene.size_hw, 3)
    return np.nonzero((picture == COLOURS[colour]).all(axis=-1))


def words_of(caption: str) -> list[tuple[str, str, str]]:
    """(size, colour, kind) of the shapes that a caption names."""
    return re.findall(SIZED, caption)


def test_every_caption_names_the_shapes_that_stand_there() -> None:
    for scene in SCENES:
        for caption in describe(scene):
            named = {(colour, kind) for _, colour, kind in words_of(caption)}
            assert named == {(shape.colour, shape.kind) for shape in scene.shapes}, caption
        for shape in scene.shapes:
            ys, xs = pixels_of(scene, shape.colour)
            mask = np.asarray(draw_mask(shape, scene.size_hw))
            assert (mask[ys, xs] == 255).all()
            assert len(ys) == (mask == 255).sum()


def test_relations_are_true_of_the_pixels() -> None:
    assert len(TWO) > 100
    for scene in TWO:
        full, sides, back, _ = describe(scene)
        for caption in (full, back):
            (_, colour, _), (_, other, _) = words_of(caption)
            (ys, xs), (other_ys, other_xs) = pixels_of(scene, colour), pixels_of(scene, other)
            apart = {
                "left of": xs.max() < other_xs.min(),
                "right of": xs.min() > other_xs.max(),
                "above": ys.max() < other_ys.min(),
                "below": ys.min() > other_ys.max(),
            }
            (relation,) = (word for word in apart if f" {word} " in caption)
            assert apart[relation], caption
        (_, colour, _), (_, other, _) = words_of(sides)
        axis, ends = (1, ("left", "right")) if "on the left" in sides else (0, ("top", "bottom"))
        middles = [np.mean(pixels_of(scene, name)[axis]) / scene.size_hw[axis] for name in (colour, other)]
        assert sides.index(ends[0]) < sides.index(ends[1])
        assert middles[0] < 0.5 < middles[1], sides


def test_positions_are_true_of_the_pixels() -> None:
    assert len(ONE) > 80
    for scene in ONE:
        (shape,) = scene.shapes
        mask = np.asarray(draw_mask(shape, scene.size_hw)) > 127
        middles = [(np.flatnonzero(mask.any(1 - axis))[[0, -1]].mean() + 0.5) / scene.size_hw[axis] for axis in (0, 1)]
        for caption in describe(scene)[:3]:
            where = re.search(r" (?:at|in) the ([a-z ]+?)(?: on |$)", caption)
            assert where, caption
            for at, low, high in zip(middles, ("top", "left"), ("bottom", "right"), strict=True):
                said = {low, high} & set(where[1].split())
                assert said == ({low} if at < 0.415 else {high} if at > 0.585 else set()), caption


def test_sizes_are_true_and_told_apart() -> None:
    for scene in SCENES:
        shares = {(s.colour, s.kind): s.radius_px / min(scene.size_hw) for s in scene.shapes}
        for size, colour, kind in words_of(describe(scene)[0]):
            low, high = RADII[size]
            assert low <= shares[colour, kind] <= high
    ranges = list(RADII.values())
    assert all(high < low for (_, high), (low, _) in pairwise(ranges))


def test_ground_is_as_said() -> None:
    for scene in SCENES:
        ground = scene.ground
        named = [name for name in (ground.colour, ground.other) if name]
        for caption in describe(scene):
            assert re.findall(rf"\b(?:{'|'.join(GROUNDS)})\b", caption) == named, caption
            assert ("stripe" in caption) == (ground.style == "stripes")
            assert ("fading" in caption) == (ground.style == "fade")
        picture = np.asarray(draw_ground(ground, scene.size_hw))
        assert tuple(picture[0, 0]) == GROUNDS[ground.colour]
        last = ground.colour if ground.stripes % 2 or ground.style == "plain" else ground.other
        assert tuple(picture[-1, -1]) == GROUNDS[last]
        changes = [
            (np.abs(np.diff(picture.astype(int), axis=axis)).max(-1) > 12).any(1 - axis).sum() for axis in (0, 1)
        ]
        assert changes[0] == 0
        stripes_px = scene.size_hw[1] / ground.stripes if ground.stripes else np.inf
        assert stripes_px >= 8
        assert bool(changes[1]) == (ground.style == "stripes")


def test_shapes_keep_apart_and_inside() -> None:
    for scene in SCENES:
        margin = 0.03 * min(scene.size_hw)
        for shape in scene.shapes:
            for at, side in zip(shape.centre_yx, scene.size_hw, strict=True):
                assert shape.radius_px + margin - 1e-9 <= at <= side - shape.radius_px - margin + 1e-9
        if len(scene.shapes) == 2:
            first, second = (np.array(shape.centre_yx) for shape in scene.shapes)
            assert np.linalg.norm(second - first) > sum(shape.radius_px for shape in scene.shapes) + 2 * margin


def test_held_out_combinations_are_drawn_only_when_asked() -> None:
    kept = held_out_combinations()
    assert sorted(kind for kind, _ in kept) == sorted(KINDS)
    assert sorted(colour for _, colour in kept) == sorted(COLOURS)
    drawn = {(shape.kind, shape.colour) for index in range(512) for shape in make_scene(0, index).shapes}
    assert drawn == {(kind, colour) for kind in KINDS for colour in COLOURS} - set(kept)
    to_judge = [make_scene(0, index, held_out=True) for index in range(128)]
    assert all(sum((s.kind, s.colour) in kept for s in scene.shapes) == 1 for scene in to_judge)
    assert {(s.kind, s.colour) for scene in to_judge for s in scene.shapes} > set(kept)


@pytest.mark.parametrize(
    ("kind", "filled", "aspect"),
    [
        ("circle", 0.785, 1.0),
        ("square", 1.0, 1.0),
        ("triangle", 0.5, 1.155),
        ("star", 0.36, 1.05),
        ("cross", 0.53, 1.0),
        ("heart", 0.62, 1.14),
        ("ring", 0.55, 1.0),
        ("crescent", 0.47, 0.79),
    ],
)
def test_each_kind_has_its_form(kind: str, filled: float, aspect: float) -> None:
    ground = Ground("plain", "white")
    ys, xs = pixels_of(Scene((128, 128), ground, (Shape(kind, "blue", (64.0, 64.0), 50.0),)), "blue")
    height, width = np.ptp(ys) + 1, np.ptp(xs) + 1
    assert np.hypot(ys - 63.5, xs - 63.5).max() < 51
    assert all(abs(at.min() + at.max() - 127) <= 2 for at in (ys, xs))
    assert len(ys) / (height * width) == pytest.approx(filled, abs=0.04)
    assert width / height == pytest.approx(aspect, abs=0.04)


def test_edges_are_smooth() -> None:
    picture = draw(Scene((96, 96), Ground("plain", "white"), (Shape("circle", "blue", (48.0, 48.0), 30.0),)))
    assert len(picture.getcolors() or []) > 8


def test_pictures_vary_and_captions_use_the_words_and_no_others() -> None:
    scenes = [make_scene(0, index) for index in range(768)]
    assert len(set(scenes)) == len(scenes)
    assert {scene.size_hw for scene in scenes} == set(SIZES_HW)
    captions = [describe(scene) for scene in scenes]
    assert all(len(set(said)) == len(said) == 4 for said in captions)
    words = [re.findall(r"\w+", caption) for said in captions for caption in said]
    assert {word for caption in words for word in caption} == set(WORDS)
    assert len(WORDS) == len(set(WORDS))
    assert max(map(len, words)) <= 30


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_longer_set_begins_with_the_shorter_one(tmp_path: Path) -> None:
    few, many = files_of(write_shapes(tmp_path / "few", 4)), files_of(write_shapes(tmp_path / "many", 12))
    assert list(few) == [f"shape-{i:05d}.{end}" for i in range(4) for end in ("png", "txt")]
    assert {name: many[name] for name in few} == few
    assert len(many) == 24
    assert files_of(write_shapes(tmp_path / "many", 12)) == many
    assert files_of(write_shapes(tmp_path / "other", 4, seed=1)) != few


def test_sidecar_holds_the_captions(tmp_path: Path) -> None:
    write_shapes(tmp_path / "train", 9, seed=3)
    write_shapes(tmp_path / "judge", 9, seed=3, held_out=True, sizes_hw=[(64, 72)])
    for index in range(9):
        for folder, scene in (
            ("train", make_scene(3, index)),
            ("judge", make_scene(3, index, held_out=True, sizes_hw=[(64, 72)])),
        ):
            text = (tmp_path / folder / f"shape-{index:05d}.txt").read_text(encoding="utf-8")
            assert tuple(text.splitlines()) == describe(scene)


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--count", "0"],
        ["--count", "many"],
        ["--colour", "red"],
        ["--size", "64"],
        ["--size", "64x32"],
        ["--size", "ax64"],
    ],
)
def test_bad_argument_is_one_line(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        main(["pictures", *arguments] if arguments else [])
    assert stopped.value.code == 64
    assert capsys.readouterr().err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_out_that_is_a_file_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "taken").write_text("")
    with pytest.raises(SystemExit) as stopped:
        main([str(tmp_path / "taken")])
    assert stopped.value.code == 64
    assert str(tmp_path / "taken") in capsys.readouterr().err


def test_door_draws_what_it_is_asked_for(tmp_path: Path) -> None:
    assert main([str(tmp_path / "door"), "--count", "5", "--size", "96x80", "--size", "64x64", "--held-out"]) == 0
    write_shapes(tmp_path / "call", 5, held_out=True, sizes_hw=[(96, 80), (64, 64)])
    assert files_of(tmp_path / "door") == files_of(tmp_path / "call")


def test_door_writes_and_needs_neither_torch_nor_numpy(tmp_path: Path) -> None:
    script = (
        "import sys; from demo.shapes import main; main(sys.argv[1:]); assert not {'torch', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path), "--count", "2"], check=True, capture_output=True)
    assert len(list(tmp_path.iterdir())) == 4
