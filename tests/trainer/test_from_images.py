"""Given pictures noised to the first timestep below B and drawn on: files, and what a store holds out."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from shared.errors import ConfigError, ContractError, DataError
from shared.manifest import open_manifest
from shared.sheet import Card
from trainer import generate as generate_module
from trainer.checkpoint import open_expert
from trainer.drawing import GenerateRequest, first_timestep
from trainer.ensemble import DrawSettings, plan_steps
from trainer.generate import generate

Pair = tuple[Path, Path]
Draw = Callable[..., list[Path]]


@pytest.fixture
def draw(pair: Pair, tiny_model: Path, tmp_path: Path) -> Draw:
    def drawn(**changes: Any) -> list[Path]:
        asked: dict[str, Any] = {"experts": pair, "model": tiny_model, "out": tmp_path / "out", "device": "cpu"}
        asked |= {"prompts": (), "settings": DrawSettings(30, 2.0, None, "euler")}
        return list(generate(GenerateRequest(**(asked | changes))))

    return drawn


@pytest.fixture
def pictures(world: Any, tmp_path: Path) -> Path:
    """Three pictures of the world, with their captions beside them."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for path in sorted(world.pictures.glob("*.png"))[:3]:
        shutil.copy(path, folder)
        shutil.copy(path.with_suffix(".txt"), folder)
    return folder


def facts_of(path: Path) -> dict[str, Any]:
    with Image.open(path) as image:
        facts: dict[str, Any] = json.loads(image.text["sdxl-experts"])  # type: ignore[attr-defined]
    return facts


def test_a_picture_follows_its_bytes_and_its_seed_alone(draw: Draw, pictures: Path, tmp_path: Path) -> None:
    for scheduler in ("unipc", "euler-a"):
        settings = DrawSettings(30, 2.0, None, scheduler)
        several = draw(from_images=pictures, seed=4, count=2, settings=settings)
        several.sort()
        assert [path.name for path in several] == [f"{i:03d}-seed-{seed}.png" for i in range(3) for seed in (4, 5)]
        last = sorted(pictures.glob("*.png"))[2]
        renamed = shutil.copy(last, tmp_path / f"{scheduler}.png")
        shutil.copy(last.with_suffix(".txt"), renamed.with_suffix(".txt"))
        alone = draw(from_images=renamed, seed=5, settings=settings, out=tmp_path / scheduler)
        assert np.array_equal(np.asarray(Image.open(alone[0])), np.asarray(Image.open(several[5])))
        assert len({path.read_bytes() for path in several}) == 6


def test_drawing_begins_at_the_first_step_below_the_boundary(
    draw: Draw, pictures: Path, pair: Pair, capfd: pytest.CaptureFixture[str]
) -> None:
    path = draw(from_images=pictures, limit=1, experts=pair[1:])[0]
    source = facts_of(path)["source"]
    assert (source["name"], round(source["timestep"])) == (sorted(pictures.glob("*.png"))[0].name, 332)
    assert "1 picture, each from t = 332 on in 10 evaluations" in capfd.readouterr().err


def test_the_refiner_alone_draws_what_the_pair_does(draw: Draw, pictures: Path, pair: Pair, tmp_path: Path) -> None:
    both = draw(from_images=pictures, limit=2)
    alone = draw(from_images=pictures, limit=2, experts=pair[1:], out=tmp_path / "alone")
    for one, other in zip(both, alone, strict=True):
        assert np.array_equal(np.asarray(Image.open(one)), np.asarray(Image.open(other)))


def test_less_noise_leaves_more_of_the_picture(draw: Draw, pictures: Path, tmp_path: Path) -> None:
    def distance(t: int) -> float:
        path = draw(from_images=pictures, limit=1, start_timestep=t, height=64, width=64, out=tmp_path / str(t))[0]
        nearest = draw(from_images=pictures, limit=1, start_timestep=0, height=64, width=64, out=tmp_path / "0",
                       settings=DrawSettings(1000, 1.0, None, "euler"))[0]  # fmt: skip
        return float(np.abs(np.asarray(Image.open(path), np.float32) - np.asarray(Image.open(nearest))).mean())

    assert distance(40) < distance(340) < distance(900)


