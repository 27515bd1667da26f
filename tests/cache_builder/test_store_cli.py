"""cache-store as users meet it: reports for people and programs, one line on an error, the documented exit codes."""

import json
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
from shared.preview import read_preview
from shared.store import StoreReader, StoreWriter
from tests.pictures import write_shapes

Build = Callable[..., BuildReport]


@pytest.fixture(scope="module")
def before(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, run_build: Build) -> Path:
    place = tmp_path_factory.mktemp("before")
    run_build([write_shapes(place / "set", 5)], place / "store", tiny_model)
    return place


@pytest.fixture
def store(before: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(before / "store", tmp_path / "store"))


def refused(done: Any, code: int, pattern: str) -> None:
    assert (done.code, done.out) == (code, "")
    assert len(done.errors) == 1
    assert re.search(pattern, done.errors[0])


def test_each_subcommand_tells_people_and_programs(before: Path, store: Path, tmp_path: Path, commands: Any) -> None:
    digest = open_manifest(store, "main").digest
    (before / "set/shape-00001.txt").write_text("another caption\n")
    told: dict[tuple[str, ...], tuple[str, dict[str, Any]]] = {
        ("verify", str(store)): ("sound", {"sound": True, "faults": [], "manifests": 1}),
        ("verify", str(store), "--deep"): ("every record read", {"sound": True, "mode": "deep"}),
        ("stats", str(store)): (f"manifest main {digest[:16]}, current", {"different_captions": 7, "quarantined": 0}),
        ("diff", str(store), str(before / "set")): ("changed shape-00001.png: captions", {"same": 4, "new": []}),
        ("gc", str(store), "--dry-run"): ("would delete 0 records", {"records": 0, "dry_run": True}),
        ("gc", str(store)): ("deleted 0 records", {"records": 0, "dry_run": False}),
        ("show", str(store), "--out", str(tmp_path / "s.png")): ("5 samples of main", {"samples": 5, "damaged": []}),
        ("copy", str(store), "--to", str(tmp_path / "copy")): ("every record read and verified", {"manifests": 1}),
    }
    for arguments, (text, fields) in told.items():
        done = commands.store(*arguments)
        assert (done.code, done.errors) == (0, []), arguments
        assert text in done.out, arguments
        if arguments[0] == "copy":
            shutil.rmtree(tmp_path / "copy")
        report = json.loads(commands.store(*arguments, "--json").out)
        assert {key: report[key] for key in fields} == fields, arguments


def test_stats_add_up(store: Path, commands: Any) -> None:
    with StoreWriter(store) as writer:
        writer.put_many([(b"u" * 16, b"x" * 1000)])
    stats = json.loads(commands.store("stats", store, "--json").out)
    with StoreReader(store) as reader:
        sizes = [size for page in reader.sizes() for _, size in page]
    kinds = stats["kinds"]
    assert sum(kind["records"] for kind in kinds.values()) == len(sizes)
    assert sum(kind["bytes"] for kind in kinds.values()) == stats["record_bytes"] == sum(sizes)
    assert kinds["unnamed damaged"] == {"records": 1, "bytes": 1000}
    assert (kinds["latents"]["records"], kinds["texts"]["records"]) == (5, 7 + 1)  # and the empty prompt
    assert kinds["facts"]["records"] == 5 + 8
    assert stats["record_bytes"] < stats["used_bytes"] <= stats["file_bytes"] == (store / "data.mdb").stat().st_size
    (manifest,) = stats["manifests"]
    assert sum(sum(counts.values()) for counts in manifest["buckets"].values()) == 5
    assert sum(manifest["samples"].values()) == manifest["crops"] == 5
    assert (stats["captions"], stats["different_captions"]) == (7, 7)
    assert 0 < stats["caption_tokens"] < stats["caption_slots"] == 7 * 75
    assert stats["previews"] == [open_manifest(store, "main").settings.vae_digest]


def test_what_is_wrong_ends_with_65(store: Path, tmp_path: Path, commands: Any) -> None:
    row = open_manifest(store, "main").rows([0])[0]
    key = row.variants[0].latent_key
    with StoreWriter(store) as writer:
        writer.delete_many([key])
        writer.put_many([(key, b"bad")])
    assert commands.store("verify", store).code == 0
    shown = commands.store("show", store, "--out", tmp_path / "s.png")
    assert (shown.code, f"damaged set/{row.path}" in shown.out) == (65, True)
    refused(commands.store("copy", store, "--to", tmp_path / "copy"), 65, "--quarantine sets bad records aside")
    deep = commands.store("verify", store, "--deep")
    assert (deep.code, f"needed by main: set/{row.path}" in deep.out, "--quarantine" in deep.out) == (65, True, True)
    aside = commands.store("verify", store, "--quarantine")
    assert (aside.code, "1 record moved to quarantine/" in aside.out) == (65, True)
    assert commands.store("verify", store).code == 65  # until the next build
    assert "quarantine/ holds 1 record" in commands.store("stats", store).out


