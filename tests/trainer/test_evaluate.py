"""`evaluate-experts`: the numbers in its report, recomputed; who is compared on what; and what is refused."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from shared.errors import CheckpointError, ContractError, DataError, ManifestMismatch
from shared.latents import LatentMoments, sample_latents
from shared.manifest import open_manifest
from shared.schedule import NoiseSchedule, TimestepRange, scaled_linear_betas
from shared.seeding import make_generator
from shared.store import StoreReader
from trainer.eval_loss import EvalDraw, plan_draws
from trainer.eval_samples import choose_samples, read_sample_batch
from trainer.loop import train_expert
from trainer.unet import ConditionedUnet, load_unet

BASE, REFINER = TimestepRange(350, 1000), TimestepRange(0, 350)
CPU = torch.device("cpu")
Pair = tuple[Path, Path]
Judge = Callable[..., Any]


@pytest.fixture(scope="session")
def report(judge_in: Judge, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return judge_in(tmp_path_factory.mktemp("report"), draws=32)


def loss_of(report: Any, name: str, low: int, high: int) -> Any:
    [found] = [one for one in report.rounds[-1].losses if (one.candidate, one.low, one.high) == (name, low, high)]
    return found


def by_hand(world: Any, store: StoreReader, unet: Any, draw: EvalDraw, gives: str) -> float:
    """The loss in v of one draw, from the record, the noise of its id and the formulas alone, in fp64."""
    manifest = open_manifest(world.store, world.manifest)
    batch, _ = read_sample_batch(store, manifest.settings, [draw.sample])
    assert batch is not None
    ids = bytes.fromhex(draw.sample.sample_id)
    eps, posterior = (
        torch.randn(batch.moments.mean.shape[1:], generator=make_generator(0, f"eval {what}", ids, draw.repetition))
        for what in ("eps", "posterior")
    )
    abar = NoiseSchedule(scaled_linear_betas(1000, 0.00085, 0.012), zero_terminal_snr=True).abar[draw.t]
    alpha, sigma = abar.sqrt(), (1 - abar).sqrt()
    moments = LatentMoments(batch.moments.mean.double(), batch.moments.logvar)
    x_0 = sample_latents(moments, 0.13025, posterior).double()[0]
    x_t = alpha * x_0 + sigma * eps
    with torch.inference_mode():
        model = ConditionedUnet(unet, "sdxl", 64)
        answer = model(x_t.float()[None], torch.tensor([draw.t]), batch.text, batch.time_ids, 6.0)[0].double()
    v = answer if gives == "v_prediction" else alpha * answer - sigma * (x_t - sigma * answer) / alpha
    return float((v - (alpha * eps - sigma * x_0)).square().mean())


@pytest.mark.parametrize("name", ["start model", "base", "refiner"])
@pytest.mark.parametrize("within", [BASE, REFINER])
def test_three_draws_by_hand(
    world: Any, pair: Pair, judge_in: Judge, tmp_path: Path, name: str, within: TimestepRange
) -> None:
    """Everybody over everybody's timesteps; the start model was taught eps, the experts v."""
    report = judge_in(tmp_path / "out", draws=3)
    folder = {"base": pair[0], "refiner": pair[1]}.get(name)
    unet = load_unet(folder / "checkpoints/step-00000002/ema" if folder else world.model / "unet", CPU)
    draws = plan_draws(choose_samples(open_manifest(world.store, world.manifest)), within, 3)
    gives = "v_prediction" if folder else "epsilon"
    with StoreReader(world.store) as store:
        expected = [by_hand(world, store, unet, draw, gives) for draw in draws]
    found = loss_of(report, name, within.low, within.high)
    assert found.loss == pytest.approx(sum(expected) / 3, rel=2e-4)
    for draw, loss in zip(draws, expected, strict=True):
        [bin_] = [one for one in found.bins if one[0] <= draw.t < one[1]]
        assert bin_[2:] == (pytest.approx(loss, rel=2e-4), 1)


