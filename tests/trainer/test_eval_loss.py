"""The stable eval loss: what it computes, what it depends on, and that training does not notice it."""

import contextlib
import json
import math
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lmdb
import pytest
import torch
from torch import Tensor

from shared.conditioning import PromptEmbeds
from shared.errors import CheckpointError
from shared.manifest import open_manifest
from shared.schedule import NoiseSchedule, TimestepRange, scaled_linear_betas
from shared.seeding import make_generator
from shared.store import StoreReader
from tests.pictures import write_shapes
from trainer.checkpoint import read_tensors
from trainer.config import EvalConfig, LossConfig
from trainer.ema import Ema
from trainer.eval_loss import eval_loss, holding, plan_draws
from trainer.eval_samples import PinnedSample, choose_samples, pin_samples, read_sample_batch
from trainer.held_out import HeldOut, Turns
from trainer.loop import train_expert
from trainer.loss import DenoisingLoss
from trainer.loss_bins import LossBins
from trainer.run import open_run
from trainer.unet import ConditionedUnet, load_unet

CPU = torch.device("cpu")
BASE, REFINER = TimestepRange(350, 1000), TimestepRange(0, 350)
FREELY = ("eval.share=1", "eval.samples=12")
Events = Callable[..., list[dict[str, Any]]]


def objective(within: TimestepRange, settings: LossConfig | None = None, seed: int = 0) -> DenoisingLoss:
    schedule = NoiseSchedule(scaled_linear_betas(1000, 0.00085, 0.012), zero_terminal_snr=True)
    return DenoisingLoss(schedule, within, "v_prediction", 0.13025, settings or LossConfig(), seed)


@pytest.fixture
def store(world: Any) -> Any:
    with StoreReader(world.store) as store:
        yield store


def measure(world: Any, store: StoreReader, predict: Any, loss: DenoisingLoss, count: int, batch: int = 4) -> Any:
    manifest = open_manifest(world.store, world.manifest)
    read = partial(read_sample_batch, store, manifest.settings)
    return eval_loss(predict, loss, choose_samples(manifest), read, count=count, batch=batch, device=CPU)


def zeros(x: Tensor, t: Tensor, text: PromptEmbeds, time_ids: Tensor) -> Tensor:
    return torch.zeros_like(x)


def by_hand(store: StoreReader, sample: PinnedSample, repetition: int, t: int, scaling: float) -> float:
    """The mean of v^2, as a network that answers zeros has it, one product at a time."""
    abar = 1.0
    for i in range(t + 1):
        abar *= 1 - (0.00085**0.5 + (0.012**0.5 - 0.00085**0.5) * i / 999) ** 2
    last = 1.0
    for i in range(1000):
        last *= 1 - (0.00085**0.5 + (0.012**0.5 - 0.00085**0.5) * i / 999) ** 2
    first = 1 - 0.00085
    root = (abar**0.5 - last**0.5) * first**0.5 / (first**0.5 - last**0.5)
    alpha, sigma = root, math.sqrt(1 - root**2)
    with store.snapshot() as snapshot:
        latents = snapshot.read(bytes.fromhex(sample.latent_key)).tensors
    shape = latents["mean"].shape
    noise = {
        what: torch.randn(shape, generator=make_generator(0, what, bytes.fromhex(sample.sample_id), repetition))
        for what in ("eval eps", "eval posterior")
    }
    mean, logvar = (torch.from_numpy(latents[name].copy()).double() for name in ("mean", "logvar"))
    x_0 = scaling * (mean + torch.exp(logvar / 2) * noise["eval posterior"].double())
    return float((alpha * noise["eval eps"].double() - sigma * x_0).square().mean())