def test_held_out_pictures_of_a_store(draw: Draw, world: Any, pair: Pair, tmp_path: Path) -> None:
    sheet = tmp_path / "sheet.png"
    paths = draw(from_images=world.store, experts=pair[1:], sheet=sheet, batch=2)
    manifest = open_manifest(world.store, "main")
    rows = [int(row) for bucket in manifest.buckets("eval") for row in bucket.rows]
    labels = {facts_of(path)["source"]["label"] for path in paths}
    assert labels == {sample.hex() for sample in manifest.sample_ids(rows)}
    sizes = {row.sample_id.hex(): row.bucket_hw for row in manifest.rows(rows)}
    for path in paths:
        with Image.open(path) as image:
            assert (image.height, image.width) == sizes[facts_of(path)["source"]["label"]]
        assert facts_of(path)["prompt"]
    with Image.open(sheet) as image:
        assert image.width > 2 * 256


def test_sizes_follow_the_picture(draw: Draw, tmp_path: Path) -> None:
    path = tmp_path / "wide.png"
    Image.fromarray(np.zeros((30, 120, 3), np.uint8)).save(path)
    with Image.open(draw(from_images=path, prompts=("x",))[0]) as image:
        assert (image.height, image.width) == (64, 256)  # the UNet's own 128 x 128 in area, multiples of 32
    with Image.open(draw(from_images=path, prompts=("x",), height=64, width=96, out=tmp_path / "b")[0]) as image:
        assert (image.height, image.width) == (64, 96)


def test_the_sheet_shows_the_source_beside_the_picture(
    draw: Draw, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: list[Card] = []
    monkeypatch.setattr(generate_module, "save_sheet", lambda path, cards, *_: shown.extend(cards))
    draw(from_images=pictures, sheet=tmp_path / "sheet.png", height=64, width=64)
    assert len(shown) == 3
    for card, path in zip(shown, sorted(pictures.glob("*.png")), strict=True):
        source = card.panels[0].pixels
        assert source is not None
        assert source.shape == (64, 64, 3)
        assert f"{path.name} from t = 332" in card.title
        assert card.caption == path.with_suffix(".txt").read_text().splitlines()[0]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (
            {"start_timestep": 400, "experts": 1},
            r"--start-timestep 400: no expert answers for it \(refiner \[0, 350\)\)",
        ),
        ({"start_timestep": 1000}, "--start-timestep 1000: no expert answers"),
        ({"start_timestep": 300, "experts": 0}, "--start-timestep 300: no expert answers"),
        ({"experts": 0}, r"say from which timestep on pictures are drawn: --start-timestep \(base \[350, 1000\)\)"),
        ({"prompts": ("a", "b")}, "2 prompts for 3 pictures"),
        ({"height": 60}, "--height 60: sizes are multiples of 8 pixels"),
        ({"from_images": None, "start_timestep": 3, "prompts": ("a",)}, "give --from-images"),
    ],
)
def test_what_cannot_be_begun_with_is_said(
    draw: Draw, pictures: Path, pair: Pair, tmp_path: Path, changes: dict[str, Any], says: str
) -> None:
    if "experts" in changes:
        changes = changes | {"experts": [pair[changes["experts"]]]}
    with pytest.raises(ConfigError, match=says):
        draw(**({"from_images": pictures} | changes))
    assert not (tmp_path / "out").exists()


def test_places_without_pictures_are_said(draw: Draw, tmp_path: Path, pictures: Path, world: Any) -> None:
    with pytest.raises(ConfigError, match="no picture, folder or store is there"):
        draw(from_images=tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="no pictures in it"):
        draw(from_images=tmp_path / "empty")
    with pytest.raises(ConfigError, match="--height and --width: what a store holds has its own size"):
        draw(from_images=world.store, height=64)
    next(iter(sorted(pictures.glob("*.txt")))).unlink()
    with pytest.raises(ConfigError, match="has no caption beside it"):
        draw(from_images=pictures)


