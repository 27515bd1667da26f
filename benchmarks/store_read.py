"""How fast training batches are put together from a warm store, beside other ways to keep the same tensors.

`python -m benchmarks.store_read [--json FILE]` writes a data set of random tensors in SDXL's shapes in each layout to a
temporary folder, then reads batches of it in random order, the layouts in turns, on one thread. Ratios of one run are
what can be compared; rates depend on the machine.

    plain copy    the same bytes out of one memory-mapped file into the batch: what the memory allows
    store         StoreReader.snapshot().copy_into, every checksum verified
    unchecked     the same with the checksum left out: what the checks cost
    safetensors   a file for each sample
    torch.load    two files for each sample, latents and text embeds
    MDS           mosaicml-streaming's shards, where --peer-python names an environment that has it
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from benchmarks.timing import Rate, take_turns
from shared.record import encode_record
from shared.store import StoreReader, StoreWriter

Array = np.ndarray[Any, np.dtype[Any]]
Layout = Mapping[str, Mapping[str, tuple[int, ...]]]  # record -> tensor -> shape, fp16

TEXT = {"prompt_embeds": (77, 2048), "pooled_prompt_embeds": (1280,)}
SAMPLES: Layout = {"latents": {"mean": (4, 128, 128)}, "text": TEXT}
MOMENTS: Layout = {"latents": {"mean": (4, 128, 128), "logvar": (4, 128, 128)}, "text": TEXT}
SMALL: Layout = {
    "latents": {"mean": (4, 8, 8), "logvar": (4, 8, 8)},
    "text": {"prompt_embeds": (32, 128), "pooled_prompt_embeds": (64,)},
}
BATCH = 8


def sample_bytes(layout: Layout) -> int:
    """Bytes of one sample's tensors."""
    return sum(2 * int(np.prod(shape)) for tensors in layout.values() for shape in tensors.values())


class Batches:
    """Random batches of one data set, in buffers that are used again and again."""

    def __init__(self, layout: Layout, count: int) -> None:
        self.layout, self.count = layout, count
        self._rng = random.Random(0)
        shapes = [(record, name, shape) for record, tensors in layout.items() for name, shape in tensors.items()]
        self.buffers = {(record, name): np.zeros((BATCH, *shape), np.float16) for record, name, shape in shapes}

    def draw(self) -> list[int]:
        """Which samples come next."""
        return self._rng.sample(range(self.count), BATCH)

    def targets(self, record: str, row: int) -> dict[str, Array]:
        """Where the tensors of `record` of the batch's sample number `row` belong."""
        return {name: self.buffers[record, name][row] for name in self.layout[record]}


def key_of(record: str, index: int) -> bytes:
    """The key under which the benchmark's store holds a record."""
    return f"{record[0]}{index:015d}".encode()


def tensors_of(layout: Layout, record: str, index: int) -> dict[str, Array]:
    """Random bits that are finite halves, the same for every layout."""
    rng = np.random.default_rng([index, len(record)])
    shapes = layout[record].items()
    return {name: rng.integers(0, 0x7C00, shape, np.uint16).view(np.float16) for name, shape in shapes}


def write_layouts(folder: Path, layout: Layout, count: int, peers: Sequence[str]) -> None:
    """The data set in every layout that is asked for."""
    with StoreWriter(folder / "store") as store, (folder / "plain").open("wb") as plain:
        for index in range(count):
            made = {record: tensors_of(layout, record, index) for record in layout}
            framed = [(key_of(r, index), encode_record(key_of(r, index), r, made[r], {})) for r in layout]
            store.put_many(framed)
            for tensors in made.values():
                plain.write(b"".join(tensor.tobytes() for tensor in tensors.values()))
            for peer in peers:
                WRITERS[peer](folder, index, made)


def _write_safetensors(folder: Path, index: int, made: dict[str, dict[str, Array]]) -> None:
    (folder / "safetensors").mkdir(exist_ok=True)
    flat = {name: torch.from_numpy(tensor) for tensors in made.values() for name, tensor in tensors.items()}
    save_file(flat, folder / "safetensors" / f"{index}.safetensors")


def _write_torch(folder: Path, index: int, made: dict[str, dict[str, Array]]) -> None:
    (folder / "torch").mkdir(exist_ok=True)
    for record, tensors in made.items():
        named = {name: torch.from_numpy(tensor) for name, tensor in tensors.items()}
        torch.save(named, folder / "torch" / f"{index}.{record}.pt")


WRITERS: dict[str, Callable[[Path, int, dict[str, dict[str, Array]]], None]] = {
    "safetensors": _write_safetensors,
    "torch.load": _write_torch,
}


def plain_copy(folder: Path, layout: Layout, batches: Batches) -> Callable[[], int]:
    """Rows of bytes out of a memory-mapped file: no names, no checks, no shapes."""
    size = sample_bytes(layout)
    rows = np.memmap(folder / "plain", np.uint8, "r").reshape(-1, size)
    buffer = np.zeros((BATCH, size), np.uint8)

    def read() -> int:
        for row, index in enumerate(batches.draw()):
            np.copyto(buffer[row], rows[index])
        return BATCH

    return read


