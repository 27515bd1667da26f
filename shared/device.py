"""`--device auto`: which accelerator to use."""

from typing import TYPE_CHECKING

from shared.errors import ConfigError

if TYPE_CHECKING:
    import torch


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