def test_an_experts_loss_is_the_one_its_trainer_logged(
    world: Any, judge_in: Judge, events: Any, tmp_path: Path
) -> None:
    sets = ("steps=2", "batch=1", "ema.decay=0.5", "eval.share=1", "eval.samples=10", "checkpoint.every=2")
    for expert in ("base", "refiner"):
        train_expert(world.request(tmp_path / expert, *sets, expert=expert))
    report = judge_in(tmp_path / "out", experts=(tmp_path / "base", tmp_path / "refiner"), draws=10, batch=1)
    for expert, within in (("base", BASE), ("refiner", REFINER)):
        logged = events(tmp_path / expert, "eval")[-1]
        assert loss_of(report, expert, within.low, within.high).loss == pytest.approx(logged["loss_ema"], rel=1e-6)


def test_the_table_is_made_of_the_parts(report: Any) -> None:
    names = [tuple(answer.candidate for answer in one.answers) for one in report.rounds[0].choices]
    assert names == [(a, b) for a in ("start model", "refiner") for b in ("start model", "base")]
    for one in report.rounds[0].choices:
        low, high = one.answers
        expected = 0.35 * loss_of(report, low.candidate, 0, 350).loss
        expected += 0.65 * loss_of(report, high.candidate, 350, 1000).loss
        assert one.loss == pytest.approx(expected, rel=1e-12)


def test_changes_are_of_the_same_draws_and_have_errors(report: Any) -> None:
    start = report.rounds[0].choices[0]
    assert (start.change, start.change_error) == (0.0, 0.0)
    for one in report.rounds[0].choices[1:]:
        assert one.change == pytest.approx(one.loss - start.loss, rel=1e-6, abs=1e-9)
        assert one.error > 0
        assert one.change_error > 0
    for one in report.rounds[0].losses:
        assert one.change == pytest.approx(one.loss - loss_of(report, "start model", one.low, one.high).loss, abs=1e-9)
        assert len(one.bin_errors) == len(one.bins)


def test_both_experts_are_looked_at_on_either_side_of_the_boundary(report: Any) -> None:
    for name in ("start model", "base", "refiner"):
        for low, high in ((300, 350), (350, 400)):
            one = loss_of(report, name, low, high)
            assert one.loss > 0
            assert [bin_[:2] for bin_ in one.bins] == [(low, high)]


def test_the_sweep_meets_the_pair_at_its_own_boundary(report: Any) -> None:
    """With the draws spread evenly: at 350 it is the pair's loss, at 0 and at 1000 one expert's alone."""
    sweep = {one.boundary: one.loss for one in report.rounds[0].sweep}
    assert set(sweep) >= {0, 350, 1000}

    def alone(name: str) -> float:
        bins = [bin_ for low, high in ((0, 350), (350, 1000)) for bin_ in loss_of(report, name, low, high).bins]
        return float(sum(b[2] * (b[1] - b[0]) for b in bins) / sum(b[1] - b[0] for b in bins))

    assert sweep[0] == pytest.approx(alone("base"), rel=1e-9)
    assert sweep[1000] == pytest.approx(alone("refiner"), rel=1e-9)
    assert len(set(sweep.values())) > 3
    for one in report.rounds[0].sweep:
        assert one.change == pytest.approx(one.loss - sweep[350], abs=1e-9)
        assert one.error > 0
        assert (one.change_error == 0) == (one.boundary == 350)


def test_a_report_reads_back_and_is_the_same_again(report: Any, judge_in: Judge, tmp_path: Path) -> None:
    again = judge_in(tmp_path / "out", draws=32)
    assert again.rounds[0].losses == report.rounds[0].losses
    content = json.loads((tmp_path / "out" / "report.json").read_text())
    assert content["format"] == 1
    assert content["rounds"][0]["experts"][0]["step"] == 2


def test_one_expert_alone_stands_beside_the_start_model(judge_in: Judge, pair: Pair, tmp_path: Path) -> None:
    report = judge_in(tmp_path / "out", experts=pair[:1])
    names = [[answer.candidate for answer in one.answers] for one in report.rounds[0].choices]
    assert names == [["start model", "start model"], ["start model", "base"]]
    assert report.rounds[0].sweep == []


