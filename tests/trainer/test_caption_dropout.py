"""What dropout takes of a batch, from whom, and how its share runs with t."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from shared.conditioning import PromptEmbeds
from shared.config import load_config
from shared.contract import NullPrompt
from shared.errors import ConfigError
from shared.manifest import open_manifest
from shared.schedule import NoiseSchedule, TimestepRange, scaled_linear_betas
from shared.store import StoreReader
from trainer.batch import Batch
from trainer.caption_dropout import DropoutByTimestep, drop_captions, dropout_shares, may_drop
from trainer.config import ExpertConfig, LossConfig
from trainer.data import BatchReader, read_null_text
from trainer.data_config import DataConfig
from trainer.loop import train_expert
from trainer.loss import DenoisingLoss
from trainer.sampler import Order
from trainer.view import view_of

CPU = torch.device("cpu")
REFINER = TimestepRange(0, 350)


def batches(world: Any, count: int, null: NullPrompt) -> tuple[list[Batch], PromptEmbeds | None]:
    """`count` batches of three, and the text that stands for no caption."""
    manifest = open_manifest(world.store, "main")
    pools = view_of(manifest, DataConfig())
    order = Order(pools, 3, 0)
    with StoreReader(world.store) as store:
        reader = BatchReader(
            store, manifest, pools, captions="random", seed=0, pin_memory=False, on_corrupt=lambda path, why: None
        )
        return [reader.read(order[i]) for i in range(count)], read_null_text(store, manifest, null, CPU)


@pytest.mark.parametrize("null", ["zeros", "encoded"])
def test_it_takes_the_caption_and_nothing_else(world: Any, null: NullPrompt) -> None:
    kept, null_text = batches(world, 60, null)
    dropped = [drop_captions(batch, torch.full((3,), 0.3), null_text, seed=0) for batch in kept]
    every = drop_captions(kept[0], torch.ones(3), null_text, seed=0)
    empty = torch.zeros_like(kept[0].text.prompt_embeds[0]) if null_text is None else null_text.prompt_embeds[0]
    assert (null_text is None) == (null == "zeros")
    assert null == "zeros" or empty.abs().sum() > 0
    assert all(torch.equal(row, empty) for row in every.text.prompt_embeds)
    count = 0
    for with_text, batch in zip(kept, dropped, strict=True):
        assert batch.time_ids is with_text.time_ids
        assert batch.moments is with_text.moments
        for i in range(3):
            is_null = torch.equal(batch.text.prompt_embeds[i], empty)
            assert is_null or torch.equal(batch.text.prompt_embeds[i], with_text.text.prompt_embeds[i])
            assert (batch.text.pooled_prompt_embeds[i].abs().sum() == 0) == (is_null and null == "zeros")
            count += is_null
    assert 0.2 < count / 180 < 0.4  # 3 deviations around 0.3 are +-0.1


def test_a_share_runs_from_the_first_timestep_to_the_last() -> None:
    shares = dropout_shares(DropoutByTimestep(low=0.3, high=0.05), REFINER)
    assert shares.tolist()[::349] == pytest.approx([0.3, 0.05])
    assert torch.allclose(shares.diff(), shares.diff()[0], atol=1e-6)
    assert dropout_shares(DropoutByTimestep.model_validate(0.2), REFINER).unique().tolist() == pytest.approx([0.2])


def test_who_is_dropped_at_a_share_is_dropped_at_every_larger_one(world: Any) -> None:
    whole, null_text = batches(world, 40, "zeros")

    def dropped(share: float) -> Tensor:
        of_batch = (drop_captions(batch, torch.full((3,), share), null_text, seed=3) for batch in whole)
        return torch.cat([batch.text.prompt_embeds.flatten(1).abs().sum(1) == 0 for batch in of_batch])

    fewer, more = dropped(0.2), dropped(0.6)
    assert 0 < fewer.sum() < more.sum() < 120
    assert bool((more | ~fewer).all())


@pytest.mark.parametrize("t", [0, 349])
def test_the_loss_drops_by_its_own_timesteps(world: Any, t: int) -> None:
    """All at its first timestep and none at its last: what the UNet is shown says which it was."""
    settings = LossConfig(caption_dropout=DropoutByTimestep(low=1, high=0))
    loss = DenoisingLoss(
        NoiseSchedule(scaled_linear_betas(1000, 0.00085, 0.012)), REFINER, "epsilon", 0.13, settings, seed=0
    )
    (batch,), _ = batches(world, 1, "zeros")
    shown: list[PromptEmbeds] = []

    def predict(x_t: Tensor, t: Tensor, text: PromptEmbeds, time_ids: Tensor) -> Tensor:
        shown.append(text)
        return x_t

    loss(predict, batch, torch.full((3,), t))
    is_kept = bool(shown[0].prompt_embeds.any())
    assert is_kept == (t == 349)
    loss.at(predict, batch, torch.zeros(3, dtype=torch.int64), loss.noise("eps", batch), loss.noise("posterior", batch))
    assert torch.equal(shown[1].prompt_embeds, batch.text.prompt_embeds)  # an evaluation drops nothing


def test_it_does_not_depend_on_the_micro_batch(world: Any) -> None:
    (whole,), _ = batches(world, 1, "zeros")
    shares = torch.tensor([0.5, 0.5, 0.5])
    alone = [
        drop_captions(
            replace(
                whole,
                moments=replace(whole.moments, mean=whole.moments.mean[i : i + 1]),
                text=PromptEmbeds(whole.text.prompt_embeds[i : i + 1], whole.text.pooled_prompt_embeds[i : i + 1]),
                time_ids=whole.time_ids[i : i + 1],
                places=whole.places[i : i + 1],
            ),
            shares[:1],
            None,
            seed=0,
        )
        for i in range(3)
    ]
    together = drop_captions(whole, shares, None, seed=0).text.prompt_embeds
    assert torch.equal(torch.cat([one.text.prompt_embeds for one in alone]), together)


def test_a_config_says_it_either_way(world: Any) -> None:
    base = ["name=x", "steps=1", "timesteps={low=0, high=350}"]
    number = load_config(ExpertConfig, [], [*base, "loss.caption_dropout=0.25"])
    table = load_config(ExpertConfig, [], [*base, "loss.caption_dropout={low=0.25, high=0.25}"])
    assert number == table
    for value in ("1.5", "{low=0.1}", "{low=-1, high=0}", "often"):
        with pytest.raises(ConfigError, match=r"^loss\.caption_dropout"):
            load_config(ExpertConfig, [], [*base, f"loss.caption_dropout={value}"])


def test_an_expert_trains_with_it(world: Any, tmp_path: Any) -> None:
    sets = ("steps=2", "loss.caption_dropout={low=0.3, high=0.05}")
    assert train_expert(world.request(tmp_path / "run", *sets)) == 2
    assert "high = 0.05" in (tmp_path / "run" / "config.toml").read_text()


def test_where_no_draw_is_below_the_largest_share_nothing_is_dropped(world: Any) -> None:
    kept, null_text = batches(world, 60, "zeros")
    spared = [batch for batch in kept if not may_drop(batch.places, 0.3, seed=0)]
    for batch in spared:
        left = drop_captions(batch, torch.full((3,), 0.3), null_text, seed=0)
        assert torch.equal(left.text.prompt_embeds, batch.text.prompt_embeds)
    others = [batch for batch in kept if may_drop(batch.places, 0.3, seed=0)]
    for batch in others:
        left = drop_captions(batch, torch.full((3,), 0.3), null_text, seed=0)
        assert not torch.equal(left.text.prompt_embeds, batch.text.prompt_embeds)
    assert min(len(spared), len(others)) > 5
    assert not any(may_drop(batch.places, 0.0, seed=0) for batch in kept)
