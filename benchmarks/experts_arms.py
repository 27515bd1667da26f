"""What is compared: one model over all timesteps against experts that share them, at equal optimizer steps in all.

Every arm begins with the same model, and draws a picture with as many evaluations of a UNet of the same size.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace

T = 1000
KINDS = {  # what is trained, as settings of train-expert
    "full": ("optimizer.name=adamw",),
    "lora": ("adapter.rank=16", "adapter.alpha=16", "optimizer.name=adamw"),
}
RATES = {"full": 2e-4, "lora": 2e-3}  # of learning, at first; the best for the one model beginning with demo/model
PREDICTIONS = {
    "v": (),  # as the start model's: v-prediction, zero-terminal SNR
    "epsilon": ("schedule.prediction_type=epsilon", "schedule.zero_terminal_snr=false"),
}
# The same pair with something of its own in one expert or in both: (of the high-noise expert, of the low-noise one).
VARIATIONS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "refiner sees plain grounds alone": ((), ('data.keep={meta={ground={one_of=["plain"]}}}',)),
    "refiner reads the full caption alone": ((), ("data.captions=first",)),
    "refiner drops 3 captions of 10": ((), ("loss.caption_dropout=0.3",)),
    "dropout 0.05 at high noise, 0.3 at low": (
        ("loss.caption_dropout={low=0.17, high=0.05}",),
        ("loss.caption_dropout={low=0.3, high=0.17}",),
    ),
    "exposure 0.1": ((), ("loss.exposure.share=0.1",)),
}


@dataclass(frozen=True)
class Run:
    """One `train-expert`: its range [low, high), optimizer steps and seed, and how it differs from the plain one."""

    low: int
    high: int
    steps: int
    seed: int
    kind: str = "full"
    sets: tuple[str, ...] = ()
    label: str = ""
    partner: str = ""  # name of the run that hands over to it, done before it begins; for loss.exposure

    @property
    def name(self) -> str:
        """Of its folder; equal runs of several arms are trained once."""
        return "-".join(
            filter(None, (self.kind, f"{self.low}-{self.high}", str(self.steps), self.label, f"s{self.seed}"))
        )


@dataclass(frozen=True)
class Arm:
    """Runs that tile the schedule, low noise first; none is the start model itself."""

    name: str
    runs: tuple[Run, ...]


def arms(total: int, boundaries: Sequence[int], seed: int, kind: str = "full") -> Iterator[Arm]:
    """The one, and for each boundary a pair whose steps go by their share of the schedule, and one of equal halves."""
    yield Arm("one", (Run(0, T, total, seed, kind),))
    for boundary in boundaries:
        low_steps = round(total * boundary / T)
        yield Arm(f"pair {boundary}", _pair(boundary, low_steps, total - low_steps, seed, kind))
        if 2 * low_steps != total:
            yield Arm(f"halves {boundary}", _pair(boundary, total // 2, total - total // 2, seed, kind))


def variations(total: int, boundary: int, seed: int, names: Collection[str] = tuple(VARIATIONS)) -> Iterator[Arm]:
    """The pair of that boundary in each of these variations."""
    low_steps = round(total * boundary / T)
    low, high = _pair(boundary, low_steps, total - low_steps, seed, "full")
    for number, (name, (of_high, of_low)) in enumerate(VARIATIONS.items(), 1):
        if name not in names:
            continue
        met = high.name if any(one.startswith("loss.exposure") for one in of_low) else ""
        changed = [
            replace(run, sets=sets, label=f"v{number}", partner=partner) if sets else run
            for run, sets, partner in ((low, of_low, met), (high, of_high, ""))
        ]
        yield Arm(f"pair {boundary}, {name}", tuple(changed))


def _pair(boundary: int, low_steps: int, high_steps: int, seed: int, kind: str) -> tuple[Run, Run]:
    return Run(0, boundary, low_steps, seed, kind), Run(boundary, T, high_steps, seed, kind)
