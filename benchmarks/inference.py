"""Time and memory of a pair in our loop, and of the two-pipeline script that people use, on the same weights.

`python -m benchmarks.inference [--json FILE] [--shape small]`. Measured: memory of whole commands in processes of their
own, from after their imports on, with mapped files and without; time of a picture in one process where both take
turns, picture by picture, so that a busy machine slows both (on a GPU, where pictures come in rounds: what more
pictures take more). Counted, without a GPU: the peak of each stage at SSD-1B's size, tensor by tensor on torch's meta
device (inference_memory.py). With --device cuda --shape ssd-1b --precision bf16 --steps 40 the first is measured at
1024 px there (20 GB of files), --offload too.
"""

import argparse
import json
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.inference_memory import compare
from benchmarks.inference_world import INFERENCE_SHAPES, PairOnDisk, write_pair
from benchmarks.own_memory import Watch, own_bytes

PROMPT = "a red circle on white"
SPLIT = 0.65  # 1 - 350 / 1000
GUIDANCE, RESCALE = 5.0, 0.7
MIB = 1 << 20


@dataclass(frozen=True)
class Job:
    """So many pictures with one pair."""

    pair: PairOnDisk
    out: Path
    count: int
    steps: int
    device: str
    precision: str
    offload: bool = False  # ours alone


@dataclass(frozen=True)
class Cost:
    """Of one job: seconds after imports, and the most bytes above what imports take (peak_bytes on a GPU: there)."""

    took_s: float
    peak_bytes: int
    own_bytes: int  # of main memory, and not a file's


def draw_ours(job: Job) -> Iterator[None]:
    """`generate-images`, picture by picture."""
    from trainer.drawing import GenerateRequest
    from trainer.ensemble import DrawSettings
    from trainer.generate import generate

    request = GenerateRequest(
        job.pair.experts, job.pair.model, (PROMPT,), job.out, DrawSettings(job.steps, GUIDANCE),
        count=job.count, height=job.pair.size_px, width=job.pair.size_px, device=job.device, precision=job.precision,
        offload=job.offload,
    )  # fmt: skip
    for _ in generate(request):
        yield


def draw_with_two_pipelines(job: Job) -> Iterator[None]:
    """The script, everything loaded twice, picture by picture."""
    from diffusers import StableDiffusionXLImg2ImgPipeline, StableDiffusionXLPipeline, UniPCMultistepScheduler

    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[job.precision]
    job.out.mkdir(parents=True, exist_ok=True)
    pipelines: list[Any] = []
    for kind, stage in zip((StableDiffusionXLPipeline, StableDiffusionXLImg2ImgPipeline), job.pair.stages, strict=True):
        folder = job.pair.model if job.pair.is_adapter else stage
        pipeline = kind.from_pretrained(folder, use_safetensors=True, dtype=dtype)
        pipeline.scheduler = UniPCMultistepScheduler.from_pretrained(job.pair.model, subfolder="scheduler")
        if job.pair.is_adapter:
            pipeline.load_lora_weights(stage)
        pipeline.set_progress_bar_config(disable=True)
        pipelines.append(pipeline.to(job.device))
    asked = {
        "prompt": PROMPT,
        "num_inference_steps": job.steps,
        "guidance_scale": GUIDANCE,
        "guidance_rescale": RESCALE,
    }
    sizes = {"height": job.pair.size_px, "width": job.pair.size_px}
    for seed in range(job.count):
        generator = torch.Generator().manual_seed(seed)
        half = pipelines[0](**asked, **sizes, denoising_end=SPLIT, output_type="latent", generator=generator).images
        picture = pipelines[1](**asked, denoising_start=SPLIT, image=half, generator=generator).images[0]
        picture.save(job.out / f"{seed}.png")
        yield


WAYS = {"ours": draw_ours, "script": draw_with_two_pipelines}


