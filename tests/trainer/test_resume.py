"""A run that is killed, stopped or damaged and goes on is the run that nothing happened to, bit for bit."""

import hashlib
import json
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from shared.errors import CheckpointError, DataError
from shared.stopping import stop_requests
from trainer.checkpoint import newest_checkpoint, open_checkpoint
from trainer.loop import train_expert

SETS = (
    "steps=20",
    "batch=1",
    "accumulation=2",
    "checkpoint.every=2",
    "checkpoint.keep=100",
    "loss.caption_dropout=0.3",
)
ALL = {"unet/diffusion_pytorch_model.safetensors", "ema/diffusion_pytorch_model.safetensors", "optimizer.safetensors"}

Events = Callable[..., list[dict[str, Any]]]
Files = Callable[[Path, int], dict[str, str]]


@pytest.fixture(scope="module")
def unbroken(world: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 20 steps with a checkpoint of every second."""
    torch.set_num_threads(1)
    run = tmp_path_factory.mktemp("unbroken") / "run"
    train_expert(world.request(run, *SETS))
    return run


def steps_done(run: Path, events: Events) -> int:
    return max((event["step"] for event in events(run, "step")), default=0)


def step_dir(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step:08d}"


@pytest.mark.parametrize(
    ("expert", "micro", "kills"),
    [
        ("base", 4, (6, 13)),
        ("refiner", 8, (6, 13)),
        *(
            pytest.param(e, m, (1, 2, 4, 6, 7, 9, 10, 13, 15, 17), marks=pytest.mark.slow)
            for e, m in (("base", 4), ("refiner", 8))
        ),
    ],
)
def test_three_epochs_with_kills(
    world: Any,
    start: Callable[..., Any],
    files_of: Files,
    events: Events,
    tmp_path: Path,
    expert: str,
    micro: int,
    kills: tuple[int, ...],
) -> None:
    """45 samples, 144 drawn: a missed, repeated or reordered one, or another draw, would change every later bit."""
    sets = (
        "steps=18",
        f"batch={micro}",
        f"accumulation={8 // micro}",
        "checkpoint.every=4",
        "loss.caption_dropout=0.3",
    )
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    reference = start("train-expert", world.arguments(whole, *sets, expert=expert), "whole.txt")
    for kill_after in kills:
        command = start("train-expert", world.arguments(broken, *sets, expert=expert))
        command.wait_for(lambda wanted=kill_after: steps_done(broken, events) >= wanted)
        command.signal(signal.SIGKILL)
        assert command.wait() == -signal.SIGKILL
    last = start("train-expert", world.arguments(broken, *sets, expert=expert))
    assert last.wait() == 0, last.errors()
    assert reference.wait() == 0, reference.errors()
    assert set(files_of(whole, 18)) >= ALL
    assert files_of(whole, 18) == files_of(broken, 18)
    assert events(whole, "step")[-1]["epoch"] == 3
    resumed = [event["step"] for event in events(broken, "resume")]
    assert resumed == sorted(resumed)
    if len(kills) == 2:
        assert resumed == [4, 12]
    assert not list((broken / "checkpoints").glob(".*"))


def test_under_muon_a_run_goes_on_bit_for_bit(world: Any, files_of: Files, tmp_path: Path) -> None:
    sets = ("batch=2", "optimizer.name=muon", "checkpoint.every=3", "log.trackers=[]")
    train_expert(world.request(tmp_path / "unbroken", "steps=6", *sets))
    train_expert(world.request(tmp_path / "broken", "steps=3", *sets))
    train_expert(world.request(tmp_path / "broken", "steps=6", *sets))
    assert files_of(tmp_path / "broken", 6) == files_of(tmp_path / "unbroken", 6)
    names = set(load_file(step_dir(tmp_path / "broken", 6) / "optimizer.safetensors"))
    assert {name.partition(".")[2] for name in names} == {"step", "exp_avg", "exp_avg_sq", "momentum_buffer"}


@pytest.mark.parametrize(("number", "after"), [(signal.SIGTERM, 3), (signal.SIGINT, 4), (signal.SIGTERM, 9)])
def test_asked_to_stop_it_finishes_the_step_saves_and_exits_75(
    world: Any,
    start: Callable[..., Any],
    files_of: Files,
    events: Events,
    unbroken: Path,
    tmp_path: Path,
    number: int,
    after: int,
) -> None:
    run = tmp_path / "run"
    sets = (*SETS, "checkpoint.every=100")
    command = start("train-expert", world.arguments(run, *sets))
    command.wait_for(lambda: steps_done(run, events) >= after)
    asked_s = time.monotonic()
    command.signal(number)
    assert command.wait() == 75
    assert time.monotonic() - asked_s < 30
    stopped = events(run, "stopped")[-1]["step"]
    assert stopped == steps_done(run, events)
    assert command.errors()[-1].startswith(f"stopped: {run} is saved at step {stopped} of 20")
    again = start("train-expert", world.arguments(run, *sets))
    assert again.wait() == 0
    assert events(run, "resume")[-1]["step"] == stopped  # nothing is lost
    assert files_of(run, 20) == files_of(unbroken, 20)


def test_a_stop_at_the_last_step_is_the_end(world: Any, events: Events, tmp_path: Path) -> None:
    with stop_requests() as outer:
        assert train_expert(world.request(tmp_path / "run", "steps=1")) == 1
        signal.raise_signal(signal.SIGTERM)  # handlers are as they were before the run
        assert outer.asked()
    assert events(tmp_path / "run", "complete")


def test_a_second_sigint_interrupts_at_once() -> None:
    with stop_requests() as stop:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        assert stop.asked()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_asked_to_stop_while_it_opens(world: Any, start: Callable[..., Any], events: Events, tmp_path: Path) -> None:
    run = tmp_path / "run"
    command = start("train-expert", world.arguments(run, "steps=2", "batch=1"))
    command.wait_for(lambda: bool(events(run, "begin")))
    command.signal(signal.SIGTERM)
    assert command.wait() == 75
    assert command.errors()[-1].startswith(f"stopped: {run} ")
    again = start("train-expert", world.arguments(run, "steps=2", "batch=1"))
    assert again.wait() == 0, again.errors()


@pytest.mark.slow
def test_fifty_stops_at_random_times(
    world: Any, start: Callable[..., Any], files_of: Files, events: Events, tmp_path: Path
) -> None:
    sets = (*SETS, "steps=400", "checkpoint.every=400")
    whole, run, rng = tmp_path / "whole", tmp_path / "run", random.Random(0)
    reference = start("train-expert", world.arguments(whole, *sets), "whole.txt")
    for attempt in range(50):
        command = start("train-expert", world.arguments(run, *sets))
        command.wait_for(lambda n=attempt: len([e for e in events(run) if e["event"] in ("begin", "resume")]) > n)
        time.sleep(rng.uniform(0, 1.5))
        command.signal(rng.choice([signal.SIGTERM, signal.SIGINT]))
        assert command.wait() == 75
        assert command.errors()[-1].startswith(f"stopped: {run} ")
        steps = [event["step"] for event in events(run, "step")]
        assert steps == list(range(1, len(steps) + 1))  # none is lost and done again
    last = start("train-expert", world.arguments(run, *sets))
    assert last.wait() == 0, last.errors()
    reference.process.join()
    assert files_of(run, 400) == files_of(whole, 400)


@pytest.mark.parametrize(("kills", "steps"), [(10, 20), pytest.param(200, 220, marks=pytest.mark.slow)])
def test_kills_while_saving(
    world: Any,
    start: Callable[..., Any],
    files_of: Files,
    events: Events,
    unbroken: Path,
    tmp_path: Path,
    kills: int,
    steps: int,
) -> None:
    run, rng = tmp_path / "run", random.Random(0)
    sets = (*SETS, "checkpoint.every=1", "checkpoint.keep=2", f"steps={steps}")
    if steps != 20:
        unbroken = tmp_path / "unbroken"
        train_expert(world.request(unbroken, *SETS, "checkpoint.every=1000", f"steps={steps}"))
    parent, reached, torn = run / "checkpoints", 0, 0
    for _ in range(kills):
        command = start("train-expert", world.arguments(run, *sets))
        before = {path.name for path in parent.glob("*step-*")}
        command.wait_for(
            lambda seen=before: any(parent.glob(".saving-*")) and {p.name for p in parent.glob("step-*")} >= seen
        )
        time.sleep(rng.uniform(0, 0.03))
        command.signal(signal.SIGKILL)
        assert command.wait() == -signal.SIGKILL
        torn += any(parent.glob(".*"))
        bad: list[str] = []
        newest = newest_checkpoint(run, bad.append)
        assert not bad  # a checkpoint is whole under its name or not there
        step = newest.state.step if newest else 0
        assert step >= reached
        reached = step
        if newest is not None:
            latest = json.loads((parent / "latest.json").read_text()) if (parent / "latest.json").exists() else None
            assert latest is None or (parent / latest["path"]).is_dir() or latest["step"] < step
    assert torn
    last = start("train-expert", world.arguments(run, *sets))
    assert last.wait() == 0, last.errors()
    assert files_of(run, steps) == files_of(unbroken, steps)
    assert not any(parent.glob(".*"))


def damages(path: Path) -> dict[str, Callable[[], None]]:
    data = bytearray(path.read_bytes())

    def flip() -> None:
        data[len(data) // 2] ^= 1
        path.write_bytes(data)

    def cut() -> None:
        path.write_bytes(data[: len(data) // 2])

    return {"flipped": flip, "cut": cut, "deleted": path.unlink}


def test_every_damage_to_every_file_is_found(unbroken: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    shutil.copytree(step_dir(unbroken, 18), step_dir(run, 18))
    shutil.copytree(step_dir(unbroken, 20), tmp_path / "good")
    names = sorted(str(p.relative_to(tmp_path / "good")) for p in (tmp_path / "good").rglob("*") if p.is_file())
    assert set(names) >= ALL | {"state.json", "expert.json", "checksums.json", "unet/config.json", "ema/config.json"}
    for name in names:
        for what in ("flipped", "cut", "deleted"):
            shutil.rmtree(step_dir(run, 20), ignore_errors=True)
            shutil.copytree(tmp_path / "good", step_dir(run, 20))
            damages(step_dir(run, 20) / name)[what]()
            heard: list[str] = []
            with pytest.raises(CheckpointError):
                open_checkpoint(step_dir(run, 20))
            found = newest_checkpoint(run, heard.append)
            assert found is not None, (name, what)
            assert found.state.step == 18, (name, what)
            assert len(heard) == 1, (name, what)
            assert "step-00000020" in heard[0]


def rewrite_sums(checkpoint: Path) -> None:
    """Make the sums those of the files that are there, as a careless hand would."""
    sums = {
        str(path.relative_to(checkpoint)): {
            "bytes": path.stat().st_size,
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        }
        for path in checkpoint.rglob("*")
        if path.is_file() and path.name != "checksums.json"
    }
    (checkpoint / "checksums.json").write_text(json.dumps(sums))


@pytest.fixture(scope="module")
def four_steps(world: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unbroken run as it stood at step 4."""
    torch.set_num_threads(1)
    run = tmp_path_factory.mktemp("four") / "run"
    train_expert(world.request(run, *SETS, "checkpoint.every=4", "steps=4"))
    return run


@pytest.fixture
def cut_short(four_steps: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return shutil.copytree(four_steps, tmp_path / "cut")


def leave_out_file(name: str) -> Callable[[Path], None]:
    def leave_out(checkpoint: Path) -> None:
        (checkpoint / name).unlink()
        rewrite_sums(checkpoint)

    return leave_out


def leave_out_tensor(name: str) -> Callable[[Path], None]:
    def leave_out(checkpoint: Path) -> None:
        tensors = load_file(checkpoint / name)
        tensors.pop(sorted(tensors)[len(tensors) // 2])
        save_file(tensors, checkpoint / name, {"format": "pt"})
        rewrite_sums(checkpoint)

    return leave_out


def leave_out_key(name: str, key: str) -> Callable[[Path], None]:
    def leave_out(checkpoint: Path) -> None:
        content = json.loads((checkpoint / name).read_text())
        del content[key]
        (checkpoint / name).write_text(json.dumps(content))
        rewrite_sums(checkpoint)

    return leave_out


STATE_KEYS = ("format", "step", "epoch", "ema_updates", "skipped", "threads", "torch")


@pytest.mark.parametrize(
    "leave_out",
    [
        *(pytest.param(leave_out_file(name), id=name) for name in (*sorted(ALL), "state.json", "expert.json")),
        *(pytest.param(leave_out_tensor(name), id=f"tensor-of-{name.partition('/')[0]}") for name in sorted(ALL)),
        *(pytest.param(leave_out_key("state.json", key), id=f"state-{key}") for key in STATE_KEYS),
        *(pytest.param(leave_out_key("expert.json", key), id=f"expert-{key}") for key in ("contract", "facts")),
    ],
)
def test_each_saved_item_is_needed(world: Any, cut_short: Path, leave_out: Callable[[Path], None]) -> None:
    """Left out so that the sums agree: going on is refused, never different."""
    leave_out(step_dir(cut_short, 4))
    with pytest.raises((CheckpointError, DataError)):
        train_expert(world.request(cut_short, *SETS, "steps=5"))
    assert not step_dir(cut_short, 5).exists()


def test_the_copy_that_items_are_left_out_of_does_go_on(
    world: Any, cut_short: Path, unbroken: Path, files_of: Files
) -> None:
    train_expert(world.request(cut_short, *SETS, "checkpoint.every=99"))
    assert files_of(cut_short, 20) == files_of(unbroken, 20)


def test_a_damaged_newest_checkpoint_costs_its_steps_and_nothing_else(
    world: Any, start: Callable[..., Any], files_of: Files, events: Events, unbroken: Path, tmp_path: Path
) -> None:
    """The damaged one does not count as one of those that are kept, and its broken sums do not stop later saves."""
    run = tmp_path / "run"
    sets = (*SETS, "checkpoint.every=2", "checkpoint.keep=3")
    train_expert(world.request(run, *sets, "steps=5"))
    (step_dir(run, 5) / "checksums.json").write_text("{")
    command = start("train-expert", world.arguments(run, *sets))
    assert command.wait() == 0, command.errors()
    assert any(line.startswith(f"passed over: checkpoint {step_dir(run, 5)}") for line in command.errors())
    assert [event["why"] for event in events(run, "bad_checkpoint")]
    assert events(run, "resume")[-1]["step"] == 4
    assert files_of(run, 20) == files_of(unbroken, 20)
    names = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert names == ["latest.json", "step-00000016", "step-00000018", "step-00000020"]


def test_without_a_checkpoint_that_verifies_nothing_is_trained(world: Any, cut_short: Path) -> None:
    (step_dir(cut_short, 4) / "optimizer.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"no checkpoint of .* verifies; start again with a new --output"):
        train_expert(world.request(cut_short, *SETS))
    assert step_dir(cut_short, 4).is_dir()


def test_an_older_one_without_its_optimizer_is_not_gone_on_with(world: Any, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train_expert(world.request(run, "steps=6", "checkpoint.keep=3"))
    for step in (4, 6):
        (step_dir(run, step) / "state.json").write_text("")
    with pytest.raises(CheckpointError, match="no longer keeps its optimizer state"):
        train_expert(world.request(run, "steps=8", "checkpoint.keep=3"))


def test_left_over_folders_never_block(world: Any, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train_expert(world.request(run, "steps=2"))
    for name in (".saving-3", ".saving-4", ".removing-step-00000001", "damaged-step-00000009"):
        (run / "checkpoints" / name / "unet").mkdir(parents=True)
        (run / "checkpoints" / name / "unet" / "part").write_bytes(b"x")
    train_expert(world.request(run, "steps=4"))
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["latest.json", "step-00000002", "step-00000004"]


def test_another_number_of_threads_is_said(world: Any, cut_short: Path, capfd: pytest.CaptureFixture[str]) -> None:
    torch.set_num_threads(2)
    train_expert(world.request(cut_short, *SETS, "steps=5"))
    assert "another number of threads" in capfd.readouterr().err
