"""Manifests: one digest for one content, sealed whole or not at all, and nothing opened that was touched."""

import itertools
import json
import os
import random
import signal
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from hashlib import blake2b
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

import shared.manifest
import shared.manifest_check
import shared.manifest_columns
from shared.errors import ConfigError, DataError, ManifestMismatch
from shared.manifest import Manifest, list_manifests, open_manifest, seal_manifest
from shared.manifest_rows import ManifestRow, ManifestSettings, Variant, manifest_digest
from tests.stores import key, settings

SETTINGS = settings(("cats", "dogs"), build={"resolution": 1024, "split": {"salt": "s", "fraction": 0.02}}, prompts={})
BUCKETS = [(832, 1216), (1024, 1024), (1216, 832)]


def make_row(index: int) -> ManifestRow:
    bucket = BUCKETS[index % 3]
    variants = tuple(Variant(key(index, v), bool(v), (v, index % 7), bucket) for v in range(1 + index % 2))
    return ManifestRow(
        dataset="cats" if index % 5 else "dogs",
        sample_id=key("sample", index),
        path=f"folder {index % 3}/é🦊-{index}.png",
        image_digest=blake2b(bytes([index % 256]), digest_size=32).digest(),
        original_hw=(2000 + index, 3000),
        bucket_hw=bucket,
        variants=variants,
        text_keys=tuple(key("text", index, n) for n in range(index % 4)),
        split="eval" if index % 10 == 3 else "train",
    )


ROWS = [make_row(index) for index in range(60)]
ORDERED = sorted(ROWS, key=ManifestRow.order)


def seal(store: Path, name: str = "train", rows: Sequence[ManifestRow] = ROWS, **options: Any) -> Manifest:
    return seal_manifest(store, name, options.pop("settings", SETTINGS), rows, **options)


def test_rows_and_settings_come_back(tmp_path: Path) -> None:
    sealed = seal(tmp_path)
    for manifest in (sealed, open_manifest(tmp_path, "train"), open_manifest(tmp_path, "train", sealed.digest)):
        assert (manifest.name, manifest.digest, len(manifest)) == ("train", sealed.digest, len(ROWS))
        assert manifest.settings == SETTINGS
        assert manifest.rows(range(len(ROWS))) == ORDERED
        assert manifest.rows([7, 3, 3]) == [ORDERED[7], ORDERED[3], ORDERED[3]]
        assert manifest.rows(np.array([], np.int64)) == []
    assert sealed.digest == manifest_digest(SETTINGS, ORDERED)


def test_an_empty_manifest_is_a_manifest(tmp_path: Path) -> None:
    manifest = seal(tmp_path, rows=[])
    assert len(manifest) == 0
    assert manifest.buckets() == manifest.buckets("eval") == []
    assert len(seal(tmp_path)) == len(ROWS)  # and growing from it is no fault
    with pytest.raises(ManifestMismatch, match="--allow-shrink"):
        seal(tmp_path, rows=[])


class AsTheyCome:
    """Rows that are made when they are asked for."""

    def __init__(self, rows: Sequence[ManifestRow]) -> None:
        self.rows, self.rounds = rows, 0

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[ManifestRow]:
        self.rounds += 1
        return (replace(row) for row in self.rows)


def test_rows_in_order_are_gone_through_and_not_held(tmp_path: Path) -> None:
    rows = AsTheyCome(ORDERED[::-1])  # whoever sorted them would hold them all
    manifest = seal(tmp_path, rows=rows, in_order=True)  # type: ignore[arg-type]
    assert manifest.rows(range(len(ROWS))) == ORDERED[::-1]
    assert rows.rounds == 2  # for the digest, and for the columns


@given(st.permutations(range(12)))
def test_digest_does_not_depend_on_the_order_of_rows(order: list[int]) -> None:
    rows = [ROWS[index] for index in order]
    assert manifest_digest(SETTINGS, sorted(rows, key=ManifestRow.order)) == DIGEST_OF_12