def in_a_process(work: Callable[..., Any], *given: Any) -> Any:
    """What `work` answers in a process of its own."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_answer, args=(there, work, *given))
    process.start()
    there.close()
    answer = here.recv()
    process.join()
    return answer


def measure(way: str, job: Job) -> Cost:
    """Time and memory of one job."""
    on_gpu = job.device.startswith("cuda")
    before, own_before, watch = 0 if on_gpu else _memory_bytes("VmRSS"), own_bytes(), Watch()
    began_s = time.perf_counter()
    for _ in WAYS[way](job):
        pass
    took_s = time.perf_counter() - began_s
    peak_bytes = (torch.cuda.max_memory_allocated() if on_gpu else _memory_bytes("VmHWM")) - before
    return Cost(took_s, peak_bytes, watch.stop() - own_before)


def take_turns(job: Job) -> dict[str, dict[str, float]]:
    """Seconds of a picture of each way, by the clock and of the processor; the first ones load and are not counted."""
    pictures = {way: draw(replace(job, count=job.count + 1, out=job.out / way)) for way, draw in WAYS.items()}
    for own in pictures.values():
        next(own)
    times: dict[str, list[tuple[float, float]]] = {way: [] for way in WAYS}
    for _ in range(job.count):
        for way, own in pictures.items():
            began_s, began_cpu_s = time.perf_counter(), time.process_time()
            next(own)
            times[way].append((time.perf_counter() - began_s, time.process_time() - began_cpu_s))
    pairs = list(zip(times["ours"], times["script"], strict=True))
    told = {way: {"picture_s": median(t for t, _ in own), "picture_cpu_s": median(c for _, c in own)}
            for way, own in times.items()}  # fmt: skip
    ratio = {"picture_s": median(a / b for (a, _), (b, _) in pairs)}
    return told | {"ratio": ratio | {"picture_cpu_s": median(a / b for (_, a), (_, b) in pairs)}}


def measure_pair(pair: PairOnDisk, folder: Path, options: argparse.Namespace, offload: bool) -> dict[str, Any]:
    """Both ways: memory and time of the whole command, medians over rounds; time of a picture; and the ratios."""
    job = Job(pair, folder / "out", options.count, options.steps, options.device, options.precision, offload)
    found: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    for number in range(options.rounds):
        for way in sorted(WAYS, reverse=bool(number % 2)):  # neither is always the one that comes after
            first = in_a_process(measure, way, replace(job, count=1))
            whole = in_a_process(measure, way, job)
            picture_s = (whole.took_s - first.took_s) / (job.count - 1)
            found[way].append({
                "picture_s": picture_s, "whole_s": whole.took_s,
                "peak_mib": whole.peak_bytes / MIB,
                "own_mib": whole.own_bytes / MIB, "first_own_mib": first.own_bytes / MIB,
            })  # fmt: skip
    keys = ("picture_s", "whole_s", "peak_mib", "own_mib", "first_own_mib")
    rounds = list(zip(found["ours"], found["script"], strict=True))
    told = {way: {key: median(one[key] for one in own) for key in keys} for way, own in found.items()}
    told["ratio"] = {key: median(ours[key] / script[key] for ours, script in rounds) for key in keys}
    if options.device == "cpu":
        for name, better in in_a_process(take_turns, job).items():
            told[name] |= better
    return told


def _answer(end: Connection, work: Callable[..., Any], *given: Any) -> None:
    import diffusers
    import transformers

    import trainer.generate  # noqa: F401

    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    end.send(work(*given))


def _memory_bytes(name: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


def _measured(shape: str, kind: str, one: dict[str, Any]) -> str:
    ours, script, ratio = one["ours"], one["script"], one["ratio"]
    in_cpu_time = f"; in CPU time {ratio['picture_cpu_s']:.3f}" if "picture_cpu_s" in ratio else ""
    return (
        f"measured, {shape}, {kind}: a picture {ours['picture_s']:.2f} s against {script['picture_s']:.2f} "
        f"({ratio['picture_s']:.3f}{in_cpu_time}), all {ours['whole_s']:.1f} against "
        f"{script['whole_s']:.1f} ({ratio['whole_s']:.2f}), memory {ours['peak_mib']:.0f} MiB against "
        f"{script['peak_mib']:.0f} ({ratio['peak_mib']:.2f}), of it the process's own {ours['own_mib']:.0f} against "
        f"{script['own_mib']:.0f} ({ratio['own_mib']:.2f}), of one picture alone {ours['first_own_mib']:.0f} against "
        f"{script['first_own_mib']:.0f} ({ratio['first_own_mib']:.2f})"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, count, print, and keep the numbers where --json says."""
    parser = argparse.ArgumentParser(prog="benchmarks.inference", description="A pair in one loop, or two pipelines.")
    parser.add_argument("--shape", choices=INFERENCE_SHAPES, default="small", help="default: %(default)s")
    parser.add_argument("--device", default="cpu", help="default: %(default)s")
    parser.add_argument("--precision", choices=("fp32", "bf16", "fp16"), default="fp32", help="default: %(default)s")
    parser.add_argument("--count", type=int, default=3, help="pictures, two at least (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=10, help="40 on a GPU (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="default: %(default)s")
    parser.add_argument("--count-only", default="ssd-1b", metavar="SHAPE", help="counted (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="file for the numbers")
    options = parser.parse_args(arguments)
    results: dict[str, Any] = {"counted": compare(options.count_only), "measured": {}, "options": {}}
    results["options"] = {key: str(value) for key, value in vars(options).items()}
    for kind, one in results["counted"].items():
        stages = ", ".join(f"{stage} {one[stage] / 1e9:.2f}" for stage in ("encode", "draw", "decode"))
        print(
            f"counted, {options.count_only}, {kind}: GB {stages}; {one['ratio_bf16']:.2f} of two pipelines in bf16 "
            f"({one['script_bf16'] / 1e9:.2f}), {one['ratio_fp16']:.2f} in fp16 ({one['script_fp16'] / 1e9:.2f})"
        )
    for kind in ("pair", "adapters", *(["offload"] if options.device != "cpu" else [])):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            pair = write_pair(folder, options.shape, kind == "adapters")
            results["measured"][kind] = one = measure_pair(pair, folder, options, kind == "offload")
            print(_measured(options.shape, kind, one))
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
