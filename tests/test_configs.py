"""The configurations that are shipped: they load, each pair tiles the schedule, and the recipe is the recipe."""

from pathlib import Path

import pytest

from cache_builder.config import BuildConfig
from cache_builder.serve_config import ServeConfig
from shared.config import dump_config, load_config
from shared.schedule import check_partition
from trainer.config import ExpertConfig

CONFIGS = Path(__file__).parents[1] / "configs"
PAIRS = [CONFIGS, CONFIGS / "ssd-1b", CONFIGS / "demo"]


def expert(folder: Path, name: str) -> ExpertConfig:
    return load_config(ExpertConfig, [folder / "expert.toml", folder / f"{name}.toml"])


@pytest.mark.parametrize("folder", PAIRS, ids=lambda folder: folder.name)
def test_a_pair_differs_in_name_and_range_only_and_tiles_the_schedule(folder: Path) -> None:
    base, refiner = expert(folder, "base"), expert(folder, "refiner")
    check_partition([base.range, refiner.range], base.schedule.num_timesteps)
    assert base.model_copy(update={"name": refiner.name, "timesteps": refiner.timesteps}) == refiner


def test_the_ssd_1b_recipe() -> None:
    base, refiner = (expert(CONFIGS / "ssd-1b", name) for name in ("base", "refiner"))
    assert (refiner.timesteps.high, base.timesteps.low) == (350, 350)
    assert base.schedule.prediction_type == "v_prediction"
    assert base.schedule.zero_terminal_snr
    assert base.schedule.timestep_spacing == "trailing"
    assert base.optimizer.learning_rate == 4e-7
    assert base.batch * base.accumulation == 8
    assert base.gradient_checkpointing


@pytest.mark.parametrize("file", sorted(CONFIGS.rglob("cache.toml")), ids=lambda file: file.parent.name)
def test_cache_configurations_load(file: Path) -> None:
    load_config(BuildConfig, [file])


def test_the_service_configuration_loads_and_stands_where_it_lies() -> None:
    config = load_config(ServeConfig, [CONFIGS / "serve.toml"])
    assert config.store == CONFIGS / "store"
    assert config.datasets[0].root == CONFIGS / "PICTURES"
    assert config.runs == (CONFIGS / "runs/base", CONFIGS / "runs/refiner")
    assert config.build == load_config(
        BuildConfig, sets=["images.resolution=1024", f"datasets=[{{id='pictures', root='{CONFIGS}/PICTURES'}}]"]
    )


def test_the_small_worlds_start_model_shares_its_experts_schedule() -> None:
    """A pair that goes on from it must not find another noise, another target or another last timestep."""
    start = load_config(ExpertConfig, [CONFIGS / "demo" / "start.toml"])
    assert start.schedule == expert(CONFIGS / "demo", "base").schedule
    assert (start.range.low, start.range.high) == (0, start.schedule.num_timesteps)


def test_no_configuration_is_left_untested() -> None:
    known = {"expert.toml", "base.toml", "refiner.toml", "cache.toml", "start.toml", "serve.toml"}
    assert {file.name for file in CONFIGS.rglob("*.toml")} == known
    assert {file.parent for file in CONFIGS.rglob("expert.toml")} == set(PAIRS)


def test_a_resolved_expert_reads_back(tmp_path: Path) -> None:
    config = expert(CONFIGS, "base")
    (tmp_path / "config.toml").write_text(dump_config(config))
    assert load_config(ExpertConfig, [tmp_path / "config.toml"]) == config
