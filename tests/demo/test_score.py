"""Scores of pictures whose truth is known: drawings of what was asked, of something else, and of nothing."""

import json
from pathlib import Path

import pytest
from PIL import Image, ImageFilter
from PIL.PngImagePlugin import PngInfo

from demo import prompts as prompts_door
from demo import report
from demo.captions import describe, expect
from demo.draw import draw
from demo.prompts import PICTURE_HW, PROMPTS_SEED, SETS, make_prompts, set_of
from demo.scene import held_out_combinations, make_scene
from demo.score import METADATA, judge_folder, judge_pictures, score, score_sets

SCENES = [make_scene(PROMPTS_SEED, index, sizes_hw=(PICTURE_HW,)) for index in range(24)]
CAPTIONS = [describe(scene)[0] for scene in SCENES]
DRAWN = [draw(scene) for scene in SCENES]
PATHS = [Path(f"{index}.png") for index in range(24)]


def save(folder: Path, pictures: list[Image.Image], captions: list[str]) -> None:
    folder.mkdir(parents=True)
    for index, (picture, caption) in enumerate(zip(pictures, captions, strict=True)):
        info = PngInfo()
        info.add_itxt(METADATA, json.dumps({"prompt": caption}))
        picture.save(folder / f"{index:03d}.png", pnginfo=info)


def test_prompts_are_of_their_sets_and_shown_to_nobody() -> None:
    prompts = make_prompts(8)
    assert [set_of(prompt) for prompt in prompts] == [name for name in SETS for _ in range(8)]
    assert make_prompts(8) == prompts
    held_out = set(held_out_combinations())
    for prompt in prompts:
        asked = expect(prompt)
        unseen = [(shape.kind, shape.colour) in held_out for shape in asked.shapes]
        assert any(unseen) == (set_of(prompt) == "held out")
        assert bool(asked.relation) == (set_of(prompt) == "two")


def test_the_door_of_prompts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "new" / "prompts.txt"
    assert prompts_door.main([str(file), "--count", "3"]) == 0
    assert file.read_text().splitlines() == make_prompts(3)
    for bad in ([str(file), "--count", "0"], [str(tmp_path)]):
        with pytest.raises(SystemExit) as stopped:
            prompts_door.main(bad)
        assert stopped.value.code == 64
        assert capsys.readouterr().err.count("\n") == 1


def test_drawings_of_what_was_asked_score_full_marks() -> None:
    scores = score_sets(judge_pictures(DRAWN, CAPTIONS, PATHS))
    assert set(scores) == {"one", "two"}
    for of in scores.values():
        assert of.follows == of.kind == of.colour == of.relation == of.to_the_letter == 1.0
        assert 0.9 < of.sharpness < 1.1
        assert of.edge_error_px < 0.2
        assert of.clip is None
    assert sum(of.pictures for of in scores.values()) == len(DRAWN)


def test_drawings_of_something_else_do_not() -> None:
    """What a model that does not listen would reach: the shares of luck."""
    unheard = [*CAPTIONS[1:], CAPTIONS[0]]
    of = score(judge_pictures(DRAWN, unheard, PATHS))
    assert of.follows <= 0.05
    assert 0.3 < of.count < 0.8


def test_a_blur_costs_sharpness_and_not_meaning() -> None:
    blurred = [picture.filter(ImageFilter.GaussianBlur(1.0)) for picture in DRAWN]
    sharp, soft = (score(judge_pictures(pictures, CAPTIONS, PATHS)) for pictures in (DRAWN, blurred))
    assert soft.follows > 0.95
    assert soft.sharpness < 0.6 * sharp.sharpness


def test_pictures_without_shapes_have_no_detail() -> None:
    empty = [Image.new("RGB", (96, 96), (140, 140, 140))]
    (one,) = judge_pictures(empty, CAPTIONS[:1], PATHS[:1])
    assert one.detail is None
    assert score([one]).sharpness == score([one]).follows == 0.0


def test_a_folder_is_judged_by_what_its_pictures_say(tmp_path: Path) -> None:
    save(tmp_path / "images", DRAWN[:4], CAPTIONS[:4])
    judged = judge_folder(tmp_path / "images")
    assert [one.prompt for one in judged] == CAPTIONS[:4]
    assert all(one.verdict.to_the_letter for one in judged)
    DRAWN[0].save(tmp_path / "images" / "999.png")
    with pytest.raises(ValueError, match=r"999\.png does not say what it was drawn from"):
        judge_folder(tmp_path / "images")


def test_the_report_shows_every_picture_and_escapes_what_it_says(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "CLIP", None)
    hostile = CAPTIONS[0] + " <script>alert(1)</script>"
    captions = [hostile, *CAPTIONS[1:6]]
    save(tmp_path / "images" / "pair", DRAWN[:6], captions)
    save(tmp_path / "images" / "start", [DRAWN[5], *DRAWN[1:6]], captions)
    assert report.main([str(tmp_path)]) == 0
    page = (tmp_path / "report.html").read_text()
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    assert page.count("<img class=right") == 11
    assert page.count("<img class=wrong") == 1
    assert page.count("<table") == page.count("<div class=wide><table") == 1  # tables scroll, the page does not
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert (scores["pair"]["all"]["follows"], scores["start"]["all"]["follows"]) == (1.0, round(5 / 6, 4))
    with Image.open(tmp_path / "images" / "sheet.png") as sheet:
        assert sheet.width > 6 * 96
    assert "both experts" in capsys.readouterr().out


def test_a_report_without_pictures_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "images" / "start").mkdir(parents=True)
    with pytest.raises(SystemExit) as stopped:
        report.main([str(tmp_path)])
    assert stopped.value.code == 64
    assert capsys.readouterr().err == f"demo.report: no pictures in {tmp_path}/images/start\n"
