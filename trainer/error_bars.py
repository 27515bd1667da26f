"""How far off an eval loss may be, for want of held-out samples: its standard error, and that of a difference.

    each draw's loss - mean of its stretch of 50 timesteps  ->  summed by sample  ->  spread of these sums

Draws are spread evenly over timesteps, so what differs between stretches is no chance; several draws of one sample are
not independent, so samples are what is counted (Liang and Zeger 1986, with the usual factors for few of them). Of a
difference both sides have the same draws: it is known far better than either side.
"""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence

from trainer.loss_bins import BIN

# (sample id, repetition) of a draw -> its timestep and its loss
Each = Mapping[tuple[str, int], tuple[int, float]]


def standard_error(terms: Sequence[tuple[float, Each]]) -> float | None:
    """Of a weighted sum of means, each over draws; None where there are too few draws to tell.

    A draw that is alone in its stretch differs from nothing, which is not certainty: no more than half may be so.
    """
    sums: dict[str, float] = defaultdict(float)
    draws = groups = 0
    alone = whole = 0.0
    for weight, each in terms:
        stretches: dict[int, list[tuple[str, float]]] = defaultdict(list)
        for (sample, _), (t, loss) in each.items():
            stretches[t // BIN].append((sample, loss))
        draws, groups, whole = draws + len(each), groups + len(stretches), whole + abs(weight)
        alone += abs(weight) * sum(len(own) == 1 for own in stretches.values()) / max(len(each), 1)
        for own in stretches.values():
            mean = sum(loss for _, loss in own) / len(own)
            for sample, loss in own:
                sums[sample] += weight * (loss - mean) / len(each)
    if len(sums) < 2 or draws <= groups or alone > whole / 2:
        return None
    few = len(sums) / (len(sums) - 1) * (draws - 1) / (draws - groups)
    return math.sqrt(few * sum(value * value for value in sums.values()))


def difference(one: Each, other: Each) -> Each:
    """Of the draws that both have: what the first loses more than the second."""
    return {key: (t, loss - other[key][1]) for key, (t, loss) in one.items() if key in other}


def mean(each: Each) -> float | None:
    """Over all draws; None where there is none."""
    return sum(loss for _, loss in each.values()) / len(each) if each else None


def between(each: Each, low: int, high: int) -> Each:
    """The draws at timesteps [low, high)."""
    return {key: one for key, one in each.items() if low <= one[0] < high}
