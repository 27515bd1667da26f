"""What is handed over at a boundary, by an expert that ends there or by a model that goes on: does it look like data?

    run's newest checkpoint, held-out captions -> handover_of -> x_0 at the last step above B: of what it drew, of data
    both                                       -> drifts      -> how far apart, in mean, variance and spectrum

The estimate is `evaluate-experts`'s own (trainer.handover); here a model of the whole schedule gives one too.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from shared.schedule import TimestepRange
from shared.store import StoreReader
from trainer.bench import open_bench
from trainer.checkpoint import open_expert
from trainer.easel import Easel
from trainer.ensemble import DrawSettings
from trainer.gallery import PictureWish, open_gallery
from trainer.lineup import LineUp, Part, line_up

DRIFTS = ("mean", "variance", "power")


def handover_of(run: Path, model: Path, store: Path, boundary: int, pictures: int, out: Path, **drawing: Any) -> Any:
    """Of whoever answers just above the boundary: {"timestep", "pictures", "drawn", "real"}, as `HandOver` has them.

    `out` is for the VAE's preview only; `drawing` are DrawSettings.
    """
    checkpoint = open_expert(run)
    with StoreReader(store) as reader:
        bench = open_bench(store, reader, None, [checkpoint])
        line = _cut(line_up([checkpoint], model, None, bench.manifest.settings, is_whole=False), boundary)
        wish = PictureWish((), DrawSettings(**drawing), held_out=pictures, precision="fp32")
        gallery = open_gallery(wish, model, reader, out, bench, line, torch.device("cpu"))
        assert gallery is not None
        [found] = Easel(gallery, line, out).hand_over()
    return found.model_dump()


def drifts(found: Mapping[str, Any]) -> dict[str, float]:
    """How far what was drawn is from real latents, root mean square.

    "mean": over channels, in standard deviations of real latents. "variance": over channels, of the logarithm of the
    ratio. "power": the same over bands of spatial frequency that have any.
    """
    drawn, real = ({key: _floats(one[key]) for key in DRIFTS} for one in (found["drawn"], found["real"]))
    return {
        "mean": _rms((drawn["mean"] - real["mean"]) / np.sqrt(real["variance"])),
        "variance": _rms(np.log(drawn["variance"] / real["variance"])),
        "power": _rms(np.log(drawn["power"] / real["power"])),
    }


def _cut(line: LineUp, boundary: int) -> LineUp:
    """The trained one alone answers from the boundary up, whatever its range below."""
    trained = line.candidates[-1]
    below, above = TimestepRange(0, boundary), TimestepRange(boundary, line.contract.num_timesteps)
    own = trained.within(above)
    return replace(line, parts=(Part(below, trained.within(below), None), Part(above, own, None)))


def _floats(values: list[float | None]) -> np.ndarray[Any, np.dtype[np.float64]]:
    return np.asarray([np.nan if one is None else one for one in values])


def _rms(values: np.ndarray[Any, np.dtype[np.float64]]) -> float:
    return float(np.sqrt(np.nanmean(np.square(values))))
