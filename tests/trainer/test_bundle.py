"""A pair handed over: the script that people use runs on it unchanged and draws our loop's picture, to the last bit."""

import hashlib
import json
import runpy
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLImg2ImgPipeline, StableDiffusionXLPipeline, UniPCMultistepScheduler
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from shared.errors import CheckpointError, ConfigError, ContractError, StoreFull
from shared.schedule import TimestepRange
from trainer.bundle import BundleRequest, bundle
from trainer.bundle_stage import Stage
from trainer.checkpoint import open_expert
from trainer.ensemble import DrawSettings
from trainer.generate import GenerateRequest, generate
from trainer.schedulers import SCHEDULERS, make_scheduler, support_of

PROMPT = "a red circle on white"
Pair = tuple[Path, Path]


@pytest.fixture(scope="module")
def bundled(pair: Pair, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out: Path = tmp_path_factory.mktemp("bundle") / "pair"
    return bundle(BundleRequest(pair, tiny_model, out, device="cpu"))


@pytest.fixture
def request_of(pair: Pair, tiny_model: Path, tmp_path: Path) -> Callable[..., BundleRequest]:
    def made(**changes: Any) -> BundleRequest:
        whole = BundleRequest(pair, tiny_model, tmp_path / "out", prove=False, device="cpu")
        return replace(whole, **changes)

    return made


def two_pipelines(bundle: Path, scheduler: str, steps: int, boundary: float = 0.65) -> Any:
    """What people run: two pipelines, and a scheduler made from that of stage 1."""
    base = StableDiffusionXLPipeline.from_pretrained(bundle / "stage_1", use_safetensors=True)
    refiner = StableDiffusionXLImg2ImgPipeline.from_pretrained(bundle / "stage_2", use_safetensors=True)
    for pipeline in (base, refiner):
        own = UniPCMultistepScheduler.from_pretrained(bundle / "stage_1", subfolder="scheduler")
        pipeline.scheduler = getattr(diffusers, SCHEDULERS[scheduler][0]).from_config(own.config)
        pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(5)
    settings = {"prompt": PROMPT, "num_inference_steps": steps, "guidance_scale": 4.0, "guidance_rescale": 0.7}
    latents = base(
        **settings, generator=generator, height=64, width=96, denoising_end=boundary, output_type="latent"
    ).images
    image = refiner(**settings, generator=generator, denoising_start=boundary, image=latents).images[0]
    return np.asarray(image)


def our_loop(experts: Pair, model: Path, out: Path, scheduler: str, steps: int) -> Any:
    settings = DrawSettings(steps, 4.0, 0.7, scheduler)
    asked = GenerateRequest(experts, model, (PROMPT,), out, settings, seed=5, height=64, width=96, device="cpu")
    with Image.open(next(iter(generate(asked)))) as image:
        return np.asarray(image)


@pytest.mark.parametrize(("scheduler", "steps"), [("ddim", 8), ("euler", 5)])
def test_the_script_that_people_use_draws_our_loops_picture(
    bundled: Path, pair: Pair, tiny_model: Path, tmp_path: Path, scheduler: str, steps: int
) -> None:
    ours = our_loop(pair, tiny_model, tmp_path, scheduler, steps)
    assert np.array_equal(two_pipelines(bundled, scheduler, steps), ours)
    assert ours.std() > 0


def test_it_draws_with_the_scheduler_in_the_folder(bundled: Path) -> None:
    assert two_pipelines(bundled, "unipc", 5).std() > 0


@pytest.mark.parametrize(
    "name", [name for name in SCHEDULERS if support_of(name, "v_prediction", True).verdict != "refused"]
)
@pytest.mark.parametrize("stage", ["stage_1", "stage_2"])
def test_every_scheduler_made_from_the_folder_is_ours(bundled: Path, pair: Pair, name: str, stage: str) -> None:
    ours = make_scheduler(name, open_expert(pair[0]).card.contract)
    own = UniPCMultistepScheduler.from_pretrained(bundled / stage, subfolder="scheduler")
    theirs = type(ours).from_config(own.config, **SCHEDULERS[name][1])
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(7)
    assert torch.equal(ours.timesteps, theirs.timesteps)
    assert torch.equal(ours.alphas_cumprod, theirs.alphas_cumprod)
    different = {key for key, value in ours.config.items() if theirs.config.get(key) != value}
    assert different <= {"_use_default_values", "_class_name"}
    text = json.loads((bundled / stage / "scheduler" / "scheduler_config.json").read_text())
    assert (text["prediction_type"], text["rescale_betas_zero_snr"], text["timestep_spacing"]) == (
        "v_prediction", True, "trailing",
    )  # fmt: skip


def test_the_rest_is_the_models_byte_for_byte_and_lies_there_once(bundled: Path, tiny_model: Path) -> None:
    compared = 0
    for stage in ("stage_1", "stage_2"):
        for part in ("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"):
            names = sorted(file.name for file in (bundled / stage / part).iterdir())
            assert names == sorted(file.name for file in (tiny_model / part).iterdir())
            for name in names:
                copy = bundled / stage / part / name
                assert copy.read_bytes() == (tiny_model / part / name).read_bytes()
                assert copy.stat().st_ino == (bundled / "stage_1" / part / name).stat().st_ino
                assert copy.stat().st_ino != (tiny_model / part / name).stat().st_ino
                compared += 1
    assert compared > 20


@pytest.mark.parametrize(("raw", "folder"), [(False, "ema"), (True, "unet")])
def test_the_weights_are_those_that_were_asked_for(
    request_of: Callable[..., BundleRequest], pair: Pair, raw: bool, folder: str
) -> None:
    out = bundle(request_of(raw=raw))
    for number, run in enumerate(pair, 1):
        file = out / f"stage_{number}" / "unet" / "diffusion_pytorch_model.safetensors"
        saved = load_file(run / "checkpoints" / "step-00000002" / folder / file.name)
        handed = load_file(file)
        assert handed.keys() == saved.keys()
        assert all(torch.equal(handed[name], saved[name]) for name in saved)
        with safe_open(file, "pt") as opened:
            said = opened.metadata()
        assert said["format"] == "pt"
        assert said["sdxl_experts.timesteps"] == ("350 1000", "0 350")[number - 1]
    assert sorted(path.name for path in out.parent.iterdir()) == ["out"]


def test_weights_may_be_rounded(request_of: Callable[..., BundleRequest], pair: Pair) -> None:
    name = "diffusion_pytorch_model.safetensors"
    saved = load_file(pair[1] / "checkpoints" / "step-00000002" / "ema" / name)
    for dtype, torch_dtype in (("fp16", torch.float16), ("bf16", torch.bfloat16)):
        out = bundle(request_of(dtype=dtype, out=request_of().out / dtype))
        handed = load_file(out / "stage_2" / "unet" / name)
        assert all(torch.equal(handed[key], saved[key].to(torch_dtype)) for key in saved)


def test_pair_json_says_what_programs_need(bundled: Path, pair: Pair) -> None:
    facts = json.loads((bundled / "pair.json").read_text())
    assert (facts["format"], facts["form"], facts["boundaries"]) == (1, "diffusers", [350])
    first, second = facts["stages"]
    assert (first["denoising_start"], first["denoising_end"]) == (None, 0.65)
    assert (second["denoising_start"], second["denoising_end"]) == (0.65, None)
    assert (first["facts"]["name"], second["facts"]["name"]) == ("base", "refiner")
    assert facts["contract"] == json.loads(open_expert(pair[0]).card.contract.model_dump_json())
    assert len(facts["sha256"]) == 2
    for name, digest in facts["sha256"].items():
        assert hashlib.sha256((bundled / name).read_bytes()).hexdigest() == digest


def test_the_script_on_the_card_runs(bundled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    card = (bundled / "README.md").read_text()
    script = card.partition("```python\n")[2].partition("```")[0].replace("THIS FOLDER", str(bundled))
    assert "denoising_end=0.65" in script
    assert "denoising_start=0.65" in script
    monkeypatch.chdir(tmp_path)
    script = script.replace('"num_inference_steps": 40', '"num_inference_steps": 3')
    Path("script.py").write_text(script)
    runpy.run_path("script.py")
    with Image.open("picture.png") as image:
        assert image.size == (128, 128)


def test_the_order_of_experts_does_not_matter(
    request_of: Callable[..., BundleRequest], pair: Pair, bundled: Path
) -> None:
    out = bundle(request_of(experts=pair[::-1]))
    assert json.loads((out / "pair.json").read_text()) == json.loads((bundled / "pair.json").read_text())


def test_the_proof_draws_with_every_first_order_scheduler(
    request_of: Callable[..., BundleRequest], capfd: pytest.CaptureFixture[str]
) -> None:
    bundle(request_of(prove=True))
    said = [line for line in capfd.readouterr().err.splitlines() if line.startswith("proved")]
    assert said == [
        f"proved: {name}, 4 steps, each made once by its own stage" for name in ("ddim", "euler", "euler-a")
    ]


def test_what_fails_its_proof_is_not_there(
    request_of: Callable[..., BundleRequest], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Stages that say another hand-over than that of their experts."""
    monkeypatch.setattr(Stage, "ends", property(lambda stage: 0.3 if stage.number == 1 else None))
    with pytest.raises(ContractError, match="the stages made steps at"):
        bundle(request_of(prove=True))  # nobody makes the steps between 700 and 350
    monkeypatch.setattr(Stage, "ends", property(lambda stage: 0.9 if stage.number == 1 else None))
    with pytest.raises(ContractError, match=r"stage_1 answers for \[350, 1000\) and was asked at t = "):
        bundle(request_of(prove=True))
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_not_empty_is_refused(request_of: Callable[..., BundleRequest], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    assert bundle(request_of()) == tmp_path / "out"  # an empty one is taken
    with pytest.raises(ConfigError, match="is not an empty folder"):
        bundle(request_of())
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match="is not an empty folder"):
        bundle(request_of(out=tmp_path / "file"))


def test_a_full_disk_is_said_first(
    request_of: Callable[..., BundleRequest], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1 << 20))
    with pytest.raises(StoreFull, match=r"the bundle takes .* MiB, 1.0 MiB are free"):
        bundle(request_of())
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_checkpoint_is_named(request_of: Callable[..., BundleRequest], pair: Pair, tmp_path: Path) -> None:
    step = shutil.copytree(pair[1] / "checkpoints" / "step-00000002", tmp_path / "step")
    weights = step / "ema" / "diffusion_pytorch_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"step/ema/diffusion_pytorch_model\.safetensors is damaged"):
        bundle(request_of(experts=(pair[0], step)))


def test_experts_that_do_not_belong_together_are_refused(
    request_of: Callable[..., BundleRequest], pair: Pair, tiny_model: Path, tmp_path: Path
) -> None:
    for experts, message in (
        (pair[:1], r"no expert answers for timesteps \[0, 350\)"),
        ((*pair, pair[1]), r"two experts answer for timesteps \[0, 350\)"),
    ):
        with pytest.raises(ContractError, match=message):
            bundle(request_of(experts=experts))
    from demo.tiny_model import write_tiny_model

    other = write_tiny_model(tmp_path / "other", seed=1)
    with pytest.raises(ContractError, match=r"the VAE of .* is not the one"):
        bundle(request_of(model=other))
    with pytest.raises(ConfigError, match="--format onnx: known are diffusers"):
        bundle(request_of(form="onnx"))
    with pytest.raises(ConfigError, match="--dtype fp8: known are fp32, fp16, bf16"):
        bundle(request_of(dtype="fp8"))
    assert not (tmp_path / "out").exists()


def test_where_the_hand_over_falls(bundled: Path, pair: Pair) -> None:
    """The pipelines' cut and our routing agree for every boundary and for 1 to 100 steps."""
    for name in ("ddim", "euler", "euler-a"):
        scheduler = make_scheduler(name, open_expert(pair[0]).card.contract)
        for steps in range(1, 101):
            scheduler.set_timesteps(steps)
            for low in (1, 57, 333, 350, 999):
                cut = round(1000 - (1000 * (1 - low / 1000)))
                base = [float(t) for t in scheduler.timesteps if t >= cut]
                assert base == [float(t) for t in scheduler.timesteps if float(t) in TimestepRange(low, 1000)]
