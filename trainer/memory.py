"""What training takes of a GPU's memory, counted tensor by tensor on torch's meta device: no GPU, no bytes, no weights.

Every storage that a micro-batch or two make, forth and back, is counted from its birth to its death, so the peak is
that of the real order of work. Attention counts as the fused kernels do it: output and one number per row, no scores.
Not counted: fragmentation; layer norms that bf16-mixed computes in fp32. Assumed: RESERVED_BYTES.
"""

import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from shared.conditioning import TEXT_LENGTH, PromptEmbeds
from shared.manifest_rows import ManifestSettings
from trainer.config import ExpertConfig
from trainer.optimizer_config import OptimizerConfig
from trainer.torch_rules import multiplies
from trainer.unet import ConditionedUnet, choose_layout, unet_on_meta

RESERVED_BYTES = 700_000_000  # CUDA context, cuDNN's and cuBLAS's workspaces: what is usual, not what was measured

# A pass over one micro-batch of the UNet: its scalar loss.
Pass = Callable[[], Tensor]


@dataclass(frozen=True)
class Memory:
    """Bytes on the device in training."""

    weights: int  # with the copy in bf16 that autocast makes of them
    state: int  # the optimizer's
    average: int
    passes: int  # peak of activations and gradients together, over the micro-batches of a step
    step: int  # what the optimizer takes besides while it steps
    reserved: int = RESERVED_BYTES

    @property
    def total(self) -> int:
        """The peak: of the passes or of the step, which does not need the activations."""
        return self.weights + self.state + self.average + max(self.passes, self.step) + self.reserved


def training_memory(
    unet_config: dict[str, Any], config: ExpertConfig, known: ManifestSettings, bucket_hw: tuple[int, int]
) -> Memory:
    """Memory of training the whole of a UNet on pictures of one bucket, px, in SDXL's layout or the refiner's."""
    unet = unet_on_meta(unet_config, torch.float32 if config.precision == "fp32" else torch.bfloat16).train()
    return count_memory(unet, config, pass_on_meta(unet, config, known, bucket_hw))


def pass_on_meta(unet: Any, config: ExpertConfig, known: ManifestSettings, bucket_hw: tuple[int, int]) -> Pass:
    """A micro-batch of one bucket, px, through `unet`, to a loss of no meaning."""
    layout = choose_layout(dict(unet.config), known.text_widths, known.pooled_width)
    model = ConditionedUnet(unet, layout, known.text_widths[1])
    batch, (h, w) = config.batch, (edge // known.downscale for edge in bucket_hw)

    def zeros(*shape: int, dtype: torch.dtype = model.dtype) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device="meta")

    def one_pass() -> Tensor:
        text = PromptEmbeds(
            zeros(batch, known.text_chunks * TEXT_LENGTH, sum(known.text_widths)), zeros(batch, known.pooled_width)
        )
        ids, t = zeros(batch, 6, dtype=torch.float32), zeros(batch, dtype=torch.int64)
        return model(zeros(batch, known.latent_channels, h, w), t, text, ids, 6.0).float().mean()

    return one_pass


def count_memory(unet: Any, config: ExpertConfig, one_pass: Pass) -> Memory:
    """Memory of training `unet`, on the meta device, on micro-batches of which `one_pass` is one.

    What is trained is what requires a gradient. The UNet's weights are in the dtype that it computes in.
    """
    trained = [parameter for parameter in unet.parameters() if parameter.requires_grad]
    elements, every = sum(p.numel() for p in trained), sum(p.numel() for p in unet.parameters())
    is_mixed, is_lean = config.precision == "bf16-mixed", config.precision == "bf16-lean"
    if config.gradient_checkpointing:
        again = partial(checkpoint, use_reentrant=False, preserve_rng_state=False, context_fn=_once_more)
        unet.enable_gradient_checkpointing(again)
    if config.optimizer.fused_backward:
        for parameter in trained:
            parameter.register_post_accumulate_grad_hook(_let_go)
    live = LiveBytes()
    with FusedAttention(), live:
        for _ in range(min(2, config.accumulation)):  # the second beside the gradients of the first
            torch.autograd.backward(one_pass())
    gradients = sum(p.grad.nbytes for p in trained if p.grad is not None)
    if is_mixed:  # gradients have the dtype of the weights, which stay in fp32
        live.peak += gradients
        gradients *= 2
    largest = max(p.numel() for p in trained)
    state = sum(state_bytes(parameter, config.optimizer, is_lean) for parameter in trained)
    return Memory(
        weights=_mixed_bytes(config, elements, every) if is_mixed else sum(p.nbytes for p in unet.parameters()),
        state=state,
        average=4 * elements if config.ema.decay and config.ema.device == "model" else 0,
        passes=live.peak,
        step=gradients + largest * (30 if is_lean else 0),
    )


def _mixed_bytes(config: ExpertConfig, trained: int, every: int) -> int:
    """Weights in fp32 with the copy in bf16 that autocast makes; what an adapter stands on is in bf16 alone."""
    return 6 * trained + 2 * (every - trained) if config.adapter else 6 * every


def _let_go(parameter: Tensor) -> None:
    parameter.grad = None


def _once_more() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """What a block is computed under, and computed again under in the backward pass, where modes do not reach."""
    return nullcontext(), FusedAttention()


def state_bytes(parameter: Tensor, config: OptimizerConfig, is_lean: bool = False) -> int:
    """Bytes of the state that an optimizer keeps of one parameter."""
    n = parameter.numel()
    if is_lean:
        return 8 * n  # moments 2 + 4 and compensation 2, or two moments of 4
    if config.name == "muon" and isinstance(parameter, nn.Parameter) and multiplies(parameter):
        return 4 * n
    if config.name == "adamw-8bit":
        return 2 * n + 8 * -(-n // 256) if n >= 4096 else 8 * n
    if config.name == "adafactor":
        rows = len(parameter) if parameter.ndim > 1 else 0
        return 4 * (rows + n // rows) if rows else 4 * n
    return 8 * n


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Bytes of the storages that were made under it and are alive, and the most there were at a time."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        given = {id_of(tensor) for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, Tensor)}
        for tensor in tree_leaves(output):
            if isinstance(tensor, Tensor) and id_of(tensor) not in given:
                self._add(tensor)
        return output

    def _add(self, tensor: Tensor) -> None:
        storage, key = tensor.untyped_storage(), id_of(tensor)
        if key in self._known:
            return
        self._known.add(key)
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._remove, key, storage.nbytes())

    def _remove(self, key: int, count: int) -> None:
        self._known.discard(key)
        self.now -= count


def id_of(tensor: Tensor) -> int:
    """What tells a storage from others that are alive; those of the meta device have no address."""
    return int(tensor.untyped_storage()._cdata)


class FusedAttention(TorchFunctionMode):
    """Attention as a fused kernel has it."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.nn.functional.scaled_dot_product_attention:
            return _Fused.apply(*args[:3]) if len(args) >= 3 else _Fused.apply(*_named(args, kwargs))  # type: ignore[no-untyped-call]
        return func(*args, **(kwargs or {}))


def _named(args: tuple[Any, ...], kwargs: Any) -> list[Tensor]:
    given = dict(zip(("query", "key", "value"), args, strict=False)) | dict(kwargs or {})
    return [given["query"], given["key"], given["value"]]


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        output, sums = torch.empty_like(q), q.new_empty(q.shape[:-1], dtype=torch.float32)
        context.save_for_backward(q, k, v, output, sums)
        return output

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v, _, _ = context.saved_tensors
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
