"""Pictures of an evaluation: those that generate-images draws, by every choice; held-out ones beside their source."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from cache_builder.build import BuildOptions, build
from cache_builder.config import BuildConfig
from cache_builder.sources.folder import FolderSource
from demo.clip_score import clip_cosines
from demo.prompts import make_prompts
from shared.config import load_config
from shared.errors import ConfigError, ContractError, DataError
from shared.model_folder import resolve_clip
from tests.pictures import write_shapes
from trainer.clip_score import ClipScorer
from trainer.drawing import GenerateRequest
from trainer.ensemble import DrawSettings
from trainer.gallery import PictureWish
from trainer.generate import generate

Pair = tuple[Path, Path]
CLIP = Path(__file__).parents[2] / "demo" / "model" / "clip"
PROMPTS = ("a small solid red circle", "two shapes", "three shapes")
SETTINGS = DrawSettings(8, 2.0, None, "euler-a")
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("evaluation")


@pytest.fixture(scope="module")
def report(judge_in: Callable[..., Any], folder: Path) -> Any:
    wish = PictureWish(PROMPTS, SETTINGS, seed=3, held_out=2, batch=2, clip=CLIP)
    return judge_in(folder, draws=1, pictures=wish)


def pixels_of(path: Path) -> Any:
    with Image.open(path) as image:
        return np.array(image)


def test_the_pair_draws_what_generate_images_draws(report: Any, folder: Path, world: Any, pair: Pair) -> None:
    request = GenerateRequest(pair, world.model, PROMPTS, folder / "again", SETTINGS, seed=3, device="cpu")
    again = list(generate(request))
    drawn = report.rounds[0].choices[-1].pictures
    assert len(drawn) == len(again) == 3
    for path, other in zip(drawn, again, strict=True):
        assert np.abs(pixels_of(folder / path).astype(int) - pixels_of(other)).max() <= 1  # batches of 2 and of 1


def test_every_choice_draws_its_own_pictures(report: Any, folder: Path) -> None:
    seen = {pixels_of(folder / one.pictures[0]).tobytes() for one in report.rounds[0].choices}
    assert len(seen) == len(report.rounds[0].choices) == 4


def test_scores_are_those_of_the_pictures(report: Any, folder: Path) -> None:
    scorer = ClipScorer(CLIP)
    for one in report.rounds[0].choices:
        own = [
            scorer.score(pixels_of(folder / path), text, CPU) for path, text in zip(one.pictures, PROMPTS, strict=True)
        ]
        assert one.clip_each == pytest.approx(own)
        assert one.clip == pytest.approx(sum(own) / 3)
    assert len({one.clip for one in report.rounds[0].choices}) == 4


def test_the_small_clip_says_of_its_world_what_it_said_to_its_teacher() -> None:
    """Through the processor and the tokenizer in its folder, which press pictures in whole steps of 1/255."""
    scorer, prompts = ClipScorer(CLIP), make_prompts(2)
    pictures = [noise_picture(i) for i in range(len(prompts))]
    expected = clip_cosines(CLIP, [Image.fromarray(one) for one in pictures], prompts)
    found = [scorer.score(one, prompt, CPU) for one, prompt in zip(pictures, prompts, strict=True)]
    assert found == pytest.approx(expected, abs=0.3)
    assert len({round(score) for score in found}) > 2


def noise_picture(seed: int) -> Any:
    return np.random.default_rng(seed).integers(0, 256, (72, 56, 3), np.uint8)


class ForTorchmetrics:
    """A CLIP whose features are tensors, as transformers before 5 gave them: that is what torchmetrics takes."""

    def __init__(self) -> None:
        from transformers import CLIPModel

        self._model = CLIPModel.from_pretrained(CLIP, dtype=torch.float32).eval().requires_grad_(False)
        self.config = self._model.config

    def to(self, device: Any) -> "ForTorchmetrics":
        return self

    def get_image_features(self, pixels: Any) -> Any:
        return self._model.get_image_features(pixels).pooler_output

    def get_text_features(self, ids: Any, mask: Any) -> Any:
        return self._model.get_text_features(ids, mask).pooler_output


def test_scores_are_those_of_torchmetrics() -> None:
    from torchmetrics.functional import multimodal
    from transformers import AutoTokenizer, CLIPImageProcessorPil, CLIPProcessor

    processor = CLIPProcessor(CLIPImageProcessorPil.from_pretrained(CLIP), AutoTokenizer.from_pretrained(CLIP))
    model, scorer = ForTorchmetrics(), ClipScorer(CLIP)
    for i, prompt in enumerate(make_prompts(1)):
        pixels = torch.from_numpy(noise_picture(i)).permute(2, 0, 1)
        theirs = multimodal.clip_score(pixels, prompt, lambda: (model, processor))
        assert max(scorer.score(noise_picture(i), prompt, CPU), 0.0) == pytest.approx(float(theirs), abs=1e-4)


def test_held_out_pictures_stand_beside_what_both_made_of_them(report: Any, folder: Path, world: Any) -> None:
    [round_] = report.rounds
    assert len(round_.finished) == 2
    assert 0 < round_.finished_from < 350
    for one in round_.finished:
        assert one.dataset == "shapes"
        assert one.caption
        source, *made = (pixels_of(folder / path).astype(float) for path in (one.source, *(p for _, p in one.pictures)))
        assert [name for name, _ in one.pictures] == ["start model", "refiner"]
        assert all(picture.shape == source.shape for picture in made)
        assert not np.array_equal(*made)


def test_what_is_handed_over_is_estimated_at_the_last_step_above_the_boundary(report: Any) -> None:
    """Both estimates are of the same step; of real latents a trained base and a start model say different things."""
    start, base = report.rounds[0].handover
    assert (start.candidate, base.candidate) == ("start model", "base")
    assert start.timestep == base.timestep >= 350
    assert start.timestep - 125 < 350  # of 8 steps the next is below
    assert start.pictures == 2
    assert len({tuple(facts.mean) for one in (start, base) for facts in (one.drawn, one.real)}) == 4


def test_each_data_set_has_its_share(judge_in: Callable[..., Any], world: Any, tmp_path: Path) -> None:
    report = judge_in(tmp_path / "out", draws=1, pictures=PictureWish((), SETTINGS, held_out=1))
    assert [one.dataset for one in report.rounds[0].finished] == ["shapes"]
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count('<img src="data:image/jpeg;base64,') == 3


def test_of_two_data_sets_each_has_its_share(judge_in: Callable[..., Any], world: Any, tmp_path: Path) -> None:
    """Both finished beside themselves, each under its own name, by their own captions, in report and page."""
    own = world.copy(tmp_path / "store")
    write_shapes(tmp_path / "more", 40, seed=5)
    config = load_config(BuildConfig, [], ["images.resolution=64", "images.step=16", "split.eval_fraction=0.3"])
    folders = {"shapes": world.pictures, "more": tmp_path / "more"}
    sources = [FolderSource(path, name, config.captions, config.images.max_bytes) for name, path in folders.items()]
    build(sources, own.model, config, BuildOptions(own.store, "both", "cpu"))
    wish = PictureWish((), SETTINGS, held_out=2)
    report = judge_in(tmp_path / "out", draws=1, store=own.store, manifest="both", pictures=wish)
    finished = report.rounds[0].finished
    assert [one.dataset for one in finished] == ["more", "more", "shapes", "shapes"]
    assert len({one.name for one in finished}) == 4
    assert len({pixels_of(tmp_path / "out" / one.source).tobytes() for one in finished}) == 4
    captions = {name: {file.read_text() for file in path.rglob("*.txt")} for name, path in folders.items()}
    assert all(any(one.caption in text for text in captions[one.dataset]) for one in finished)
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.index("<h3>Data set more</h3>") < page.index("<h3>Data set shapes</h3>")
    assert page.count('<img src="data:image/jpeg;base64,') == 4 * 3


def test_a_lone_expert_is_helped_by_the_start_model(judge_in: Callable[..., Any], pair: Pair, tmp_path: Path) -> None:
    wish = PictureWish(PROMPTS[:1], SETTINGS, held_out=1)
    report = judge_in(tmp_path / "out", draws=1, experts=pair[:1], pictures=wish)
    assert [len(one.pictures) for one in report.rounds[0].choices] == [1, 1]
    assert [name for name, _ in report.rounds[0].finished[0].pictures] == ["start model"]


def test_what_is_no_clip_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no CLIP folder"):
        resolve_clip(str(tmp_path / "absent"))
    with pytest.raises(DataError, match=r"no config\.json in it"):
        ClipScorer(tmp_path)
    for name in ("config.json", "preprocessor_config.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((CLIP / name).read_bytes())
    with pytest.raises(DataError, match="cannot be loaded"):
        ClipScorer(tmp_path)


def test_what_cannot_be_drawn_is_refused_before_anything_is_measured(
    judge_in: Callable[..., Any], tmp_path: Path
) -> None:
    with pytest.raises(ContractError, match="1 steps never come to a timestep of"):
        judge_in(tmp_path / "out", draws=1, pictures=PictureWish(PROMPTS, DrawSettings(1)))
    with pytest.raises(ConfigError, match="known are"):
        judge_in(tmp_path / "out", draws=1, pictures=PictureWish(PROMPTS, DrawSettings(8, 2.0, None, "magic")))
    assert not (tmp_path / "out" / "report.json").exists()
