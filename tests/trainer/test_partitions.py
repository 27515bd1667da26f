"""Partitions: micro-batches are of one part each, and a machine that has its part trains what all of them would."""

import signal
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cache_builder.transfer.store_export import export_store
from cache_builder.transfer.store_import import import_store
from shared.errors import ConfigError, DataError
from shared.manifest import Manifest
from shared.parts import Part, covers
from tests.stores import row, write_store
from tests.trainer.together import SETS, Events, Start, assert_same_run, start_together
from trainer.data import BatchReader
from trainer.data_config import DataConfig
from trainer.loop import train_expert
from trainer.partitions import PartitionedOrder, own_micro_batches, own_places, partitions_read
from trainer.rehearsal import rehearse
from trainer.run import open_run
from trainer.sampler import MicroBatch, Order
from trainer.view import view_of

TWO = (*SETS, "partitions=2")
BATCH, SEED = 2, 5


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return write_store(tmp_path_factory.mktemp("store"), [row(index) for index in range(90)])


def order_of(manifest: Manifest, partitions: list[int], count: int) -> PartitionedOrder:
    pools = view_of(manifest, DataConfig(), partitions, count)
    return PartitionedOrder(pools, BATCH, SEED, partitions=partitions, count=count)


def first(order: PartitionedOrder | Order, count: int) -> list[MicroBatch]:
    return [order[index] for index in range(count)]


def test_micro_batch_m_reads_partition_m_mod_n_and_its_places_are_its_own(manifest: Manifest) -> None:
    heads, micros = manifest.sample_heads(), first(order_of(manifest, [0, 1, 2], 3), 90)
    for index, micro in enumerate(micros):
        assert micro.partition == index % 3
        assert Part(index % 3, 3).holds(heads[list(micro.rows)]).all()
    places = [place for micro in micros for place in micro.places()]
    assert len(set(places)) == len(places)
    assert len({micro.rows for micro in micros}) > 60  # and partitions are not shuffled alike


def test_a_partition_gives_the_same_whether_the_others_are_there_or_not(manifest: Manifest) -> None:
    micros, alone = first(order_of(manifest, [0, 1, 2], 3), 60), order_of(manifest, [1], 3)
    assert [alone[index] for index in range(1, 60, 3)] == micros[1::3]


def test_every_sample_comes_once_an_epoch_of_its_partition(manifest: Manifest) -> None:
    order, seen = order_of(manifest, [0, 1], 2), {0: [0] * len(manifest), 1: [0] * len(manifest)}
    for micro in first(order, 400):
        for one in micro.rows:
            seen[micro.partition][one] += 1
    (rows,) = (bucket.rows for bucket in manifest.buckets())
    for number, counts in seen.items():
        own = np.array(counts)[rows[Part(number, 2).holds(manifest.sample_heads(rows))]]
        assert sum(counts) == own.sum()
        assert own.max() - own.min() <= 1


def test_one_partition_is_the_order_as_it_was(manifest: Manifest) -> None:
    pools = view_of(manifest, DataConfig())
    assert first(PartitionedOrder(pools, BATCH, SEED), 90) == first(Order(pools, BATCH, SEED), 90)


@given(st.integers(1, 6), st.integers(1, 6), st.integers(1, 4))
def test_processes_share_a_step_and_each_reads_from_its_part(processes: int, partitions: int, times: int) -> None:
    accumulation = times * int(np.lcm(processes, partitions))
    own = [own_places(process, processes, accumulation, partitions) for process in range(processes)]
    assert sorted(place for places in own for place in places) == list(range(accumulation))
    for process, places in enumerate(own):
        assert len(places) == accumulation // processes
        assert list(islice(map(own_micro_batches(places, accumulation), range(99)), len(places))) == places
        read = [Part(number, partitions) for number in partitions_read(places, partitions)]
        if max(processes, partitions) % min(processes, partitions) == 0:
            whole = Part(process, processes) if partitions >= processes else read[0]
            assert all(covers([whole], part) for part in read)
            assert covers(read, Part(process, processes))


def test_without_partitions_a_process_takes_a_stretch_of_each_step() -> None:
    assert [own_places(process, 2, 4) for process in range(2)] == [[0, 1], [2, 3]]
    assert [own_places(process, 2, 4, 2) for process in range(2)] == [[0, 2], [1, 3]]
    with pytest.raises(ConfigError, match="accumulation 3 is not a multiple of 2 processes"):
        own_places(0, 2, 3)


