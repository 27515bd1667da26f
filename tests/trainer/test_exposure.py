"""Hand-over exposure: what a sample becomes that the partner hands over, which samples do, and that a run goes on."""

import hashlib
import json
import math
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from shared.conditioning import PromptEmbeds
from shared.config import load_config
from shared.contract import ExposureFacts
from shared.errors import CheckpointError, ConfigError, ContractError
from shared.latents import LatentMoments
from shared.schedule import NoiseSchedule, PredictionType, TimestepRange, scaled_linear_betas
from trainer.batch import Batch
from trainer.checkpoint import open_expert
from trainer.config import ExpertConfig, LossConfig
from trainer.exposure import Exposure
from trainer.loop import train_expert
from trainer.loss import DenoisingLoss
from trainer.partner import Partner
from trainer.processes import Processes
from trainer.rehearsal import rehearse

CPU = torch.device("cpu")
REFINER = TimestepRange(0, 350)
KINDS: list[PredictionType] = ["epsilon", "v_prediction", "sample"]
COUNT = 64
PLACES = [(2, position) for position in range(COUNT)]
GENERATOR = torch.Generator().manual_seed(0)
X_0, EPS = torch.randn(2, COUNT, 4, 3, 3, generator=GENERATOR)
T = torch.arange(350 - COUNT, 350)


class Knowing(nn.Module):
    """A partner that knows x_0 of every sample, told by its time_ids, and errs by `error`."""

    def __init__(self, schedule: NoiseSchedule, kind: PredictionType, error: float = 0.0) -> None:
        super().__init__()
        self.schedule, self.kind, self.error = schedule, kind, error
        self.x_0 = nn.Parameter(X_0.clone())
        self.asked: list[tuple[int, int]] = []
        self.captions: list[float] = []

    def forward(self, x: Tensor, t: Tensor, text: PromptEmbeds, time_ids: Tensor) -> Tensor:
        assert not torch.is_grad_enabled()
        index = time_ids[:, 0].long()
        self.asked += zip(index.tolist(), t.tolist(), strict=True)
        self.captions += text.pooled_prompt_embeds[:, 0].tolist()
        x_0 = self.x_0[index] + self.error
        alpha, sigma = (table(t).view(-1, 1, 1, 1) for table in (self.schedule.alpha, self.schedule.sigma))
        eps = (x - alpha * x_0) / sigma
        return {"epsilon": eps, "v_prediction": alpha * eps - sigma * x_0, "sample": x_0}[self.kind]


class Shown(nn.Module):
    """An expert that answers zeros and remembers what it was shown."""

    def forward(self, x: Tensor, t: Tensor, text: PromptEmbeds, time_ids: Tensor) -> Tensor:
        self.x, self.captions = x, text.pooled_prompt_embeds[:, 0]
        return torch.zeros_like(x)


def schedule_of(kind: PredictionType) -> NoiseSchedule:
    return NoiseSchedule(scaled_linear_betas(1000, 0.00085, 0.012), zero_terminal_snr=kind != "epsilon")


def exposure_of(partner: Knowing, chance: float = 1.0, reach: int = 100) -> Exposure:
    return Exposure(partner, partner.schedule, partner.kind, REFINER, reach, chance, seed=1)


def batch_of(indices: list[int]) -> Batch:
    ids = torch.tensor([[float(i), 0, 0, 0, 0, 0] for i in indices])
    text = PromptEmbeds(torch.ones(len(indices), 77, 2), torch.ones(len(indices), 2))
    return Batch(LatentMoments(X_0[indices], None), text, ids, [PLACES[i] for i in indices])


def loss_of(kind: PredictionType, expose: Exposure | None, **settings: Any) -> DenoisingLoss:
    plain = {"caption_dropout": 0.0} | settings
    return DenoisingLoss(schedule_of(kind), REFINER, kind, 1.0, LossConfig(**plain), 1, None, expose)


EVERY = list(range(COUNT))