DIGEST_OF_12 = manifest_digest(SETTINGS, sorted(ROWS[:12], key=ManifestRow.order))


def test_digest_does_not_depend_on_the_name(tmp_path: Path) -> None:
    one, other = seal(tmp_path, "one", ROWS), seal(tmp_path / "elsewhere", "other", ROWS[::-1])
    assert one.digest == other.digest
    assert one.path.read_bytes() == other.path.read_bytes()


VARIANT = ROWS[1].variants[0]
CHANGED_ROWS = {
    "dataset": replace(ROWS[1], dataset="dogs"),
    "sample_id": replace(ROWS[1], sample_id=bytes(16)),
    "path": replace(ROWS[1], path="x"),
    "image_digest": replace(ROWS[1], image_digest=bytes(32)),
    "original_hw": replace(ROWS[1], original_hw=(3000, 2001)),
    "bucket_hw": replace(ROWS[1], bucket_hw=(1024, 1152)),
    "split": replace(ROWS[1], split="eval"),
    "text_keys": replace(ROWS[1], text_keys=(bytes(16),)),
    "text_keys fewer": replace(ROWS[1], text_keys=()),
    "variants fewer": replace(ROWS[1], variants=ROWS[1].variants[:1]),
    "variants order": replace(ROWS[1], variants=ROWS[1].variants[::-1]),
    "latent_key": replace(ROWS[1], variants=(replace(VARIANT, latent_key=bytes(16)), *ROWS[1].variants[1:])),
    "flip": replace(ROWS[1], variants=(replace(VARIANT, flip=True), *ROWS[1].variants[1:])),
    "crop_top_left": replace(ROWS[1], variants=(replace(VARIANT, crop_top_left=(1, 0)), *ROWS[1].variants[1:])),
    "target_hw": replace(ROWS[1], variants=(replace(VARIANT, target_hw=(8, 8)), *ROWS[1].variants[1:])),
}
CHANGED_SETTINGS: dict[str, Any] = {
    "vae_digest": "ab",
    "scaling_factor": 0.18215,
    "latent_channels": 16,
    "downscale": 16,
    "latents": "mean",
    "text_digests": {"text_encoder": "bb", "tokenizer": "cd"},
    "text_widths": (1280, 768),
    "pooled_width": 1024,
    "text_chunks": 2,
    "null_text_key": "de",
    "zeros_for_empty_prompt": False,
    "datasets": ("cats",),
    "build": {"resolution": 1024, "split": {"salt": "t", "fraction": 0.02}},
    "meta": {"score": "float"},
    "prompts": {"a cat": "ee"},
}


def test_digest_depends_on_each_field_of_a_row_and_of_the_settings() -> None:
    digests = [DIGEST_OF_12, manifest_digest(SETTINGS, [])]
    for row in CHANGED_ROWS.values():
        rows = [row if index == 1 else old for index, old in enumerate(ROWS[:12])]
        digests.append(manifest_digest(SETTINGS, sorted(rows, key=ManifestRow.order)))
    assert CHANGED_SETTINGS.keys() == ManifestSettings.model_fields.keys()
    for field, value in CHANGED_SETTINGS.items():
        settings = SETTINGS.model_copy(update={field: value})
        digests.append(manifest_digest(settings, sorted(ROWS[:12], key=ManifestRow.order)))
    assert len(set(digests)) == len(CHANGED_ROWS) + len(CHANGED_SETTINGS) + 2


META: dict[str, Any] = {"score": "float", "likes": "int", "safe": "bool", "artist": "string", "tags": "strings"}
VALUES: list[dict[str, Any]] = [
    {"score": 0.5, "likes": -3, "safe": False, "artist": "", "tags": ()},
    {"score": float("inf"), "likes": 2**62, "safe": True, "artist": "名\n前", "tags": ("a", "b")},
    {},
]


