"""Layouts: what SDXL's UNet and the stock refiner's are told, against the pipelines that tell them."""

import pytest
import torch
from diffusers import StableDiffusionXLImg2ImgPipeline, StableDiffusionXLPipeline
from hypothesis import given
from hypothesis import strategies as st

from shared.conditioning import MicroConditioning, PromptEmbeds, layout_embeds, layout_time_ids
from shared.errors import DataError

D1, D2 = 768, 1280


def test_refiner_takes_the_second_towers_columns() -> None:
    first, second = torch.randn(2, 77, D1), torch.randn(2, 77, D2)
    embeds = torch.cat([first, second], dim=-1)
    assert torch.equal(layout_embeds("sdxl-refiner", embeds, D2), second)
    assert layout_embeds("sdxl", embeds, D2) is embeds


def test_time_ids_stand_in_sdxls_order() -> None:
    ids = MicroConditioning(original_hw=(1, 2), crop_top_left=(3, 4), target_hw=(5, 6)).time_ids()
    assert ids.tolist() == [1, 2, 3, 4, 5, 6]
    pipeline_ids = StableDiffusionXLPipeline._get_add_time_ids
    stub = _Told(addition_time_embed_dim=256, in_features=6 * 256 + 1280)
    theirs = pipeline_ids(stub, (1, 2), (3, 4), (5, 6), torch.float32, text_encoder_projection_dim=1280)
    assert torch.equal(theirs[0], ids)


def test_refiner_ids_are_those_of_its_pipeline() -> None:
    ids = MicroConditioning((1, 2), (3, 4), (5, 6)).time_ids()[None]
    stub = _Told(addition_time_embed_dim=256, in_features=5 * 256 + 1280, requires_aesthetics_score=True)
    positive, negative = StableDiffusionXLImg2ImgPipeline._get_add_time_ids(
        stub, (1, 2), (3, 4), (5, 6), 6.0, 2.5, (1, 2), (3, 4), (5, 6), torch.float32, 1280
    )
    assert torch.equal(layout_time_ids("sdxl-refiner", ids, 6.0), positive)
    assert torch.equal(layout_time_ids("sdxl-refiner", ids, 2.5), negative)
    assert layout_time_ids("sdxl", ids, 6.0) is ids


@given(st.lists(st.integers(0, 2**24), min_size=6, max_size=6))
def test_sizes_are_exact_above_2048(sizes: list[int]) -> None:
    """Half precision has 11 bits: 2049 would be told as 2048."""
    ids = MicroConditioning((sizes[0], sizes[1]), (sizes[2], sizes[3]), (sizes[4], sizes[5])).time_ids()
    assert ids.dtype == torch.float32
    assert ids.long().tolist() == sizes


@pytest.mark.parametrize("rows", [1, 76, 78, 153])
def test_embeds_come_in_whole_stretches(rows: int) -> None:
    with pytest.raises(DataError, match=f"{rows} rows"):
        PromptEmbeds(torch.zeros(1, rows, 8), torch.zeros(1, 4))


@pytest.mark.parametrize("shape", [(77, 8), (2, 154, 8)])
def test_embeds_of_any_number_of_stretches_are_taken(shape: tuple[int, ...]) -> None:
    assert PromptEmbeds(torch.zeros(shape), torch.zeros(4)).prompt_embeds.shape == shape


class _Told:
    """The few settings that the pipelines' id functions read."""

    def __init__(self, addition_time_embed_dim: int, in_features: int, **config: object) -> None:
        linear = type("Linear", (), {"in_features": in_features})()
        embedding = type("Embedding", (), {"linear_1": linear})()
        unet_config = type("Config", (), {"addition_time_embed_dim": addition_time_embed_dim})()
        self.unet = type("Unet", (), {"config": unet_config, "add_embedding": embedding})()
        self.config = type("Config", (), config)()
