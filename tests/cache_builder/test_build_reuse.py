"""What is encoded again after a change: exactly what depends on it. False reuse 0, false rebuild 0.

Each change is built twice: onto the store from before, and into an empty one. The counts say that no more was encoded
than had to be, the comparison of both stores that no less was.
"""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cache_builder.report import BuildReport
from shared.manifest import open_manifest
from shared.store import StoreReader
from tests.pictures import write_shapes

PICTURES, CAPTIONS = 6, 8  # and the empty caption
Build = Callable[..., BuildReport]


@dataclass
class World:
    """A data set, a model and the settings of a build; changes edit it."""

    folder: Path
    model: Path
    sets: dict[str, str] = field(default_factory=dict)
    dataset: str = "set"

    def build(self, run_build: Build, store: Path) -> BuildReport:
        """Build it all."""
        sets = [f"{key}={value}" for key, value in self.sets.items()]
        return run_build([self.folder], store, self.model, *sets, datasets=[self.dataset], allow_shrink=True)


@pytest.fixture(scope="module")
def before(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, run_build: Build) -> Path:
    """A folder with a data set, a model and their store."""
    place = tmp_path_factory.mktemp("before")
    folder = write_shapes(place / "set", PICTURES)
    Image.open(folder / "shape-00004.png").save(folder / "shape-00004.bmp")  # not compressed: any byte may change
    (folder / "shape-00004.png").unlink()
    Image.open(folder / "shape-00003.png").resize((70, 120)).save(folder / "shape-00003.png")  # a portrait
    (folder / "sub").mkdir()
    for path in folder.glob("shape-00005.*"):
        path.rename(folder / "sub" / path.name)
    shutil.copytree(tiny_model, place / "model")
    report = World(folder, place / "model").build(run_build, place / "store")
    assert (report.stored, report.encoded_captions) == (PICTURES, CAPTIONS + 1)
    return place


def edit(path: Path, at: int, keep_times: bool = False) -> None:
    """Change one byte and nothing else."""
    times, data = path.stat(), bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)
    if keep_times:
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def append(path: Path, data: bytes) -> None:
    path.write_bytes(path.read_bytes() + data)


