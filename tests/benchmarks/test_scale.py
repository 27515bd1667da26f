"""The tables in docs/scale.md are what the arithmetic gives; a small form of the measurement holds what is promised."""

from pathlib import Path

import pytest

from benchmarks.scale import measure
from benchmarks.sizing import Costs, epoch_s, exchange_s, table_text

ROOT = Path(__file__).parents[2]


def test_the_tables_stand_in_the_document() -> None:
    assert table_text(Costs()) in (ROOT / "docs" / "scale.md").read_text()


def test_twice_the_gpus_of_one_machine_take_half_the_time_and_machines_cost_an_exchange() -> None:
    costs = Costs()
    assert epoch_s(costs, 1_000_000, 8) == pytest.approx(epoch_s(costs, 1_000_000, 4) / 2)
    assert exchange_s(costs, 8) == 0
    assert epoch_s(costs, 1_000_000, 64) > epoch_s(costs, 1_000_000, 8) / 8


@pytest.mark.slow
def test_a_hundred_thousand_rows_take_little_of_a_trainer(tmp_path: Path) -> None:
    found = measure(tmp_path, 100_000, 20_000)
    assert found["sealing"]["bytes"] / 100_000 < 200
    assert found["records"]["records"] == 20_000
    for reader in [*found["two readers, warm"], *found["two readers, cold"]]:
        assert reader["rows"] == 100_000
        assert reader["most_anonymous_mb"] < 40  # of which store and batches are most
        assert reader["first_batch_cpu_s"] < 2
