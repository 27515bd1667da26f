"""What the service drops of its old manifests: never what is pinned, named by a run, open, or another name's."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from cache_builder.keep import KeepRules, drop_old_manifests
from shared.manifest import open_manifest, seal_manifest
from shared.manifest_rows import ManifestRow, Variant
from shared.manifest_shelf import sealed_manifests
from shared.store import StoreWriter
from tests.stores import settings

SETTINGS = settings()
ROW = ManifestRow(
    dataset="set",
    sample_id=bytes(16),
    path="",
    image_digest=bytes(32),
    original_hw=(64, 64),
    bucket_hw=(64, 64),
    variants=(Variant(bytes(16), False, (0, 0), (64, 64)),),
    text_keys=(bytes(16),),
    split="train",
)


def seal(store: Path, count: int, name: str = "main") -> list[str]:
    """`count` manifests of `name`, oldest first; their digests."""
    rows = [replace(ROW, path=f"{index}.png") for index in range(count)]
    return [seal_manifest(store, name, SETTINGS, [row]).digest for row in rows]


@pytest.fixture
def store(tmp_path: Path) -> Path:
    path = tmp_path / "store"
    StoreWriter(path).close()
    return path


def left(store: Path, name: str = "main") -> set[str]:
    return {sealed.digest for sealed in sealed_manifests(store) if sealed.name == name}


def run_folder(folder: Path, digests: Sequence[str]) -> Path:
    folder.mkdir(parents=True)
    (folder / "expert.json").write_text(json.dumps({"facts": {"manifests": [{"digest": one} for one in digests]}}))
    return folder


def test_the_newest_stay(store: Path) -> None:
    digests, others = seal(store, 7), seal(store, 3, "other")
    result = drop_old_manifests(store, "main", KeepRules(5))
    assert result.kept == digests[:1:-1]
    assert set(result.dropped) == set(digests[:2])
    assert left(store) == set(digests[2:])
    assert left(store, "other") == set(others)
    assert drop_old_manifests(store, "main", KeepRules("all")).kept == result.kept


def test_the_current_one_stays_though_it_was_sealed_first(store: Path) -> None:
    digests = seal(store, 4)
    seal_manifest(store, "main", SETTINGS, [replace(ROW, path="0.png")])
    assert drop_old_manifests(store, "main", KeepRules(1)).kept == [digests[0]]


def test_what_is_pinned_named_or_open_stays(store: Path, tmp_path: Path) -> None:
    digests = seal(store, 6)
    run = run_folder(tmp_path / "run", digests[1:2])
    run_folder(tmp_path / "runs/base", digests[2:3])
    in_use = open_manifest(store, "main", digests[3])
    rules = KeepRules(1, (digests[0][:8],), (run, tmp_path / "not begun"), tmp_path / "runs")
    result = drop_old_manifests(store, "main", rules)
    assert result.dropped == [digests[4]]
    assert left(store) == {*digests[:4], digests[5]}
    (remark,) = result.remarks
    assert remark.startswith(f"kept for now: manifest main {digests[3][:16]} is open in another process")
    del in_use
    assert drop_old_manifests(store, "main", rules).dropped == [digests[3]]


@pytest.mark.parametrize("card", ["{", "[]", '{"facts": {"manifests": [{}]}}'])
def test_nothing_goes_where_a_run_does_not_tell(store: Path, tmp_path: Path, card: str) -> None:
    digests = seal(store, 3)
    (tmp_path / "run").mkdir()
    (tmp_path / "run/expert.json").write_text(card)
    result = drop_old_manifests(store, "main", KeepRules(1, (), (tmp_path / "run",)))
    assert (result.dropped, left(store)) == ([], set(digests))
    assert "does not say what" in result.remarks[0]


def test_nothing_goes_where_the_shelf_is_damaged(store: Path) -> None:
    digests = seal(store, 3)
    (store / "manifests/other").mkdir()
    (store / "manifests/other/current.json").write_text("{")
    assert drop_old_manifests(store, "main", KeepRules(1)).dropped == []
    assert left_files(store) == set(digests)


def test_nothing_goes_while_another_one_writes(store: Path) -> None:
    digests = seal(store, 3)
    with StoreWriter(store):
        result = drop_old_manifests(store, "main", KeepRules(1))
    assert (result.dropped, left(store)) == ([], set(digests))
    assert "is being written by pid" in result.remarks[0]
    assert len(drop_old_manifests(store, "main", KeepRules(1)).dropped) == 2


def left_files(store: Path) -> set[str]:
    return {path.stem for path in (store / "manifests/main").glob("*.arrow")}
