"""Views: what an expert sees of a manifest, as its config says, and nothing encoded anew for it."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shared.config import load_config
from shared.errors import ConfigError
from shared.manifest import Manifest, open_manifest, seal_manifest
from shared.manifest_rows import ManifestRow, ManifestSettings, Variant
from trainer.data_config import DataConfig
from trainer.loop import train_expert
from trainer.sampler import Order
from trainer.view import describe_view, view_of

SIZES = [(600, 600), (512, 768), (1024, 1024), (300, 900)]
SETTINGS = {
    "vae_digest": "00",
    "scaling_factor": 0.13025,
    "latent_channels": 4,
    "downscale": 8,
    "latents": "moments",
    "text_digests": {},
    "text_widths": (8, 8),
    "pooled_width": 8,
    "text_chunks": 1,
    "null_text_key": "00" * 16,
    "zeros_for_empty_prompt": True,
    "datasets": ("photos", "scans"),
    "build": {},
    "meta": {"score": "float", "year": "int", "artist": "string", "tags": "strings", "good": "bool"},
}


def row(number: int) -> ManifestRow:
    """Sample `number`: everything about it follows from the number."""
    key = number.to_bytes(16, "big")
    size = SIZES[number % 4]
    meta: dict[str, Any] = {"score": number / 2, "artist": f"A{number % 3}", "tags": ("cat",) if number % 2 else ()}
    meta |= {"year": 2000 + number, "good": number % 5 == 0} if number != 7 else {}
    return ManifestRow(
        dataset="photos" if number < 16 else "scans",
        sample_id=key,
        path=f"{number}.png",
        image_digest=key * 2,
        original_hw=size,
        bucket_hw=(64, 64) if number % 4 < 2 else (64, 96),
        variants=(Variant(key, False, (0, 0), (64, 64)),),
        text_keys=tuple((100 * number + i).to_bytes(16, "big") for i in range(1 + number % 3)),
        split="eval" if number == 23 else "train",
        meta=meta,
    )


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    settings = ManifestSettings.model_validate(SETTINGS)
    return seal_manifest(tmp_path_factory.mktemp("store"), "main", settings, map(row, range(24)))


def config(*sets: str) -> DataConfig:
    return load_config(DataConfig, [], sets)


def seen(manifest: Manifest, *sets: str) -> dict[int, float]:
    """Numbers of the samples that are seen, and how often in an epoch."""
    found: Counter[int] = Counter()
    for pool in view_of(manifest, config(*sets)):
        weights = np.ones(len(pool.rows)) if pool.weights is None else pool.weights
        for one, weight in zip(manifest.rows(list(pool.rows)), weights, strict=True):
            assert one.bucket_hw == pool.hw
            found[int(one.path.removesuffix(".png"))] += weight
    return dict(found)


ALL = set(range(23))


@pytest.mark.parametrize(
    ("sets", "expected"),
    [
        ((), ALL),
        (("keep.datasets=['scans']",), ALL - set(range(16))),
        (("keep.short_side_px.min=600",), {n for n in ALL if n % 4 in (0, 2)}),
        (("keep.short_side_px.max=512",), {n for n in ALL if n % 4 in (1, 3)}),
        (("keep.area_px={min=360000, max=400000}",), {n for n in ALL if n % 4 in (0, 1)}),
        (("keep.aspect.min=1.2",), {n for n in ALL if n % 4 in (1, 3)}),
        (("keep.aspect={min=1.2, max=2}", "keep.datasets=['photos']"), {n for n in range(16) if n % 4 == 1}),
        (("keep.meta.score.min=4.5",), {n for n in ALL if n >= 9}),
        (("keep.meta.year={min=2003, max=2008}",), {3, 4, 5, 6, 8}),  # 7 has no year
        (("keep.meta.artist.one_of=['A0', 'A2']",), {n for n in ALL if n % 3 != 1}),
        (("keep.meta.artist.none_of=['A0']",), {n for n in ALL if n % 3}),
        (("keep.meta.tags.one_of=['cat', 'dog']",), {n for n in ALL if n % 2}),
        (("keep.meta.tags.none_of=['cat']",), {n for n in ALL if n % 2 == 0}),
        (("keep.meta.good.one_of=[true]",), {n for n in ALL if n % 5 == 0}),
        (("keep.meta.good.none_of=[true]",), {n for n in ALL if n % 5} - {7}),
        (("weights=[{where={datasets=['scans']}, weight=0}]",), set(range(16))),
    ],
)
def test_only_what_passes_every_rule_is_seen(manifest: Manifest, sets: tuple[str, ...], expected: set[int]) -> None:
    assert seen(manifest, *sets) == dict.fromkeys(expected, 1)


def test_weights_multiply_where_rules_overlap(manifest: Manifest) -> None:
    rules = "weights=[{where={datasets=['scans']}, weight=3}, {where={meta={tags={one_of=['cat']}}}, weight=0.5}]"
    expected = {n: (3.0 if n >= 16 else 1.0) * (0.5 if n % 2 else 1.0) for n in ALL}
    assert seen(manifest, rules) == expected


def test_all_captions_is_each_of_them_once_an_epoch(manifest: Manifest) -> None:
    pools = view_of(manifest, config("captions=all", "keep.meta.score.max=5"))
    order = Order(pools, 1, 0)
    drawn = [order[index] for index in range(order.epoch_start(1))]
    pairs = Counter((micro.rows[0], (micro.captions or ())[0]) for micro in drawn)
    rows = {index: manifest.rows([index])[0] for index, _ in pairs}
    assert set(pairs.values()) == {1}
    assert len(pairs) == sum(len(one.text_keys) for one in rows.values()) == sum(1 + n % 3 for n in range(11))


def test_people_are_told_how_much_is_seen(manifest: Manifest) -> None:
    assert describe_view(manifest, view_of(manifest, config())) == "23 samples"
    assert describe_view(manifest, view_of(manifest, config("keep.datasets=['photos']"))) == "16 of 23 samples"


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        (("keep.datasets=['photo']",), r"data.keep.datasets: .* no data set 'photo'; there is: photos"),
        (("keep.meta.scores.min=1",), r"data.keep.meta: .* no column 'scores'; there is: score"),
        (("keep.meta.artist.min=1",), r"data.keep.meta.artist: min and max are for numbers; the column holds string"),
        (("keep.meta.score.one_of=['high']",), r"data.keep.meta.score: the column holds float, which 'high' is not"),
        (("keep.meta.good.one_of=[1]",), r"the column holds bool, which 1 is not"),
        (("keep.short_side_px.min=601", "keep.aspect.min=2"), r"none of 23 samples: .* short_side_px 6, aspect 5"),
        (("weights=[{weight=0}]",), r"leaves none of 23 samples: every weight is 0"),
        (("weights=[{where={datasets=['x']}, weight=1}]",), r"data.weights.0.where.datasets"),
        (("keep.aspect={min=2, max=1}",), r"min 2 is above max 1"),
        (("keep.apsect.min=2",), r"unknown config key 'keep.apsect'; did you mean 'keep.aspect'"),
        (("weights=[{weight=-1}]",), r"greater than or equal to 0"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(manifest: Manifest, sets: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        view_of(manifest, config(*sets))
    assert "\n" not in str(error.value)


def test_an_expert_trains_on_its_view_and_goes_on_with_no_other(world: Any, tmp_path: Path, capfd: Any) -> None:
    half = ("data.keep.aspect.max=1.1", "data.captions=first", "data.weights=[{weight=1.5}]")
    train_expert(world.request(tmp_path / "run", "steps=2", *half))
    manifest = open_manifest(world.store, "main")
    expected = view_of(manifest, config(*(part.removeprefix("data.") for part in half)))
    assert 0 < sum(len(pool.rows) for pool in expected) < 43
    assert f"{sum(len(pool.rows) for pool in expected)} of 43 samples" in capfd.readouterr().err
    train_expert(world.request(tmp_path / "run", "steps=3", *half))
    with pytest.raises(ConfigError, match=r"is another run: data.keep.aspect.max was 1.1, is 1.2"):
        train_expert(world.request(tmp_path / "run", "steps=4", "data.keep.aspect.max=1.2", *half[1:]))