def test_columns_that_travel_along_come_back_with_their_types(tmp_path: Path) -> None:
    settings = SETTINGS.model_copy(update={"meta": META})
    rows = [replace(row, meta=VALUES[index % 3]) for index, row in enumerate(ROWS)]
    sealed = seal(tmp_path, rows=rows, settings=settings)
    opened = open_manifest(tmp_path, "train")
    assert opened.settings.meta == META
    assert opened.rows(range(len(rows))) == sorted(rows, key=ManifestRow.order)
    assert {tuple(bucket.hw) for bucket in opened.buckets()} == set(BUCKETS)
    with pa.memory_map(str(sealed.path)) as file:
        schema = pa.ipc.open_file(file).schema
    assert schema.field("meta_score").type == pa.float64()
    assert schema.field("meta_tags").type.value_type == pa.string()
    assert all(schema.field("meta_" + name).nullable for name in META)


def test_digest_covers_what_travels_along() -> None:
    settings = SETTINGS.model_copy(update={"meta": META})
    digests = {manifest_digest(settings, [replace(ROWS[0], meta=values)]) for values in VALUES}
    digests |= {manifest_digest(settings, [replace(ROWS[0], meta={"likes": value})]) for value in (0, 1)}
    assert len(digests) == 5
    without = manifest_digest(SETTINGS, ORDERED)
    assert manifest_digest(SETTINGS.model_copy(update={"meta": {}}), ORDERED) == without


def test_sealing_the_same_twice_writes_one_file_once(tmp_path: Path) -> None:
    first = seal(tmp_path)
    before = {path.name: path.stat().st_mtime_ns for path in first.path.parent.iterdir() if path.name != "current.json"}
    again = seal(tmp_path, rows=ROWS[::-1])
    after = {path.name: path.stat().st_mtime_ns for path in first.path.parent.iterdir() if path.name != "current.json"}
    assert (again.digest, after) == (first.digest, before)
    assert before.keys() == {f"{first.digest}.arrow", f"{first.digest}.json"}


def test_older_manifests_stay_open_and_can_be_opened_by_digest(tmp_path: Path) -> None:
    old = seal(tmp_path, rows=ROWS[:50])
    new = seal(tmp_path)
    assert open_manifest(tmp_path, "train").digest == new.digest != old.digest
    assert old.rows(range(50)) == sorted(ROWS[:50], key=ManifestRow.order)
    assert open_manifest(tmp_path, "train", old.digest).rows([0]) == old.rows([0])


# --- succession ---


def test_other_data_sets_need_replace(tmp_path: Path) -> None:
    seal(tmp_path)
    settings = SETTINGS.model_copy(update={"datasets": ("cats",)})
    with pytest.raises(ManifestMismatch, match=r"cats, dogs, this build of cats.*--replace"):
        seal(tmp_path, settings=settings)
    assert open_manifest(tmp_path, "train").settings == SETTINGS
    assert seal(tmp_path, settings=settings, replace=True).settings.datasets == ("cats",)


def test_losing_more_than_a_tenth_needs_allow_shrink(tmp_path: Path) -> None:
    seal(tmp_path, rows=ROWS[:50])
    with pytest.raises(ManifestMismatch, match=r"has 50 samples and would keep 44.*--allow-shrink"):
        seal(tmp_path, rows=ROWS[:44])
    with pytest.raises(ManifestMismatch, match="--allow-shrink"):
        seal(tmp_path, rows=ROWS[:44], replace=True)
    assert len(seal(tmp_path, rows=ROWS[:45])) == 45
    assert len(seal(tmp_path, rows=ROWS[:10], allow_shrink=True)) == 10


# --- buckets ---


def test_buckets_hold_each_row_of_their_split_once(tmp_path: Path) -> None:
    manifest = seal(tmp_path)
    for split in ("train", "eval"):
        buckets = manifest.buckets(split)
        assert [bucket.hw for bucket in buckets] == sorted(bucket.hw for bucket in buckets)
        for bucket in buckets:
            assert bucket.rows.dtype == np.int64
            assert {(row.bucket_hw, row.split) for row in manifest.rows(bucket.rows)} == {(bucket.hw, split)}
    indices = np.concatenate([bucket.rows for split in ("train", "eval") for bucket in manifest.buckets(split)])
    assert sorted(indices.tolist()) == list(range(len(ROWS)))


