"""The drawn data set: captions true of the pixels, and every file a function of (seed, index)."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from demo.shapes import COLOURS, KINDS, SIZES_HW, Scene, Shape, describe, draw, main, make_scene, write_shapes

NAME = rf"an? (?:small |large )?({'|'.join(COLOURS)}) ({'|'.join(KINDS)})"
TWO = re.compile(rf"{NAME} (left of|right of|above|below) {NAME}(?: on |, )(\w+)(?: background)?")
ONE = re.compile(rf"{NAME}(?: (?:at the|in the) (.+))?(?: on |, )(\w+)(?: background)?")
SCENES = [make_scene(seed, index) for seed in (0, 1) for index in range(150)]


def pixels_of(scene: Scene, colour: str) -> tuple[np.ndarray, np.ndarray]:
    """Where, in the drawn picture, this exact colour stands: ys and xs."""
    picture = np.asarray(draw(scene))
    assert picture.shape == (*scene.size_hw, 3)
    return np.nonzero((picture == COLOURS[colour]).all(axis=-1))


@pytest.mark.parametrize("wording", [0, 1])
def test_caption_of_two_shapes_is_true_of_the_pixels(wording: int) -> None:
    scenes = [scene for scene in SCENES if len(scene.shapes) == 2]
    assert len(scenes) > 100
    for scene in scenes:
        found = TWO.fullmatch(describe(scene)[wording])
        assert found, describe(scene)
        colour, kind, relation, other_colour, other_kind, _ = found.groups()
        assert {(colour, kind), (other_colour, other_kind)} == {(s.colour, s.kind) for s in scene.shapes}
        (ys, xs), (other_ys, other_xs) = pixels_of(scene, colour), pixels_of(scene, other_colour)
        apart = {
            "left of": xs.max() < other_xs.min(),
            "right of": xs.min() > other_xs.max(),
            "above": ys.max() < other_ys.min(),
            "below": ys.min() > other_ys.max(),
        }
        assert apart[relation], describe(scene)


def test_caption_of_one_shape_is_true_of_the_pixels() -> None:
    scenes = [scene for scene in SCENES if len(scene.shapes) == 1]
    assert len(scenes) > 60
    for scene in scenes:
        plain, detailed = (ONE.fullmatch(caption) for caption in describe(scene))
        assert plain, describe(scene)
        assert detailed, describe(scene)
        assert plain[1] == detailed[1] == scene.shapes[0].colour
        assert plain[2] == detailed[2] == scene.shapes[0].kind
        places = detailed[3].split()
        ys, xs = pixels_of(scene, plain[1])
        y, x = ys.mean() / scene.size_hw[0], xs.mean() / scene.size_hw[1]
        assert ("left" in places, "right" in places) == (x < 0.4, x > 0.6) or min(abs(x - 0.4), abs(x - 0.6)) < 0.02
        assert ("top" in places, "bottom" in places) == (y < 0.4, y > 0.6) or min(abs(y - 0.4), abs(y - 0.6)) < 0.02
        assert (places == ["middle"]) == (not {"left", "right", "top", "bottom"} & set(places))


def test_size_words_follow_the_size() -> None:
    for share, word in ((0.18, "small"), (0.28, None), (0.4, "large")):
        scene = Scene((100, 128), "white", (Shape("circle", "red", (50.0, 64.0), share * 100),))
        words = describe(scene)[1].split()
        assert [w for w in words if w in ("small", "large")] == ([word] if word else [])


def test_background_surrounds_whole_shapes() -> None:
    for scene in SCENES:
        picture = np.asarray(draw(scene))
        border = np.concatenate([picture[0], picture[-1], picture[:, 0], picture[:, -1]])
        assert (border == COLOURS[scene.background]).all(), scene
        assert all(caption.count(scene.background) == 1 for caption in describe(scene))
        for shape in scene.shapes:
            y, x = (round(at) for at in shape.centre_yx)
            assert tuple(picture[y, x]) == COLOURS[shape.colour], scene


@pytest.mark.parametrize(
    ("kind", "filled", "aspect"),
    [
        ("circle", 0.785, 1.0),
        ("square", 1.0, 1.0),
        ("triangle", 0.5, 1.155),
        ("diamond", 0.5, 0.7),
        ("star", 0.36, 1.05),
        ("cross", 0.53, 1.0),
    ],
)
def test_each_kind_has_its_form(kind: str, filled: float, aspect: float) -> None:
    ys, xs = pixels_of(Scene((128, 128), "white", (Shape(kind, "blue", (64.0, 64.0), 50.0),)), "blue")
    height, width = np.ptp(ys) + 1, np.ptp(xs) + 1
    assert len(ys) / (height * width) == pytest.approx(filled, abs=0.04)
    assert width / height == pytest.approx(aspect, abs=0.04)


def test_edges_are_smooth() -> None:
    picture = draw(Scene((96, 96), "white", (Shape("circle", "black", (48.0, 48.0), 30.0),)))
    assert len(picture.getcolors() or []) > 8


def test_pictures_vary() -> None:
    scenes = [make_scene(0, index) for index in range(512)]
    shapes = [shape for scene in scenes for shape in scene.shapes]
    assert len(set(scenes)) == 512
    assert {scene.size_hw for scene in scenes} == set(SIZES_HW)
    assert {(s.kind, s.colour) for s in shapes} == {(kind, colour) for kind in KINDS for colour in COLOURS}
    assert {scene.background for scene in scenes} == set(COLOURS)
    words = re.findall(r"\w+", " ".join(caption for scene in scenes for caption in describe(scene)))
    assert {"left", "right", "above", "below", "top", "bottom", "middle", "small", "large", "an"} <= set(words)


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
    write_shapes(tmp_path, 9, seed=3)
    for index in range(9):
        captions = (tmp_path / f"shape-{index:05d}.txt").read_text(encoding="utf-8").splitlines()
        assert captions == list(describe(make_scene(3, index)))[: len(captions)]
        assert len(captions) == (2 if index % 3 == 0 else 1)


@pytest.mark.parametrize("arguments", [[], ["--count", "0"], ["--count", "many"], ["--colour", "red"]])
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


def test_door_writes_and_needs_no_torch(tmp_path: Path) -> None:
    script = "import sys; from demo.shapes import main; main(sys.argv[1:]); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", script, str(tmp_path), "--count", "2"], check=True, capture_output=True)
    assert len(list(tmp_path.iterdir())) == 4
