"""cache-build as users meet it: a wrong command or bad input is one line that names the thing and the way out."""

import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cache_builder.report import BuildReport
from shared.manifest import open_manifest
from shared.store import StoreReader
from tests.pictures import write_shapes

Build = Callable[..., BuildReport]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shapes(tmp_path_factory.mktemp("data") / "pictures", 4)


@pytest.fixture(scope="module")
def built(pictures: Path, tiny_model: Path, run_build: Build, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished store of those pictures."""
    store = tmp_path_factory.mktemp("built") / "store"
    run_build([pictures], store, tiny_model)
    return store


def refused(done: Any, code: int, pattern: str) -> None:
    """One line on stderr, nothing on stdout, the exit code, no traceback."""
    assert done.out == ""
    assert len(done.errors) == 1
    assert done.errors[0].startswith("error: ")
    assert re.search(pattern, done.errors[0])
    assert done.code == code


def test_the_command_runs_and_speaks_plainly(
    tmp_path: Path, pictures: Path, tiny_model: Path, arguments_of: Callable[..., list[str]]
) -> None:
    arguments = arguments_of(pictures, tmp_path / "store", tiny_model)
    arguments.remove("--json")
    command = [sys.executable, "-m", "cache_builder.cli", *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0
    first, second, last = done.stdout.splitlines()
    assert first == "seen 4 = stored 4 + reused 0 + quarantined 0 + skipped 0 + duplicate 0"
    assert second.startswith("captions 6, ")
    assert re.fullmatch(r"manifest main [0-9a-f]{16} in \d+\.\d s", last)
    assert done.stderr.splitlines() == [
        f"loading both text encoders of {tiny_model} on cpu",
        f"loading the VAE of {tiny_model} on cpu, float32",
    ]


def test_json_holds_the_whole_account(pictures: Path, built: Path, tiny_model: Path, commands: Any) -> None:
    done = commands.build(pictures, built, tiny_model)
    report = json.loads(done.out)
    parts = ("stored", "reused", "quarantined", "skipped", "duplicate")
    assert report["seen"] == sum(report[part] for part in parts) == 4
    assert report["digest"] == open_manifest(built, "main").digest
    assert done.err == ""


def test_help_is_quick_and_light() -> None:
    program = (
        "import sys\n"
        "from cache_builder.cli import cache_build\n"
        "try:\n    cache_build()\nfinally:\n"
        "    print([name for name in ('torch', 'numpy', 'pyarrow', 'PIL') if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", program, "--help"], capture_output=True, text=True)
    assert done.returncode == 0
    assert "--allow-shrink" in done.stdout
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize(
    ("more", "code", "pattern"),
    [
        (
            ["--set", "images.resoluton=64"],
            64,
            "unknown config key 'images.resoluton'; did you mean 'images.resolution'",
        ),
        (["--set", "seeed=1"], 64, "did you mean 'seed'"),
        (["--set", "resolution=64"], 64, "did you mean 'images.resolution'"),
        (["--set", "seed"], 64, "--set seed: write it as key=value"),
        (["--set", "seed=much"], 64, "seed: .*integer"),
        (["--set", "images.resolution=100"], 64, "100 px is not a multiple of the bucket step 16 px; 96 is"),
        (["--set", "images.step=128"], 64, "images.step 128 is above images.resolution 64"),
        (["--set", "images.background=[0, 0, 256]"], 64, "images.background.2: .*255"),
        (["--set", "captions.missing=guess"], 64, "captions.missing: .*'error', 'skip' or 'empty'"),
        (["--set", 'captions.extensions=["txt"]'], 64, "'txt' is not a file suffix"),
        (["--set", "encode.dtype=float16"], 64, "this VAE overflows"),
        (["--set", "images.max_pixels=1000000000"], 64, "max_pixels 1000000000"),
        (["--set", "images.variants=2"], 64, 'images: variants = 2 would all be one crop: set crop to "random" or'),
        (["--set", "images.crop=off", "--set", "images.buckets=[[64, 64]]"], 64, 'and crop = "off" makes its own'),
        (["--set", "images.buckets=[[64, 64], [64, 64]]"], 64, "buckets: one of them is given twice"),
        (["--set", "images.buckets=[[64, 65]]"], 64, r"images.buckets.0.1: .*multiple of 8"),
        (["--set", "images.crop=off", "--set", "images.downsample_to=64"], 64, "downsample_to needs a crop"),
        (["--resolution", "128", "--set", "images.resolution=96", "--set", "images.downsample_to=64"], 64, "below res"),
        (["--set", "images.skip={min_size = 9, max_size = 8}"], 64, "images.skip: min_size 9 is above max_size 8"),
        (["--set", "images.skip={min_aspect = 2, max_aspect = 1}"], 64, "images.skip: min_aspect 2.0 is above"),
        (["--set", "images.skip.max_upscale=0.5"], 64, "images.skip.max_upscale: .*greater than or equal to 1"),
        (["--set", "images.max_samples=5"], 64, "did you mean 'images.skip.max_samples'"),
        (["--set", "captions.remove_patterns=['(']"], 64, r"remove_patterns: '\(' is not a regular expression"),
        (["--prompts", "nowhere.txt"], 64, "--prompts nowhere.txt: No such file"),
        (["--config", "nowhere.toml"], 64, "config file nowhere.toml: No such file"),
        (["--device", "gpu"], 64, "--device gpu cannot be used"),
        (["--device", "cuda:99"], 64, "--device cuda:99 cannot be used"),
        (["--resolution", "big"], 64, "'--resolution': .*valid integer.*--help"),
        (["--colour"], 64, "(?i)no such option.*--help"),
        (["--manifest", "../up"], 64, "manifest name '../up'"),
        (["--manifest", ""], 64, "manifest name ''"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_settings(
    more: list[str], code: int, pattern: str, tmp_path: Path, pictures: Path, tiny_model: Path, commands: Any
) -> None:
    refused(commands.build(pictures, tmp_path / "store", tiny_model, *more), code, pattern)
    assert not (tmp_path / "store/manifests").exists()


def test_prompts_are_embedded_beside_the_captions(
    tmp_path: Path, pictures: Path, tiny_model: Path, commands: Any, arguments_of: Callable[..., list[str]]
) -> None:
    store, file = tmp_path / "store", tmp_path / "prompts.txt"
    file.write_text("a cat\n\n a cat \n" + "very " * 90 + "\x1b[1mlong\n", encoding="utf-8-sig")
    report = json.loads(commands.build(pictures, store, tiny_model, "--prompts", file).out)
    assert (report["prompts"], report["truncated_prompts"], report["truncated"]) == (2, 1, 0)
    assert report["encoded_captions"] == report["unique_captions"] + 3  # and the empty one
    manifest = open_manifest(store, "main")
    assert list(manifest.settings.prompts) == ["a cat", ("very " * 90 + "\x1b[1mlong")]
    with StoreReader(store) as reader, reader.snapshot() as snapshot:
        for text, key in manifest.settings.prompts.items():
            assert snapshot.read(bytes.fromhex(key)).meta["caption"] == text
    without = json.loads(commands.build(pictures, store, tiny_model).out)
    assert (without["encoded_captions"], without["prompts"]) == (0, 0)
    assert without["digest"] != report["digest"]
    line = [part for part in arguments_of(pictures, store, tiny_model, "--prompts", str(file)) if part != "--json"]
    again = commands.run(*line)
    assert "prompts 2, 1 cut short" in again.out.splitlines()
    file.write_bytes(b"caf\xe9")
    refused(
        commands.build(pictures, store, tiny_model, "--prompts", file), 65, "prompts.txt is not UTF-8 text .at byte 3"
    )


def test_a_name_that_cannot_be_is_said_before_anything_is_encoded(
    tmp_path: Path, pictures: Path, tiny_model: Path, commands: Any
) -> None:
    done = commands.build(pictures, tmp_path / "store", tiny_model, "--manifest", "a b")
    refused(done, 64, "manifest name 'a b'")
    assert done.err.count("\n") == 1
    assert not (tmp_path / "store").exists()


def test_a_config_file_and_the_short_option(tmp_path: Path, pictures: Path, tiny_model: Path, commands: Any) -> None:
    (tmp_path / "config.toml").write_text('[images]\nresolution = 128\nbackground = [1, 2, 3]\n[split]\nsalt = "x"\n')
    done = commands.build(
        pictures, tmp_path / "s", tiny_model, "--config", tmp_path / "config.toml", "--resolution", "96"
    )
    assert done.code == 0
    build = open_manifest(tmp_path / "s", "main").settings.build
    assert build["images"]["background"] == [1, 2, 3]
    assert build["images"]["resolution"] == 64  # `--set` of the test's own comes after `--resolution`
    assert build["split"]["salt"] == "x"


def test_folders_that_are_none(tmp_path: Path, tiny_model: Path, commands: Any) -> None:
    store = tmp_path / "store"
    refused(commands.build(tmp_path / "nowhere", store, tiny_model), 65, "folder .*nowhere: No such file or directory")
    (tmp_path / "file").write_text("")
    refused(commands.build(tmp_path / "file", store, tiny_model), 65, "folder .*file: Not a directory")
    assert not store.exists()


def test_a_folder_without_pictures_says_what_is_there(tmp_path: Path, tiny_model: Path, commands: Any) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    refused(commands.build(empty, tmp_path / "store", tiny_model), 65, "no pictures in empty: it holds no files")
    for name in ("a.json", "b.json", "c.TXT", "README", ".hidden.png"):
        (empty / name).write_text("")
    done = commands.build(empty, tmp_path / "store", tiny_model)
    refused(done, 65, r"5 files seen, none of them pictures by name \(2 \.json, .*\); pictures end in \.avif, ")
    for part in ("1 .txt", "1 (no suffix)", "1 (hidden)"):
        assert part in done.err


def test_pictures_without_captions(tmp_path: Path, tiny_model: Path, commands: Any) -> None:
    folder = write_shapes(tmp_path / "set", 6)
    for index in range(5):
        (folder / f"shape-0000{index}.txt").unlink()
    done = commands.build(folder, tmp_path / "store", tiny_model)
    names = r"shape-00000.png, shape-00001.png, shape-00002.png \.\.\."
    refused(done, 65, rf"5 of 6 pictures have no caption \({names}\): .*\.txt or \.caption, or .*=skip .*=empty")
    skipped = json.loads(commands.build(folder, tmp_path / "s1", tiny_model, "--set", "captions.missing=skip").out)
    assert (skipped["stored"], skipped["skipped_by_reason"]) == (1, {"no caption": 5})
    empty = json.loads(commands.build(folder, tmp_path / "s2", tiny_model, "--set", "captions.missing=empty").out)
    assert (empty["stored"], empty["skipped"], empty["unique_captions"]) == (6, 0, 2)
    (folder / "shape-00005.txt").unlink()
    done = commands.build(folder, tmp_path / "s3", tiny_model, "--set", "captions.missing=skip")
    refused(done, 65, "no picture of set can be used: 6 seen; 6 no caption")


def change_json(path: Path, **values: Any) -> None:
    content = json.loads(path.read_text())
    path.write_text(json.dumps({key: value for key, value in (content | values).items() if value != "gone"}))


def only_bin(folder: Path) -> None:
    (path,) = folder.glob("*.safetensors")
    path.rename(path.with_suffix(".bin"))


def become_a_file(model: Path) -> None:
    shutil.rmtree(model)
    model.write_text("")


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


MODELS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "not there": (shutil.rmtree, "no model folder"),
    "a file": (become_a_file, "no model folder"),
    "no model_index.json": (lambda m: (m / "model_index.json").unlink(), "no model_index.json: .*diffusers layout"),
    "model_index.json cut": (lambda m: cut(m / "model_index.json"), "model_index.json cannot be read"),
    "no vae": (lambda m: shutil.rmtree(m / "vae"), "no folder vae/"),
    "no tokenizer": (lambda m: shutil.rmtree(m / "tokenizer_2"), "no folder tokenizer_2/"),
    "no text encoder": (lambda m: shutil.rmtree(m / "text_encoder"), "no folder text_encoder/"),
    "vae as .bin": (lambda m: only_bin(m / "vae"), r"weights as .*\.bin, which only a pickle loader.*save_pretrained"),
    "text encoder as .bin": (lambda m: only_bin(m / "text_encoder_2"), "only a pickle loader"),
    "another vae": (
        lambda m: change_json(m / "vae/config.json", _class_name="AutoencoderTiny"),
        "is a AutoencoderTiny; this program encodes with an AutoencoderKL",
    ),
    "a vae that shifts": (lambda m: change_json(m / "vae/config.json", shift_factor=0.1), "shifts its latents"),
    "a vae without blocks": (
        lambda m: change_json(m / "vae/config.json", block_out_channels="gone"),
        "not that of an AutoencoderKL: KeyError",
    ),
    "a vae of another size": (
        lambda m: change_json(m / "vae/config.json", block_out_channels=[8, 8, 8, 8]),
        "vae cannot be loaded: .*shape",
    ),
    "a vae cut short": (lambda m: cut(m / "vae/diffusion_pytorch_model.safetensors"), "not a whole safetensors file"),
    "text config": (lambda m: change_json(m / "text_encoder/config.json", hidden_size="gone"), "not those of CLIP"),
    "text encoder of another size": (
        lambda m: change_json(m / "text_encoder/config.json", intermediate_size=100),
        "text_encoder cannot be loaded|lacks weights",
    ),
    "vocabulary cut": (lambda m: cut(m / "tokenizer/vocab.json"), "vocab.json cannot be read"),
    "no vocabulary": (lambda m: (m / "tokenizer/vocab.json").unlink(), "neither tokenizer.json nor vocab.json"),
}


@pytest.mark.parametrize("name", MODELS)
def test_wrong_models(name: str, tmp_path: Path, pictures: Path, tiny_model: Path, commands: Any) -> None:
    change, pattern = MODELS[name]
    model = shutil.copytree(tiny_model, tmp_path / "model")
    change(model)
    refused(commands.build(pictures, tmp_path / "store", model), 65, pattern)
    assert not (tmp_path / "store/manifests").exists()


def test_a_hub_id_without_a_network(tmp_path: Path, pictures: Path, commands: Any) -> None:
    done = commands.build(pictures, tmp_path / "store", Path("nobody/no-model"))
    refused(done, 65, "no model folder nobody/no-model, and the Hub did not give it")


def test_stores_that_cannot_be(tmp_path: Path, pictures: Path, tiny_model: Path, commands: Any) -> None:
    (tmp_path / "file").write_text("")
    refused(commands.build(pictures, tmp_path / "file", tiny_model), 65, "file is a file, not a store")
    refused(commands.build(pictures, tmp_path / "file/store", tiny_model), 74, "file/store: Not a directory")
    refused(commands.build(pictures, pictures, tiny_model), 65, "not a store and not empty .*name a new folder")
    assert sorted(path.suffix for path in pictures.iterdir()) == [".png"] * 4 + [".txt"] * 4
    refused(commands.build(pictures, tmp_path / os.fsdecode(b"caf\xe9"), tiny_model), 64, r"caf\\udce9: .*not UTF-8")
    newer = tmp_path / "newer"
    newer.mkdir()
    (newer / "store.json").write_text('{"format": 99}')
    refused(commands.build(pictures, newer, tiny_model), 65, "store format 99; this program reads 1: update it")


@pytest.mark.skipif(os.geteuid() == 0 and not shutil.which("setpriv"), reason="root may write everywhere")
def test_a_store_that_may_not_be_written(
    tmp_path: Path, pictures: Path, tiny_model: Path, arguments_of: Callable[..., list[str]]
) -> None:
    place = tmp_path / "place"
    place.mkdir(mode=0o555)
    command = [sys.executable, "-m", "cache_builder.cli", *arguments_of(pictures, place / "store", tiny_model)]
    if os.geteuid() == 0:
        command = ["setpriv", "--bounding-set=-dac_override", *command]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (74, "")
    assert done.stderr == f"error: {place / 'store'}: Permission denied\n"


def test_a_name_goes_to_other_pictures_only_when_told(
    tmp_path: Path, pictures: Path, built: Path, tiny_model: Path, commands: Any
) -> None:
    store = shutil.copytree(built, tmp_path / "store")
    refused(commands.build(pictures, store, tiny_model, "--dataset", "other"), 65, "of data sets pictures, .*--replace")
    assert commands.build(pictures, store, tiny_model, "--dataset", "other", "--replace").code == 0
    fewer = shutil.copytree(pictures, tmp_path / "other")
    (fewer / "shape-00000.png").unlink()
    refused(commands.build(fewer, store, tiny_model), 65, "4 samples and would keep 3: .*--allow-shrink")
    assert commands.build(fewer, store, tiny_model, "--allow-shrink").code == 0
    assert commands.build(pictures, store, tiny_model, "--manifest", "second").code == 0
    assert len(open_manifest(store, "main")) == 3
    assert len(open_manifest(store, "second")) == 4


HOSTILE = (
    b"new\nline", b"error: forged\nerror: twice", b"\x1b[2J\x1b[31mred", b"\r\roverwritten", b"caf\xe9", b"\xff\xfe",
    "\u202egnp.exe".encode(), "\u2066\u200b\ufeff".encode(), b"tab\there", b"bell\a", b"$(touch x)`touch y`", b"-rf",
    b"a" * 200, "日本".encode(), b"[bold]rich", b"%s%n{}", b"\x7f", "\u2028line".encode(), b"' or 1", b" ",
)  # fmt: skip


def test_names_and_captions_cannot_forge_output(tmp_path: Path, tiny_model: Path, commands: Any) -> None:
    drawn, folder = write_shapes(tmp_path / "drawn", len(HOSTILE)), tmp_path / "set\n\x1b[1m"
    folder.mkdir()
    readable = 0
    for index, name in enumerate(HOSTILE):
        picture = (drawn / f"shape-{index:05d}.png").read_bytes()
        path = os.fsencode(folder) + b"/" + name
        is_bad = index % 3 == 0
        Path(os.fsdecode(path + b".png")).write_bytes(picture[:-70] if is_bad else picture)
        Path(os.fsdecode(path + b".txt")).write_bytes(b"a caption " + name)
        readable += not is_bad and _is_utf8(name)
    options = [
        str(folder),
        "--store",
        tmp_path / "store",
        "--model",
        tiny_model,
        "--device",
        "cpu",
        "--resolution",
        "64",
    ]
    done = commands.run(*options, "--set", "max_quarantined=1")
    assert (done.code, done.errors) == (0, [])
    assert all(line.isprintable() for line in done.out.split("\n"))
    lines = done.out.splitlines()
    assert lines[0].startswith(f"seen {len(HOSTILE)} = stored {readable} + ")
    assert all(line.startswith(("seen ", "captions ", "  skipped ", "  quarantined ", "manifest ")) for line in lines)
    manifest = open_manifest(tmp_path / "store", "main")
    assert len(manifest) == readable
    assert {row.dataset for row in manifest.rows([0])} == {folder.name}
    refused(commands.run(*options, "--manifest", "other"), 65, "more than max_quarantined = 0.1")
    again = json.loads(commands.run(*options, "--set", "max_quarantined=1", "--json").out)
    assert (again["stored"], again["reused"]) == (0, readable)
    for sidecar in folder.glob("*.txt"):
        sidecar.unlink()
    refused(commands.run(*options), 65, "pictures have no caption")


def _is_utf8(name: bytes) -> bool:
    try:
        name.decode()
    except UnicodeDecodeError:
        return False
    return True


def test_a_data_set_whose_folder_is_not_utf8(tmp_path: Path, pictures: Path, tiny_model: Path, commands: Any) -> None:
    folder = shutil.copytree(pictures, tmp_path / os.fsdecode(b"caf\xe9"))
    assert commands.build(folder, tmp_path / "store", tiny_model).code == 0
    assert open_manifest(tmp_path / "store", "main").settings.datasets == (r"caf\xe9",)


def test_nothing_outside_the_folder_is_read(tmp_path: Path, pictures: Path, tiny_model: Path, commands: Any) -> None:
    secret = shutil.copytree(pictures, tmp_path / "secret")
    (secret / "shape-00002.txt").write_text("a secret caption")
    folder = shutil.copytree(pictures, tmp_path / "set")
    for path in folder.glob("shape-0000[12].*"):
        path.unlink()
    (folder / "folder").symlink_to(secret)
    (folder / "shape-00001.png").symlink_to(secret / "shape-00001.png")
    (folder / "shape-00001.txt").symlink_to(secret / "shape-00001.txt")
    shutil.copy(secret / "shape-00002.png", folder)
    (folder / "shape-00002.txt").symlink_to(secret / "shape-00002.txt")
    (folder / "up").symlink_to("..")
    report = json.loads(commands.build(folder, tmp_path / "store", tiny_model).out)
    assert (report["stored"], report["skipped_by_reason"]) == (2, {"symlink": 1, "caption: symlink": 1})
    assert b"secret" not in (tmp_path / "store/data.mdb").read_bytes()
    link = tmp_path / "link"
    link.symlink_to(folder)  # the root itself may be a link: the user named it
    assert json.loads(commands.build(link, tmp_path / "store", tiny_model).out)["reused"] == 2


class Bomb:
    """Whoever unpickles this leaves a mark."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (str(self.mark),)


def test_pickles_beside_everything_are_never_opened(
    tmp_path: Path, pictures: Path, tiny_model: Path, commands: Any
) -> None:
    mark = tmp_path / "mark"
    bomb = pickle.dumps(Bomb(mark))
    model, folder = shutil.copytree(tiny_model, tmp_path / "model"), shutil.copytree(pictures, tmp_path / "set")
    store = tmp_path / "store"
    assert commands.build(folder, store, model).code == 0
    places = [folder, store, store / "manifests", store / "manifests/main", model]
    places += [path for path in model.iterdir() if path.is_dir()]
    for place in places:
        for name in ("model", "pytorch_model", "diffusion_pytorch_model", "data", "current", "shape-00000"):
            for suffix in (".pt", ".bin", ".ckpt", ".pkl", ".npy", ".pth", ".pickle"):
                (place / (name + suffix)).write_bytes(bomb)
    (folder / "evil.png").write_bytes(bomb)
    (folder / "evil.txt").write_text("evil")
    for sets in ((), ("--set", "images.background=[0, 0, 0]", "--set", "text.chunks=2")):
        done = commands.build(folder, store, model, "--set", "max_quarantined=1", *sets)
        assert (done.code, done.errors) == (0, [])
        assert json.loads(done.out)["quarantined"] == 1
    assert not mark.exists()
    pickle.loads(bomb)  # it does go off where it is opened
    assert mark.exists()


def test_records_of_refused_builds_are_kept(tmp_path: Path, tiny_model: Path, commands: Any) -> None:
    folder, store = write_shapes(tmp_path / "set", 5), tmp_path / "store"
    for index in (1, 3):
        path = folder / f"shape-0000{index}.png"
        path.write_bytes(path.read_bytes()[:-60])
    refused(
        commands.build(folder, store, tiny_model), 65, r"2 of 5 pictures .*shape-00001.png: .*max_quarantined = 0.1"
    )
    assert not (store / "manifests").exists()
    with StoreReader(store) as reader, reader.snapshot():
        pass
    report = json.loads(commands.build(folder, store, tiny_model, "--set", "max_quarantined=0.4").out)
    assert (report["stored"], report["reused"], report["encoded_captions"]) == (0, 3, 0)
    assert [bad["path"] for bad in report["quarantined_files"]] == ["shape-00001.png", "shape-00003.png"]
