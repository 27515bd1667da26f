"""Several processes that train one expert, begun as a launcher would, and what their run must equal."""

import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from trainer.checkpoint import newest_checkpoint

Start = Callable[..., Any]
Events = Callable[..., list[dict[str, Any]]]
SETS = ("batch=2", "accumulation=4", "loss.caption_dropout=0.3", "log.every=1", "checkpoint.every=3", "eval.share=1")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def start_together(start: Start, arguments: Sequence[list[str]]) -> list[Any]:
    """What a launcher does: a command for each process, each told its place."""
    count = str(len(arguments))
    common = {"WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    common |= {"OMP_NUM_THREADS": "1", "LOCAL_WORLD_SIZE": count}
    return [
        start("train-expert", own, f"process{rank}.txt", {**common, "RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank, own in enumerate(arguments)
    ]


def weights(run: Path, folder: str) -> dict[str, torch.Tensor]:
    checkpoint = newest_checkpoint(run, print)
    assert checkpoint is not None
    return load_file(checkpoint.path / folder / "diffusion_pytorch_model.safetensors")


def assert_same_run(run: Path, whole: Path, events: Events) -> None:
    for kind in ("step", "eval"):  # evaluation comes with checkpoints too, so at other steps in broken runs
        mine, theirs = ({event["step"]: event for event in events(folder, kind)} for folder in (run, whole))
        assert set(mine) >= set(theirs)
        for step, event in theirs.items():
            assert mine[step]["loss"] == pytest.approx(event["loss"], rel=1e-4)
            assert [part[3] for part in mine[step]["bins"]] == [part[3] for part in event["bins"]]  # samples in each
            assert mine[step].get("epoch") == event.get("epoch")
    for folder in ("unet", "ema"):
        for name, tensor in weights(whole, folder).items():
            assert torch.allclose(weights(run, folder)[name], tensor, rtol=1e-3, atol=1e-5), name
