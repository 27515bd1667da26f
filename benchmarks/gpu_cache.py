"""How fast pictures and captions are encoded on a GPU, by models of SDXL's full size with random weights.

`python -m benchmarks.gpu_cache [--json FILE]`:

    vae     pictures per second of the VAE's encoder alone, from pixels on the host to latents there
    text    captions per second of both text encoders
    build   pictures per second of a build's second pass, JPEG to store, and how much of that time the encoder works

Runs on a CPU too, with --small, which takes the tiny model, to be tested.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.cache_encode import Free, World
from benchmarks.vae_dtype import write_random_sdxl
from cache_builder.encode import Job, Records, SampleEncoder
from demo.model_files import EOS, make_vocabulary, text_name, text_settings, write_transformer
from demo.tiny_model import random_weights, write_tiny_model
from shared.text_encoders import TextEncoders
from shared.vae import EncodeDtype, Vae

TOWERS = {  # width, layers, heads, activation, padding: CLIP-L and OpenCLIP bigG
    "text_encoder": (768, 12, 12, "quick_gelu", EOS),
    "text_encoder_2": (1280, 32, 20, "gelu", "!"),
}


class Timed(Free):
    """The real encoder; notes when it works, as the benchmark's stand-ins do."""

    def __init__(self, encoder: SampleEncoder) -> None:
        super().__init__(0)
        self._encoder = encoder

    def encode(self, job: Job) -> Records:
        """The encoder's records, which are on the host: nothing is left to wait for."""
        began = time.perf_counter()
        records = self._encoder.encode(job)
        self.busy.append((began, time.perf_counter()))
        return records


def write_full_size(folder: Path) -> Path:
    """SDXL's VAE and text encoders with random weights; the tokenizers are the small world's."""
    import transformers

    model = write_tiny_model(folder)
    write_random_sdxl(model)
    for name, (width, layers, heads, activation, pad) in TOWERS.items():
        cls = transformers.CLIPTextModel if name == "text_encoder" else transformers.CLIPTextModelWithProjection
        config = transformers.CLIPTextConfig(
            **text_settings(make_vocabulary()[0], pad),
            hidden_size=width,
            intermediate_size=4 * width,
            projection_dim=width,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            hidden_act=activation,
        )
        weights = random_weights(0, name, lambda cls=cls, config=config: cls(config))
        write_transformer(model / name, cls.__name__, config, {text_name(key): t for key, t in weights.items()})
    return model


def rate_of(work: Callable[[], int], rounds: int) -> float:
    """Things per second in the median round; results are on the host, so nothing is left to wait for."""
    rates = []
    for number in range(rounds + 1):
        began = time.perf_counter()
        done = work()
        if number:  # the first warms up
            rates.append(done / (time.perf_counter() - began))
    return median(rates)


def vae_rates(
    model: Path, device: str, dtype: EncodeDtype, size_px: int, batches: Sequence[int], rounds: int
) -> dict[str, float | None]:
    """Pictures per second by batch size; None where memory is full."""
    vae = Vae(model, device, dtype)
    reached: dict[str, float | None] = {}
    for batch in batches:
        pixels = torch.randint(0, 256, (batch, size_px, size_px, 3), dtype=torch.uint8)

        def encode(pixels: torch.Tensor = pixels) -> int:
            return len(vae.encode(pixels).mean.cpu())

        try:
            reached[str(batch)] = rate_of(encode, rounds)
        except torch.OutOfMemoryError:
            reached[str(batch)] = None
    return reached


def text_rates(model: Path, device: str, batches: Sequence[int], rounds: int) -> dict[str, float]:
    """Captions per second by batch size."""
    encoders = TextEncoders(model, device)
    captions = [f"a red circle above {index} blue squares" for index in range(max(batches))]

    def encode(batch: int) -> int:
        return len(encoders.encode(captions[:batch]).prompt_embeds.cpu())

    return {str(batch): rate_of(lambda batch=batch: encode(batch), rounds) for batch in batches}


def build_rate(
    model: Path, device: str, dtype: EncodeDtype, count: int, size_px: int, threads: int
) -> dict[str, float]:
    """Pictures per second of the second pass of a build, and the share of it in which the encoder works."""
    with tempfile.TemporaryDirectory() as folder:
        world = World(Path(folder), count, size_px / 1024, size_px, threads)
        world.build(Timed(SampleEncoder(model, device, dtype, "moments", 1)))  # loads the VAE and warms up
        encoder = Timed(SampleEncoder(model, device, dtype, "moments", 1))
        began = time.perf_counter()
        world.build(encoder)
        took_s = time.perf_counter() - began
    first, last = encoder.busy[0][0], encoder.busy[-1][1]
    return {"per_s": count / took_s, "per_s_once_loaded": count / (last - first), "busy_share": encoder.busy_share()}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, and keep the numbers where --json says."""
    parser = argparse.ArgumentParser(prog="benchmarks.gpu_cache", description="Encoding speed on a GPU.")
    parser.add_argument("--device", default="cuda", help="default: %(default)s")
    parser.add_argument("--small", action="store_true", help="the tiny model in place of SDXL's sizes")
    parser.add_argument("--dtype", default="bfloat16", help="of the VAE (default: %(default)s)")
    parser.add_argument("--size", type=int, default=1024, help="of the pictures, pixels (default: %(default)s)")
    parser.add_argument("--batches", default="1,4,8,16", help="pictures at a time (default: %(default)s)")
    parser.add_argument("--count", type=int, default=512, help="pictures of the build (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=8, help="that decode (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="default: %(default)s")
    parser.add_argument("--json", type=Path, metavar="FILE", help="file for the numbers")
    options = parser.parse_args(arguments)
    batches = [int(batch) for batch in options.batches.split(",")]
    on_gpu = torch.device(options.device).type == "cuda"
    results: dict[str, Any] = {"device": torch.cuda.get_device_name() if on_gpu else "CPU", "torch": torch.__version__}
    with tempfile.TemporaryDirectory() as name:
        model = write_tiny_model(Path(name)) if options.small else write_full_size(Path(name))
        how = (model, options.device, options.dtype)
        results["vae"] = vae_rates(*how, options.size, batches, options.rounds)
        results["text"] = text_rates(model, options.device, batches, options.rounds)
        results["build"] = build_rate(*how, options.count, options.size, options.threads)
    for what, reached in results.items():
        print(f"{what}: {reached}")
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
