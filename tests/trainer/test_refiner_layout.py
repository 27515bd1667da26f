"""The stock refiner's layout trains from a store that was built with a base model: a slice of it is all it needs."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionXLImg2ImgPipeline
from safetensors.torch import load_file

from demo.tiny_model import POOLED_WIDTH, TEXT_WIDTHS, write_tiny_model
from shared.errors import ContractError
from shared.manifest import open_manifest
from shared.store import StoreReader
from trainer.bundle import BundleRequest, bundle
from trainer.checkpoint import open_expert
from trainer.data import BatchReader
from trainer.data_config import DataConfig
from trainer.drawing import GenerateRequest
from trainer.generate import generate
from trainer.loop import train_expert
from trainer.sampler import MicroBatch
from trainer.unet import ConditionedUnet, choose_layout, load_unet, read_unet_config
from trainer.view import view_of


@pytest.fixture(scope="module")
def refiner_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("refiner-model"), unet_layout="sdxl-refiner")


@pytest.fixture(scope="module")
def refiner_run(world: Any, refiner_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    run: Path = tmp_path_factory.mktemp("refiner-run") / "run"
    sets = ("steps=3", "loss.null_prompt=encoded", "loss.caption_dropout=0.5")
    assert train_expert(dataclasses.replace(world.request(run, *sets, expert="refiner"), model=refiner_model)) == 3
    return run


def test_its_card_holds_what_it_uses(world: Any, refiner_run: Path) -> None:
    card = open_expert(refiner_run).card
    assert card.facts.layout == "sdxl-refiner"
    assert card.facts.null_prompt == "encoded"
    assert set(card.contract.text_digests) == {"text_encoder_2", "tokenizer_2"}
    known = open_manifest(world.store, "main").settings.text_digests
    assert card.contract.text_digests == {part: known[part] for part in card.contract.text_digests}


def test_it_is_fed_the_last_columns_and_five_ids(world: Any, refiner_model: Path) -> None:
    manifest = open_manifest(world.store, "main")
    bucket = manifest.buckets("train")[0]
    with StoreReader(world.store) as store:
        reader = BatchReader(
            store,
            manifest,
            view_of(manifest, DataConfig()),
            captions="first",
            seed=0,
            pin_memory=False,
            on_corrupt=print,
        )
        batch = reader.read(MicroBatch(bucket.hw, tuple(bucket.rows[:2].tolist()), 0, 0))
    unet = load_unet(refiner_model / "unet", torch.device("cpu"))
    seen: dict[str, Any] = {}
    unet.register_forward_pre_hook(lambda module, args, kwargs: seen.update(kwargs), with_kwargs=True)
    x = torch.randn(batch.moments.mean.shape, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        out = ConditionedUnet(unet, "sdxl-refiner", TEXT_WIDTHS[1])(
            x, torch.tensor([3, 200]), batch.text, batch.time_ids, 6.5
        )
    assert out.shape == x.shape
    assert torch.isfinite(out).all()
    assert torch.equal(seen["encoder_hidden_states"], batch.text.prompt_embeds[..., TEXT_WIDTHS[0] :].float())
    added = seen["added_cond_kwargs"]
    assert torch.equal(added["text_embeds"], batch.text.pooled_prompt_embeds.float())
    assert added["text_embeds"].shape == (2, POOLED_WIDTH)
    assert torch.equal(added["time_ids"], torch.cat([batch.time_ids[:, :4], torch.full((2, 1), 6.5)], dim=1))


def test_the_layout_is_read_off_the_widths(world: Any, refiner_model: Path) -> None:
    for model, layout in ((world.model, "sdxl"), (refiner_model, "sdxl-refiner")):
        assert choose_layout(read_unet_config(model / "unet"), TEXT_WIDTHS, POOLED_WIDTH) == layout
        with pytest.raises(ContractError, match="they are of different models"):
            choose_layout(read_unet_config(model / "unet"), (48, 80), POOLED_WIDTH)


def test_it_draws_with_a_base_of_the_other_layout(
    world: Any, pair: tuple[Path, Path], refiner_run: Path, tmp_path: Path
) -> None:
    import numpy as np
    from PIL import Image

    from trainer.ensemble import DrawSettings

    def picture(refiner: Path, guidance: float) -> Any:
        request = GenerateRequest(
            (pair[0], refiner),
            world.model,
            ("a red circle",),
            tmp_path,
            DrawSettings(6, guidance),
            device="cpu",
            height=64,
            width=64,
        )
        return np.asarray(Image.open(next(iter(generate(request)))))

    mixed = picture(refiner_run, 5.0)
    assert mixed.shape == (64, 64, 3)
    assert mixed.std() > 0
    assert not np.array_equal(mixed, picture(pair[1], 5.0))
    assert picture(refiner_run, 1.0).std() > 0


def test_it_is_handed_over_as_a_single_file_behind_a_base(
    world: Any, refiner_run: Path, refiner_model: Path, pair: tuple[Path, Path], tmp_path: Path
) -> None:
    out = bundle(BundleRequest((pair[0], refiner_run), world.model, tmp_path / "out", "single-file", device="cpu"))
    stored = load_file(out / "stage_2.safetensors")
    assert {name.split(".")[0] for name in stored} == {"model", "first_stage_model", "conditioner", "v_pred", "ztsnr"}
    assert not any(name.startswith("conditioner.embedders.1.") for name in stored)
    loaded = StableDiffusionXLImg2ImgPipeline.from_single_file(
        str(out / "stage_2.safetensors"), config=str(out / "stage_2"), local_files_only=True
    )
    tower = {name.removeprefix("text_model."): t for name, t in loaded.text_encoder_2.state_dict().items()}
    known = load_file(refiner_model / "text_encoder_2" / "model.safetensors")
    assert tower.keys() == {name.removeprefix("text_model.") for name in known}
    assert all(torch.equal(tower[name.removeprefix("text_model.")], tensor) for name, tensor in known.items())
    checkpoint = open_expert(refiner_run)
    saved = checkpoint.weights(checkpoint.weights_folder().name)
    assert loaded.unet.state_dict().keys() == saved.keys()
    assert all(torch.equal(loaded.unet.state_dict()[name], tensor) for name, tensor in saved.items())
    nodes = json.loads((out / "workflow.json").read_text())
    scores = [nodes[f"stage_2_{sign}"]["inputs"]["ascore"] for sign in ("positive", "negative")]
    assert scores == [checkpoint.card.facts.aesthetic_score, checkpoint.card.facts.negative_aesthetic_score]
