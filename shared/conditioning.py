"""What an SDXL UNet is told beside x_t and t: text embeds, and the sizes of micro-conditioning.

Layouts of the UNet's added conditioning (Podell et al. 2023, arXiv:2307.01952, section 2.2 and appendix):

    sdxl          prompt_embeds [n, d1 + d2]  time_ids [original_h, original_w, crop_top, crop_left, target_h, target_w]
    sdxl-refiner  prompt_embeds [n, d2]       time_ids [original_h, original_w, crop_top, crop_left, aesthetic_score]

The second is a slice of the first: the last d2 columns are the second text encoder's alone, and pooled is the same.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from shared.errors import DataError

if TYPE_CHECKING:  # torch is imported where a tensor is made: a build with nothing to encode reads this page too
    from torch import Tensor

Layout = Literal["sdxl", "sdxl-refiner"]

TEXT_LENGTH = 77  # tokens a CLIP text encoder reads at once; prompt_embeds are n = chunks * 77 rows


@dataclass(frozen=True)
class PromptEmbeds:
    """Embeds of prompts: prompt_embeds [B, n, d1 + d2] and pooled_prompt_embeds [B, p], or one prompt without B."""

    prompt_embeds: "Tensor"
    pooled_prompt_embeds: "Tensor"

    def __post_init__(self) -> None:
        if self.prompt_embeds.shape[-2] % TEXT_LENGTH:
            raise DataError(f"prompt_embeds have {self.prompt_embeds.shape[-2]} rows, not a multiple of {TEXT_LENGTH}")


@dataclass(frozen=True)
class MicroConditioning:
    """Where a training picture came from: true size, the crop that was cut, and the size of the cut; pixels, (h, w)."""

    original_hw: tuple[int, int]
    crop_top_left: tuple[int, int]
    target_hw: tuple[int, int]

    def ids(self) -> tuple[int, ...]:
        """The six ids in SDXL's order."""
        return *self.original_hw, *self.crop_top_left, *self.target_hw

    def time_ids(self) -> "Tensor":
        """The six ids, fp32 [6]; half precision would round sizes above 2048."""
        import torch

        return torch.tensor(self.ids(), dtype=torch.float32)


def layout_embeds(layout: Layout, prompt_embeds: "Tensor", refiner_width: int) -> "Tensor":
    """prompt_embeds as `layout` takes them: all columns, or for the stock refiner the last `refiner_width`."""
    return prompt_embeds if layout == "sdxl" else prompt_embeds[..., -refiner_width:]


def layout_time_ids(layout: Layout, time_ids: "Tensor", aesthetic_score: float) -> "Tensor":
    """time_ids fp32 [B, 6] as `layout` takes them: as they are, or [B, 5] with a score in place of the target size."""
    import torch

    if layout == "sdxl":
        return time_ids
    score = torch.full_like(time_ids[..., :1], aesthetic_score)
    return torch.cat([time_ids[..., :4], score], dim=-1)