def test_a_bucket_gathers_rows_of_several_data_sets(tmp_path: Path) -> None:
    bucket = seal(tmp_path).buckets()[0]
    assert {row.dataset for row in seal(tmp_path).rows(bucket.rows)} == {"cats", "dogs"}


def test_a_split_that_nobody_is_in_has_no_buckets(tmp_path: Path) -> None:
    assert seal(tmp_path, rows=[row for row in ROWS if row.split == "train"]).buckets("eval") == []


# --- what cannot be opened ---


def test_an_absent_name_tells_what_there_is(tmp_path: Path) -> None:
    with pytest.raises(ManifestMismatch, match="a build that completes makes one"):
        open_manifest(tmp_path, "train")
    seal(tmp_path, "one")
    seal(tmp_path, "two")
    assert list_manifests(tmp_path) == ["one", "two"]
    with pytest.raises(ManifestMismatch, match="there are: one, two"):
        open_manifest(tmp_path, "train")
    with pytest.raises(ManifestMismatch, match="no longer in"):
        open_manifest(tmp_path, "one", "0" * 64)


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../x", "a/b", "/etc", "a\\b", ".hidden", "-x", "a b", "ä", "a\n", "x" * 101, "a\0"]
)
def test_names_that_could_leave_the_store_are_refused(tmp_path: Path, name: str) -> None:
    for call in (lambda: open_manifest(tmp_path, name), lambda: seal(tmp_path, name)):
        with pytest.raises(ConfigError, match="manifest name"):
            call()
    assert list(tmp_path.iterdir()) == []


def test_a_digest_that_is_no_digest_is_not_followed(tmp_path: Path) -> None:
    sealed = seal(tmp_path)
    for digest in ("", "../train/current", "current", sealed.digest.upper(), sealed.digest + "\n"):
        with pytest.raises(ManifestMismatch):
            open_manifest(tmp_path, "train", digest)


def test_another_manifest_under_a_digest_is_not_taken_for_it(tmp_path: Path) -> None:
    one, other = seal(tmp_path, rows=ROWS[:50]), seal(tmp_path)
    (one.path.with_suffix(".json")).write_bytes(other.path.with_suffix(".json").read_bytes())
    with pytest.raises(ManifestMismatch, match="another digest"):
        open_manifest(tmp_path, "train", one.digest)


@pytest.mark.parametrize("count", [60, pytest.param(2000, marks=pytest.mark.slow)])
def test_damage_to_any_file_is_a_mismatch(tmp_path: Path, count: int) -> None:
    sealed = seal(tmp_path)
    source = random.Random(4)
    for file in (sealed.path, sealed.path.parent / "current.json"):
        whole = file.read_bytes()
        for step in range(count):
            changed, at = bytearray(whole), source.randrange(len(whole))
            if step % 3 == 0:
                del changed[at:]
            elif step % 3 == 1:
                changed[at] ^= 1 << source.randrange(8)
            else:
                changed += source.randbytes(source.randrange(1, 100))
            file.write_bytes(changed)
            try:
                opened = open_manifest(tmp_path, "train")
            except ManifestMismatch:
                pass
            else:  # the time in a seal, or white space at its end
                assert file.suffix == ".json"
                assert opened.rows(range(len(ROWS))) == ORDERED
        file.write_bytes(whole)
    sealed.path.unlink()
    with pytest.raises(ManifestMismatch, match="damaged"):
        open_manifest(tmp_path, "train")


@pytest.mark.parametrize("file", ["current.json", "seal", "arrow"])
@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b"ARROW1\0\0" + bytes(100), None])
def test_building_again_repairs_a_damaged_manifest(tmp_path: Path, file: str, content: bytes | None) -> None:
    sealed = seal(tmp_path)
    folder = sealed.path.parent
    path = {"current.json": folder / file, "seal": sealed.path.with_suffix(".json"), "arrow": sealed.path}[file]
    path.unlink() if content is None else path.write_bytes(content)
    assert seal(tmp_path).rows(range(len(ROWS))) == ORDERED
    assert open_manifest(tmp_path, "train", sealed.digest).digest == sealed.digest


