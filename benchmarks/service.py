"""How long a picture takes from the folder into a sealed manifest: `python -m benchmarks.service`.

A service keeps a folder with the tiny model; pictures are dropped one by one, and what is said is how long after the
end of the quiet period the manifest with the picture was sealed, beside what an ordinary build of the same takes.
"""

import argparse
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from demo.shapes import write_shapes
from demo.tiny_model import write_tiny_model
from shared.manifest import current_digest
from shared.runlog import read_events

QUIET_S = 2.0
CONFIG = """
store = "store"
model = "model"
device = "cpu"
service = {{quiet_s = {quiet_s}}}
page = {{enabled = false}}
images = {{resolution = 64, step = 16}}
[[datasets]]
id = "shapes"
root = "shapes"
"""
SERVE = "from cache_builder.cli import cache_serve; cache_serve()"
BUILD = "from cache_builder.cli import cache_build; cache_build()"


def wait_until_another(store: Path, digest: str | None) -> str:
    """The first current digest that is another one."""
    while (now := current_digest(store, "main")) in (digest, None):
        time.sleep(0.01)
    return str(now)


def dropped_to_sealed(folder: Path, more: Path, count: int, ready_s: float) -> list[float]:
    """Seconds from the end of the quiet period to a seal, for each of `count` pictures that are dropped in turn."""
    store, taken = folder / "store", []
    digest = wait_until_another(store, None)
    for picture in sorted(more.glob("*.png"))[:count]:
        time.sleep(ready_s)
        for file in (picture.with_suffix(".txt"), picture):
            shutil.copy(file, folder / "shapes" / f"new-{file.name}")
        began_s = time.monotonic()
        digest = wait_until_another(store, digest)
        taken.append(time.monotonic() - began_s - QUIET_S)
    return taken


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pictures", type=int, default=1000, help="in the folder from the start")
    parser.add_argument("--dropped", type=int, default=5)
    parser.add_argument("--ready", type=float, default=15.0, help="seconds for the next build's process to be ready")
    told = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder, more = Path(place), Path(place) / "more"
        write_tiny_model(folder / "model")
        write_shapes(folder / "shapes", count=told.pictures)
        write_shapes(more, count=told.dropped, seed=1)
        (folder / "serve.toml").write_text(CONFIG.format(quiet_s=QUIET_S))
        service = subprocess.Popen([sys.executable, "-c", SERVE, "--config", str(folder / "serve.toml")])
        try:
            taken = dropped_to_sealed(folder, more, told.dropped, told.ready)
        finally:
            service.terminate()
            service.wait()
        began_s = time.monotonic()
        command = [
            sys.executable,
            "-c",
            BUILD,
            str(folder / "shapes"),
            "--store",
            str(folder / "store"),
            "--device",
            "cpu",
        ]
        command += ["--model", str(folder / "model"), "--set", "images.resolution=64", "--set", "images.step=16"]
        subprocess.run(command, check=True, capture_output=True)
        alone_s = time.monotonic() - began_s
        builds = [
            event["seconds"]
            for event in read_events(folder / "store/service/events.jsonl")
            if event["event"] == "build_end"
        ]
    print(f"{told.pictures} pictures, tiny model, first build {builds[0]:.1f} s")
    print(
        f"dropped to sealed, after the quiet period: median {statistics.median(taken):.2f} s, most {max(taken):.2f} s"
    )
    print(f"cache-build of the same by hand, nothing to encode: {alone_s:.1f} s")


if __name__ == "__main__":
    main()
