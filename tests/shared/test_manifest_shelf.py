"""Every sealed manifest of a store is listed, and none is dropped while anybody has it open."""

import os
import signal
from hashlib import blake2b
from pathlib import Path

import pytest

from shared.errors import ConfigError, ManifestMismatch, StoreLocked
from shared.manifest import Manifest, open_manifest, seal_manifest
from shared.manifest_rows import ManifestRow, Variant
from shared.manifest_shelf import drop_manifest, find_sealed, sealed_manifests
from tests.stores import settings

SETTINGS = settings()


def key(*parts: object) -> bytes:
    """A key that ends in a zero byte now and then, as one in 256 does."""
    digest = blake2b(repr(parts).encode(), digest_size=16).digest()
    return digest[:-1] + b"\0" if digest[0] % 3 == 0 else digest


def make_rows(count: int) -> list[ManifestRow]:
    return [
        ManifestRow(
            dataset="set",
            sample_id=key("sample", index),
            path=f"{index}.png",
            image_digest=bytes(31) + bytes([index]),
            original_hw=(64, 64),
            bucket_hw=(64, 64),
            variants=tuple(Variant(key(index, v), False, (0, 0), (64, 64)) for v in range(1 + index % 3)),
            text_keys=tuple(key("text", index // 2, n) for n in range(index % 4)),
            split="train",
        )
        for index in range(count)
    ]


def seal(store: Path, count: int = 20, name: str = "main") -> Manifest:
    return seal_manifest(store, name, SETTINGS, make_rows(count), allow_shrink=True)


def test_all_are_listed_the_current_one_first(tmp_path: Path) -> None:
    assert sealed_manifests(tmp_path) == []
    old, new, other = seal(tmp_path, 19).digest, seal(tmp_path, 20).digest, seal(tmp_path, 20, "other").digest
    assert new == other
    listed = [(sealed.name, sealed.digest, sealed.is_current) for sealed in sealed_manifests(tmp_path)]
    assert listed == [("main", new, True), ("main", old, False), ("other", new, True)]
    assert [sealed.open().digest for sealed in sealed_manifests(tmp_path)] == [new, old, new]
    assert [sealed.name for sealed in find_sealed(tmp_path, new[:8])] == ["main", "other"]
    for digest in (new[:7], "", "x" * 64, new.upper()):
        with pytest.raises(ConfigError):
            find_sealed(tmp_path, digest)


def test_a_current_one_without_its_seal_still_counts(tmp_path: Path) -> None:
    sealed = seal(tmp_path)
    sealed.path.with_suffix(".json").unlink()
    (listed,) = sealed_manifests(tmp_path)
    assert listed.open().digest == listed.digest == sealed.digest
    assert b'"xxh3_128"' in listed.seal_bytes()


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b'{"digest": "../../x"}', b"\xff"])
def test_a_damaged_name_is_told(tmp_path: Path, content: bytes) -> None:
    (seal(tmp_path).path.parent / "current.json").write_bytes(content)
    with pytest.raises(ManifestMismatch, match=r"current\.json is damaged"):
        sealed_manifests(tmp_path)


def test_what_is_dropped_is_gone_and_the_others_stay(tmp_path: Path) -> None:
    old = seal(tmp_path, 19).digest
    seal(tmp_path, 20)
    new, gone = sealed_manifests(tmp_path)
    drop_manifest(gone)
    assert sealed_manifests(tmp_path) == [new]
    with pytest.raises(ManifestMismatch, match="no longer in"):
        open_manifest(tmp_path, "main", old)
    drop_manifest(new)
    assert list((tmp_path / "manifests/main").iterdir()) == []
    assert seal(tmp_path, 20).digest == new.digest  # and can be sealed again


def test_while_it_is_open_it_stays(tmp_path: Path) -> None:
    opened = seal(tmp_path)
    (sealed,) = sealed_manifests(tmp_path)
    with pytest.raises(StoreLocked, match="open in another process"):
        drop_manifest(sealed)
    assert opened.rows([3]) == open_manifest(tmp_path, "main").rows([3])
    del opened
    drop_manifest(sealed)
    assert sealed_manifests(tmp_path) == []


def test_the_kernel_lets_go_of_it_however_a_process_dies(tmp_path: Path) -> None:
    seal(tmp_path)
    (sealed,) = sealed_manifests(tmp_path)
    read_end, write_end = os.pipe()
    pid = os.fork()
    if pid == 0:
        held = sealed.open()
        os.write(write_end, b".")
        signal.pause()
        os._exit(len(held))
    os.read(read_end, 1)
    with pytest.raises(StoreLocked):
        drop_manifest(sealed)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    drop_manifest(sealed)


def test_keys_and_the_rows_that_name_them(tmp_path: Path) -> None:
    manifest = seal(tmp_path)
    rows = manifest.rows(range(len(manifest)))
    latents = [variant.latent_key for row in rows for variant in row.variants]
    texts = [text for row in rows for text in row.text_keys]
    assert [each.ljust(16, b"\0") for each in manifest.latent_keys().tolist()] == latents
    assert [each.ljust(16, b"\0") for each in manifest.text_keys().tolist()] == texts
    assert any(each.endswith(b"\0") for each in latents)
    for wanted in {*latents, *texts}:
        expected = [
            i for i, row in enumerate(rows) if wanted in {*row.text_keys, *(v.latent_key for v in row.variants)}
        ]
        assert manifest.rows_naming([wanted]) == expected
    assert manifest.rows_naming([b"q" * 16]) == manifest.rows_naming([]) == []
    assert len(seal(tmp_path, 0).latent_keys()) == 0
