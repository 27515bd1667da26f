"""The other processes of the trainer's tests: a command line in a process of its own, one thread, warnings are errors.

Run by runpy in a process forked from a server that has torch and diffusers imported already, which saves seconds each
time. The globals it is given are COMMAND ("train-expert", "evaluate-experts" or "cache-build"), ARGUMENTS, STDERR, a
file's path, and ENVIRONMENT.
"""

import os
import resource
import warnings
from typing import Any

import torch

from shared.command import run_command


def _command(name: str) -> Any:
    if name == "cache-build":
        from cache_builder.cli import _cache_build

        return _cache_build
    from trainer.cli import _evaluate_experts, _train_expert

    return _evaluate_experts if name == "evaluate-experts" else _train_expert


given: dict[str, Any] = globals()
os.environ.update(given["ENVIRONMENT"])
if "LIMIT" in given["ENVIRONMENT"]:  # bytes that a file may have: stands in for a full disk
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(given["ENVIRONMENT"]["LIMIT"]), resource.RLIM_INFINITY))
os.dup2(os.open(given["STDERR"], os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
warnings.simplefilter("error")
torch.set_num_threads(1)
run_command(_command(given["COMMAND"]), given["ARGUMENTS"])
