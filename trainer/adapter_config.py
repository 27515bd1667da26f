"""An adapter, as an expert's config asks for one: [adapter]."""

from typing import Literal

from pydantic import Field

from shared.config import Config
from shared.contract import AdapterFacts


class AdapterConfig(Config):
    """A low-rank update of some layers, trained in place of the UNet (Hu et al. 2021, arXiv:2106.09685)."""

    kind: Literal["lora", "dora"] = "lora"
    """"dora" learns a magnitude for each output beside the update (Liu et al. 2024, arXiv:2402.09353)."""
    rank: int = Field(16, ge=1)
    """Inner width of the update."""
    alpha: float | None = Field(None, gt=0)
    """The update is scaled by alpha / rank; unset: alpha is the rank, so that programs without alpha draw the same."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Share of a layer's inputs that its update does not see in training."""
    targets: tuple[str, ...] = Field(("attention",), min_length=1)
    """Layers that have one: linear and convolution layers that the presets of `trainable` or patterns name."""

    def facts(self) -> AdapterFacts:
        """What of it stands in expert.json."""
        alpha = float(self.rank if self.alpha is None else self.alpha)
        return AdapterFacts(kind=self.kind, rank=self.rank, alpha=alpha, targets=self.targets)
