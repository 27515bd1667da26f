"""Training speed on a GPU: SSD-1B and SDXL from their configurations, 1024 px, bf16, from a store of random records.

`python -m benchmarks.gpu_train [--json FILE]`. In one run, in turns, with the same settings:

    trainer     `train-expert`'s own loop, reading the store
    resident    the least there is, on one batch that stays on the GPU: what all else costs
    peer        the order of work of diffusers' train_text_to_image_sdxl.py, written anew from what it does: embeds and
                latents ready in pageable memory, autocast in bf16 over fp32 weights, `.item()` of the loss in every
                micro-batch, clipping, AdamW by its defaults, an average by parameter

beside the rate of a bf16 matmul measured there, of which the trainer's share is told (FLOP counted by torch's counter).
Runs on a CPU too, with --shapes tiny, to be tested.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.bare_loop import LEARNING_RATE, Resident, resident_batch
from benchmarks.train_world import SHAPES, Shape, World, write_world
from shared.runlog import read_events
from shared.schedule import NoiseSchedule, scaled_linear_betas
from trainer.loop import train_expert
from trainer.unet import load_unet

SAMPLES = 64


def wait_for(device: torch.device) -> None:
    """Return once the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def matmul_flops(device: torch.device, edge: int) -> float:
    """FLOP/s of a bf16 matrix product of edge x edge, the best of ten rounds."""
    a, b = (torch.randn(edge, edge, device=device, dtype=torch.bfloat16) for _ in range(2))
    times = []
    for _ in range(10):
        wait_for(device)
        began = time.perf_counter()
        for _ in range(10):
            a @ b
        wait_for(device)
        times.append((time.perf_counter() - began) / 10)
    return 2 * edge**3 / min(times)


def flop_per_sample(shape: Shape) -> float:
    """FLOP of one sample forth and back, without recomputation, counted on the meta device."""
    from diffusers import UNet2DConditionModel

    device = torch.device("meta")
    with device:
        unet = UNet2DConditionModel(**shape.unet)
    with FlopCounterMode(display=False) as counter:
        batch = resident_batch(shape, 1, device, torch.float32)
        added = {"text_embeds": batch.pooled, "time_ids": batch.time_ids}
        t = torch.zeros(1, device=device, dtype=torch.int64)
        torch.autograd.backward(unet(batch.x_0, t, batch.text, added_cond_kwargs=added, return_dict=False)[0].sum())
    return float(counter.get_total_flops())


def trainer_rate(world: World, output: Path, device: torch.device, steps: int, sets: Sequence[str]) -> dict[str, float]:
    """Samples per second of the trainer over the second half of `steps`, and its share of waiting for data."""
    settings = (f"steps={steps}", f"log.every={steps // 2}", *sets)
    train_expert(world.request(output, str(device), *settings))
    last = [event for event in read_events(output / "events.jsonl") if event["event"] == "step"][-1]
    return {"per_s": last["samples_per_s"], "data_wait_share": last["data_wait_share"]}


