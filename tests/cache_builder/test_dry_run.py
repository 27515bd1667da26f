"""A dry run says what the build then does, ends as it would end, and leaves no trace."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import shared.scratch
from cache_builder import dry_run as dry
from cache_builder.build import BuildOptions, build
from cache_builder.config import BuildConfig
from cache_builder.datasets import choose_datasets, open_sources
from shared.amounts import duration_text
from shared.config import load_config
from shared.errors import ConfigError
from shared.store import StoreWriter
from tests.datasets import Item, write_parquet, write_tar
from tests.pictures import write_shapes

Build = Callable[..., Any]
SMALL = ["images.resolution=64", "images.step=16", "encode.batch=4", "captions.missing=skip", "max_quarantined=0.5"]
LONG = "a red circle " * 40


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Whatever can become of a picture, as a folder; some of it also as a table and as a shard."""
    place = tmp_path_factory.mktemp("place")
    folder = write_shapes(place / "set", 9)
    pictures = [path.read_bytes() for path in sorted(folder.glob("*.png"))]
    (folder / "shape-00001.png").write_bytes(pictures[1][:-60])  # only decoding tells
    (folder / "shape-00002.png").write_bytes(b"no picture")
    (folder / "shape-00003.txt").write_text(LONG)
    (folder / "shape-00004.txt").unlink()
    (folder / "twin.png").write_bytes(pictures[0])
    (folder / "twin.txt").write_text("another caption")
    Image.new("RGB", (20, 30), "red").save(folder / "little.png")
    (folder / "little.txt").write_text("little")
    items = [Item(f"{i}.png", data, [f"picture {i}"], {"score": i}) for i, data in enumerate(pictures)]
    write_parquet(place / "table.parquet", items[3:])
    write_tar(place / "shard.tar", items[6:])
    return place


def config_of(place: Path, *sets: str, roots: tuple[str, ...] = ("set",)) -> BuildConfig:
    datasets = ", ".join(f'{{id="{root}", root="{place / root}"}}' for root in roots)
    return choose_datasets(load_config(BuildConfig, sets=[*SMALL, *sets, f"datasets=[{datasets}]"]), None, None)


def foretell(config: BuildConfig, model: Path, store: Path, decode: bool = True, **options: Any) -> Any:
    how = dry.DryRunOptions(timing=options.pop("timing", False), decode=decode)
    return dry.dry_run(open_sources(config.datasets), model, config, BuildOptions(store, "main", "cpu", **options), how)


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below, but LMDB's table of readers."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != "lock.mdb"]
    return {str(path): path.read_bytes() for path in files}


WORLDS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "a folder": ((), ("set",)),
    "several data sets": ((), ("set", "table.parquet", "shard.tar")),
    "crops, mirrored": (("images.crop=random", "images.variants=2", "images.flip=force"), ("set", "shard.tar")),
    "rules that skip": (("images.skip={min_size=32, max_samples=4}", "captions.lines=first"), ("set",)),
    "means, two chunks": (("encode.latents=mean", "text.chunks=2"), ("set", "table.parquet")),
}