@pytest.mark.parametrize("kind", KINDS)
def test_a_partner_that_errs_in_nothing_hands_over_the_noised_truth(kind: PredictionType) -> None:
    partner = Knowing(schedule_of(kind), kind)
    handed, truth = Shown(), Shown()
    losses = loss_of(kind, exposure_of(partner))(handed, batch_of(EVERY), T)
    expected = loss_of(kind, None)(truth, batch_of(EVERY), T)
    assert len(partner.asked) == COUNT
    torch.testing.assert_close(handed.x, truth.x, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        losses, expected, rtol=1e-4, atol=1e-5
    )  # zeros are answered: this is the target's square
    eps = exposure_of(partner)(batch_of(EVERY), X_0, EPS, T)
    torch.testing.assert_close(eps, EPS, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_a_partner_that_errs_by_hand(kind: PredictionType) -> None:
    """x^ = x_0 + 0.3: its eps^ from x_t', the step to t, and the noise from there to the true x_0, one by one."""
    partner = Knowing(schedule_of(kind), kind, error=0.3)
    eps = exposure_of(partner)(batch_of(EVERY), X_0, EPS, T)
    abar = partner.schedule.abar
    for i, above in partner.asked:
        a, s = math.sqrt(abar[above]), math.sqrt(1 - abar[above])
        alpha, sigma = math.sqrt(abar[T[i]]), math.sqrt(1 - abar[T[i]])
        x_0, own = X_0[i].double(), EPS[i].double()
        eps_hat = (a * x_0 + s * own - a * (x_0 + 0.3)) / s
        x_t = alpha * (x_0 + 0.3) + sigma * eps_hat
        torch.testing.assert_close(eps[i].double(), (x_t - alpha * x_0) / sigma, rtol=1e-3, atol=1e-4)
        shown = partner.schedule.add_noise(X_0[i : i + 1], eps[i : i + 1], T[i : i + 1])[0]
        torch.testing.assert_close(shown.double(), x_t, rtol=1e-3, atol=1e-4)
        target = {"epsilon": eps[i], "v_prediction": alpha * eps[i] - sigma * X_0[i], "sample": X_0[i]}[kind].double()
        back = {  # the target says the true x_0 where the expert stands
            "epsilon": (x_t - sigma * target) / alpha,
            "v_prediction": alpha * x_t - sigma * target,
            "sample": target,
        }[kind]
        torch.testing.assert_close(back, x_0, rtol=1e-3, atol=1e-3)


def test_its_share_of_samples_near_the_edge_and_none_elsewhere() -> None:
    partner = Knowing(schedule_of("v_prediction"), "v_prediction")
    expose = exposure_of(partner, chance=0.35, reach=100)  # of [0, 350): a share of 0.1
    places = [(0, i) for i in range(20_000)]
    t = torch.randint(0, 350, (20_000,), generator=torch.Generator().manual_seed(1))
    chosen = expose.is_chosen(places, t)
    assert set(t[chosen].tolist()) == set(range(250, 350))
    assert 0.093 < chosen.float().mean() < 0.107  # three deviations
    begin = expose.begin(places)
    assert sorted(set(begin.tolist())) == list(range(350, 450))
    assert abs(float(begin.double().mean()) - 399.5) < 1
    assert torch.equal(expose.is_chosen(places[:7], t[:7]), chosen[:7])
    assert not torch.equal(replace(expose, seed=2).is_chosen(places, t), chosen)
    assert not expose.is_chosen(places, t + 350).any()  # they are the partner's


def test_others_keep_their_noise_and_company_changes_nothing() -> None:
    partner = Knowing(schedule_of("v_prediction"), "v_prediction", error=0.3)
    expose = exposure_of(partner, chance=0.5)
    eps = expose(batch_of(EVERY), X_0, EPS, T)
    chosen = expose.is_chosen(PLACES, T)
    assert 0 < int(chosen.sum()) < COUNT
    assert torch.equal(eps[~chosen], EPS[~chosen])
    assert not torch.isclose(eps[chosen], EPS[chosen]).any(dim=0).all()
    assert len(partner.asked) == int(chosen.sum())
    for i in range(8):
        assert torch.equal(expose(batch_of([i]), X_0[[i]], EPS[[i]], T[[i]]), eps[[i]])
    assert expose(batch_of([0]), X_0[[0]], EPS[[0]], torch.tensor([10])) is not None
    assert torch.equal(expose(batch_of([0]), X_0[[0]], EPS[[0]], torch.tensor([10])), EPS[[0]])


def test_the_partner_reads_captions_that_the_expert_does_without() -> None:
    partner, expert = Knowing(schedule_of("epsilon"), "epsilon"), Shown()
    loss_of("epsilon", exposure_of(partner), caption_dropout=1.0)(expert, batch_of(EVERY), T)
    assert set(expert.captions.tolist()) == {0.0}
    assert set(partner.captions) == {1.0}


def test_what_training_adds_to_the_noise_is_in_what_the_partner_meets_or_on_top() -> None:
    partner, handed, truth = Knowing(schedule_of("epsilon"), "epsilon"), Shown(), Shown()
    added = {"offset_noise": 0.5, "input_perturbation": 0.2}
    losses = loss_of("epsilon", exposure_of(partner), **added)(handed, batch_of(EVERY), T)
    torch.testing.assert_close(
        losses, loss_of("epsilon", None, **added)(truth, batch_of(EVERY), T), rtol=1e-4, atol=1e-5
    )
    torch.testing.assert_close(handed.x, truth.x, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("sets", "why"),
    [
        (("timesteps={low=350, high=1000}",), "loss.exposure: drawing begins in [350, 1000), nobody hands over to it"),
        (("loss.exposure.reach=351",), "loss.exposure.reach 351 is more than the 350 timesteps of [0, 350)"),
        (
            ("loss.exposure.share=0.3",),
            "share 0.3 is more than the 0.286 of samples that are drawn within 100 timesteps",
        ),
        (("loss.timestep_bias={strategy='earlier', multiplier=20}",), "is more than the 0.0495"),
        (("loss.exposure.shares=0.3",), "did you mean 'loss.exposure.share'?"),
    ],
)
def test_what_cannot_be_is_refused_in_a_line(sets: tuple[str, ...], why: str) -> None:
    common = ["name=x", "steps=1", "timesteps={low=0, high=350}", "loss.exposure.share=0.1"]
    with pytest.raises(ConfigError) as error:
        load_config(ExpertConfig, [], [*common, *sets])
    assert why in str(error.value)
    assert "\n" not in str(error.value)


# --- runs ---

SETS = ("steps=4", "batch=4", "checkpoint.every=2", "loss.exposure={share=0.5, reach=300}", "eval.samples=0")


def exposed(world: Any, output: Path, partner: Path | None, *sets: str, expert: str = "refiner") -> Any:
    return replace(world.request(output, *SETS, *sets, expert=expert), partner=partner)


def step_dir(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step:08d}"


@pytest.fixture(scope="module")
def base(world: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base with checkpoints at steps 1, 2 and 3; tests must not write into it."""
    torch.set_num_threads(1)
    run = tmp_path_factory.mktemp("partner") / "base"
    train_expert(world.request(run, "steps=3", "batch=1", "checkpoint.every=1", "eval.samples=0"))
    return run


@pytest.fixture(scope="module")
def unbroken(world: Any, base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    run = tmp_path_factory.mktemp("exposed") / "run"
    train_expert(exposed(world, run, base))
    return run


def test_with_a_share_of_nothing_it_is_the_run_without(
    world: Any, unbroken: Path, files_of: Callable[..., Any], tmp_path: Path
) -> None:
    sets = [one for one in SETS if "exposure" not in one]
    train_expert(world.request(tmp_path / "plain", *sets, expert="refiner"))
    train_expert(world.request(tmp_path / "none", *sets, "loss.exposure={share=0, reach=7}", expert="refiner"))
    plain, none, own = (files_of(run, 4) for run in (tmp_path / "plain", tmp_path / "none", unbroken))
    weights = ("unet/diffusion_pytorch_model.safetensors", "optimizer.safetensors", "state.json", "expert.json")
    assert [none[name] for name in weights] == [plain[name] for name in weights]
    assert own[weights[0]] != plain[weights[0]]
    assert "partner" not in (step_dir(tmp_path / "plain", 4) / "state.json").read_text()


def test_it_goes_on_bit_for_bit(world: Any, base: Path, unbroken: Path, files_of: Any, tmp_path: Path) -> None:
    for steps in ("steps=3", "steps=4"):
        train_expert(exposed(world, tmp_path / "run", base, steps))
    assert files_of(tmp_path / "run", 4) == files_of(unbroken, 4)


@pytest.mark.slow
def test_killed_it_goes_on_bit_for_bit(
    world: Any, base: Path, unbroken: Path, start: Callable[..., Any], events: Any, files_of: Any, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    arguments = [*world.arguments(run, *SETS, expert="refiner"), "--partner", str(base)]
    command = start("train-expert", arguments)
    command.wait_for(lambda: bool(events(run, "step")) and events(run, "step")[-1]["step"] >= 3)
    command.signal(signal.SIGKILL)
    assert command.wait() == -signal.SIGKILL
    train_expert(exposed(world, run, base))
    assert files_of(run, 4) == files_of(unbroken, 4)
    met = [(event["step"], event["partner"], event["partner_step"]) for event in events(run, "partner")]
    assert met == [(0, "base", 3), (2, "base", 3)]


def test_a_newer_partner_is_met_from_a_log_point_on_and_told(
    world: Any, base: Path, files_of: Any, events: Any, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """One that moves on in the middle is asked from there; going on takes the one that was asked, while it is there."""
    partner = shutil.copytree(base, tmp_path / "base")
    for step in (2, 3):
        step_dir(partner, step).rename(tmp_path / f"later-{step}")
    run = tmp_path / "run"
    train_expert(exposed(world, run, partner, "steps=2"))
    (tmp_path / "later-2").rename(step_dir(partner, 2))
    shutil.copytree(run, tmp_path / "gone")
    train_expert(exposed(world, run, partner))  # step 1 as before, step 2 from the log point after its first step on
    met = [(event["step"], event["partner_step"]) for event in events(run, "partner")]
    assert met == [(0, 1), (2, 1), (3, 2)]
    assert json.loads((step_dir(run, 4) / "state.json").read_text())["partner_step"] == 2
    assert "bit for bit" not in capfd.readouterr().err

    (tmp_path / "later-3").rename(step_dir(partner, 3))
    shutil.rmtree(step_dir(partner, 1))
    train_expert(exposed(world, tmp_path / "gone", partner))
    assert "no longer holds step 1 as it was asked before: going on with step 3, not bit for" in capfd.readouterr().err
    assert files_of(tmp_path / "gone", 4) != files_of(run, 4)


def test_a_damaged_newer_partner_is_passed_over_once(
    world: Any, base: Path, events: Any, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    partner = shutil.copytree(base, tmp_path / "base")
    loaded = Partner(partner, open_expert(step_dir(partner, 2)), world.model, 64, CPU, torch.float32)
    (step_dir(partner, 3) / "state.json").write_text("{}")
    alone = Processes(0, 1, CPU)
    assert loaded.renew(alone) == loaded.renew(alone) == 0
    assert loaded.step == 2
    assert capfd.readouterr().err.count("passed over") == 1
    fields = loaded.fields()
    shutil.rmtree(step_dir(partner, 2))  # as a run does with its older ones
    assert loaded.fields() == fields


def test_a_renewed_partner_predicts_as_one_that_was_loaded(world: Any, base: Path) -> None:
    renewed, fresh = (
        Partner(base, open_expert(step_dir(base, step)), world.model, 64, CPU, torch.float32) for step in (1, 3)
    )
    text = PromptEmbeds(torch.ones(2, 77, 96), torch.ones(2, 48))
    given = (torch.ones(2, 4, 8, 8), torch.tensor([400, 900]), text, torch.ones(2, 6))
    with torch.no_grad():
        assert not torch.equal(renewed.predict(*given), fresh.predict(*given))
        assert renewed.renew(Processes(0, 1, CPU)) > 0
        assert torch.equal(renewed.predict(*given), fresh.predict(*given))
    assert renewed.fields() == fresh.fields()
    assert fresh.renew(Processes(0, 1, CPU)) == 0


def test_what_does_not_hand_over_is_refused_and_nothing_is_begun(
    world: Any, base: Path, unbroken: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    refused: list[tuple[Path | None, tuple[str, ...], type[Exception], str]] = [
        (None, (), ConfigError, r"loss.exposure.share = 0.5 needs --partner RUN"),
        (base, ("loss.exposure.share=0",), ConfigError, "--partner is there to be met for a share of the samples"),
        (tmp_path / "nobody", (), CheckpointError, "no run folder"),
        (
            unbroken,
            (),
            ContractError,
            r"--partner 'refiner' answers for \[0, 350\): one that hands over to \[0, 350\) b",
        ),
        (base, ("schedule.prediction_type=sample",), ContractError, r"--partner: experts .* differ in prediction_type"),
        (base, ("timesteps={low=0, high=500}",), ContractError, "begins at 500"),
    ]
    for partner, sets, kind, why in refused:
        for do in (train_expert, rehearse):
            with pytest.raises(kind, match=why):
                do(exposed(world, run, partner, *sets))
    assert not run.exists()


def test_a_run_that_does_not_say_whom_it_asked_is_not_gone_on_with(world: Any, base: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train_expert(exposed(world, run, base, "steps=1"))
    state = step_dir(run, 1) / "state.json"
    content = json.loads(state.read_text())
    del content["partner_sha256"]
    state.write_text(json.dumps(content))
    sums = json.loads((step_dir(run, 1) / "checksums.json").read_text())
    sums["state.json"] = {"bytes": state.stat().st_size, "sha256": hashlib.sha256(state.read_bytes()).hexdigest()}
    (step_dir(run, 1) / "checksums.json").write_text(json.dumps(sums))
    with pytest.raises(CheckpointError, match="does not say which checkpoint of the partner it asked"):
        train_expert(exposed(world, run, base))


def test_it_is_recorded_and_counted(world: Any, base: Path, unbroken: Path, events: Any, tmp_path: Path) -> None:
    assert open_expert(unbroken).card.facts.exposure == ExposureFacts(share=0.5, reach=300, partner="base")
    card = (step_dir(unbroken, 4) / "README.md").read_text()
    assert "exposure: 0.5 of its samples, within 300 timesteps of the edge, came from predictions of `base`" in card
    assert any(
        "takes 58.3% of the samples in [50, 350) from the partner" in e["why"] for e in events(unbroken, "advice")
    )
    told = rehearse(exposed(world, tmp_path / "run", base))
    plain = rehearse(world.request(tmp_path / "run", "batch=4", expert="refiner"), with_timing=False)
    weights = (step_dir(base, 3) / "ema" / "diffusion_pytorch_model.safetensors").stat().st_size
    assert told.partner_bytes == pytest.approx(weights, rel=0.1)
    assert told.memory_bytes == plain.memory_bytes + told.partner_bytes
    assert any(line.startswith("partner      ") for line in told.lines())
    assert told.step_s
    assert not any(line.startswith("partner") for line in plain.lines())


def test_an_adapter_may_be_the_partner(world: Any, events: Any, tmp_path: Path) -> None:
    lora = tmp_path / "lora"
    adapter = ("adapter.rank=2", "steps=1", "batch=1", "checkpoint.every=1", "eval.samples=0")
    train_expert(world.request(lora, *adapter))
    run = tmp_path / "run"
    train_expert(exposed(world, run, lora, "steps=1", "batch=2"))
    loaded = Partner(lora, open_expert(lora), world.model, 64, CPU, torch.float32)
    train_expert(world.request(lora, *adapter, "steps=2"))
    assert loaded.renew(Processes(0, 1, CPU)) > 0
    fresh = Partner(lora, open_expert(lora), world.model, 64, CPU, torch.float32)
    text = PromptEmbeds(torch.ones(1, 77, 96), torch.ones(1, 48))
    given = (torch.ones(1, 4, 8, 8), torch.tensor([400]), text, torch.ones(1, 6))
    with torch.no_grad():
        assert torch.equal(loaded.predict(*given), fresh.predict(*given))
    assert rehearse(exposed(world, tmp_path / "new", lora), with_timing=False).partner_bytes > 0
