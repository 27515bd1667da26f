"""The run folder: the identical command goes on, anything else is refused by name or logged."""

import dataclasses
import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from cache_builder.gc import collect_garbage
from shared.errors import CheckpointError, ConfigError, ContractError, DataError, ManifestMismatch, StoreLocked
from shared.manifest import open_manifest
from tests.pictures import write_shapes
from trainer.checkpoint import newest_checkpoint
from trainer.loop import train_expert
from trainer.run import make_order, open_run
from trainer.view import view_of

Events = Callable[..., list[dict[str, Any]]]


def small(world: Any, run: Path, *sets: str, **changes: Any) -> Any:
    return world.request(run, "steps=2", "batch=1", *sets, **changes)


def test_a_complete_run_says_so_and_does_nothing(
    world: Any, events: Events, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert train_expert(small(world, run)) == 2
    before = (run / "checkpoints" / "latest.json").stat().st_mtime_ns
    assert train_expert(small(world, run)) == 2
    assert f"{run} is complete: 2 steps" in capfd.readouterr().err
    assert (run / "checkpoints" / "latest.json").stat().st_mtime_ns == before
    assert len(events(run, "step")) == 2


def test_the_manifest_of_a_run_cannot_be_dropped_under_it(world: Any, tmp_path: Path) -> None:
    """While it trains; later it can, and the run says how to go on."""
    own = world.copy(tmp_path / "store")
    old = open_manifest(own.store, "main").digest
    request = small(own, tmp_path / "run")
    run = open_run(request)
    own.build(pictures=write_shapes(tmp_path / "more", 12, seed=7), allow_shrink=True)
    with pytest.raises(StoreLocked, match="a run that trains on it"):
        collect_garbage(own.store, drop=[old])
    assert collect_garbage(own.store).records == 0
    assert run.manifest.rows([0])
    run.close()
    del run
    assert collect_garbage(own.store, drop=[old]).records > 0
    with pytest.raises(ManifestMismatch, match="--move-to-manifest"):
        open_run(request)


@pytest.mark.parametrize(
    "change",
    ["batch=2", "seed=1", "name=other", "timesteps.low=351", "loss.caption_dropout=0.2", "precision=bf16-mixed",
     "ema.decay=0.8", "optimizer.beta2=0.99", "schedule.prediction_type=sample", "gradient_checkpointing=true"],
)  # fmt: skip
def test_another_config_is_refused_by_key(begun: Path, world: Any, change: str) -> None:
    before = (begun / "config.toml").read_text()
    with pytest.raises(ConfigError, match=rf"is another run: {change.partition('=')[0]} was .*, is ") as raised:
        open_run(small(world, begun, change))
    assert "--output" in str(raised.value)
    assert (begun / "config.toml").read_text() == before


@pytest.fixture(scope="module")
def begun(world: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps; tests must not train it."""
    run: Path = tmp_path_factory.mktemp("begun") / "run"
    train_expert(small(world, run, "ema.decay=0.9"))
    return run


def test_what_may_change_is_logged(world: Any, events: Events, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train_expert(small(world, run))
    allowed = ("optimizer.learning_rate=1e-4", "checkpoint.every=7", "checkpoint.keep=5", "log.every=2")
    assert train_expert(small(world, run, "steps=4", *allowed, "optimizer.max_skipped=3")) == 4
    changed = {event["key"]: (event["before"], event["after"]) for event in events(run, "config")}
    assert changed == {
        "steps": (2, 4),
        "optimizer.learning_rate": (1e-3, 1e-4),
        "optimizer.max_skipped": (100, 3),
        "checkpoint.every": (2, 7),
        "checkpoint.keep": (3, 5),
        "log.every": (1, 2),
    }
    assert events(run, "step")[-1]["learning_rate"] == 1e-4
    assert "steps = 4" in (run / "config.toml").read_text()


def test_another_start_model_is_refused(begun: Path, world: Any, tmp_path: Path) -> None:
    model = shutil.copytree(world.model, tmp_path / "model")
    path = model / "unet" / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    weights["conv_in.bias"][0] += 1
    save_file(weights, path, {"format": "pt"})
    with pytest.raises(ContractError, match="began from another UNet"):
        open_run(dataclasses.replace(small(world, begun), model=model))


@pytest.mark.parametrize("names", [["letter.txt"], ["checkpoints/step-00000001/state.json"], [".hidden"]])
def test_a_foreign_folder_is_left_alone(world: Any, tmp_path: Path, names: list[str]) -> None:
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ConfigError, match="is not empty and no run"):
        open_run(small(world, tmp_path))
    assert sorted(tmp_path.rglob("*")) == before


def test_a_file_is_no_run_folder(world: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ConfigError, match="no run"):
        open_run(small(world, tmp_path / "file"))


@pytest.mark.parametrize("left", [[], ["run.lock"], ["run.lock", "config.toml"], ["run.lock", ".config.toml.7.tmp"]])
def test_a_run_that_was_killed_while_it_began_begins_again(world: Any, tmp_path: Path, left: list[str]) -> None:
    for name in left:
        (tmp_path / name).write_text("half")
    run = open_run(small(world, tmp_path))
    assert run.first_step == 0
    run.close()
    open_run(small(world, tmp_path)).close()


def test_nothing_is_made_where_the_command_is_wrong(world: Any, tmp_path: Path) -> None:
    with pytest.raises(ManifestMismatch, match=r"no manifest 'mian' in .*; there are: main"):
        open_run(dataclasses.replace(small(world, tmp_path / "run"), manifest="mian"))
    with pytest.raises(DataError):
        open_run(dataclasses.replace(small(world, tmp_path / "run"), model=tmp_path))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("name", "error"), [("expert.json", CheckpointError), ("config.toml", ConfigError)])
def test_a_damaged_run_folder_is_said(begun: Path, world: Any, tmp_path: Path, name: str, error: Any) -> None:
    run = shutil.copytree(begun, tmp_path / "run")
    (run / name).write_text("{")
    with pytest.raises(error, match=name.replace(".", r"\.")):
        open_run(small(world, run))


def test_one_process_at_a_time(world: Any, start: Callable[..., Any], events: Events, tmp_path: Path) -> None:
    run = tmp_path / "run"
    first = start("train-expert", world.arguments(run, "steps=1000", "batch=1", "checkpoint.every=1000"), "first.txt")
    first.wait_for(lambda: bool(events(run, "step")))
    second = start("train-expert", world.arguments(run, "steps=1000", "batch=1", "checkpoint.every=1000"))
    assert second.wait() == 73
    errors = second.errors()
    assert len(errors) == 1
    assert errors[0].startswith(f"error: run {run} is being trained by pid {first.process.pid} ")
    first.signal(signal.SIGKILL)
    first.wait()
    open_run(world.request(run, "steps=1000", "batch=1", "checkpoint.every=1000")).close()


@pytest.fixture
def grown(world: Any, tmp_path: Path) -> tuple[Any, Callable[[], str]]:
    """A world of one's own, and what adds pictures to its store and seals them."""
    own = world.copy(tmp_path / "store")
    pictures = shutil.copytree(world.pictures, tmp_path / "shapes")

    def grow() -> str:
        write_shapes(pictures, 60)
        return str(own.build(pictures=pictures))

    return own, grow


def test_a_run_keeps_the_manifest_it_began_with(
    grown: tuple[Any, Callable[[], str]], begun: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], events: Events
) -> None:
    own, grow = grown
    run = shutil.copytree(begun, tmp_path / "run")
    digest = grow()
    opened = open_run(small(own, run))
    old = opened.manifest.digest
    opened.close()
    assert old != digest
    assert len(opened.manifest) == 48
    assert f"--move-to-manifest main moves on to {digest[:16]}" in capfd.readouterr().err
    assert events(run, "resume")[-1]["digest"] == old
    # Whatever becomes of the name: the run needs its own manifest alone.
    (own.store / "manifests" / "main" / "current.json").write_text("{")
    open_run(small(own, run)).close()
    for path in (own.store / "manifests" / "main").glob(f"{old}.*"):
        path.unlink()
    with pytest.raises(ManifestMismatch, match=rf"of digest {old} is no longer in"):
        open_run(small(own, run))


def test_moving_on_begins_a_new_epoch_and_is_logged(
    grown: tuple[Any, Callable[[], str]], events: Events, tmp_path: Path
) -> None:
    own, grow = grown
    run = tmp_path / "run"
    train_expert(small(own, run))
    old = open_manifest(own.store, "main").digest
    digest = grow()
    opened = open_run(small(own, run, "steps=4", move="main"))
    opened.close()
    train_expert(small(own, run, "steps=4"))  # goes on where the move was made, without being told again
    assert [(event["digest"], event["step"]) for event in events(run, "move")] == [(digest, 2)]
    assert [event["epoch"] for event in events(run, "step")] == [0, 0, 1, 1]
    newest = newest_checkpoint(run, print)
    assert newest is not None
    uses = [(use.digest, use.from_step, use.from_epoch) for use in newest.card.facts.manifests]
    assert uses == [(old, 0, 0), (digest, 2, 1)]
    train_expert(small(own, run, "steps=5", move="main"))  # a move to where it is changes nothing
    assert len(events(run, "move")) == 1
    assert events(run, "step")[-1]["epoch"] == 1
    again = open_run(small(own, run, "steps=6"))
    again.close()
    assert len(again.manifest) == 60
    assert make_order(again, view_of(again.manifest, again.config.data))[0].epoch == 1


@pytest.mark.parametrize("other", ["text.chunks=2", "vae", "text_encoder_2"])
def test_moving_to_other_encoders_is_refused(world: Any, begun: Path, tmp_path: Path, other: str) -> None:
    own = world.copy(tmp_path / "store")
    run = shutil.copytree(begun, tmp_path / "run")
    sets = [other] if "=" in other else []
    if not sets:
        model = shutil.copytree(world.model, tmp_path / "model")
        path = next((model / other).glob("*.safetensors"))
        weights = load_file(path)
        name = min(weights)
        weights[name] = weights[name] + 1e-3
        save_file(weights, path, {"format": "pt"})
        own = dataclasses.replace(own, model=model)
    own.build(*sets, manifest="other", pictures=write_shapes(tmp_path / "few", 6))
    own = dataclasses.replace(own, model=world.model)
    with pytest.raises(ManifestMismatch, match=r"another VAE, text encoder or text\.chunks"):
        open_run(small(own, run, move="other"))
    assert [use["name"] for use in json.loads((run / "expert.json").read_text())["facts"]["manifests"]] == ["main"]


def test_a_unet_of_another_width_is_refused(world: Any, tmp_path: Path) -> None:
    model = shutil.copytree(world.model, tmp_path / "model")
    config = json.loads((model / "unet" / "config.json").read_text())
    for key, value in (("cross_attention_dim", 80), ("addition_embed_type", None)):
        (model / "unet" / "config.json").write_text(json.dumps(config | {key: value}))
        with pytest.raises(ContractError, match=r"text 80 wide|not SDXL"):
            open_run(dataclasses.replace(small(world, tmp_path / "run"), model=model))
    (model / "unet" / "config.json").write_text("{")
    with pytest.raises(DataError, match="cannot be read"):
        open_run(dataclasses.replace(small(world, tmp_path / "run"), model=model))


def test_a_start_model_that_lacks_weights_is_refused(world: Any, tmp_path: Path) -> None:
    model = shutil.copytree(world.model, tmp_path / "model")
    path = model / "unet" / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    del weights["conv_out.weight"]
    save_file(weights, path, {"format": "pt"})
    with pytest.raises(DataError, match=r"lacks weights of conv_out\.weight"):
        train_expert(dataclasses.replace(small(world, tmp_path / "run"), model=model))
