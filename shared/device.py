"""`--device auto`: which accelerator to use; and what it says when its memory is full."""

import ctypes
from typing import TYPE_CHECKING

from shared.errors import ConfigError

if TYPE_CHECKING:
    import torch

# Some allocators, and libraries under torch that allocate for themselves, raise a plain RuntimeError.
_FULL = ("DefaultCPUAllocator", "not enough memory", "out of memory", "_ALLOC_FAILED")


def choose_device(setting: str) -> "torch.device":
    """The device of "auto" (cuda, else mps, else cpu) or of a torch name; raises ConfigError where it is not there."""
    import torch

    if setting == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(setting)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(f"--device {setting} cannot be used: {reason}") from None
    return device


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` says that a device, or the CPU, has no memory left for a tensor."""
    import torch

    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _FULL)


def free_unused_memory() -> None:
    """Give back what torch keeps of a GPU's memory, and glibc of main memory, without using it.

    Of weights below 32 MiB, as most are, glibc gives back nothing by itself while anything lies above them.
    """
    import torch

    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # other C libraries have none
    if trim is not None:
        trim(0)
