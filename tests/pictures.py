"""Drawn pictures for tests that count captions: one caption each, and a second one for every third picture."""

from pathlib import Path

from demo import shapes


def write_shapes(out: Path, count: int = 512, seed: int = 0) -> Path:
    """`demo.shapes.write_shapes` with fewer lines in its sidecars."""
    shapes.write_shapes(out, count=count, seed=seed)
    for index in range(count):
        sidecar = out / f"shape-{index:05d}.txt"
        lines = sidecar.read_text(encoding="utf-8").splitlines()
        sidecar.write_text("\n".join(lines[: 2 if index % 3 == 0 else 1]) + "\n", encoding="utf-8")
    return out