@pytest.mark.parametrize("name", WORLDS)
def test_its_numbers_are_what_the_build_then_does(name: str, place: Path, tmp_path: Path, tiny_model: Path) -> None:
    """Into an empty store, one that holds a part, and one that holds all."""
    sets, roots = WORLDS[name]
    store, prompts = tmp_path / "store", ("a prompt", LONG)
    for part, first in ((roots[-1:], True), (roots, False), (roots, False)):
        config = config_of(place, *sets, roots=part)
        report = foretell(config, tiny_model, store, prompts=prompts, replace=True, allow_shrink=True)
        assert store.exists() != first
        foreseen = report.as_json()
        assert (report.refusals, foreseen["decoded"]) == ([], foreseen["to_decode"])
        options = BuildOptions(store, "main", "cpu", prompts=prompts, replace=True, allow_shrink=True)
        before = (store / "data.mdb").stat().st_size if store.exists() else 0
        done = build(open_sources(config.datasets), tiny_model, config, options).as_json()
        told = foreseen.keys() & done.keys()
        assert len(told) == len(done) - 3  # which are held out, the digest and the time are not foreseen
        assert {key: foreseen[key] for key in told} == {key: done[key] for key in told}
        assert sum(bucket["samples"] for bucket in foreseen["buckets"]) == done["stored"] + done["reused"]
        assert sum(bucket["crops"] for bucket in foreseen["buckets"]) == done["crops"]
        assert sum(bucket["encoded_crops"] for bucket in foreseen["buckets"]) == done["encoded_crops"]
        grown = (store / "data.mdb").stat().st_size - before
        assert abs(foreseen["bytes_to_write"] - grown) <= 0.2 * grown + 100_000
    assert (foreseen["encoded_crops"], foreseen["encoded_captions"], foreseen["bytes_to_write"]) == (0, 0, 0)


def test_it_leaves_no_trace(place: Path, tmp_path: Path, tiny_model: Path) -> None:
    config, store = config_of(place), tmp_path / "store"
    report = foretell(config, tiny_model, store, decode=False, timing=True)
    assert list(tmp_path.iterdir()) == []
    assert report.timing.crops > 0
    assert report.timing.captions > 0
    assert 0 < report.timing.crop_s < report.needed_s
    build(open_sources(config.datasets), tiny_model, config, BuildOptions(store, "main", "cpu"))
    before = tree(tmp_path)
    again = foretell(config_of(place, "seed=3", "images.background=[0, 0, 0]"), tiny_model, store, timing=True)
    assert again.as_json()["encoded_crops"] > 0
    assert tree(tmp_path) == before
    assert foretell(config, tiny_model, store, timing=True).timing is None  # there is nothing to encode


def test_a_build_may_go_on_meanwhile(place: Path, tmp_path: Path, tiny_model: Path, commands: Any) -> None:
    """It reads beside a writer, and is no rival to one."""
    build = [place / "set", tmp_path / "store", tiny_model, "--dry-run", "--no-timing"]
    sets = [part for setting in SMALL for part in ("--set", setting)]
    with StoreWriter(tmp_path / "store"):
        done = commands.build(*build, *sets)
        assert (done.code, "--wait" in done.err) == (73, True)
        assert json.loads(done.out)["stored"] == 8
        assert commands.build(*build, *sets, "--wait").code == 0
    assert commands.build(*build, *sets).code == 0


def test_damage_that_only_decoding_tells(place: Path, tmp_path: Path, tiny_model: Path) -> None:
    known = [foretell(config_of(place), tiny_model, tmp_path / "s", decode=decode) for decode in (False, True)]
    assert [len(report.account.quarantined) for report in known] == [1, 2]
    assert "damage behind a header" in known[0].as_text()
    assert "damage behind a header" not in known[1].as_text()


def test_too_little_room(place: Path, tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dry, "free_bytes", lambda path: 4096)
    (refusal,) = foretell(config_of(place), tiny_model, tmp_path / "store").refusals
    assert (refusal.exit_code, "free some space" in str(refusal)) == (74, True)


