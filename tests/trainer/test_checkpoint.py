"""An expert on disk: which checkpoints are kept, what of them, and who may read them."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from shared.errors import CheckpointError
from trainer.checkpoint import open_checkpoint, open_expert
from trainer.loop import train_expert


@pytest.fixture(scope="module")
def run(world: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten steps, saved at every second, three kept; written under a umask of 027."""
    run: Path = tmp_path_factory.mktemp("checkpoint") / "run"
    before = os.umask(0o027)
    try:
        train_expert(world.request(run, "steps=10", "checkpoint.keep=3", "batch=1"))
    finally:
        os.umask(before)
    return run


def test_the_newest_are_kept_and_two_of_them_can_go_on(run: Path) -> None:
    parent = run / "checkpoints"
    names = ["step-00000006", "step-00000008", "step-00000010"]
    assert sorted(path.name for path in parent.iterdir()) == ["latest.json", *names]
    assert [(parent / name / "optimizer.safetensors").exists() for name in names] == [False, True, True]
    assert json.loads((parent / "latest.json").read_text()) == {"step": 10, "path": names[-1]}


def test_those_without_an_optimizer_still_draw(run: Path) -> None:
    old = open_expert(run / "checkpoints" / "step-00000006")
    assert old.state.step == 6
    assert old.weights_folder().name == "ema"
    with pytest.raises(CheckpointError, match=r"optimizer\.safetensors cannot be read"):
        old.optimizer_tensors()
    assert open_expert(run).state.step == 10


@pytest.mark.parametrize("name", ["checksums.json", "expert.json", "ema/diffusion_pytorch_model.safetensors"])
def test_a_damaged_one_that_was_named_is_never_passed_over(run: Path, tmp_path: Path, name: str) -> None:
    own = shutil.copytree(run, tmp_path / "run")
    newest = own / "checkpoints" / "step-00000010"
    (newest / name).unlink()
    with pytest.raises(CheckpointError, match=r"step-00000010.* is damaged"):
        open_expert(newest)
    with pytest.raises(CheckpointError, match=r"step-00000099 is damaged or incomplete.*No such file"):
        open_expert(own / "checkpoints" / "step-00000099")
    assert open_expert(own).state.step == 8  # of the run it is the newest that is whole


def test_files_may_be_read_by_whom_the_umask_lets(run: Path) -> None:
    paths = list(run.rglob("*"))
    assert sum(path.suffix == ".safetensors" for path in paths) == 8
    for path in paths:
        assert path.stat().st_mode & 0o777 == (0o750 if path.is_dir() else 0o640), path


def test_a_checkpoint_says_what_it_is_of(run: Path, world: Any) -> None:
    checkpoint = open_checkpoint(run / "checkpoints" / "step-00000010")
    assert checkpoint.card.facts.timesteps == world.config().range
    assert checkpoint.card.facts.null_prompt == "zeros"
    assert [use.from_step for use in checkpoint.card.facts.manifests] == [0]
    assert json.loads((run / "expert.json").read_text()) == json.loads((checkpoint.path / "expert.json").read_text())


def test_weights_load_in_diffusers_as_they_are(run: Path) -> None:
    from diffusers import UNet2DConditionModel

    for folder in ("unet", "ema"):
        _, report = UNet2DConditionModel.from_pretrained(
            run / "checkpoints" / "step-00000010" / folder, output_loading_info=True
        )
        assert not report["missing_keys"]
        assert not report["unexpected_keys"]


@pytest.mark.parametrize("name", ["/etc/passwd", "../step-00000008/state.json"])
def test_sums_that_point_outside_are_refused(run: Path, tmp_path: Path, name: str) -> None:
    copy = tmp_path / "step-00000010"
    copy.mkdir()
    (copy / "checksums.json").write_text(json.dumps({name: {"bytes": 0, "sha256": ""}}))
    with pytest.raises(CheckpointError, match="outside its checkpoint"):
        open_checkpoint(copy)


@pytest.mark.parametrize("content", ["", "[]", "7", "null", '{"state.json": 1}', '{"a": {"bytes": 0}}', "{}"])
def test_nonsense_is_one_error(tmp_path: Path, content: str) -> None:
    (tmp_path / "checksums.json").write_text(content)
    with pytest.raises(CheckpointError):
        open_checkpoint(tmp_path)


def test_without_an_average_the_weights_themselves_are_drawn_with(world: Any, tmp_path: Path) -> None:
    train_expert(world.request(tmp_path / "run", "steps=2", "ema.decay=0"))
    checkpoint = open_expert(tmp_path / "run")
    assert checkpoint.weights_folder().name == "unet"
    assert not (checkpoint.path / "ema").exists()
    train_expert(world.request(tmp_path / "run", "steps=3", "ema.decay=0"))
