"""The main job as users run it: console commands on a folder, from nothing to a picture, and once more."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.pictures import write_shapes

ROOT = Path(__file__).parents[2]
SMALL = ("--set", "images.step=32", "--resolution", "64")
EXPERT = [f"--config={ROOT}/configs/demo/expert.toml", "--set=steps=6", "--set=log.every=2", "--set=batch=2"]


def start(module: str, function: str, *arguments: object) -> "subprocess.Popen[str]":
    code = f"import sys; sys.argv[0] = '{function}'; from {module} import {function}; {function}()"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-W", "ignore", "-c", code, *map(str, arguments)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=environment, cwd=ROOT, text=True, stdout=pipe, stderr=pipe)


def finish(process: "subprocess.Popen[str]") -> str:
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return out


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> dict[str, Path]:
    """Pictures, store, two runs made at once while a build adds pictures, and images drawn by the pair."""
    root = tmp_path_factory.mktemp("main-job")
    names = ("pictures", "store", "base", "refiner", "images")
    paths = {name: root / name for name in names} | {"model": tiny_model}
    build = ("--store", paths["store"], "--model", tiny_model, *SMALL, "--json")
    write_shapes(paths["pictures"], count=24, seed=1)
    first = json.loads(finish(start("cache_builder.cli", "cache_build", paths["pictures"], *build)))
    assert (first["seen"], first["stored"]) == (24, 24)

    common = ("--store", paths["store"], "--model", tiny_model)
    trainers = [
        start(
            "trainer.cli",
            "train_expert",
            *EXPERT,
            f"--config={ROOT}/configs/demo/{name}.toml",
            *common,
            "--output",
            paths[name],
        )
        for name in ("base", "refiner")
    ]
    write_shapes(paths["pictures"], count=40, seed=1)
    grown = json.loads(finish(start("cache_builder.cli", "cache_build", paths["pictures"], *build)))
    assert (grown["seen"], grown["stored"], grown["reused"]) == (40, 16, 24)
    for trainer in trainers:
        finish(trainer)
    experts = ("--expert", paths["base"], "--expert", paths["refiner"], "--model", tiny_model)
    prompts = ("--prompt", "a red circle on white", "--prompt", "a blue square")
    finish(start("trainer.cli", "generate_images", *experts, *prompts, "--steps", 4, "--out", paths["images"]))
    return paths


def test_both_experts_saw_the_same_data_or_each_says_what_it_saw(world: dict[str, Path]) -> None:
    sealed = {path.stem for path in (world["store"] / "manifests" / "main").glob("*.arrow")}
    for name in ("base", "refiner"):
        card = json.loads((world[name] / "expert.json").read_text())
        assert {use["digest"] for use in card["facts"]["manifests"]} <= sealed


def test_the_pair_drew_a_picture_for_each_prompt(world: dict[str, Path]) -> None:
    paths = sorted(world["images"].glob("*.png"))
    assert [path.name for path in paths] == ["000-seed-0.png", "001-seed-0.png"]
    for path in paths:
        with Image.open(path) as image:
            pixels = np.asarray(image)
            facts = json.loads(image.text["sdxl-experts"])  # type: ignore[attr-defined]
        assert pixels.shape == (128, 128, 3)
        assert pixels.std() > 1
        assert [(e["name"], e["timesteps"], e["step"]) for e in facts["experts"]] == [
            ("base", [350, 1000], 6),
            ("refiner", [0, 350], 6),
        ]


def test_the_same_commands_again_do_nothing_twice(world: dict[str, Path]) -> None:
    build = ("--store", world["store"], "--model", world["model"], *SMALL, "--json")
    again = json.loads(finish(start("cache_builder.cli", "cache_build", world["pictures"], *build)))
    assert (again["stored"], again["encoded_captions"], again["reused"]) == (0, 0, 40)
    before = (world["base"] / "checkpoints" / "latest.json").stat().st_mtime_ns
    common = ("--store", world["store"], "--model", world["model"], "--output", world["base"])
    finish(start("trainer.cli", "train_expert", *EXPERT, f"--config={ROOT}/configs/demo/base.toml", *common))
    assert (world["base"] / "checkpoints" / "latest.json").stat().st_mtime_ns == before


def test_losses_are_finite_and_logged(world: dict[str, Path]) -> None:
    for name in ("base", "refiner"):
        events = [json.loads(line) for line in (world[name] / "events.jsonl").read_text().splitlines()]
        steps = [event for event in events if event["event"] == "step"]
        assert [event["step"] for event in steps] == [2, 4, 6]
        assert all(np.isfinite(event["loss"]) and event["skipped"] == 0 for event in steps)
        assert list((world[name] / "tensorboard").iterdir())