def timed_rate(step: Callable[[], None], samples: int, steps: int, device: torch.device) -> float:
    """Samples per second of the second half of `steps` steps."""
    for _ in range(steps - steps // 2):
        step()
    wait_for(device)
    began = time.perf_counter()
    for _ in range(steps // 2):
        step()
    wait_for(device)
    return samples * (steps // 2) / (time.perf_counter() - began)


class Loop:
    """The UNet under autocast with AdamW, as the peer has it; `is_peer` false leaves out what the host waits for."""

    def __init__(
        self, world: World, device: torch.device, batch: int, *, checkpointing: bool, is_mixed: bool, is_peer: bool
    ) -> None:
        self._unet = load_unet(world.folder / "model" / "unet", device).train()
        if checkpointing:
            self._unet.enable_gradient_checkpointing()
        self._weights, self._device = list(self._unet.parameters()), device
        self._is_mixed, self._is_peer = is_mixed, is_peer
        self._average = [weight.detach().clone() for weight in self._weights]
        self._adamw = torch.optim.AdamW(self._weights, lr=LEARNING_RATE, fused=None if is_peer else True)
        self._schedule = NoiseSchedule(scaled_linear_betas(1000, 0.00085, 0.012), device=device)
        self._resident = resident_batch(world.shape, batch, device, torch.float32)
        self._host = resident_batch(world.shape, batch, torch.device("cpu"), torch.float32)
        self.logged = 0.0

    def step(self) -> None:
        """One micro-batch and one optimizer step."""
        batch = self._fetch()
        eps = torch.randn_like(batch.x_0)
        t = torch.randint(0, 1000, (len(eps),), device=self._device)
        added = {"text_embeds": batch.pooled, "time_ids": batch.time_ids}
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self._is_mixed):
            x_t = self._schedule.add_noise(batch.x_0, eps, t)
            prediction = self._unet(x_t, t, batch.text, added_cond_kwargs=added, return_dict=False)[0]
        loss = torch.nn.functional.mse_loss(prediction.float(), eps)
        if self._is_peer:
            self.logged = loss.detach().repeat(len(eps)).mean().item()
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(self._weights, 1.0)
        self._adamw.step()
        self._adamw.zero_grad()
        self._take_average()

    def _fetch(self) -> Resident:
        if not self._is_peer:
            return self._resident
        return Resident(*(tensor.to(self._device) for tensor in vars(self._host).values()))

    @torch.no_grad()
    def _take_average(self) -> None:
        if not self._is_peer:
            torch._foreach_lerp_(self._average, self._weights, 0.001)
            return
        for shadow, weight in zip(self._average, self._weights, strict=True):
            shadow.sub_(0.001 * (shadow - weight))


def measure(world: World, folder: Path, device: torch.device, steps: int, batch: int, **how: bool) -> dict[str, float]:
    """Samples per second of trainer, resident batch and peer, and their ratios, at one setting."""
    precision = "bf16-mixed" if how["mixed"] else "fp32"
    sets = [f"batch={batch}", f"precision={precision}", f"gradient_checkpointing={str(how['checkpointing']).lower()}"]
    sets += ["compile=true", "channels_last=true"] if how["compiled"] else []
    ours = trainer_rate(world, folder / f"run-{batch}-{how['checkpointing']}-{how['compiled']}", device, steps, sets)
    rates = {}
    for name, is_peer in (("resident", False), ("peer", True)):
        loop = Loop(world, device, batch, checkpointing=how["checkpointing"], is_mixed=how["mixed"], is_peer=is_peer)
        rates[name] = timed_rate(loop.step, batch, steps, device)
        del loop
    memory = torch.cuda.max_memory_allocated(device) / 1e9 if device.type == "cuda" else 0.0
    return {
        "trainer_per_s": ours["per_s"],
        "data_wait_share": ours["data_wait_share"],
        "resident_per_s": rates["resident"],
        "peer_per_s": rates["peer"],
        "over_peer": ours["per_s"] / rates["peer"],
        "of_resident": ours["per_s"] / rates["resident"],
        "peak_gb": memory,
    }


def sweep(
    world: World, device: torch.device, steps: int, batches: Sequence[int], compiled: Sequence[bool], mixed: bool
) -> list[Any]:
    """`measure` at every batch size, with and without checkpointing and compilation; None where memory is full."""
    results: list[Any] = []
    for batch in batches:
        for checkpointing in (False, True):
            for one in compiled:
                how = {"checkpointing": checkpointing, "compiled": one, "mixed": mixed}
                with tempfile.TemporaryDirectory() as folder:
                    try:
                        reached = measure(world, Path(folder), device, steps, batch, **how)
                    except torch.OutOfMemoryError:
                        reached = None
                results.append({"batch": batch, **how, "reached": reached})
                print(f"  batch {batch} {how}: {reached}", flush=True)
    return results


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, and keep the numbers where --json says."""
    parser = argparse.ArgumentParser(prog="benchmarks.gpu_train", description="Training speed on a GPU.")
    parser.add_argument("--shapes", default="ssd-1b,sdxl", help="of the UNet (default: %(default)s)")
    parser.add_argument("--device", default="cuda", help="default: %(default)s")
    parser.add_argument("--batches", default="1,2,4,8,16", help="samples in a micro-batch (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=20, help="of each way; half are counted (default: %(default)s)")
    parser.add_argument("--fp32", action="store_true", help="in place of bf16, which some CPUs are slow at")
    parser.add_argument("--no-compile", action="store_true", help="leave compiled runs out")
    parser.add_argument("--matmul", type=int, default=8192, help="edge of the matrices (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="file for the numbers")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    results: dict[str, Any] = {
        "device": name,
        "torch": torch.__version__,
        "bf16_flops": matmul_flops(device, options.matmul),
    }
    print(f"{name}: {results['bf16_flops'] / 1e12:.1f} TFLOP/s in a bf16 matmul of {options.matmul}")
    for shape_name in options.shapes.split(","):
        shape = SHAPES[shape_name]
        flop = flop_per_sample(shape)
        with tempfile.TemporaryDirectory() as folder:
            world = write_world(Path(folder), shape, SAMPLES)
            batches = [int(batch) for batch in options.batches.split(",")]
            tried = sweep(
                world,
                device,
                options.steps,
                batches,
                [False] if options.no_compile else [False, True],
                not options.fp32,
            )
        best = max(one["reached"]["trainer_per_s"] for one in tried if one["reached"])
        share = best * flop / results["bf16_flops"]
        results[shape_name] = {"flop_per_sample": flop, "sweep": tried, "best_per_s": best, "share_of_matmul": share}
        print(f"{shape_name}: {best:.2f} samples/s at best, {share:.1%} of the matmul's rate")
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
