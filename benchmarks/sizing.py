"""What 1 M, 10 M and 100 M pictures take, reckoned from unit costs: the tables of docs/scale.md.

`measured` costs were taken with this project's benchmarks on two cores of an AMD EPYC; `given` ones are of GPUs
that were not there, or of hardware as it is sold. Everything else is multiplication.
"""

from dataclasses import dataclass

PICTURES = (1_000_000, 10_000_000, 100_000_000)
GPUS = (1, 8, 64, 512)
GPUS_PER_MACHINE = 8


@dataclass(frozen=True)
class Costs:
    """Unit costs at 1024 px, moments, one crop and one caption a picture."""

    sample_bytes: float = 574.3 * 1024  # measured: benchmarks.store_size, in data.mdb
    row_bytes: float = 157.1  # measured: benchmarks.scale, of the manifest's file
    seal_row_s: float = 24e-6  # measured: benchmarks.scale, processor time
    trainer_row_bytes: float = 5.8  # measured: benchmarks.scale, of a partition
    decode_s: float = 0.040  # measured: benchmarks.cache_encode, processor time of a JPEG of 1.7 MP
    import_bytes_per_s: float = 330e6  # measured: benchmarks.transfer, about one core
    encode_per_s: float = 69.0  # given: one H200 at 34 % of its peak, the VAE's encoder
    train_per_s: float = 27.0  # given: one H200 at 34 % of its peak, SSD-1B forward and backward
    gradient_bytes: float = 4 * 1.3e9  # given: SSD-1B in fp32
    link_bytes_per_s: float = 50e9  # given: 400 Gbit/s between machines
    step_samples_per_gpu: int = 32  # given: what a GPU computes between two exchanges


def hours(seconds: float) -> str:
    """Hours; days from three days on, and less where it is a matter of minutes."""
    if seconds >= 72 * 3600:
        return f"{seconds / 86400:.0f} d"
    if seconds >= 3600:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 60:.0f} min" if seconds >= 100 else f"{seconds:.0f} s"


def size(amount: float) -> str:
    """Bytes, in the unit that shows them."""
    for unit in ("B", "KB", "MB", "GB"):
        if amount < 1000:
            return f"{amount:.3g} {unit}"
        amount /= 1000
    return f"{amount:.3g} TB"


def exchange_s(costs: Costs, gpus: int) -> float:
    """Time of one exchange of gradients in a ring between machines; within one it hides behind the backward pass."""
    machines = -(-gpus // GPUS_PER_MACHINE)
    return 2 * (machines - 1) / machines * costs.gradient_bytes / costs.link_bytes_per_s


def epoch_s(costs: Costs, pictures: int, gpus: int) -> float:
    """One epoch of each of two experts: half of the GPUs each, or one after the other on one."""
    own = max(1, gpus // 2)
    step_s = costs.step_samples_per_gpu / costs.train_per_s + exchange_s(costs, own)
    steps = pictures / (own * costs.step_samples_per_gpu)
    return steps * step_s * (2 if gpus == 1 else 1)


def by_pictures(costs: Costs) -> list[list[str]]:
    """What does not depend on how many GPUs there are."""
    rows = {
        "store on disk": lambda n: size(n * costs.sample_bytes),
        "a part of 8": lambda n: size(n * costs.sample_bytes / 8),
        "a part of 64": lambda n: size(n * costs.sample_bytes / 64),
        "encoding, of one GPU": lambda n: hours(n / costs.encode_per_s),
        "decoding, of one core": lambda n: hours(n * costs.decode_s),
        "import of the whole by one machine": lambda n: hours(n * costs.sample_bytes / costs.import_bytes_per_s),
        "import of a part of 64": lambda n: hours(n * costs.sample_bytes / 64 / costs.import_bytes_per_s),
        "one epoch of both experts, of one GPU": lambda n: hours(epoch_s(costs, n, 1)),
        "manifest on disk": lambda n: size(n * costs.row_bytes),
        "sealing it": lambda n: hours(n * costs.seal_row_s),
        "memory of a trainer that reads all": lambda n: size(n * costs.trainer_row_bytes),
        "memory of one that reads a part of 64": lambda n: size(n * costs.trainer_row_bytes / 64),
    }
    return [["", *map(count, PICTURES)], *([name, *map(of, PICTURES)] for name, of in rows.items())]


def by_gpus(costs: Costs) -> list[list[str]]:
    """Encoder-hours and training-hours by the clock, and what stands between the GPUs and them."""
    table = [["", *(f"{gpus} GPU{'s' * (gpus > 1)}" for gpus in GPUS)]]
    for pictures in PICTURES:
        table.append([f"encoding {count(pictures)}", *(hours(pictures / costs.encode_per_s / g) for g in GPUS)])
    for pictures in PICTURES:
        table.append([f"an epoch of both, {count(pictures)}", *(hours(epoch_s(costs, pictures, g)) for g in GPUS)])
    written = costs.encode_per_s * costs.sample_bytes
    table.append(["encoders give, to be written", *(f"{size(written * g)}/s" for g in GPUS)])
    table.append(["cores that decode for them", *(f"{costs.encode_per_s * costs.decode_s * g:.0f}" for g in GPUS)])
    table.append(["store read by all, an epoch at full speed", *(reading(costs, g) for g in GPUS)])
    table.append(["exchange of gradients, of a step", *(share(costs, g) for g in GPUS)])
    return table


def reading(costs: Costs, gpus: int) -> str:
    """Bytes that trainers on `gpus` read from their stores each second."""
    return f"{size(costs.train_per_s * costs.sample_bytes * gpus)}/s"


def share(costs: Costs, gpus: int) -> str:
    """The share of a step that an exchange takes where nothing hides it."""
    took = exchange_s(costs, max(1, gpus // 2))
    return f"{100 * took / (took + costs.step_samples_per_gpu / costs.train_per_s):.0f} %"


def count(pictures: int) -> str:
    """1 M, 10 M, ..."""
    return f"{pictures // 1_000_000} M"


def table_text(costs: Costs) -> str:
    """Both tables, in Markdown."""
    return "\n\n".join(
        "\n".join(f"| {' | '.join(cells)} |" for cells in [rows[0], ["---"] * len(rows[0]), *rows[1:]])
        for rows in (by_pictures(costs), by_gpus(costs))
    )