def from_store(
    store: StoreReader, layout: Layout, batches: Batches, indices: Sequence[int] | None = None
) -> Callable[[], int]:
    """What trainer.data does for each batch; of `indices` or drawn at random."""

    def read() -> int:
        with store.snapshot() as snapshot:
            for row, index in enumerate(indices or batches.draw()):
                for record in layout:
                    snapshot.copy_into(key_of(record, index), batches.targets(record, row))
        return BATCH

    return read


def unchecked(read: Callable[[], int]) -> Callable[[], int]:
    """The same with every checksum taken for right."""

    def run() -> int:
        with patch("shared.record.xxhash.xxh3_128", _Taken):
            return read()

    return run


class _Taken:
    """A checksum that costs nothing and equals whatever stands in the record."""

    def __init__(self, _: object = b"") -> None:
        pass

    def update(self, _: object) -> None:
        """Nothing."""

    def digest(self) -> "_Taken":
        return self

    def __ne__(self, _: object) -> bool:
        return False

    __hash__ = None  # type: ignore[assignment]


def from_safetensors(folder: Path, layout: Layout, batches: Batches) -> Callable[[], int]:
    """A file for each sample."""

    def read() -> int:
        for row, index in enumerate(batches.draw()):
            tensors = load_file(folder / "safetensors" / f"{index}.safetensors")
            for record, names in layout.items():
                for name in names:
                    torch.from_numpy(batches.buffers[record, name][row]).copy_(tensors[name])
        return BATCH

    return read


def from_torch(folder: Path, layout: Layout, batches: Batches) -> Callable[[], int]:
    """Two files for each sample."""

    def read() -> int:
        for row, index in enumerate(batches.draw()):
            for record, names in layout.items():
                tensors = torch.load(folder / "torch" / f"{index}.{record}.pt", weights_only=True)
                for name in names:
                    torch.from_numpy(batches.buffers[record, name][row]).copy_(tensors[name])
        return BATCH

    return read


def measure(layout: Layout, count: int, rounds: int, peers: Sequence[str], peer_python: str | None) -> dict[str, Rate]:
    """Samples per second of every layout."""
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        folder = Path(name)
        write_layouts(folder, layout, count, peers)
        batches = Batches(layout, count)
        store = from_store(stack.enter_context(StoreReader(folder / "store")), layout, batches)
        ways = {"plain copy": plain_copy(folder, layout, batches), "store": store, "unchecked": unchecked(store)}
        if "safetensors" in peers:
            ways["safetensors"] = from_safetensors(folder, layout, batches)
        if "torch.load" in peers:
            ways["torch.load"] = from_torch(folder, layout, batches)
        if peer_python:
            ways["MDS"] = stack.enter_context(Mds(peer_python, folder, layout, count))
        return take_turns(ways, rounds)


class Mds:
    """mosaicml-streaming in a process of its own environment, asked for batches over a pipe."""

    def __init__(self, python: str, folder: Path, layout: Layout, count: int) -> None:
        script = Path(__file__).with_name("mds_peer.py")
        command = [python, str(script), str(folder / "plain"), str(folder / "mds"), json.dumps(layout), str(count)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._answer()

    def __call__(self) -> int:
        """Eight batches, so that the pipe costs nothing."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{BATCH} {BATCH}\n")
        self._process.stdin.flush()
        return self._answer()

    def __enter__(self) -> "Mds":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()

    def _answer(self) -> int:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("the peer's process ended")
        return int(line)


def show(title: str, rates: Mapping[str, Rate], size: int) -> None:
    """One table: samples and bytes per second, and what the store's rate is of each."""
    ours = rates["store"].median
    print(f"\n{title}, {size / 1024:.1f} KiB a sample, batches of {BATCH}")
    print(f"  {'':12} {'samples/s':>10} {'GB/s':>6}  store / this")
    for name, rate in rates.items():
        print(f"  {name:12} {rate.median:10.0f} {rate.median * size / 1e9:6.2f}  {ours / rate.median:8.2f}")


def main() -> int:
    """Measure, print, and keep the numbers where --json says."""
    parser = argparse.ArgumentParser(prog="benchmarks.store_read", description="Rates of reading training batches.")
    parser.add_argument("--count", type=int, default=1000, help="samples of each size (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=7, help="default: %(default)s")
    parser.add_argument("--peer-python", metavar="PYTHON", help="Python of an environment with mosaicml-streaming")
    parser.add_argument("--json", type=Path, metavar="FILE", help="file for the numbers")
    options = parser.parse_args()
    torch.set_num_threads(1)
    peers = list(WRITERS)
    results: dict[str, Any] = {}
    for title, layout in (("latent sample", SAMPLES), ("moments", MOMENTS)):
        rates = measure(layout, options.count, options.rounds, peers, options.peer_python)
        show(title, rates, sample_bytes(layout))
        results[title] = {name: vars(rate) for name, rate in rates.items()}
    rates = measure(SMALL, 20 * options.count, options.rounds, (), None)
    show("small records", rates, sample_bytes(SMALL))
    results["small"] = {name: vars(rate) for name, rate in rates.items()}
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
