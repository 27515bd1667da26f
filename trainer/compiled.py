"""torch.compile over the UNet's repeated blocks: compiled before the first step for every bucket, or an error.

Compiling blocks in place of the whole takes minutes less and leaves the names of the weights as they are. Past its
limit of recompilations torch runs code uncompiled without a word; here that ends the run.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from shared.conditioning import TEXT_LENGTH, PromptEmbeds
from shared.errors import ConfigError
from shared.manifest_rows import ManifestSettings
from trainer.loss import Predict

# Kinds of block (by width and heads) x sizes (one, then any) x training or evaluation, with room to spare.
RECOMPILE_LIMIT = 64


def compile_blocks(unet: Any, backend: str = "inductor", limit: int = RECOMPILE_LIMIT) -> None:
    """Compile each kind of repeated block of `unet` when it is first called; at most `limit` times."""
    import torch._dynamo.config as settings

    settings.recompile_limit = limit
    settings.fail_on_recompile_limit_hit = True
    unet.compile_repeated_blocks(backend=backend)


def warm_up(
    unet: torch.nn.Module,
    predict: Predict,
    buckets_hw: Iterable[tuple[int, int]],
    batch: int,
    known: ManifestSettings,
    device: torch.device,
) -> None:
    """A pass forth and back, and one of evaluation, of zeros of each bucket's size; weights and gradients stay."""
    trained = [parameter for parameter in unet.parameters() if parameter.requires_grad]
    for h, w in buckets_hw:
        x = torch.zeros(batch, known.latent_channels, h // known.downscale, w // known.downscale, device=device)
        width, length = sum(known.text_widths), known.text_chunks * TEXT_LENGTH
        text = PromptEmbeds(
            torch.zeros(batch, length, width, device=device), torch.zeros(batch, known.pooled_width, device=device)
        )
        t, ids = torch.zeros(batch, dtype=torch.int64, device=device), torch.zeros(batch, 6, device=device)
        torch.autograd.grad(predict(x, t, text, ids).float().mean(), trained, allow_unused=True)
        unet.eval()
        with torch.no_grad():
            predict(x, t, text, ids)
        unet.train()


@contextmanager
def recompiling_is_an_error(is_compiled: bool) -> Iterator[None]:
    """Raise ConfigError in here where torch would give up compiling and run on without."""
    if not is_compiled:
        yield
        return
    from torch._dynamo.exc import FailOnRecompileLimitHit

    try:
        yield
    except FailOnRecompileLimitHit:
        raise ConfigError(
            "compile = true: the UNet was compiled too many times over for its sizes and settings, and torch would run "
            "on without: set compile = false, or build with fewer buckets"
        ) from None
