"""How far an expert has moved from the model that it began with, layer by layer: |W - W_0| / |W_0|, Frobenius norms.

    the start model's UNet, an expert's -> layer_moves -> Move of each layer -> by_block, for people

Where a pair has moved little, one model made of both (`bundle-experts --merge`) loses little; where the two have moved
far, and apart, it does. Tensors are read one at a time.
"""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

from shared.tensor_file import LazyTensor, from_tensor, read_lazily, values_of
from shared.weights import find_weights
from trainer.adapter import load_adapter, merge_adapter
from trainer.lineup import Candidate
from trainer.unet import load_unet

BLOCK = re.compile(r"((?:down|up)_blocks\.\d+|mid_block)\.(attentions|resnets|downsamplers|upsamplers)")


@dataclass(frozen=True)
class Move:
    """One layer, or several together."""

    layer: str
    moved: float  # Frobenius norm of the difference
    start: float  # of the start model's weights

    @property
    def drift(self) -> float:
        """How far, as a share of where it began; infinite for weights that began at 0."""
        return self.moved / self.start if self.start else math.inf if self.moved else 0.0


def layer_moves(start: Candidate, expert: Candidate) -> list[Move] | None:
    """Of each layer of an expert's UNet (a weight and its bias together); None where the two are not alike."""
    before, after = read_lazily(find_weights(start.folder)), _tensors(expert)
    if before.keys() != after.keys() or any(before[name].shape != after[name].shape for name in before):
        return None
    squares: dict[str, tuple[float, float]] = {}
    for name, tensor in before.items():
        w_0, w = values_of(tensor).double(), values_of(after[name]).double()
        moved, whole = squares.get(layer := name.rpartition(".")[0], (0.0, 0.0))
        squares[layer] = (moved + float((w - w_0).square().sum()), whole + float(w_0.square().sum()))
    return [Move(layer, math.sqrt(moved), math.sqrt(whole)) for layer, (moved, whole) in squares.items()]


def by_block(moves: Iterable[Move]) -> list[Move]:
    """The same, the layers of a block's attentions, of its resnets and so on taken together."""
    squares: dict[str, tuple[float, float]] = {}
    for one in moves:
        found = BLOCK.match(one.layer)
        block = f"{found[1]} {found[2]}" if found else one.layer.partition(".")[0]
        moved, whole = squares.get(block, (0.0, 0.0))
        squares[block] = (moved + one.moved**2, whole + one.start**2)
    return [Move(block, math.sqrt(moved), math.sqrt(whole)) for block, (moved, whole) in squares.items()]


def _tensors(one: Candidate) -> Mapping[str, LazyTensor]:
    """The whole UNet that the candidate draws with; an adapter is added to the one that it stands on."""
    if one.checkpoint is None or one.facts.adapter is None:
        return read_lazily(find_weights(one.folder))
    folder = one.checkpoint.weights_folder()
    unet = load_unet(one.folder, torch.device("cpu"))
    load_adapter(unet, one.facts.adapter, "own", one.checkpoint.weights(folder.name))
    merge_adapter(unet)
    return {name: from_tensor(tensor) for name, tensor in unet.state_dict().items()}
