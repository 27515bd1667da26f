"""Convolutions of large pictures in strips on a CPU: less memory, the same bits. Used by vae.py.

oneDNN copies all that a convolution reads and writes into a layout of its own: 2 GB in one convolution of SDXL's
decoder, of a picture of 1024 px. Of a strip it is little, and it takes no longer.
"""

from functools import partial

from torch import Tensor, nn
from torch.nn import functional

STRIP_ROWS = 64  # with fewer, oneDNN chooses other kernels, whose last bits differ
STRIPS_FROM_BYTES = 64 << 20  # of what is read; smaller has little to gain


def convolve_in_strips(network: nn.Module) -> None:
    """Have every convolution that keeps height and width go by strips where that saves memory."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d) and _keeps_size(module):
            module.forward = partial(_in_strips, module)  # type: ignore[method-assign]


def _keeps_size(conv: nn.Conv2d) -> bool:
    """Whether each pixel is made of an odd square of pixels around it."""
    edge = conv.kernel_size[0]
    is_square = edge % 2 == 1 and conv.kernel_size == (edge, edge) and conv.padding == (edge // 2, edge // 2)
    return is_square and conv.stride == conv.dilation == (1, 1) and conv.groups == 1 and conv.padding_mode == "zeros"


def _in_strips(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """The convolution of x [B, C, H, W]."""
    if x.device.type != "cpu" or x.nbytes < STRIPS_FROM_BYTES:
        return functional.conv2d(x, conv.weight, conv.bias, padding=conv.padding)
    reach, height = conv.kernel_size[0] // 2, x.shape[2]
    out = x.new_empty(x.shape[0], conv.out_channels, height, x.shape[3])
    for low in range(0, height, STRIP_ROWS):
        high = min(low + STRIP_ROWS, height)
        above, below = min(reach, low), min(reach, height - high)
        strip = functional.pad(x[:, :, low - above : high + below], (0, 0, reach - above, reach - below))
        out[:, :, low:high] = functional.conv2d(strip, conv.weight, conv.bias, padding=(0, reach))
    return out
