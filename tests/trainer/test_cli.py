"""The doors: help in a blink, one line for whatever is wrong, a documented exit code, and nothing that is executed."""

import json
import pickle
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shared.command import run_command
from shared.errors import ConfigError, DataError
from tests.pictures import write_shapes
from trainer.cli import _bundle_experts, _evaluate_experts, _generate_images, _train_expert
from trainer.generate import read_prompts

COMMANDS = ("train_expert", "generate_images", "bundle_experts", "evaluate_experts")
Call = Callable[..., tuple[int, list[str]]]


def run_code(code: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)


def processor_s() -> float:
    """Processor time of this process's children: what else runs on the machine is not theirs."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


@pytest.mark.parametrize("command", COMMANDS)
def test_help_comes_in_a_blink_and_without_torch(command: str) -> None:
    code = f"""
import sys, trainer.cli
sys.argv = ["x", "--help"]
try:
    trainer.cli.{command}()
finally:
    heavy = {{"torch", "diffusers", "transformers", "numpy", "lmdb", "pyarrow"}} & set(sys.modules)
    assert not heavy, heavy
"""
    times_s = []
    for _ in range(3):
        before_s = processor_s()
        done = run_code(code)
        times_s.append(processor_s() - before_s)
        assert done.returncode == 0, done.stderr
        assert "Usage" in done.stdout
    assert min(times_s) < 0.6


@pytest.fixture
def call(capfd: pytest.CaptureFixture[str]) -> Call:
    """Runs a command here; its exit code and what it wrote to stderr."""

    def called(function: Any, arguments: list[str]) -> tuple[int, list[str]]:
        with pytest.raises(SystemExit) as raised:
            run_command(function, arguments)
        code = raised.value.code
        assert isinstance(code, int)
        return code, capfd.readouterr().err.splitlines()

    return called


def refused(result: tuple[int, list[str]], code: int, says: str) -> None:
    """One line, the documented code, no traceback."""
    assert result[0] == code, result
    errors = [line for line in result[1] if line.startswith("error: ")]
    assert len(errors) == 1, result
    assert result[1][-1] == errors[0]
    assert says in errors[0]
    assert "Traceback" not in "".join(result[1])


def replaced(arguments: list[str], option: str, value: str) -> list[str]:
    arguments = list(arguments)
    arguments[arguments.index(option) + 1] = value
    return arguments


def test_train_expert_refuses_in_one_line(call: Call, world: Any, tmp_path: Path) -> None:
    good = world.arguments(tmp_path / "run")
    (tmp_path / "file").write_text("x = [")
    (tmp_path / "bytes").write_bytes(b"\xff\xfe")
    few = shutil.copytree(world.store, tmp_path / "few")
    (few / "store.json").write_text('{"format": 99}')
    cases: list[tuple[list[str], int, str]] = [
        (good[2:], 64, "Missing option '--store'"),
        ([*good, "--bogus"], 64, "No such option: --bogus"),
        ([*good, "extra"], 64, "unexpected extra argument"),
        (replaced(good, "--store", str(tmp_path / "none")), 65, ""),
        (replaced(good, "--store", str(few)), 65, ""),
        (replaced(good, "--manifest", "mian"), 65, "there are: main"),
        (replaced(good, "--manifest", "../main"), 64, "manifest name '../main'"),
        (replaced(good, "--model", str(tmp_path / "none")), 65, "no model folder"),
        (replaced(good, "--model", str(tmp_path)), 65, "has no model_index.json"),
        (replaced(good, "--model", "segmind/SSD-1B"), 65, "the Hub did not give it"),
        (replaced(good, "--model", "no/such\x1b[31m"), 65, "no model folder"),
        (replaced(good, "--device", "cuda:7"), 64, "--device cuda:7 cannot be used"),
        (replaced(good, "--device", "gpu"), 64, "--device gpu cannot be used"),
        (replaced(good, "--output", str(tmp_path)), 64, "is not empty and no run"),
        ([*good, "--set", "batsh=2"], 64, "unknown config key 'batsh'; did you mean 'batch'?"),
        ([*good, "--set", "loss.gamma=2"], 64, "unknown config key 'loss.gamma'"),
        ([*good, "--set", "batch"], 64, "write it as key=value"),
        ([*good, "--set", "batch=0"], 64, "batch: "),
        ([*good, "--set", "batch=many"], 64, "batch: "),
        ([*good, "--set", "optimizer.learning_rate=nan"], 64, "optimizer.learning_rate"),
        ([*good, "--set", "timesteps={low=400, high=300}"], 64, "timesteps.low 400 is not below"),
        ([*good, "--set", "timesteps={low=0, high=1001}"], 64, "beyond the 1000 there are"),
        ([*good, "--set", "schedule.prediction_type=epsilon"], 64, "with zero_terminal_snr = true use"),
        ([*good, "--set", "schedule.timestep_spacing=leading"], 64, "needs timestep_spacing = 'trailing'"),
        ([*good, "--config", str(tmp_path / "none.toml")], 64, "No such file"),
        ([*good, "--config", str(tmp_path / "file")], 64, "is not TOML"),
        ([*good, "--config", str(tmp_path / "bytes")], 64, "is not TOML"),
        ([*good, "--config", str(tmp_path)], 64, "config file"),
    ]
    for arguments, code, says in cases:
        refused(call(_train_expert, arguments), code, says)
    assert not (tmp_path / "run").exists()


def test_generate_images_refuses_in_one_line(call: Call, world: Any, pair: tuple[Path, Path], tmp_path: Path) -> None:
    good = [f"--expert={pair[0]}", f"--expert={pair[1]}", f"--model={world.model}", f"--out={tmp_path / 'out'}"]
    good += ["--prompt=a red circle", "--device=cpu", "--steps=2"]
    (tmp_path / "file").write_text("x")
    cases: list[tuple[list[str], int, str]] = [
        (good[2:], 64, "Missing option '--expert'"),
        ([*good, "--steps", "0"], 64, "--steps"),
        ([*good, "--count", "0"], 64, "--count"),
        ([*good, "--guidance", "-1"], 64, "--guidance"),
        ([*good, "--guidance-rescale", "2"], 64, "--guidance-rescale"),
        ([*good, "--seed", "x"], 64, "--seed"),
        ([*good, "--width", "63"], 64, "--width"),
        ([*good, "--width", "100"], 64, "sizes are multiples of 8"),
        ([*good, "--scheduler", "plms"], 64, "known are unipc"),
        ([*good, "--expert", str(tmp_path / "none")], 65, "no run folder"),
        ([*good, "--expert", str(pair[1])], 65, "two experts answer for timesteps [0, 350)"),
        ([*good[1:], "--expert", str(pair[1])], 65, "two experts answer for"),
        ([good[1], good[1], *good[2:]], 65, "two experts answer for"),
        ([*good, "--model", str(tmp_path / "none")], 65, "no model folder"),
        ([*good, "--out", str(tmp_path / "file")], 64, "is a file"),
        ([*good, "--base", str(tmp_path / "none")], 65, f"--base {tmp_path / 'none'}: nothing is there"),
        ([*good, "--base", str(tmp_path / "file")], 65, "file is neither a folder nor a .safetensors file"),
        ([*good, "--prompts", str(tmp_path / "none.txt")], 64, "none.txt: No such file"),
        ([*good, "--prompts", str(tmp_path / "bytes")], 65, "is not UTF-8 text (at byte 3)"),
        ([*(part for part in good if part != "--prompt=a red circle")], 64, "nothing to draw: give --prompt TEXT or"),
        ([*good, "--prompts", str(tmp_path / "empty.csv")], 65, "empty.csv holds no prompt: nothing to draw"),
        ([*good, "--prompts", str(tmp_path / "other.csv")], 65, "has no column prompt or caption or text; it has a, b"),
        ([*good, "--scheduler", "heun"], 64, "--scheduler heun: ignores zero-terminal SNR"),
        ([*good, *["--guidance", "2"] * 3], 64, "--guidance is given 3 times for 2 experts"),
        ([*good, *["--negative-prompt", "x"] * 3], 64, "--negative-prompt is given 3 times for 2 experts"),
        ([*good, "--expert-prompt", "x"], 64, "--expert-prompt is given 1 times for 2 experts"),
        ([*good, "--precision", "int8"], 64, "--precision int8: known are auto, fp32, bf16, fp16"),
        ([*good, "--offload"], 64, "--offload keeps UNets in main memory"),
        ([*good, "--seed", "-1"], 64, "--seed"),
        ([*good, "--batch", "0"], 64, "--batch"),
        ([*good, "--sheet", str(tmp_path)], 64, "is a folder; it names a PNG"),
        ([*good, "--start-timestep", "300"], 64, "give --from-images"),
        ([*good, "--steps", "30", "--from-images", str(tmp_path / "none")], 64, "no picture, folder or store is there"),
        ([*good, "--steps", "30", "--from-images", str(tmp_path / "file")], 65, "no picture in it can be read"),
        ([*good, "--from-images", str(world.store), "--start-timestep", "1000"], 64, "no expert answers for it"),
        ([*good, "--steps", "30", "--from-images", str(world.store), "--manifest", "nix"], 65, "nix"),
        ([*good, "--from-images", str(world.store)], 65, "2 steps never come to a timestep of refiner below 350"),
        ([*good[1:], "--from-images", str(world.store), "--start-timestep", "350"], 64, "(refiner [0, 350))"),
    ]
    (tmp_path / "bytes").write_bytes(b"red\xff")
    (tmp_path / "empty.csv").write_text("prompt\n")
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    for arguments, code, says in cases:
        refused(call(_generate_images, arguments), code, says)


def test_bundle_experts_refuses_in_one_line(call: Call, world: Any, pair: tuple[Path, Path], tmp_path: Path) -> None:
    good = [f"--expert={pair[0]}", f"--expert={pair[1]}", f"--model={world.model}", f"--out={tmp_path / 'out'}"]
    good += ["--device=cpu", "--no-prove"]
    (tmp_path / "file").write_text("x")
    cases: list[tuple[list[str], int, str]] = [
        (good[2:], 64, "Missing option '--expert'"),
        ([*good, "--format", "onnx"], 64, "--format onnx: known are"),
        ([*good, "--dtype", "int8"], 64, "--dtype int8: known are"),
        ([*good, "--out", str(tmp_path)], 64, "is not an empty folder"),
        ([*good, "--out", str(tmp_path / "file" / "out")], 74, ""),
        ([*good, "--expert", str(tmp_path / "none")], 65, "no run folder"),
        (good[1:], 65, "no expert answers for timesteps [350, 1000)"),
        ([*good, "--expert", str(pair[1])], 65, "two experts answer for timesteps [0, 350)"),
        ([*good, "--model", str(tmp_path / "none")], 65, "no model folder"),
    ]
    for arguments, code, says in cases:
        refused(call(_bundle_experts, arguments), code, says)
    assert not (tmp_path / "out").exists()


def test_evaluate_experts_refuses_in_one_line(call: Call, world: Any, pair: tuple[Path, Path], tmp_path: Path) -> None:
    good = [f"--expert={pair[0]}", f"--expert={pair[1]}", f"--model={world.model}", f"--store={world.store}"]
    good += [f"--out={tmp_path / 'out'}", "--device=cpu"]
    (tmp_path / "file").write_text("\n")
    all_trained = replace(world, pictures=write_shapes(tmp_path / "shapes", 4), store=tmp_path / "all-trained")
    all_trained.build("split.eval_fraction=0")
    cases: list[tuple[list[str], int, str]] = [
        (good[2:], 64, "Missing option '--expert'"),
        ([*good, "--expert", str(pair[1])], 65, "two experts answer for timesteps [0, 350)"),
        ([*good, "--store", str(tmp_path / "none")], 65, "no store at"),
        ([*good, "--store", str(all_trained.store)], 65, "holds no sample out"),
        ([*good, "--manifest", "mian"], 65, "there are: main"),
        ([*good, "--clip", str(tmp_path / "none"), "--prompt", "x"], 65, "no CLIP folder"),
        ([*good, "--clip", str(tmp_path), "--prompt", "x"], 65, "no config.json in it; a whole CLIP folder"),
        ([*good, "--prompts", str(tmp_path / "file")], 65, "file holds no prompt: nothing to draw"),
        ([*good, "--scheduler", "plms"], 64, "known are unipc"),
        ([*good, "--out", str(tmp_path / "file")], 64, "is a file"),
        ([*good, "--base", str(tmp_path / "none")], 65, "none: nothing is there"),
        ([*good, "--watch", "--tracker", "wandbee"], 64, "--tracker wandbee: known are tensorboard, wandb, trackio"),
        ([*good, "--tracker", "tensorboard"], 64, "--tracker draws the curves of --watch"),
        ([*good, "--watch", "--max-share", "2"], 64, "--max-share"),
    ]
    for arguments, code, says in cases:
        refused(call(_evaluate_experts, arguments), code, says)
    assert not (tmp_path / "out" / "report.json").exists()


def test_prompts_come_from_the_command_line_and_then_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("\ufeffa red circle \r\n\n  a blue square\n", encoding="utf-8")
    assert read_prompts(["first"], file) == ["first", "a red circle", "a blue square"]
    assert read_prompts([], file) == ["a red circle", "a blue square"]
    file.write_text("\n \n")
    with pytest.raises(DataError, match=r"prompts\.txt holds no prompt"):
        read_prompts(["first"], file)
    with pytest.raises(ConfigError, match="nothing to draw"):
        read_prompts([], None)


def test_a_model_of_pickles_is_refused_with_the_way_out(call: Call, world: Any, tmp_path: Path) -> None:
    model = shutil.copytree(world.model, tmp_path / "model")
    (model / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    (model / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"x")
    result = call(_train_expert, replaced(world.arguments(tmp_path / "run"), "--model", str(model)))
    refused(result, 65, "diffusion_pytorch_model.bin, which only a pickle loader can read; convert it once")
    assert "save_pretrained(NEW, safe_serialization=True)" in result[1][-1]


class Trap:
    """Unpickled, it leaves a file behind."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


