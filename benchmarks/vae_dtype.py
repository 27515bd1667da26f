"""What a VAE loses and gains in half precision: error of its latents and pictures against float32, and speed.

`python -m benchmarks.vae_dtype --model MODEL [--pictures FOLDER] [--device cuda] [--json FILE]` encodes the centre
squares of pictures (drawn ones by default) in float32, bfloat16 and float16, and decodes the latents of each in
float32, so that what is seen is the encoder's error alone. `--random-sdxl` takes SDXL's full-size VAE with random
weights instead: its speed is the real one's, its errors say nothing of it.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import get_args

import numpy as np
import torch

from benchmarks.full_size import VAE
from cache_builder.buckets import plan_crop
from cache_builder.pixels import decode_picture
from demo.model_files import write_diffusers_model
from demo.shapes import write_shapes
from demo.tiny_model import random_weights
from shared.pictures import EXTENSIONS, PixelLimits, PixelRules
from shared.vae import EncodeDtype, Vae


def write_random_sdxl(model: Path) -> Path:
    """A model folder with nothing but SDXL's VAE, its weights random."""
    from diffusers import AutoencoderKL

    weights = random_weights(0, "vae", lambda: AutoencoderKL(**VAE))
    write_diffusers_model(model / "vae", "AutoencoderKL", VAE, weights)
    return model


def read_squares(folder: Path, count: int, size_px: int) -> torch.Tensor:
    """The centre squares of the first pictures of a folder, uint8 [N, size, size, 3]."""
    rules, square = PixelRules(), (size_px, size_px)
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in EXTENSIONS)[:count]
    if not paths:
        raise SystemExit(f"no pictures in {folder}")
    decoded = [decode_picture(path.read_bytes(), rules, PixelLimits()) for path in paths]
    plans = [plan_crop(picture.size_hw, square, "center", (0.5, 0.5)) for picture in decoded]
    return torch.from_numpy(np.stack([each.crop(plan, rules) for each, plan in zip(decoded, plans, strict=True)]))


def encode(vae: Vae, pixels: torch.Tensor, batch: int, rounds: int) -> tuple[torch.Tensor, float]:
    """Means fp32 of all pictures, and pictures per second in the median round."""
    rates = []
    for number in range(rounds + 1):  # the first warms up
        began = time.perf_counter()
        means = torch.cat([vae.encode(piece).mean.cpu() for piece in pixels.split(batch)])
        if number or not rounds:
            rates.append(len(pixels) / (time.perf_counter() - began))
    return means, median(rates)


def psnr_db(one: torch.Tensor, other: torch.Tensor) -> float:
    """Peak signal to noise of uint8 pictures."""
    error = float((one.double() - other.double()).square().mean())
    return float("inf") if error == 0 else 10 * float(np.log10(255**2 / error))


def measure(
    model: Path, pixels: torch.Tensor, device: str, batch: int, rounds: int, *, decoded: bool
) -> dict[str, dict[str, float]]:
    """For each dtype: speed, errors of the latents (in standard deviations of float32's), PSNR of what they show.

    `decoded` is whether to look at what they show; it costs more than encoding.
    """
    results: dict[str, dict[str, float]] = {}
    judge = Vae(model, device)
    exact, pictures = torch.empty(0), torch.empty(0)
    for dtype in get_args(EncodeDtype):
        means, rate = encode(Vae(model, device, dtype), pixels, batch, rounds)
        pieces = means.nan_to_num().split(batch) if decoded else ()
        seen = torch.cat([judge.decode(m * judge.scaling_factor) for m in pieces]) if decoded else pixels
        if dtype == "float32":
            exact, pictures = means, seen
        error = (means - exact).abs() / exact.std()
        results[dtype] = {
            "per_s": rate,
            "max_error": float(error.max()),
            "mean_error": float(error.mean()),
            "finite": float(means.isfinite().double().mean()),
        }
        if decoded:
            results[dtype] |= {"db_to_float32": psnr_db(seen, pictures), "db_to_picture": psnr_db(seen, pixels)}
    return results


def show(results: dict[str, dict[str, float]]) -> None:
    """One line for each dtype."""
    columns = list(results["float32"])
    print(" " * 12 + "".join(f"{name:>15}" for name in columns))
    for dtype, row in results.items():
        print(f"  {dtype:10}" + "".join(f"{row[name]:15.5g}" for name in columns))


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, and keep the numbers where --json says."""
    parser = argparse.ArgumentParser(prog="benchmarks.vae_dtype", description="Half precision of a VAE's encoder.")
    parser.add_argument("--model", type=Path, default=Path("demo/model"), help="default: %(default)s")
    parser.add_argument("--random-sdxl", action="store_true", help="SDXL's VAE with random weights, for its speed")
    parser.add_argument("--pictures", type=Path, help="folder of pictures (default: drawn ones)")
    parser.add_argument("--count", type=int, default=32, help="default: %(default)s")
    parser.add_argument("--size", type=int, default=64, help="of the squares, pixels (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=8, help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=3, help="timed ones, after one to warm up (default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="default: %(default)s")
    parser.add_argument("--json", type=Path, metavar="FILE", help="file for the numbers")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as name:
        model = write_random_sdxl(Path(name) / "model") if options.random_sdxl else options.model
        if options.pictures is None:
            write_shapes(Path(name) / "shapes", count=options.count)
        pixels = read_squares(options.pictures or Path(name) / "shapes", options.count, options.size)
        how = (options.device, options.batch, options.rounds)
        results = measure(model, pixels, *how, decoded=not options.random_sdxl)
    print(f"\n{len(pixels)} squares of {options.size} px, batches of {options.batch}, on {options.device}")
    show(results)
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