@pytest.mark.parametrize("within", [BASE, REFINER])
def test_three_draws_by_hand(world: Any, store: StoreReader, within: TimestepRange) -> None:
    samples = choose_samples(open_manifest(world.store, world.manifest))[:3]
    assert len(samples) == 3
    draws = plan_draws(samples, within, 3)
    expected = [by_hand(store, draw.sample, draw.repetition, draw.t, 0.13025) for draw in draws]
    got = measure(world, store, zeros, objective(within), 3)
    assert got.loss == pytest.approx(sum(expected) / 3, rel=1e-5)
    assert got.draws == 3
    assert got.lost == 0
    bins = {(one.low, one.high): (one.loss, one.samples) for one in got.bins}
    for draw, loss in zip(draws, expected, strict=True):  # three strata of the range lie in three stretches
        assert bins[draw.t // 50 * 50, draw.t // 50 * 50 + 50] == (pytest.approx(loss, rel=1e-5), 1)


def test_draws_are_spread_over_this_range_and_repeat_samples_with_other_noise(world: Any) -> None:
    samples = choose_samples(open_manifest(world.store, world.manifest))
    draws = plan_draws(samples, BASE, 65)
    assert sorted((draw.t - 350) // 10 for draw in draws) == list(range(65))
    assert len({(draw.sample.sample_id, draw.repetition) for draw in draws}) == 65
    assert {draw.sample.sample_id for draw in draws} == {sample.sample_id for sample in samples}
    assert plan_draws(samples, BASE, 65) == draws


def test_it_depends_on_weights_samples_and_range_alone(world: Any, store: StoreReader) -> None:
    """Neither on seed, weights of timesteps, kind of loss and noise of training, nor on batches, but for rounding."""
    model = partial(ConditionedUnet(load_unet(world.model / "unet", CPU), "sdxl", 64), aesthetic_score=6.0)
    plain = measure(world, store, model, objective(BASE), 10)
    settings = LossConfig(type="huber", min_snr_gamma=1, offset_noise=0.5, input_perturbation=0.5)
    assert measure(world, store, model, objective(BASE, settings, seed=9), 10) == plain
    alone = measure(world, store, model, objective(BASE), 10, batch=1)
    assert alone.loss == pytest.approx(plain.loss, rel=1e-5)
    assert alone.loss != measure(world, store, model, objective(REFINER), 10).loss
    assert plain.loss == pytest.approx(sum(one.loss * one.samples for one in plain.bins) / 10, rel=1e-12)


def test_training_does_not_notice(world: Any, files_of: Any, events: Events, tmp_path: Path) -> None:
    sets = ("steps=5", "batch=2", "accumulation=2", "checkpoint.every=5", "loss.caption_dropout=0.3")
    train_expert(world.request(tmp_path / "without", *sets, "eval.samples=0"))
    train_expert(world.request(tmp_path / "with", *sets, *FREELY, "eval.every=1"))
    assert files_of(tmp_path / "with", 5) == files_of(tmp_path / "without", 5)
    assert len(events(tmp_path / "with", "eval")) == 5
    assert not events(tmp_path / "without", "eval")
    told = [[{k: e[k] for k in ("step", "epoch", "loss", "grad_norm", "bins")} for e in events(tmp_path / run, "step")]
            for run in ("with", "without")]  # fmt: skip
    assert told[0] == told[1]


@pytest.mark.parametrize(
    "sets", [("precision=bf16-lean", "ema.device=cpu"), ("optimizer.name=schedule-free", "ema.decay=0")]
)
def test_nor_where_weights_are_not_plain(world: Any, files_of: Any, events: Events, tmp_path: Path, sets: Any) -> None:
    """bf16 weights beside an fp32 average on the host, and an optimizer that keeps its average by itself."""
    common = ("steps=3", "batch=1", "checkpoint.every=3", *sets)
    train_expert(world.request(tmp_path / "without", *common, "eval.samples=0"))
    train_expert(world.request(tmp_path / "with", *common, *FREELY, "eval.every=1"))
    assert files_of(tmp_path / "with", 3) == files_of(tmp_path / "without", 3)
    assert all(event["loss"] > 0 and event.get("loss_ema", 1) > 0 for event in events(tmp_path / "with", "eval"))


def test_what_is_logged_is_that_of_the_checkpoint_and_of_its_average(
    world: Any, store: StoreReader, events: Events, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    train_expert(world.request(run, "steps=4", "checkpoint.every=4", "optimizer.learning_rate=1e-2", *FREELY))
    [event] = events(run, "eval")
    assert event["step"] == 4
    assert event["loss"] != event["loss_ema"]
    manifest = open_manifest(world.store, world.manifest)
    loss = objective(BASE)
    loss = DenoisingLoss(loss.schedule, BASE, "v_prediction", manifest.settings.scaling_factor, LossConfig(), 0)
    for folder, key, bins in (("unet", "loss", "bins"), ("ema", "loss_ema", "bins_ema")):
        unet = load_unet(run / "checkpoints" / "step-00000004" / folder, CPU)
        model = partial(ConditionedUnet(unet, "sdxl", 64), aesthetic_score=6.0)
        again = measure(world, store, model, loss, 12, batch=2)
        assert again.loss == pytest.approx(event[key], rel=1e-6)
        assert [one.as_list() for one in again.bins] == [pytest.approx(one, rel=1e-5) for one in event[bins]]


def test_weights_that_were_held_are_let_go_untouched(world: Any) -> None:
    unet = load_unet(world.model / "unet", CPU)
    before = {name: (p.data_ptr(), p.detach().clone()) for name, p in unet.named_parameters()}
    other = {name: torch.randn_like(p) for name, p in list(unet.named_parameters())[::2]}
    with contextlib.suppress(ZeroDivisionError), holding(unet, other):
        assert all(torch.equal(p, other.get(name, before[name][1])) for name, p in unet.named_parameters())
        raise ZeroDivisionError
    assert {name: p.data_ptr() for name, p in unet.named_parameters()} == {n: b[0] for n, b in before.items()}
    assert all(torch.equal(p, before[name][1]) for name, p in unet.named_parameters())


# --- the samples stay the same ---


def test_samples_are_pinned_when_the_run_starts(world: Any, events: Events, tmp_path: Path) -> None:
    own, run = world.copy(tmp_path / "store"), tmp_path / "run"
    sets = ("batch=1", "ema.decay=0", "optimizer.learning_rate=1e-12", *FREELY)
    train_expert(own.request(run, "steps=2", *sets))
    pinned = (run / "eval_samples.json").read_text()
    manifest = open_manifest(own.store, "main")
    held_out = {row.sample_id.hex() for b in manifest.buckets("eval") for row in manifest.rows(b.rows)}
    samples = json.loads(pinned)["samples"]
    assert {sample["sample_id"] for sample in samples} == held_out
    own.build(pictures=write_shapes(shutil.copytree(world.pictures, tmp_path / "shapes"), 70))
    assert len(choose_samples(open_manifest(own.store, "main"))) > len(samples)
    train_expert(own.request(run, "steps=4", *sets, move="main"))
    assert (run / "eval_samples.json").read_text() == pinned
    losses = [event["loss"] for event in events(run, "eval")]
    assert len(losses) == 2
    assert losses[1] == pytest.approx(
        losses[0], rel=1e-6
    )  # weights that hardly move, before and after the new manifest


def test_two_experts_are_scored_on_the_same_samples(world: Any, tmp_path: Path) -> None:
    for expert in ("base", "refiner"):
        train_expert(world.request(tmp_path / expert, "steps=1", f"seed={len(expert)}", *FREELY, expert=expert))
    files = [(tmp_path / expert / "eval_samples.json").read_bytes() for expert in ("base", "refiner")]
    assert files[0] == files[1]


def test_at_most_256_and_whichever_others_there_are(world: Any) -> None:
    manifest = open_manifest(world.store, world.manifest)
    some = choose_samples(manifest, 2)
    assert choose_samples(manifest)[:2] == some


def test_a_move_to_means_alone_keeps_the_variance_of_what_was_pinned(
    world: Any, events: Events, tmp_path: Path
) -> None:
    own, run = world.copy(tmp_path / "store"), tmp_path / "run"
    sets = ("batch=1", "ema.decay=0", "optimizer.learning_rate=1e-12", *FREELY)
    train_expert(own.request(run, "steps=2", *sets))
    own.build("encode.latents=mean")
    assert open_manifest(own.store, "main").settings.latents == "mean"
    train_expert(own.request(run, "steps=4", *sets, move="main"))
    first, last = events(run, "eval")
    assert (first["lost"], last["lost"]) == (0, 0)
    assert last["loss"] == pytest.approx(first["loss"], rel=1e-6)


def test_samples_that_are_trained_on_later_are_told(
    world: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    own = world.copy(tmp_path / "store")
    pinned = pin_samples(tmp_path, open_manifest(own.store, "main"))
    own.build("split.eval_fraction=0.0")
    assert pin_samples(tmp_path, open_manifest(own.store, "main")) == pinned
    assert "5 of 5 samples of the eval loss are no longer held out by manifest 'main'" in capfd.readouterr().err


def test_a_manifest_that_holds_nothing_out_is_said_once(
    world: Any, events: Events, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    own = world.copy(tmp_path / "store")
    own.build("split.eval_fraction=0.0", manifest="all")
    request = own.request(tmp_path / "run", "steps=4", *FREELY)
    train_expert(type(request)(**{**request.__dict__, "manifest": "all"}))
    assert capfd.readouterr().err.count("there is no eval loss") == 1
    assert not events(tmp_path / "run", "eval")
    assert not (tmp_path / "run" / "eval_samples.json").exists()


def test_records_that_are_gone_are_left_out_and_counted(
    world: Any, events: Events, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    own = world.copy(tmp_path / "store")
    samples = choose_samples(open_manifest(own.store, "main"))
    with lmdb.open(str(own.store), map_size=1 << 30) as env, env.begin(write=True) as transaction:
        transaction.delete(bytes.fromhex(samples[1].latent_key))
    train_expert(own.request(tmp_path / "run", "steps=4", "batch=1", *FREELY))
    assert [event["lost"] for event in events(tmp_path / "run", "eval")] == [
        3,
        3,
    ]  # of 12, two or three of each of five
    assert all(event["loss"] > 0 for event in events(tmp_path / "run", "eval"))
    assert capfd.readouterr().err.count("3 of 12 draws of the eval loss could not be read") == 1


@pytest.mark.parametrize("content", ["", "{}", '{"format": 2, "manifest": "", "samples": []}', "[]"])
def test_damaged_pins_are_named(world: Any, tmp_path: Path, content: str) -> None:
    (tmp_path / "eval_samples.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"eval_samples\.json is damaged"):
        pin_samples(tmp_path, open_manifest(world.store, world.manifest))


# --- at most its share of the time ---


@pytest.mark.parametrize("share", [0.02, 0.1])
@pytest.mark.parametrize(("step_s", "eval_s"), [(0.5, 0.1), (0.5, 10.0), (2.0, 300.0), (0.01, 5.0)])
def test_evaluation_keeps_to_its_share(share: float, step_s: float, eval_s: float) -> None:
    """On a clock of our own: never above the share, and at the last step whenever the run is long enough for one."""
    now, spent, taken, steps = 0.0, 0.0, [], 4000
    turns = Turns(EvalConfig(every=100, share=share), steps, clock=lambda: now)
    for done in range(1, steps + 1):
        now += step_s
        if turns.is_turn(done, done % 500 == 0, samples_per_step=8, passes=2):
            now, spent = now + eval_s, spent + eval_s
            turns.took(eval_s)
            taken.append(done)
            assert spent <= share * now + eval_s * (len(taken) == 1)  # what the first one costs is not known before
    if eval_s < 0.3 * share * steps * step_s:
        assert taken[-1] == steps
        is_used = spent + 3 * eval_s > share * steps * step_s
        assert is_used or len(taken) > 0.7 * steps / 100  # the first waits for what it is reckoned to cost
    assert all(step % 100 == 0 for step in taken)


def test_without_a_limit_every_turn_is_taken() -> None:
    turns = Turns(EvalConfig(every=3, share=1), 10)
    taken = []
    for done in range(1, 11):
        if turns.is_turn(done, done in (5, 10), 1, 1):
            turns.took(1e9)
            taken.append(done)
    assert taken == [3, 5, 6, 9, 10]


def test_who_asks_to_stop_does_not_wait_for_it(world: Any, store: StoreReader, events: Events, tmp_path: Path) -> None:
    """A request that comes while it measures breaks it off: what was saved has no score, the weights are their own."""
    run = open_run(world.request(tmp_path / "run", *FREELY, "batch=2"))
    unet = load_unet(world.model / "unet", CPU)
    ema = Ema(unet, 0.5)
    before = {name: p.detach().clone() for name, p in unet.named_parameters()}
    model = partial(ConditionedUnet(unet, "sdxl", 64), aesthetic_score=6.0)
    asked, held_out = iter([False] * 8 + [True] * 99), HeldOut(run, store, objective(BASE), CPU)
    assert held_out.measure(model, unet, ema, lambda: next(asked)) is None  # the second pass, with the average
    assert unet.training
    assert all(torch.equal(p, before[name]) for name, p in unet.named_parameters())
    assert held_out.measure(model, unet, ema) is not None
    run.close()


# --- by timestep while training ---


def test_bins_are_means_of_stretches_cut_to_the_range() -> None:
    bins = LossBins(TimestepRange(330, 460), CPU)
    bins.add(torch.tensor([330, 349, 350, 459]), torch.tensor([1.0, 3.0, 5.0, 7.0]))
    bins.add(torch.tensor([399]), torch.tensor([6.0]))
    assert [one.as_list() for one in bins.read(bins.take())] == [
        [330, 350, 2.0, 2],
        [350, 400, 5.5, 2],
        [450, 460, 7.0, 1],
    ]
    assert bins.read(bins.take()) == []


def test_bins_sum_any_number_of_micro_batches_in_their_order() -> None:
    """In single precision the order of a sum shows in its last digits."""
    source = torch.Generator().manual_seed(0)
    t = torch.randint(350, 1000, (700, 3), generator=source)
    losses = torch.rand(700, 3, generator=source)
    bins = LossBins(BASE, CPU)
    for one, loss in zip(t, losses, strict=True):
        bins.add(one, loss)
    sums, expected = bins.take(), [0.0] * 13
    for where, loss in zip(((t - 350) // 50).flatten().tolist(), losses.flatten(), strict=True):
        expected[where] = float(torch.tensor(expected[where]) + loss)
    assert sums[0].tolist() == expected
    assert sums[1].sum() == 2100
    assert not bins.take().any()


def test_training_tells_its_loss_by_timestep(world: Any, events: Events, tmp_path: Path) -> None:
    train_expert(world.request(tmp_path / "run", "steps=6", "batch=4", "accumulation=2", "log.every=3"))
    steps = events(tmp_path / "run", "step")
    assert len(steps) == 2
    for event in steps:
        low, high, losses, counts = zip(*event["bins"], strict=True)
        assert sum(counts) == 3 * 8
        assert all(350 <= a < b <= 1000 and a % 50 == 0 and b - a == 50 for a, b in zip(low, high, strict=True))
        mean = sum(a * n for a, n in zip(losses, counts, strict=True)) / sum(counts)
        assert mean == pytest.approx(event["loss"], rel=1e-5)


def test_a_loss_that_is_not_finite_stays_in_its_stretch(world: Any, tmp_path: Path) -> None:
    bins = LossBins(BASE, CPU)
    bins.add(torch.tensor([350, 990]), torch.tensor([float("nan"), 2.0]))
    read = bins.read(bins.take())
    assert math.isnan(read[0].loss)
    assert read[1].loss == 2.0
    bins.add(torch.tensor([350]), torch.tensor([1.0]))
    assert bins.read(bins.take())[0].loss == 1.0


def test_weights_of_checkpoints_are_not_the_average(world: Any, tmp_path: Path) -> None:
    """An evaluation with the average just before a checkpoint leaves the weights in it."""
    train_expert(world.request(tmp_path / "run", "steps=2", "optimizer.learning_rate=1e-2", *FREELY))
    step = tmp_path / "run" / "checkpoints" / "step-00000002"
    raw, ema = (read_tensors(step / name / "diffusion_pytorch_model.safetensors") for name in ("unet", "ema"))
    assert any(not torch.equal(raw[name], ema[name]) for name in raw)