@pytest.mark.parametrize(
    ("arguments", "code", "pattern"),
    [
        ([], 64, "(?i)missing command"),
        (["tidy"], 64, "(?i)no such command 'tidy'"),
        (["verify"], 64, "(?i)missing argument"),
        (["verify", "STORE", "--quick", "--deep"], 64, "--quick reads no records"),
        (["verify", "nowhere"], 65, "no store at nowhere: make one with cache-build"),
        (["stats", "nowhere"], 65, "no store at nowhere"),
        (["gc", "nowhere"], 65, "no store at nowhere"),
        (["copy", "nowhere", "--to", "x"], 65, "no store at nowhere"),
        (["copy", "STORE", "--to", "STORE"], 64, "is there already"),
        (["copy", "STORE"], 64, "(?i)missing option '--to'"),
        (["diff", "STORE", "nowhere"], 65, "folder nowhere: No such file"),
        (["diff", "STORE", "SET", "--manifest", "other"], 65, "no manifest 'other' in .*there are: main"),
        (["diff", "STORE", "SET", "--dataset", "other"], 64, "no data set 'other'; it has set"),
        (["gc", "STORE", "--drop", "12"], 64, "no manifest of digest '12'"),
        (["show", "STORE", "--out", "x.png", "--model", "nowhere"], 65, "no model folder nowhere"),
        (["show", "STORE", "--out", "x.png", "--count", "0"], 64, "--count"),
        (["show", "STORE", "--out", "x.png", "--source", "nowhere"], 64, "--source nowhere: there is no such folder"),
        (["show", "STORE", "--out", "."], 64, "is a folder: name a PNG file"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_commands(arguments: list[str], code: int, pattern: str, before: Path, commands: Any) -> None:
    places = {"STORE": str(before / "store"), "SET": str(before / "set")}
    refused(commands.store(*(places.get(argument, argument) for argument in arguments)), code, pattern)


def test_a_store_that_is_being_written(store: Path, commands: Any) -> None:
    with StoreWriter(store):
        for arguments in (["gc"], ["verify", "--quarantine"]):
            refused(commands.store(arguments[0], store, *arguments[1:]), 73, r"is being written by pid \d+")
        assert commands.store("verify", store, "--deep").code == 0
        assert commands.store("gc", store, "--dry-run").code == 0


@pytest.mark.parametrize("arguments", [[], ["verify"], ["show"]])
def test_help_is_light(arguments: list[str]) -> None:
    heavy = ("torch", "numpy", "pyarrow", "PIL", "lmdb")
    program = (
        "import sys\n"
        "from cache_builder.cli import cache_store\n"
        f"try:\n    cache_store()\nfinally:\n    print([name for name in {heavy} if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", program, *arguments, "--help"], capture_output=True, text=True)
    assert done.returncode == 0
    assert "--help" in done.stdout
    assert done.stdout.splitlines()[-1] == "[]"


HOSTILE = ("\x1b[2J\x1b[31mred", "new\nline", "error: forged\nsound", "\u202egnp", "[bold]rich", "%s{0}", "tab\tbell\a")


def test_names_and_captions_cannot_forge_output(
    tmp_path: Path, tiny_model: Path, run_build: Build, commands: Any
) -> None:
    drawn, folder = write_shapes(tmp_path / "drawn", len(HOSTILE)), tmp_path / "set\n\x1b[1m"
    folder.mkdir()
    for index, name in enumerate(HOSTILE):
        shutil.copy(drawn / f"shape-{index:05d}.png", folder / f"{name}.png")
        (folder / f"{name}.txt").write_text(f"a caption {name}")
    store = tmp_path / "store\n\x1b[7m"
    run_build([folder], store, tiny_model)
    manifest = open_manifest(store, "main")
    with StoreWriter(store) as writer:
        for row in manifest.rows(range(len(manifest))):
            writer.delete_many([row.variants[0].latent_key])
            writer.put_many([(row.variants[0].latent_key, b"bad")])
    for path in list(folder.glob("*.txt")):
        path.write_text("x" + path.read_text())
    runs = [("verify", store, "--deep"), ("stats", store), ("diff", store, folder), ("gc", store, "--dry-run")]
    runs.append(("show", store, "--out", tmp_path / "s.png", "--source", folder))
    for arguments in runs:
        done = commands.store(*arguments)
        assert done.errors == []
        assert all(line.isprintable() for line in done.out.split("\n")), arguments
        assert "forged" not in {line.strip()[:6] for line in done.out.splitlines()}
        json.loads(commands.store(*arguments, "--json").out)
    assert done.code == 65


# --- the preview that a build leaves ---


def test_a_build_leaves_a_preview_of_its_vae_and_only_the_first(
    before: Path, tmp_path: Path, tiny_model: Path, run_build: Build
) -> None:
    store = Path(shutil.copytree(before / "store", tmp_path / "store"))
    digest = open_manifest(store, "main").settings.vae_digest
    first = read_preview(store, digest)
    assert first is not None
    assert (first.pictures, first.weights.shape) == (5, (4, 3))
    card = (store / "store.json").read_bytes()
    run_build([before / "set"], store, tiny_model)
    run_build([write_shapes(tmp_path / "more", 3, seed=4)], store, tiny_model, manifest="more")
    assert (store / "store.json").read_bytes() == card
    model = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    config = json.loads((model / "vae/config.json").read_text())
    (model / "vae/config.json").write_text(json.dumps(config | {"norm_num_groups": 2}))
    run_build([before / "set"], store, model, manifest="other")
    assert json.loads((store / "store.json").read_text())["previews"].keys() == {
        digest,
        open_manifest(store, "other").settings.vae_digest,
    }
