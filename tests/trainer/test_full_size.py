"""The real architectures, with random weights: parameter counts, one encoding and one training step of each.

SSD-1B is trained whole, in bf16: 10 GB. AdamW on all of the two larger UNets would need 20 GB and more, so there it has
the last level's weights alone; every other gradient is computed, looked at and dropped as soon as it is there.
"""

import gc
import resource
import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor

from benchmarks.full_size import BASE, REFINER, SSD_1B, VAE
from cache_builder.encode import Crop, SampleEncoder
from shared.conditioning import Layout, MicroConditioning, PromptEmbeds
from shared.latents import LatentMoments
from shared.progress import say
from shared.record import decode_record
from shared.schedule import NoiseSchedule, TimestepRange, scaled_linear_betas
from trainer.batch import Batch
from trainer.config import LossConfig
from trainer.loss import DenoisingLoss
from trainer.optim import Optimizer
from trainer.optimizer_config import OptimizerConfig
from trainer.unet import ConditionedUnet, choose_layout

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def two_threads(one_thread: None) -> Iterator[None]:
    torch.set_num_threads(2)
    yield
    gc.collect()


@pytest.fixture(scope="module")
def moments(tmp_path_factory: pytest.TempPathFactory) -> LatentMoments:
    """Moments [1, 4, 32, 32] that the real VAE's architecture gives for a picture of 256 pixels, through a record."""
    model = tmp_path_factory.mktemp("full-size")
    torch.manual_seed(0)
    vae: Any = AutoencoderKL(**VAE)
    assert sum(weight.numel() for weight in vae.encoder.parameters()) / 1e6 == pytest.approx(34.2, abs=0.05)
    vae.save_pretrained(model / "vae")
    del vae
    gradient = np.linspace(0, 255, 256 * 256 * 3).reshape(256, 256, 3).astype(np.uint8)
    began_s = time.perf_counter()
    framed = SampleEncoder(model, "cpu", "float32", "moments", 1).encode_crops([Crop(b"k" * 16, gradient)])[0]
    say(f"encoded in {time.perf_counter() - began_s:.1f} s")
    assert framed is not None
    tensors = decode_record(*framed).tensors
    assert tensors["mean"].shape == (4, 32, 32)
    return LatentMoments(*(torch.from_numpy(tensors[name].copy())[None] for name in ("mean", "logvar")))


@pytest.mark.parametrize(
    ("config", "billions", "layout", "trained"),
    [
        pytest.param(SSD_1B, 1.3002, "sdxl", "", id="ssd-1b"),
        pytest.param(BASE, 2.567, "sdxl", "up_blocks.2", id="sdxl-base"),
        pytest.param(REFINER, 2.260, "sdxl-refiner", "up_blocks.3", id="sdxl-refiner"),
    ],
)
def test_one_training_step(
    moments: LatentMoments, config: dict[str, Any], billions: float, layout: Layout, trained: str
) -> None:
    began_s = time.perf_counter()
    unet = make_unet(config)
    assert sum(weight.numel() for weight in unet.parameters()) / 1e9 == pytest.approx(billions, abs=0.0005)
    assert choose_layout(config, (768, 1280), 1280) == layout
    ours = {name: weight for name, weight in unet.named_parameters() if name.startswith(trained)}
    norms: dict[str, float] = {}
    for name, weight in unet.named_parameters():
        if name not in ours:
            weight.register_post_accumulate_grad_hook(partial(look_and_drop, norms, name))
    optimizer = Optimizer(ours.values(), OptimizerConfig(learning_rate=1e-3))

    generator = torch.Generator().manual_seed(0)
    text = PromptEmbeds(torch.randn(1, 77, 2048, generator=generator), torch.randn(1, 1280, generator=generator))
    time_ids = MicroConditioning((300, 400), (0, 21), (256, 256)).time_ids()[None]
    batch = Batch(moments, text, time_ids, [(0, 0)])
    schedule = NoiseSchedule(scaled_linear_betas(1000, 0.00085, 0.012), zero_terminal_snr=True)
    loss = DenoisingLoss(schedule, TimestepRange(350, 1000), "v_prediction", 0.13025, LossConfig(), seed=0)
    model = ConditionedUnet(unet, layout, 1280)

    def predict(x: Tensor, t: Tensor, text: PromptEmbeds, ids: Tensor) -> Tensor:
        return model(x.bfloat16(), t, text, ids, 6.0)

    built_s = time.perf_counter()
    value = loss(predict, batch, loss.timesteps(0, 1, torch.device("cpu"))).mean()
    torch.autograd.backward(value)
    norms |= {name: float(weight.grad.norm()) for name, weight in ours.items() if weight.grad is not None}
    before = {name: weight.detach().clone() for name, weight in list(ours.items())[:20]}
    optimizer.step_unless_bad(torch.tensor(0.0))
    done_s = time.perf_counter()

    assert torch.isfinite(value)
    assert norms.keys() == {name for name, _ in unet.named_parameters()}
    assert np.isfinite(list(norms.values())).all()
    assert any(not torch.equal(before[name], ours[name]) for name in before)
    peak_gb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    say(f"built in {built_s - began_s:.0f} s, step {done_s - built_s:.0f} s, peak of the process {peak_gb:.1f} GB")


def make_unet(config: dict[str, Any]) -> Any:
    """In bf16 from the start, with weights like those that torch's layers begin with."""
    with torch.device("meta"):
        unet: Any = UNet2DConditionModel(**config)
    unet = unet.bfloat16().to_empty(device="cpu").train()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in unet.named_parameters():
            if weight.ndim > 1:
                bound = (3 / weight[0].numel()) ** 0.5
                weight.uniform_(-bound, bound, generator=generator)
            else:
                weight.fill_(1.0 if name.endswith("weight") else 0.0)
    return unet


def look_and_drop(norms: dict[str, float], name: str, weight: Tensor) -> None:
    assert weight.grad is not None
    norms[name] = float(weight.grad.norm())
    weight.grad = None
