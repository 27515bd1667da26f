"""Make demo/model: the small world's start model, from random weights to a card that says what it reaches.

`python -m demo.train_tiny OUT` goes through the stages below; each goes on with what OUT holds, so a run that was
stopped is begun again by the same command. Hours on two cores, minutes on a GPU.

    vae         fit        drawn pictures -> model/vae
    clip        fit        drawn pictures and captions -> model/text_encoder, text_encoder_2, clip
    store       demo.shapes, cache-build     -> pictures, stores
    unet        train-expert, run after run, slower and slower -> runs -> model/unet
    measure     drawn by diffusers' pipeline, judged -> model/README.md
"""

import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from demo.commands import run
from demo.fit_plan import FitPlan
from demo.model_files import (
    BETAS,
    EOS,
    SDXL_BLOCKS,
    base_index,
    text_name,
    unet_settings,
    write_diffusers_model,
    write_json,
    write_scheduler,
    write_tokenizer,
    write_transformer,
)
from demo.scene import Size
from demo.shapes import OneLineParser
from demo.unet_plan import LEARNING_RATE, MUON_RATE, PICTURE_SETS, UNET_RUNS, WIDE_HW, UnetRun
from shared.errors import ExpertsError
from shared.progress import say

if TYPE_CHECKING:
    from torch import Tensor

VAE_PLAN = FitPlan(steps=3200, learning_rate=3e-3, batch=16, muon_rate=0.02)
CLIP_PLAN = FitPlan(steps=600, learning_rate=1e-3, batch=256, warmup=60)
CLOSE_PLAN = FitPlan(steps=1400, learning_rate=1e-3, batch=256, warmup=60, muon_rate=0.02)
TWIN_PLAN = FitPlan(steps=1000, learning_rate=5e-4, batch=256, warmup=60, muon_rate=0.01)
PICTURES_SEED, WIDE_SEED = 11, 12
CONFIGS = Path("configs/demo")
TIME_ID_WIDTH = 16
WINDOWS = """[[datasets]]
id = "pictures"
root = "{name}"

[[datasets]]
id = "wide"
root = "{name}-wide"
images = {{downsample_to = {wide_px}, crop = "random"}}
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """The door of `python -m demo.train_tiny`."""
    parser = OneLineParser(prog="demo.train_tiny", description="Train the small world's start model.")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to work in; what it holds is gone on with")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or mps (default: %(default)s)")
    parser.add_argument("--stage", choices=STAGES, action="append", help="only this one; may be given again")
    options = parser.parse_args(arguments)
    try:
        for name in options.stage or STAGES:
            print(f"--- {name}", flush=True)
            STAGES[name](options.out, options.device)
    except ExpertsError as error:
        parser.exit(error.exit_code, f"{parser.prog}: {error}\n")
    except subprocess.CalledProcessError as error:
        return error.returncode
    return 0


def make_vae(out: Path, device: str) -> None:
    """Train the VAE and write it, in fp16."""
    import torch

    from demo.train_vae import VAE_CONFIG, train_vae

    weights = train_vae(out / "fits", VAE_PLAN, torch.device(device))
    write_diffusers_model(out / "model" / "vae", "AutoencoderKL", VAE_CONFIG, _halved(weights))


def make_clip(out: Path, device: str) -> None:
    """Train the CLIP and both text encoders and write them, in fp16."""
    import torch

    from demo import train_clip

    weights = train_clip.train_clip(out / "fits", CLIP_PLAN, CLOSE_PLAN, TWIN_PLAN, torch.device(device))
    first, second = train_clip.first_text_config(), train_clip.second_text_config()
    parts: dict[str, tuple[str, Any, Callable[[str], str]]] = {
        "text_encoder": ("CLIPTextModel", first, text_name),
        "text_encoder_2": ("CLIPTextModelWithProjection", second, text_name),
        "clip": ("CLIPModel", train_clip.clip_config(), str),
    }
    for name, (class_name, config, rename) in parts.items():
        named = {rename(key): tensor for key, tensor in _halved(weights[name]).items()}
        write_transformer(out / "model" / name, class_name, config, named)
    write_tokenizer(out / "model" / "tokenizer", pad_token=EOS)
    write_tokenizer(out / "model" / "tokenizer_2", pad_token="!")
    write_tokenizer(out / "model" / "clip", pad_token="!")
    write_json(out / "model" / "clip" / "preprocessor_config.json", train_clip.PREPROCESSOR)


def make_store(out: Path, device: str) -> None:
    """Draw the pictures and encode them with the project's own command."""
    _write_index(out / "model")
    model = ["--model", str(out / "model"), "--config", str(CONFIGS / "cache.toml"), "--device", device]
    for name, pictures in PICTURE_SETS.items():
        folder, store = out / "pictures" / name, ["--store", str(out / "stores" / name)]
        _draw(folder, pictures.count, PICTURES_SEED, pictures.sizes_hw)
        if not pictures.wide:
            run(["cache-build", str(folder), *store, *model, *_sets(pictures.sets)])
            continue
        _draw(out / "pictures" / f"{name}-wide", pictures.wide, WIDE_SEED, (WIDE_HW,))
        both = out / "pictures" / f"{name}.toml"
        both.write_text(WINDOWS.format(name=name, wide_px=WIDE_HW[0]), encoding="utf-8")
        run(["cache-build", *store, *model, "--config", str(both), *_sets(pictures.sets)])