TRAPS = (
    "pytorch_model.bin", "diffusion_pytorch_model.bin", "diffusion_pytorch_model.fp16.bin", "model.ckpt",
    "optimizer.pt", "optimizer.bin", "scheduler.bin", "random_states_0.pkl", "training_args.bin", "state.pt",
    "model.pkl", "data.npy",
)  # fmt: skip


def test_nothing_that_lies_beside_is_executed(call: Call, world: Any, tmp_path: Path) -> None:
    sprung = tmp_path / "sprung"
    trap = pickle.dumps(Trap(sprung))
    pickle.loads(trap)
    assert sprung.exists()  # the trap works
    sprung.unlink()

    def lay(folder: Path) -> None:
        for parent in [folder, *(path for path in folder.rglob("*") if path.is_dir())]:
            for name in TRAPS:
                (parent / name).write_bytes(trap)
            np.save(parent / "array.npy", np.array([Trap(sprung)], dtype=object), allow_pickle=True)

    model = shutil.copytree(world.model, tmp_path / "model")
    own = world.copy(tmp_path / "store")
    lay(model)
    lay(own.store)
    arguments = replaced(own.arguments(tmp_path / "run", expert="whole"), "--model", str(model))
    assert call(_train_expert, [*arguments, "--set", "steps=2"])[0] == 0
    lay(tmp_path / "run")
    assert call(_train_expert, [*arguments, "--set", "steps=3"])[0] == 0
    out = ["--out", str(tmp_path / "out"), "--prompt", "red", "--steps", "2", "--device", "cpu"]
    assert call(_generate_images, ["--expert", str(tmp_path / "run"), "--model", str(model), *out])[0] == 0
    own.build(manifest="again")
    assert not sprung.exists()


def test_a_command_says_what_it_did(call: Call, world: Any, tmp_path: Path) -> None:
    code, lines = call(_train_expert, [*world.arguments(tmp_path / "run"), "--set", "steps=2"])
    assert code == 0
    assert lines == [
        "base: timesteps [350, 1000), 43 samples, cpu, fp32",
        f"note: schedule.prediction_type = 'v_prediction', while {world.model} predicts epsilon: the UNet first has to "
        "unlearn that, which takes thousands of steps",
    ]
    assert call(_train_expert, [*world.arguments(tmp_path / "run"), "--set", "steps=2"])[1] == [
        f"{tmp_path / 'run'} is complete: 2 steps"
    ]
    assert json.loads((tmp_path / "run" / "expert.json").read_text())["facts"]["name"] == "base"