def test_a_sample_that_is_corrupt_is_replaced_by_one_of_its_partition(manifest: Manifest) -> None:
    pools = view_of(manifest, DataConfig(), [0, 1], 2)
    reader = BatchReader(
        None,  # type: ignore[arg-type]
        manifest,
        pools,
        captions="first",
        seed=0,
        pin_memory=False,
        on_corrupt=print,
    )
    micro = first(order_of(manifest, [0, 1], 2), 2)[1]
    following = reader._next(micro, 0, micro.rows[0])
    assert Part(1, 2).holds(manifest.sample_heads(np.array([following]))).all()
    assert following != micro.rows[0]


def test_a_partition_without_samples_is_refused(manifest: Manifest) -> None:
    with pytest.raises(DataError, match=r"partition \d+/4096 holds no sample.*fewer partitions"):
        order_of(manifest, list(range(4096)), 4096)


def test_partitions_that_do_not_fit_a_step_are_refused(world: Any) -> None:
    with pytest.raises(ConfigError, match=r"accumulation 4 is not a multiple of partitions 3.*accumulation = 6"):
        world.config("accumulation=4", "partitions=3")


@pytest.fixture(scope="module")
def machines(world: Any, tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """The world on two machines: each with a store of its own that holds its part alone."""
    folder = tmp_path_factory.mktemp("machines")
    export_store(world.store, str(folder / "export"))
    for index in range(2):
        import_store(str(folder / "export"), folder / f"store{index}", part=Part(index, 2))
    return [replace(world, store=folder / f"store{index}") for index in range(2)]


@pytest.fixture(scope="module")
def whole(world: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three steps in one process that has everything."""
    torch.set_num_threads(1)
    run = tmp_path_factory.mktemp("whole") / "run"
    train_expert(world.request(run, *TWO, "steps=3"))
    return run


def test_two_machines_with_a_part_each_train_as_one_with_all(
    machines: list[Any], start: Start, events: Events, whole: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    commands = start_together(start, [one.arguments(run, *TWO, "steps=3") for one in machines])
    for command in commands:
        assert command.wait() == 0, command.errors()
    assert "partition 0/2" in " ".join(commands[0].errors())
    assert_same_run(run, whole, events)


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_machine_that_is_killed_costs_what_was_not_saved(
    machines: list[Any], world: Any, start: Start, events: Events, tmp_path: Path, victim: int
) -> None:
    sets = (*TWO, "checkpoint.every=2", "steps=12")
    train_expert(world.request(tmp_path / "whole", *sets))
    run = tmp_path / "run"
    train_expert(world.request(run, *sets[:-1], "steps=1"))  # begun by one that has everything
    for killed_after in (3, 7):
        commands = start_together(start, [one.arguments(run, *sets) for one in machines])
        commands[0].wait_for(lambda after=killed_after: len(events(run, "step")) >= after)  # type: ignore[misc]
        commands[victim].signal(signal.SIGKILL)
        codes = [command.wait() for command in commands]
        assert codes[victim] == -signal.SIGKILL
        assert codes[1 - victim] == 75
    for command in start_together(start, [one.arguments(run, *sets) for one in machines]):
        assert command.wait() == 0, command.errors()
    assert_same_run(run, tmp_path / "whole", events)


def test_a_store_without_what_a_process_reads_is_refused(machines: list[Any], tmp_path: Path) -> None:
    request = machines[0].request(tmp_path / "run", *TWO)
    with pytest.raises(ConfigError, match=r"only part 0/2 of .*reads partition 0/2, 1/2.*--partition 1/2"):
        open_run(request)
    with pytest.raises(ConfigError, match=r"--partition 2/4, then 3/4$"):
        open_run(machines[0].request(tmp_path / "run", "partitions=4", "accumulation=4"))
    assert not (tmp_path / "run").exists()
    open_run(request, [0]).close()
    with pytest.raises(ConfigError, match="partitions was 2, is 4"):
        open_run(machines[0].request(tmp_path / "run", *SETS, "partitions=4"), [0])


def test_two_stores_on_the_wrong_machines_are_refused_in_a_line(
    machines: list[Any], start: Start, tmp_path: Path
) -> None:
    commands = start_together(start, [one.arguments(tmp_path / "run", *TWO) for one in machines[::-1]])
    assert commands[0].wait() == 64
    assert commands[1].wait() == 75
    assert "this process reads partition 0/2: cache-store import --partition 0/2" in commands[0].errors()[-1]
    assert not (tmp_path / "run").exists()


def test_a_dry_run_makes_do_with_the_part_that_is_there(machines: list[Any], tmp_path: Path) -> None:
    report = rehearse(machines[1].request(tmp_path / "run", *TWO))
    assert 0 < report.samples < report.samples_in_manifest
    assert report.step_s is not None