def test_a_store_that_holds_nothing_out_is_said(draw: Draw, world: Any, tmp_path: Path, pictures: Path) -> None:
    copy = world.copy(tmp_path / "store")
    copy.build("split.eval_fraction=0", pictures=pictures, manifest="all")
    with pytest.raises(DataError, match=r"manifest 'all' of .* holds no picture out"):
        draw(from_images=copy.store, manifest="all")


def test_latents_of_another_vae_are_refused(draw: Draw, world: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = open_manifest(world.store, "main")
    opened.settings = opened.settings.model_copy(update={"vae_digest": "00"})
    monkeypatch.setattr("trainer.sources.open_manifest", lambda store, name: opened)
    with pytest.raises(ContractError, match="of another VAE"):
        draw(from_images=world.store)


def test_damaged_and_hostile_pictures_cost_themselves(
    draw: Draw, pictures: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    first = sorted(pictures.glob("*.png"))[0]
    whole = first.read_bytes()
    (pictures / "a-head.png").write_bytes(b"no picture")
    (pictures / "a-link.png").symlink_to(first)
    Image.new("1", (9_000, 9_000)).save(pictures / "b-bomb.png")
    (pictures / "c-tail.png").write_bytes(whole[: len(whole) * 2 // 3])
    with pytest.raises(DataError, match="3 of 6 pictures could not be begun with; the others are drawn"):
        draw(from_images=pictures, prompts=("x",), height=64, width=64)
    said = capfd.readouterr().err
    assert "passed over: " + str(pictures / "a-head.png") in said
    assert "b-bomb.png: 9000 x 9000 px, more than 64000000 pixels" in said
    assert "passed over: c-tail.png: " in said
    assert len(list((tmp_path / "out").glob("*.png"))) == 3
    only = tmp_path / "only"
    only.mkdir()
    shutil.copy(pictures / "a-head.png", only)
    with pytest.raises(DataError, match="no picture in it can be read"):
        draw(from_images=only, prompts=("x",))


def test_a_missing_record_costs_its_picture(
    draw: Draw, world: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from shared.store import StoreWriter
    from trainer.eval_samples import choose_samples

    copy = world.copy(tmp_path / "store")
    sample = choose_samples(open_manifest(copy.store, "main"))[0]
    with StoreWriter(copy.store) as store:
        store.delete_many([bytes.fromhex(sample.latent_key)])
    with pytest.raises(DataError, match="could not be begun with"):
        draw(from_images=copy.store)
    assert (
        f"passed over: {sample.sample_id[:12]}: record {sample.latent_key} is not in the store"
        in capfd.readouterr().err
    )


def test_noise_is_the_labels(draw: Draw) -> None:
    from shared.conditioning import MicroConditioning
    from trainer.drawing import Drawing
    from trainer.sources import Source

    def noise(label: bytes, seed: int, name: str = "n") -> torch.Tensor:
        sizes = MicroConditioning((64, 64), (0, 0), (64, 64))
        source = Source(name, label, (64, 64), sizes, None, lambda vae: (_ for _ in ()).throw(AssertionError))
        return torch.randn(4, generator=Drawing(name, ("x",), seed, (64, 64), sizes, source).generator())

    assert torch.equal(noise(b"a", 0), noise(b"a", 0, "other"))
    assert not torch.equal(noise(b"a", 0), noise(b"b", 0))
    assert not torch.equal(noise(b"a", 0), noise(b"a", 1))


def test_the_boundary_itself_is_the_bases(pair: Pair, tmp_path: Path) -> None:
    """A thousand steps come to t = 350 too; so does a start that is asked for."""
    cards = [open_expert(run).card for run in pair]
    facts, contract = [card.facts for card in cards], cards[0].contract

    def first(start: int | None) -> tuple[float, int]:
        request = GenerateRequest(pair, tmp_path, (), tmp_path, from_images=tmp_path, start_timestep=start)
        from_t = first_timestep(request, facts, contract)
        _, t, who = plan_steps(facts, contract, DrawSettings(1000, 1.0), from_t)[0]
        return t, who

    assert first(None) == (349, 1)
    assert first(350) == (350, 0)
    assert first(349) == (349, 1)
