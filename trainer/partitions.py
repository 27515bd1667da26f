"""Partitions of a run: micro-batch m reads partition m mod n alone, so a machine needs its part of the store only.

    manifest -> parts 0/n ... (n-1)/n (shared/parts.py) -> an endless Order of each -> micro-batch m, of them in turns

Which process takes which micro-batch of an optimizer step: those of one partition after those of another, cut into
equal shares. So process r of P reads what lies in part r/P of the manifest, whatever n and P are, and of a machine with
several processes each reads from the machine's own part. What is drawn does not depend on who draws it.

A partition goes through its epochs by itself. Parts differ in length by about the square root of it, and so, by that
share, does how often a sample comes.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

from shared.errors import ConfigError, DataError
from shared.manifest import Manifest
from shared.parts import Part, covers
from shared.seeding import derive_seed
from trainer.sampler import MicroBatch, Order, Pool


class PartitionedOrder:
    """The endless sequence of micro-batches of a run, as far as `partitions` of `count` give it."""

    def __init__(
        self,
        pools: Sequence[Pool],
        batch: int,
        seed: int,
        first_epoch: int = 0,
        *,
        partitions: Sequence[int] = (0,),
        count: int = 1,
    ) -> None:
        """Raises DataError where one of the partitions has nothing to train on."""
        self._batch, self._count = batch, count
        of = {number: [pool for pool in pools if pool.partition == number] for number in partitions}
        for number, own in of.items():
            if count > 1 and not own:
                raise DataError(f"partition {number}/{count} holds no sample to train on: set fewer partitions")
        seeds = {number: seed if count == 1 else derive_seed(seed, "partition", number, count) for number in partitions}
        self._orders = {number: Order(own, batch, seeds[number], first_epoch) for number, own in of.items()}

    def __getitem__(self, index: int) -> MicroBatch:
        """Micro-batch `index`, counted from 0 over all partitions; places are counted over all of them too."""
        place, partition = divmod(index, self._count)
        micro = self._orders[partition][place]
        first_position = micro.first_position * self._count + partition * self._batch
        return replace(micro, first_position=first_position)

    def per_epoch(self, epochs: int) -> float:
        """Micro-batches of all partitions in an epoch, by the first `epochs` of those that are here."""
        starts = [order.epoch_start(epochs) for order in self._orders.values()]
        return sum(starts) / len(starts) / epochs * self._count


def own_places(process: int, processes: int, accumulation: int, partitions: int = 1) -> list[int]:
    """Which micro-batches of an optimizer step, counted from 0, are a process's own.

    Raises ConfigError where the processes cannot have equally many.
    """
    share, rest = divmod(accumulation, processes)
    if rest:
        raise ConfigError(
            f"accumulation {accumulation} is not a multiple of {processes} processes: it counts the micro-batches of "
            "an optimizer step over all processes, and each takes equally many"
        )
    by_partition = sorted(range(accumulation), key=lambda place: (place % partitions, place))
    return sorted(by_partition[process * share :][:share])


def own_micro_batches(own: Sequence[int], accumulation: int) -> Callable[[int], int]:
    """Which micro-batch of the order is a process's own number n, where it has the places `own` of each step."""
    return lambda n: n // len(own) * accumulation + own[n % len(own)]


def partitions_read(own: Sequence[int], partitions: int) -> list[int]:
    """The partitions that the places `own` of a step are of."""
    return sorted({place % partitions for place in own})


def partitions_held(manifest: Manifest, partitions: int) -> list[int]:
    """The partitions whose records are all in the store."""
    parts = manifest.parts or (Part(0, 1),)
    return [number for number in range(partitions) if covers(parts, Part(number, partitions))]


def require_partitions(manifest: Manifest, wanted: Sequence[int], partitions: int) -> None:
    """Raises ConfigError where the store lacks records of a partition that is wanted."""
    lacking = sorted(set(wanted) - set(partitions_held(manifest, partitions)))
    if not lacking:
        return
    store, held = manifest.path.parents[2], ", ".join(map(str, manifest.parts))
    if partitions == 1:
        way_out = "import the rest (cache-store import without --partition), or set partitions"
    else:
        reads = partitions_text(wanted, partitions)
        parts = ", then ".join(f"{number}/{partitions}" for number in lacking)
        way_out = f"this process reads {reads}: cache-store import --partition {parts}"
    raise ConfigError(f"{store} has only part {held} of manifest {manifest.name!r}; {way_out}")


def partitions_text(numbers: Sequence[int], partitions: int) -> str:
    """Some partitions, for people."""
    shown = ", ".join(f"{number}/{partitions}" for number in numbers[:4])
    return f"partition {shown}" + (f" and {len(numbers) - 4} more" if len(numbers) > 4 else "")
