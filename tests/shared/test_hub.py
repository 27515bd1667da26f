"""A Hub on this machine's own address: what a model id fetches, and what it never does."""

import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from shared.original_layout import original_big_g, original_clip_l, original_unet, original_vae
from shared.tensor_file import LazyTensor, read_lazily, write_lazily
from shared.text_encoders import tokenizer_digest
from shared.weights import find_weights, read_component_config
from trainer.unet import load_unet, unet_digest

COMMIT = "0" * 39 + "1"
REPOSITORY = "someone/model"


class Hub(http.server.BaseHTTPRequestHandler):
    """The three answers that a download asks for: what files there are, what each is, and its bytes."""

    folder: Path
    asked: list[str]

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def log_message(self, *_: Any) -> None:
        """Say nothing."""

    def _answer(self, with_body: bool) -> None:
        path = self.path.partition("?")[0]
        self.asked.append(path)
        headers = {"Content-Type": "application/octet-stream", "X-Repo-Commit": COMMIT}
        if path.startswith(f"/api/models/{REPOSITORY}"):
            files = sorted(p for p in self.folder.rglob("*") if p.is_file())
            names = [str(file.relative_to(self.folder)) for file in files]
            tree = [
                {
                    "type": "file",
                    "path": name,
                    "size": file.stat().st_size,
                    "oid": hashlib.sha1(name.encode()).hexdigest(),
                }
                for name, file in zip(names, files, strict=True)
            ]
            about = {"id": REPOSITORY, "sha": COMMIT, "siblings": [{"rfilename": name} for name in names]}
            body = json.dumps(tree if "/tree/" in path else about).encode()
            headers["Content-Type"] = "application/json"
        elif path.startswith(f"/{REPOSITORY}/resolve/"):
            body = (self.folder / path.split("/", 5)[5]).read_bytes()
            headers["ETag"] = f'"{hashlib.sha256(body).hexdigest()}"'
        else:
            self.send_error(404)
            return
        self.send_response(200)
        for name, value in (headers | {"Content-Length": str(len(body))}).items():
            self.send_header(name, value)
        self.end_headers()
        if with_body:
            self.wfile.write(body)


@pytest.fixture
def hub(tiny_model: Path) -> Iterator[tuple[str, list[str]]]:
    """Its address, and the paths that were asked for; the model lies there in safetensors and as pickles too."""
    import shutil
    import tempfile

    with tempfile.TemporaryDirectory() as name:
        folder = Path(shutil.copytree(tiny_model, Path(name) / "model"))
        for part in ("unet", "vae", "text_encoder"):
            (folder / part / "diffusion_pytorch_model.bin").write_bytes(b"a pickle")
        (folder / "unet" / "modeling.py").write_text("raise SystemExit('code that came along')")
        (folder / "README.md").write_text("---\nlicense: openrail++\n---\n# A model\n")
        asked: list[str] = []
        handler = type("Served", (Hub,), {"folder": folder, "asked": asked})
        with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
            thread = threading.Thread(target=server.serve_forever, daemon=True)
            thread.start()
            yield f"http://127.0.0.1:{server.server_port}", asked
            server.shutdown()
            thread.join()


def run_with(endpoint: str, cache: Path, code: str, offline: str = "0") -> "subprocess.CompletedProcess[str]":
    own = {"HF_ENDPOINT": endpoint, "HF_HOME": str(cache), "HF_HUB_OFFLINE": offline, "HF_HUB_DISABLE_XET": "1"}
    proxies = {"NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | own | proxies, check=False
    )


def test_an_id_fetches_what_is_needed_and_nothing_that_could_be_executed(
    hub: tuple[str, list[str]], tmp_path: Path, tiny_model: Path
) -> None:
    address, asked = hub
    code = f"""
from shared.model_folder import model_name, read_licence, resolve_model
folder = resolve_model("{REPOSITORY}", ("unet",))
print(folder, model_name(folder), read_licence(folder))
"""
    first = run_with(address, tmp_path / "cache", code)
    assert first.returncode == 0, first.stderr
    folder, name, licence = first.stdout.split()
    assert (name, licence) == (REPOSITORY, "openrail++")
    load_unet(Path(folder) / "unet", torch.device("cpu"))
    assert unet_digest(Path(folder) / "unet") == unet_digest(tiny_model / "unet")
    fetched = {path.split("/", 5)[5] for path in asked if "/resolve/" in path}
    assert fetched == {
        "README.md",
        "model_index.json",
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
    }

    asked.clear()  # what was fetched once serves without a network
    again = run_with("http://127.0.0.1:9", tmp_path / "cache", code, offline="1")
    assert again.returncode == 0, again.stderr
    assert again.stdout == first.stdout
    assert asked == []


def test_an_id_that_the_hub_does_not_know_is_one_line(hub: tuple[str, list[str]], tmp_path: Path) -> None:
    code = """
from shared.errors import DataError
from shared.model_folder import resolve_model
try:
    resolve_model("nobody/nothing", ("unet",))
except DataError as error:
    print(error)
"""
    done = run_with(hub[0], tmp_path / "cache", code)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 1
    assert done.stdout.startswith("no model folder nobody/nothing, and the Hub did not give it: ")


def write_original(model: Path, file: Path) -> Path:
    """A diffusers folder as one file in the original layout."""

    def own(part: str) -> tuple[dict[str, LazyTensor], dict[str, Any]]:
        return read_lazily(find_weights(model / part)), read_component_config(model / part)

    tensors = original_unet(*own("unet")) | original_vae(*own("vae"))
    tensors |= original_clip_l(own("text_encoder")[0]) | original_big_g(own("text_encoder_2")[0], 1)
    write_lazily(file, tensors, {})
    return file


@pytest.mark.parametrize("way", ["config", "default"])
def test_a_single_file_gets_its_settings_and_tokenizers_but_no_weights(
    hub: tuple[str, list[str]], tiny_model: Path, tmp_path: Path, way: str
) -> None:
    address, asked = hub
    file = write_original(tiny_model, tmp_path / "file.safetensors")
    settings = f"{REPOSITORY!r}" if way == "config" else "None"
    code = f"""
from shared import model_folder, single_file
from shared.text_encoders import tokenizer_digest
model_folder.SDXL = "{REPOSITORY}"
if {way!r} == "default":  # heads of these widths are in no shape
    single_file.fitted = lambda part, read, given: dict(read)
folder = model_folder.resolve_model({str(file)!r}, model_folder.COMPONENTS, {settings})
print(tokenizer_digest(folder / "tokenizer"), tokenizer_digest(folder / "tokenizer_2"))
"""
    done = run_with(address, tmp_path / "cache", code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [tokenizer_digest(tiny_model / part) for part in ("tokenizer", "tokenizer_2")]
    fetched = {path.split("/", 5)[5] for path in asked if "/resolve/" in path}
    assert all(name.endswith((".json", ".txt")) for name in fetched)
    assert (way == "default") == all(name.startswith("tokenizer") for name in fetched)
    again = run_with("http://127.0.0.1:9", tmp_path / "cache", code, offline="1")  # the Hub's cache serves it
    assert (again.returncode, again.stdout) == (0, done.stdout), again.stderr