def test_what_goes_again_needs_room_too_where_it_lies(
    place: Path, tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders: list[Path | None] = []
    open_scratch = shared.scratch.open_scratch
    monkeypatch.setattr(shared.scratch, "open_scratch", lambda folder: folders.append(folder) or open_scratch(folder))
    config, store = config_of(place), tmp_path / "store"
    report = foretell(config, tiny_model, store)
    assert set(folders) == {tmp_path}  # where the store will be
    needed = report.bytes_to_write + report.bytes_passing
    for free, codes in ((needed, []), (needed - 1, [74])):
        monkeypatch.setattr(dry, "free_bytes", lambda path, free=free: free)
        assert [refusal.exit_code for refusal in foretell(config, tiny_model, store).refusals] == codes
    folders.clear()
    build(open_sources(config.datasets), tiny_model, config, BuildOptions(store, "main", "cpu"))
    assert set(folders) == {store, store / "manifests" / "main"}


def lose_pictures(folder: Path) -> None:
    for path in sorted(folder.glob("*.png"))[2:]:
        path.unlink()


def damage_pictures(folder: Path) -> None:
    for path in folder.glob("*.png"):
        path.write_bytes(path.read_bytes()[:40])


def lose_captions(folder: Path) -> None:
    for path in folder.glob("*.txt"):
        path.unlink()


NOTHING: Callable[[Path], None] = lambda folder: None  # noqa: E731
REFUSED: dict[str, tuple[Callable[[Path], None], list[str], int]] = {
    "nothing": (NOTHING, [], 0),
    "fewer pictures": (lose_pictures, [], 65),
    "fewer, as is meant": (lose_pictures, ["--allow-shrink"], 0),
    "other data sets": (NOTHING, ["--dataset", "other"], 65),
    "other data sets, as is meant": (NOTHING, ["--dataset", "other", "--replace"], 0),
    "damaged pictures": (damage_pictures, [], 65),
    "no captions": (lose_captions, [], 65),
    "no pictures": (lambda folder: [path.unlink() for path in folder.iterdir()] and None, [], 65),
    "a name that cannot be": (NOTHING, ["--manifest", "../x"], 64),
}


@pytest.mark.parametrize("name", REFUSED)
def test_it_ends_as_the_build_would(name: str, tmp_path: Path, tiny_model: Path, commands: Any) -> None:
    change, more, code = REFUSED[name]
    folder, store = write_shapes(tmp_path / "set", 6), tmp_path / "store"
    assert commands.build(folder, store, tiny_model).code == 0
    change(folder)
    before = tree(tmp_path)
    foreseen = commands.build(folder, store, tiny_model, *more, "--dry-run", "--decode", "--no-timing")
    assert tree(tmp_path) == before
    done = commands.build(folder, store, tiny_model, *more)
    assert (foreseen.code, foreseen.errors) == (done.code, done.errors)
    assert done.code == code
    if code != 64:
        refusals = json.loads(foreseen.out)["refusals"]
        assert [refusal["code"] for refusal in refusals][:1] == ([code] if code else [])


def test_what_people_read(place: Path, tmp_path: Path, tiny_model: Path, commands: Any) -> None:
    folder = shutil.copytree(place / "set", tmp_path / "set")
    (folder / "forged\nmanifest main would be sealed.png").write_bytes(b"no picture")
    (folder / "forged\nmanifest main would be sealed.txt").write_text("x")
    sets = [part for setting in SMALL for part in ("--set", setting)]
    arguments = [folder, "--store", tmp_path / "store", "--model", tiny_model, "--device", "cpu", *sets, "--dry-run"]
    done = commands.run(*arguments)
    assert (done.code, done.errors) == (0, [])
    lines = done.out.splitlines()
    assert lines[0] == "dry run: nothing is written"
    assert lines[1].startswith("seen 12 = to encode 8 + stored already 0 + quarantined ")
    assert sum(line == "manifest main would be sealed" for line in lines) == 1
    for pattern in ("1 cut short", "enlarged 1, at most ", "buckets, height x width", "to write ", "will take"):
        assert pattern in done.out, pattern
    assert not (tmp_path / "store").exists()


def test_options_that_belong_together(place: Path, tmp_path: Path, tiny_model: Path, commands: Any) -> None:
    for option in ("--no-timing", "--decode"):
        done = commands.build(place / "set", tmp_path / "store", tiny_model, option)
        assert (done.code, "--dry-run" in done.err) == (ConfigError.exit_code, True)


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0 s"), (59, "59 s"), (3599, "1 h 0 min"), (12000, "3 h 20 min")])
def test_durations(seconds: float, text: str) -> None:
    assert duration_text(seconds) == text