def test_a_newer_format_says_update_and_is_not_written_over(tmp_path: Path) -> None:
    sealed = seal(tmp_path)
    current = sealed.path.parent / "current.json"
    newer = json.dumps(json.loads(current.read_text()) | {"format": 2})
    current.write_text(newer)
    for call in (lambda: open_manifest(tmp_path, "train"), lambda: seal(tmp_path, rows=ROWS[:55])):
        with pytest.raises(ManifestMismatch, match=r"manifest format 2.*update"):
            call()
    assert current.read_text() == newer


# --- sizes and processes ---


def private_kib() -> int:
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
        if line.startswith("Anonymous:"):
            return int(line.split()[1])
    raise AssertionError("no Anonymous: in smaps_rollup")


def test_a_hundred_thousand_rows_open_fast_and_stay_on_disk(tmp_path: Path) -> None:
    rows = [replace(ROWS[index % 60], sample_id=key(index)) for index in range(100_000)]
    sealed = seal(tmp_path, rows=rows)
    assert sealed.path.stat().st_size > 10 << 20
    del rows
    before_kib, begin_s = private_kib(), time.perf_counter()
    manifest = open_manifest(tmp_path, "train")
    opened_s = time.perf_counter() - begin_s
    manifest.rows(range(0, 100_000, 1563))
    assert private_kib() - before_kib < 4096
    assert opened_s < 0.5  # 16 MB are read once, for the checksum
    assert sum(len(bucket.rows) for split in ("train", "eval") for bucket in manifest.buckets(split)) == 100_000


@pytest.mark.parametrize("kills", [15, pytest.param(300, marks=pytest.mark.slow)])
def test_kill_9_of_a_sealer_leaves_a_whole_manifest(tmp_path: Path, kills: int) -> None:
    """A reader beside it, and after each kill, always finds one that was sealed."""
    seal(tmp_path)
    source, seen = random.Random(6), {_sound_digest(tmp_path)}
    for kill in range(kills):
        pid = os.fork()
        if pid == 0:
            try:
                _seal_for_ever(tmp_path, kill)
            finally:
                os._exit(1)
        known, end_s = len(seen), time.monotonic() + source.uniform(0.002, 0.05)
        while time.monotonic() < end_s or len(seen) == known:
            assert time.monotonic() < end_s + 60, "nothing is sealed"
            seen.add(_sound_digest(tmp_path))
        os.kill(pid, signal.SIGKILL)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
        seen.add(_sound_digest(tmp_path))
    assert len(seen) > kills


def _seal_for_ever(store: Path, kill: int) -> None:
    for step in itertools.count():
        seal(store, rows=[replace(row, path=f"{kill} {step} {row.path}") for row in ROWS])


def _sound_digest(store: Path) -> str:
    manifest = open_manifest(store, "train")
    assert manifest_digest(manifest.settings, manifest.rows(range(len(manifest)))) == manifest.digest
    return manifest.digest


@pytest.mark.parametrize("step", ["sync_file", "sync_folder", "write_atomically"])
def test_a_failure_at_any_step_leaves_the_old_one_current(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    old = seal(tmp_path, rows=ROWS[:55])

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shared.manifest, step, fail)
    with pytest.raises(OSError, match="No space left"):
        seal(tmp_path)
    assert open_manifest(tmp_path, "train").digest == old.digest
    monkeypatch.undo()
    assert len(seal(tmp_path)) == len(ROWS)