def _draw(folder: Path, count: int, seed: int, sizes_hw: Sequence[Size]) -> None:
    sizes = [part for h, w in sizes_hw for part in ("--size", f"{h}x{w}")]
    run(
        [
            sys.executable,
            "-m",
            "demo.shapes",
            str(folder),
            "--count",
            str(count),
            "--seed",
            str(seed),
            "--metadata",
            *sizes,
        ]
    )


def make_unet(out: Path, device: str) -> None:
    """Train the UNet with the project's own command, run after run, and write its average in fp16."""
    begin = out / "begin"
    if not (begin / "unet" / "config.json").exists():
        _write_random_unet(begin / "unet")
        _write_index(begin)
    for plan in UNET_RUNS:
        after = out / f"after-{plan.name}"
        if not (after / "unet" / "config.json").exists():
            if plan.fit_heads:
                begin = _fit_heads(out, begin, out / f"before-{plan.name}")
            _train(out, plan, begin, device)
            _write_index(after)
            averaged = _averaged(out / "runs" / plan.name)
            write_diffusers_model(after / "unet", "UNet2DConditionModel", unet_config(), averaged)
        begin = after
    from safetensors.torch import load_file

    finished = load_file(begin / "unet" / "diffusion_pytorch_model.safetensors")
    write_diffusers_model(out / "model" / "unet", "UNet2DConditionModel", unet_config(), _halved(finished))


def _fit_heads(out: Path, begin: Path, fitted: Path) -> Path:
    """A model whose UNet is that of `begin` with a head of each cross-attention fitted, in `fitted`."""
    if (fitted / "unet" / "config.json").exists():
        return fitted
    import torch

    from demo.attention_fit import fit_heads
    from shared.schedule import NoiseSchedule, scaled_linear_betas
    from trainer.unet import load_unet

    unet = load_unet(begin / "unet", torch.device("cpu"))
    schedule = NoiseSchedule(scaled_linear_betas(1000, *BETAS), zero_terminal_snr=True)
    for name, right in fit_heads(out / "model", unet, schedule).items():
        say(f"{name} looks at the right word from {right:.0%} of the cells")
    _write_index(fitted)
    weights = {name: tensor.contiguous() for name, tensor in unet.state_dict().items()}
    write_diffusers_model(fitted / "unet", "UNet2DConditionModel", unet_config(), weights)
    return fitted


def _train(out: Path, plan: UnetRun, begin: Path, device: str) -> None:
    folder = out / "runs" / plan.name
    paths = ["--store", str(out / "stores" / plan.pictures), "--model", str(begin), "--output", str(folder)]
    command = ["train-expert", "--config", str(CONFIGS / "start.toml"), *paths, "--device", device]
    low, high = plan.timesteps
    always = (f"timesteps={{low={low}, high={high}}}", f"batch={plan.batch}")
    for steps, share in plan.stages:
        if _steps_done(folder) < steps:
            rates = (f"optimizer.learning_rate={LEARNING_RATE * share:g}", f"optimizer.muon_rate={MUON_RATE * share:g}")
            # One process has the cores for itself here, so its threads need not make room for others.
            busy = {"OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "ACTIVE")}
            run([*command, *_sets((*always, *plan.sets, *rates, f"steps={steps}"))], busy)


def _sets(settings: Sequence[str]) -> list[str]:
    return [part for setting in settings for part in ("--set", setting)]


def _steps_done(folder: Path) -> int:
    from trainer.checkpoint import newest_checkpoint

    checkpoint = newest_checkpoint(folder, print) if folder.exists() else None
    return checkpoint.state.step if checkpoint else 0


def _averaged(folder: Path) -> "dict[str, Tensor]":
    from trainer.checkpoint import newest_checkpoint, read_tensors

    checkpoint = newest_checkpoint(folder, print)
    assert checkpoint is not None
    return read_tensors(checkpoint.weights_folder() / "diffusion_pytorch_model.safetensors")


def measure(out: Path, device: str) -> None:
    """Judge pictures and reconstructions of the finished model and write its card."""
    from demo.model_card import write_card

    write_card(out / "model", device)


STAGES: dict[str, Callable[[Path, str], None]] = {
    "vae": make_vae,
    "clip": make_clip,
    "store": make_store,
    "unet": make_unet,
    "measure": measure,
}


def unet_config() -> dict[str, Any]:
    """SDXL's layout on latents of 10 to 14 a side: attention on the two coarser levels, heads of 64."""
    from demo.train_clip import PROJECTION, WIDTHS

    return {
        "sample_size": 12,
        "norm_num_groups": 16,
        **SDXL_BLOCKS,
        "block_out_channels": (96, 128, 128),
        "attention_head_dim": (1, 2, 2),  # by its old name the number of heads
        "transformer_layers_per_block": (1, 1, 1),
        "cross_attention_dim": sum(WIDTHS),
        **unet_settings(PROJECTION, TIME_ID_WIDTH, time_ids=6),
    }


def _write_random_unet(folder: Path) -> None:
    from diffusers import UNet2DConditionModel

    from demo.tiny_model import random_weights

    weights = random_weights(0, "unet", lambda: UNet2DConditionModel(**unet_config()))
    write_diffusers_model(folder, "UNet2DConditionModel", unet_config(), weights)


def _write_index(model: Path) -> None:
    write_json(model / "model_index.json", base_index())
    zero_terminal = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    write_scheduler(model / "scheduler", timestep_spacing="trailing", **zero_terminal)


def _halved(weights: "Mapping[str, Tensor]") -> "dict[str, Tensor]":
    import torch

    return {name: tensor.to(torch.float16).contiguous() for name, tensor in weights.items()}


if __name__ == "__main__":
    sys.exit(main())