def edit_json(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def edit_weights(folder: Path) -> None:
    """One element of one tensor, by its least bit but a few."""
    from safetensors.torch import load_file, save_file

    (path,) = folder.glob("*.safetensors")
    tensors = load_file(path)
    name = next(name for name in sorted(tensors) if "weight" in name and tensors[name].ndim > 1)
    tensors[name].view(-1)[0] *= 1.001
    save_file(tensors, path, metadata={"format": "pt"})


def shard(folder: Path) -> None:
    """The same weights in two files with an index."""
    from safetensors.torch import load_file, save_file

    (path,) = folder.glob("*.safetensors")
    tensors = load_file(path)
    names = sorted(tensors, reverse=True)
    stem = path.name.removesuffix(".safetensors")
    weight_map: dict[str, str] = {}
    for number, part in enumerate((names[: len(names) // 3], names[len(names) // 3 :]), 1):
        file = f"{stem}-0000{number}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    path.unlink()
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index))


def cut_merges(folder: Path) -> None:
    lines = (folder / "merges.txt").read_text().splitlines()
    (folder / "merges.txt").write_text("\n".join(lines[:-40]) + "\n")


def save_tokenizer(folder: Path, cut: int = 0) -> None:
    """Beside the old files as transformers 5 writes it, which is also what it then reads."""
    from transformers import CLIPTokenizer

    CLIPTokenizer.from_pretrained(folder).save_pretrained(folder)
    content = json.loads((folder / "tokenizer.json").read_text())
    if cut:
        content["model"]["merges"] = content["model"]["merges"][:-cut]
    (folder / "tokenizer.json").write_text(json.dumps(content))


def touch(world: World) -> None:
    for path in [*world.folder.rglob("*"), *world.model.rglob("*")]:
        os.utime(path, (1, 1))


def swap_names(world: World) -> None:
    a, b = world.folder / "shape-00001.png", world.folder / "shape-00002.png"
    a.rename(world.folder / "x.png")
    b.rename(a)
    (world.folder / "x.png").rename(b)


def rename(world: World) -> None:
    for path in list(world.folder.glob("shape-00001.*")):
        path.rename(world.folder / f"renamed{path.suffix}")


def move(world: World) -> None:
    (world.folder / "deeper/down").mkdir(parents=True)
    for path in list(world.folder.glob("shape-00001.*")):
        path.rename(world.folder / "deeper/down" / path.name)


def move_all(world: World) -> None:
    world.folder = world.folder.rename(world.folder.with_name("elsewhere"))


def move_model(world: World) -> None:
    world.model = world.model.rename(world.model.with_name("other-name"))


def add(world: World) -> None:
    write_shapes(world.folder / "more", 1, seed=99)


def remove(world: World) -> None:
    (world.folder / "shape-00003.png").unlink()


def caption(text: str) -> Callable[[World], Any]:
    return lambda world: (world.folder / "shape-00001.txt").write_text(text)


def setting(**values: str) -> Callable[[World], None]:
    return lambda world: world.sets.update({key.replace("__", "."): value for key, value in values.items()})


def in_model(change: Callable[..., None], part: str, *arguments: Any, **values: Any) -> Callable[[World], None]:
    return lambda world: change(world.model / part, *arguments, **values)


ALL = PICTURES
TEXT = CAPTIONS + 1
OTHER, SAME = True, False
# change, pictures encoded again, captions encoded again, whether the manifest is another
CHANGES: dict[str, tuple[Callable[[World], Any], int, int, bool]] = {
    "nothing": (lambda world: None, 0, 0, SAME),
    "times": (touch, 0, 0, SAME),
    "a byte of a picture": (lambda w: edit(w.folder / "shape-00004.bmp", 2000), 1, 0, OTHER),
    "a byte of a picture, same size and time": (
        lambda w: edit(w.folder / "shape-00004.bmp", 2000, keep_times=True),
        1,
        0,
        OTHER,
    ),
    "a byte behind a picture": (
        lambda w: append(w.folder / "shape-00000.png", b"\0"),
        1,
        0,
        OTHER,
    ),
    "a letter of a caption": (lambda w: edit(w.folder / "shape-00001.txt", 3), 0, 1, OTHER),
    "a letter of a caption, same size and time": (
        lambda w: edit(w.folder / "shape-00001.txt", 3, keep_times=True),
        0,
        1,
        OTHER,
    ),
    "white space of a caption": (
        lambda w: append(w.folder / "shape-00001.txt", b" \r\n\n"),
        0,
        0,
        SAME,
    ),
    "one caption more": (lambda w: append(w.folder / "shape-00001.txt", b"new\n"), 0, 1, OTHER),
    "another's caption": (caption("a red circle on white"), 0, 1, OTHER),
    "two pictures swap captions": (swap_names, 0, 0, OTHER),
    "renamed": (rename, 0, 0, OTHER),
    "moved within": (move, 0, 0, OTHER),
    "the data set moved": (move_all, 0, 0, SAME),
    "the model moved": (move_model, 0, 0, SAME),
    "one more": (add, 1, 2, OTHER),
    "one less": (remove, 0, 0, OTHER),
    "VAE weight": (in_model(edit_weights, "vae"), ALL, 0, OTHER),
    "VAE norm groups": (in_model(edit_json, "vae/config.json", norm_num_groups=2), ALL, 0, OTHER),
    "VAE scaling factor": (in_model(edit_json, "vae/config.json", scaling_factor=0.2), 0, 0, OTHER),
    "VAE name": (in_model(edit_json, "vae/config.json", _name_or_path="x", sample_size=64), 0, 0, SAME),
    "VAE in two files": (in_model(shard, "vae"), 0, 0, SAME),
    "text encoder weight": (in_model(edit_weights, "text_encoder"), 0, TEXT, OTHER),
    "text encoder 2 weight": (in_model(edit_weights, "text_encoder_2"), 0, TEXT, OTHER),
    "text encoder activation": (in_model(edit_json, "text_encoder/config.json", hidden_act="gelu"), 0, TEXT, OTHER),
    "text encoder in two files": (in_model(shard, "text_encoder"), 0, 0, SAME),
    "tokenizer merges": (in_model(cut_merges, "tokenizer"), 0, TEXT, OTHER),
    "tokenizer 2 merges": (in_model(cut_merges, "tokenizer_2"), 0, TEXT, OTHER),
    "tokenizer 2 padding": (
        in_model(edit_json, "tokenizer_2/special_tokens_map.json", pad_token="?"),
        0,
        TEXT,
        OTHER,
    ),
    "tokenizer's first token": (
        in_model(edit_json, "tokenizer/special_tokens_map.json", bos_token="?"),
        0,
        TEXT,
        OTHER,
    ),
    "tokenizer saved again": (in_model(save_tokenizer, "tokenizer"), 0, 0, SAME),
    "tokenizer.json merges": (in_model(save_tokenizer, "tokenizer", cut=40), 0, TEXT, OTHER),
    "UNet weight": (in_model(edit_weights, "unet"), 0, 0, SAME),
    "empty prompt": (in_model(edit_json, "model_index.json", force_zeros_for_empty_prompt=False), 0, 0, OTHER),
    "background": (setting(images__background="[255, 255, 254]"), ALL, 0, OTHER),
    "resample": (setting(images__resample="bicubic"), ALL, 0, OTHER),
    "resolution": (setting(images__resolution="128"), ALL, 0, OTHER),
    "latents": (setting(encode__latents="mean"), ALL, 0, OTHER),
    "dtype": (setting(encode__dtype="bfloat16"), ALL, 0, OTHER),
    "chunks": (setting(text__chunks="2"), 0, TEXT, OTHER),
    "lines": (setting(captions__lines="first"), 0, 0, OTHER),
    "mirrored, but every caption tells a side": (setting(images__flip="on"), 0, 0, OTHER),
    "all mirrored": (setting(images__flip="force"), ALL, 0, OTHER),
    "skip rules that skip none": (setting(images__skip="{min_size=8, max_size=9000, max_aspect=9}"), 0, 0, OTHER),
    "some": (setting(images__skip="{max_samples=4}"), 0, 0, OTHER),
    "a trigger": (setting(captions__trigger="sks"), 0, CAPTIONS, OTHER),
    "a suffix": (setting(captions__suffix="."), 0, CAPTIONS, OTHER),
    "nothing is taken out": (setting(captions__remove='["xyzzy"]', captions__remove_patterns='["x+y"]'), 0, 0, OTHER),
    "seed, centre crop": (setting(seed="1"), 0, 0, OTHER),
    "split": (setting(split__eval_fraction="0.6"), 0, 0, OTHER),
    "salt": (setting(split__salt="other"), 0, 0, OTHER),
    "batches": (setting(encode__batch="3", encode__text_batch="2", encode__threads="3"), 0, 0, SAME),
    "limit": (setting(max_quarantined="0.5"), 0, 0, SAME),
}


def copy_world(before: Path, tmp_path: Path) -> World:
    for name in ("set", "model", "store"):
        shutil.copytree(before / name, tmp_path / name)
    return World(tmp_path / "set", tmp_path / "model")


def same_records(one: Path, other: Path, sound: bool = True) -> None:
    """All records that the current manifest of `other` names are in `one` with the same content."""
    manifest = open_manifest(other, "main")
    keys = {bytes.fromhex(manifest.settings.null_text_key)}
    for row in manifest.rows(range(len(manifest))):
        keys |= {*(variant.latent_key for variant in row.variants), *row.text_keys}
    keys |= {bytes.fromhex(key) for key in manifest.settings.prompts.values()}
    with StoreReader(one) as a, StoreReader(other) as b, a.snapshot() as left, b.snapshot() as right:
        for key in keys:
            x, y = left.read(key), right.read(key)
            assert (x.kind, x.meta, x.tensors.keys()) == (y.kind, y.meta, y.tensors.keys())
            for name, tensor in x.tensors.items():
                np.testing.assert_allclose(
                    tensor, y.tensors[name], rtol=3e-3, atol=3e-2 if x.kind == "latents" else 3e-3
                )


@pytest.mark.parametrize("name", CHANGES)
def test_exactly_what_depends_on_a_change_is_encoded_again(
    name: str, before: Path, tmp_path: Path, run_build: Build
) -> None:
    change, pictures, captions, is_other = CHANGES[name]
    world = copy_world(before, tmp_path)
    old = open_manifest(world.folder.parent / "store", "main").digest
    change(world)
    report = world.build(run_build, tmp_path / "store")
    report.check()
    assert (report.stored, report.encoded_captions) == (pictures, captions)
    assert (report.digest != old) == is_other
    fresh = world.build(run_build, tmp_path / "fresh")
    assert fresh.digest == report.digest
    assert fresh.stored == report.stored + report.reused
    if name != "dtype":  # bfloat16 has other bits in every batch
        same_records(tmp_path / "store", tmp_path / "fresh")


def test_going_back_finds_everything(before: Path, tmp_path: Path, run_build: Build) -> None:
    world = copy_world(before, tmp_path)
    old = open_manifest(tmp_path / "store", "main").digest
    world.sets = {"images.background": "[0, 0, 0]", "text.chunks": "2"}
    assert world.build(run_build, tmp_path / "store").stored == ALL
    world.sets = {}
    report = world.build(run_build, tmp_path / "store")
    assert (report.stored, report.encoded_captions, report.digest) == (0, 0, old)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"images.crop": "random"}, {"images.crop": "random", "seed": "1"}),
        ({"images.max_aspect": "1"}, {"images.max_aspect": "1", "images.crop": "top"}),
        ({}, {"images.crop": "random"}),
        ({}, {"images.step": "64"}),
        ({}, {"images.max_aspect": "1"}),
        ({}, {"images.crop": "square"}),
        ({}, {"images.crop": "off"}),
        ({}, {"images.resolution_type": "edge"}),
        ({}, {"images.resolution_type": "long_edge"}),
        ({}, {"images.buckets": "[[64, 64], [48, 80]]"}),
        ({}, {"images.downsample_to": "72"}),
        (
            {"images.crop": "random", "images.downsample_to": "80"},
            {"images.crop": "corner", "images.downsample_to": "80"},
        ),
    ],
    ids=str,
)
def test_only_crops_that_moved_are_encoded_again(
    first: dict[str, str], second: dict[str, str], before: Path, tmp_path: Path, run_build: Build
) -> None:
    world, store = copy_world(before, tmp_path), tmp_path / "other"
    boxes = []
    for sets in (first, second):
        world.sets = sets
        report = world.build(run_build, store)
        manifest = open_manifest(store, "main")
        rows = manifest.rows(range(len(manifest)))
        boxes.append({(row.path, row.variants[0].crop_top_left, row.variants[0].target_hw) for row in rows})
    moved = len(boxes[1] - boxes[0])
    assert moved > 0
    assert report.stored == moved
    assert report.reused == PICTURES - moved