def test_an_adapter_is_compared_with_what_it_stands_on(world: Any, judge_in: Judge, tmp_path: Path) -> None:
    """Both predict eps here: one that learned nothing does as the start model does, one that did otherwise."""
    plain = ("schedule.prediction_type=epsilon", "schedule.zero_terminal_snr=false")
    sets = ("steps=1", "batch=1", "adapter.rank=2", "ema.decay=0", *plain)
    losses = []
    for rate in ("1e-12", "0.1"):
        train_expert(world.request(tmp_path / rate, *sets, f"optimizer.learning_rate={rate}", expert="base"))
        report = judge_in(tmp_path / "out", experts=(tmp_path / rate,))
        losses.append([loss_of(report, name, 350, 1000).loss for name in ("start model", "base")])
    assert losses[0][1] == pytest.approx(losses[0][0], rel=1e-6)
    assert losses[1][1] != pytest.approx(losses[1][0], rel=1e-3)


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"manifest": "mian"}, ManifestMismatch, "there are: main"),
        ({"experts": "gap"}, ContractError, r"no expert answers for timesteps \[350, 400\)"),
        ({"experts": "overlap"}, ContractError, r"two experts answer for timesteps \[350, 1000\)"),
        ({"experts": "missing"}, CheckpointError, "no run folder"),
        ({"experts": "empty"}, CheckpointError, "holds no checkpoint yet"),
        ({"experts": "flipped"}, CheckpointError, "no checkpoint of .* verifies"),
        ({"experts": "contracts"}, ContractError, "differ in prediction_type"),
    ],
)
def test_what_is_refused(
    world: Any, judge_in: Judge, pair: Pair, tmp_path: Path, change: dict[str, Any], error: type[Exception], says: str
) -> None:
    experts = {
        "gap": lambda: (narrowed(pair[0], tmp_path / "gap", 400), pair[1]),
        "overlap": lambda: (pair[0], narrowed(pair[1], tmp_path / "overlap", 0, 1000)),
        "missing": lambda: (pair[0], tmp_path / "missing"),
        "empty": lambda: (pair[0], made(tmp_path / "empty")),
        "flipped": lambda: (pair[0], flipped(pair[1], tmp_path / "flipped")),
        "contracts": lambda: (pair[0], other(pair[1], tmp_path / "other")),
    }
    if "experts" in change:
        change = {"experts": experts[change["experts"]]()}
    with pytest.raises(error, match=says):
        judge_in(tmp_path / "out", **change)
    assert not (tmp_path / "out" / "report.json").exists()


def test_nothing_held_out_is_nothing_to_evaluate_with(world: Any, judge_in: Judge, tmp_path: Path) -> None:
    own = world.copy(tmp_path / "store")
    own.build("split.eval_fraction=0.0", manifest="all")
    with pytest.raises(DataError, match="holds no sample out"):
        judge_in(tmp_path / "out", store=own.store, manifest="all")


def test_samples_that_an_expert_was_trained_on_are_left_out(world: Any, judge_in: Judge, tmp_path: Path) -> None:
    own = replace(world, store=shutil.copytree(world.store, tmp_path / "store"))
    own.build("split.eval_fraction=0.3", manifest="more")
    report = judge_in(tmp_path / "out", store=own.store, manifest="more")
    assert report.samples == len(choose_samples(open_manifest(own.store, "main")))
    assert any("held-out samples are left out" in note for note in report.notes)


# --- experts that are not what they should be ---


def made(folder: Path) -> Path:
    folder.mkdir()
    return folder


def edited(run: Path, to: Path, edit: Callable[[dict[str, Any]], None]) -> Path:
    """A run whose checkpoint says something else of itself and verifies."""
    import hashlib

    shutil.copytree(run, to)
    [step] = (to / "checkpoints").glob("step-*")
    card = json.loads((step / "expert.json").read_text())
    edit(card)
    data = json.dumps(card).encode()
    (step / "expert.json").write_bytes(data)
    sums = json.loads((step / "checksums.json").read_text())
    sums["expert.json"] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (step / "checksums.json").write_text(json.dumps(sums))
    return to


def narrowed(run: Path, to: Path, low: int, high: int = 1000) -> Path:
    return edited(run, to, lambda card: card["facts"].update(low=low, high=high))


def other(run: Path, to: Path) -> Path:
    return edited(run, to, lambda card: card["contract"].update(prediction_type="sample"))


def flipped(run: Path, to: Path) -> Path:
    shutil.copytree(run, to)
    [path] = (to / "checkpoints").glob("step-*/ema/*.safetensors")
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    return to