def test_what_is_verified_beside_is_never_trusted_before(tmp_path: Path) -> None:
    sealed = seal(tmp_path)
    data = sealed.path.read_bytes()
    rng = random.Random(7)
    for at in [*rng.sample(range(len(data)), 150), len(data) - 1]:
        damaged = bytearray(data)
        damaged[at] ^= 1 << rng.randrange(8)
        sealed.path.write_bytes(damaged)
        with pytest.raises(ManifestMismatch, match="damaged"):
            read_beside(tmp_path)
    sealed.path.write_bytes(data[:-100])
    with pytest.raises(ManifestMismatch, match="damaged"):
        read_beside(tmp_path)
    sealed.path.write_bytes(data)
    assert read_beside(tmp_path) == sum(map(len, sealed.buckets()))


def read_beside(store: Path) -> int:
    """As a trainer does: buckets first, a row after."""
    manifest = open_manifest(store, "train", check_beside=True)
    rows = np.concatenate([bucket.rows for bucket in manifest.buckets()])
    manifest.rows(rows[:1])
    return len(rows)


def test_a_check_that_goes_on_does_not_keep_who_opens_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seal(tmp_path)
    may_end = threading.Event()
    monkeypatch.setattr(shared.manifest_check, "_is_sound", lambda *_: may_end.wait(20))
    manifest = open_manifest(tmp_path, "train", check_beside=True)
    assert sum(map(len, manifest.buckets())) + sum(map(len, manifest.buckets("eval"))) == len(ROWS)
    threading.Timer(0.3, may_end.set).start()
    began_s = time.monotonic()
    assert manifest.rows([0]) == [ORDERED[0]]
    assert time.monotonic() - began_s > 0.2


@hypothesis.settings(max_examples=20)
@given(st.lists(st.tuples(st.sampled_from(BUCKETS), st.sampled_from(["train", "eval"])), max_size=30))
def test_buckets_hold_the_rows_of_their_split_wherever_they_lie(kinds: list[tuple[Any, Any]]) -> None:
    rows = [replace(ROWS[i], bucket_hw=hw, split=split) for i, (hw, split) in enumerate(kinds)]
    with tempfile.TemporaryDirectory() as folder:
        manifest = seal(Path(folder), rows=AsTheyCome(rows), in_order=True)  # type: ignore[arg-type]
        for split in ("train", "eval"):
            expected = {hw: [i for i, kind in enumerate(kinds) if kind == (hw, split)] for hw in BUCKETS}
            found = {bucket.hw: bucket.rows.tolist() for bucket in manifest.buckets(split)}  # type: ignore[arg-type]
            assert found == {hw: of for hw, of in sorted(expected.items()) if of}
            assert [len(bucket) for bucket in manifest.buckets(split)] == [*map(len, found.values())]  # type: ignore[arg-type]


@pytest.mark.slow
def test_more_text_than_a_column_can_have_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared.manifest_columns, "ROWS_AT_ONCE", 8)
    rows = AsTheyCome([replace(ROWS[0], path="x" * (1 << 26))] * 33)
    with pytest.raises(DataError, match=r"more than 2 GiB of text \(paths are one\).*--manifest"):
        seal(tmp_path, rows=rows, in_order=True)  # type: ignore[arg-type]
    assert list_manifests(tmp_path) == []


def test_what_is_shown_of_a_row_is_what_the_row_says(tmp_path: Path) -> None:
    ends_in_zero = replace(make_row(60), text_keys=(bytes(16), b"k" + bytes(15)))
    manifest = seal(tmp_path, rows=[*ROWS, ends_in_zero])
    shown = manifest.shown_rows()
    for index, row in enumerate(manifest.rows(range(len(manifest)))):
        assert shown.original_hw(index) == row.original_hw
        crops = [shown.variant(index, which) for which in range(shown.variant_count(index))]
        expected = [(each.latent_key, each.crop_top_left, each.target_hw) for each in row.variants]
        assert [(crop.latent_key, crop.crop_top_left, crop.target_hw) for crop in crops] == expected
        assert tuple(shown.text_key(index, which) for which in range(shown.text_count(index))) == row.text_keys
        with pytest.raises(IndexError):
            shown.variant(index, len(row.variants))
        with pytest.raises(IndexError):
            shown.text_key(index, len(row.text_keys))
    assert not any(column.flags.owndata for column in vars(shown).values())
