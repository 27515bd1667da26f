"""The pair at work: diffusers' own pipelines are the judge, to the last bit."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionXLImg2ImgPipeline, StableDiffusionXLPipeline
from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl import rescale_noise_cfg
from safetensors.torch import load_file
from torch import Tensor

from demo.tiny_model import POOLED_WIDTH, TEXT_WIDTHS, write_tiny_model
from shared.conditioning import MicroConditioning, PromptEmbeds
from shared.contract import ExpertFacts, PairContract, Spacing
from shared.errors import ContractError
from shared.schedule import PredictionType
from trainer.ensemble import DrawSettings, Expert, ExpertEnsemble, Prompt, Start, rescale_guidance
from trainer.schedulers import SCHEDULERS, make_scheduler, support_of
from trainer.unet import ConditionedUnet, load_unet

HW = (64, 96)
SIZE = MicroConditioning(HW, (0, 0), HW)
RANGES = {"base": (350, 1000), "refiner": (0, 350), "whole": (0, 1000)}


def contract_of(prediction_type: PredictionType, spacing: Spacing, *, ztsnr: bool = False) -> PairContract:
    return PairContract(
        num_timesteps=1000,
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        zero_terminal_snr=ztsnr,
        prediction_type=prediction_type,
        timestep_spacing=spacing,
        scaling_factor=0.13025,
        vae_digest="v",
        text_digests={},
    )


EPSILON = contract_of("epsilon", "leading")
ZERO_TERMINAL = contract_of("v_prediction", "trailing", ztsnr=True)
CONTRACTS = {
    "epsilon": EPSILON,
    "epsilon-linspace": contract_of("epsilon", "linspace"),
    "sample": contract_of("sample", "trailing"),
    "sample-zero-terminal": contract_of("sample", "trailing", ztsnr=True),
    "v": contract_of("v_prediction", "trailing"),
    "v-zero-terminal": ZERO_TERMINAL,
}
COMBINATIONS = [
    pytest.param(name, contract, id=f"{name}-{what}")
    for name in SCHEDULERS
    for what, contract in CONTRACTS.items()
    if support_of(name, contract.prediction_type, contract.zero_terminal_snr).verdict != "refused"
]


def facts_of(name: str) -> ExpertFacts:
    return ExpertFacts(
        name=name,
        low=RANGES[name][0],
        high=RANGES[name][1],
        layout="sdxl",
        null_prompt="zeros",
        text_chunks=1,
        aesthetic_score=6.0,
        negative_aesthetic_score=2.5,
        precision="fp32",
        start_model_digest="",
        manifests=(),
    )


def ensemble_of(contract: PairContract, **models: Any) -> ExpertEnsemble:
    experts = [Expert(facts_of(name), model, torch.float32) for name, model in models.items()]
    return ExpertEnsemble(experts, contract)


@pytest.fixture(scope="module")
def unets(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """Two UNets of other weights."""
    folders = [write_tiny_model(tmp_path_factory.mktemp("unets"), seed=seed) for seed in (1, 2)]
    return [load_unet(folder / "unet", torch.device("cpu")) for folder in folders]


@pytest.fixture(scope="module")
def vae(tiny_model: Path) -> Any:
    return AutoencoderKL.from_pretrained(tiny_model / "vae")


@pytest.fixture(scope="module")
def prompt() -> Prompt:
    generator = torch.Generator().manual_seed(3)

    def embeds() -> PromptEmbeds:
        return PromptEmbeds(
            torch.randn(1, 77, sum(TEXT_WIDTHS), generator=generator), torch.randn(1, POOLED_WIDTH, generator=generator)
        )

    return Prompt(embeds(), embeds())


def draw(ensemble: ExpertEnsemble, prompt: Prompt, settings: DrawSettings, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(1, 4, HW[0] // 8, HW[1] // 8, generator=generator)
    with torch.inference_mode():
        return ensemble.draw([prompt] * len(ensemble.experts), [SIZE], settings, noise, [generator])


def pipeline_of(kind: Any, unet: Any, vae: Any, scheduler: Any) -> Any:
    parts = dict.fromkeys(("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"))
    pipeline = kind(vae=vae, unet=unet, scheduler=scheduler, **parts)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def asked(prompt: Prompt, settings: DrawSettings, contract: PairContract) -> dict[str, Any]:
    return {
        "prompt_embeds": prompt.positive.prompt_embeds,
        "pooled_prompt_embeds": prompt.positive.pooled_prompt_embeds,
        "negative_prompt_embeds": prompt.negative.prompt_embeds,
        "negative_pooled_prompt_embeds": prompt.negative.pooled_prompt_embeds,
        "num_inference_steps": settings.steps,
        "guidance_scale": settings.guidance,
        "guidance_rescale": settings.rescale(contract),
        "output_type": "latent",
    }


@pytest.mark.parametrize(("name", "contract"), COMBINATIONS)
def test_one_unet_over_the_whole_range_is_the_pipeline(
    name: str, contract: PairContract, unets: list[Any], vae: Any, prompt: Prompt
) -> None:
    unet = unets[0]
    for settings in (
        DrawSettings(7, 5.0, None, name),
        DrawSettings(4, 1.0, None, name),
        DrawSettings(5, 7.5, 0.3, name),
    ):
        ours = draw(ensemble_of(contract, whole=ConditionedUnet(unet, "sdxl", TEXT_WIDTHS[1])), prompt, settings)
        pipeline = pipeline_of(StableDiffusionXLPipeline, unet, vae, make_scheduler(name, contract))
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn(1, 4, HW[0] // 8, HW[1] // 8, generator=generator)
        theirs = pipeline(
            **asked(prompt, settings, contract), height=HW[0], width=HW[1], latents=noise, generator=generator
        ).images
        assert torch.isfinite(ours).all()
        assert torch.equal(ours, theirs), (settings, float((ours - theirs).abs().max()))


@pytest.mark.parametrize("contract", [EPSILON, ZERO_TERMINAL], ids=["epsilon", "v-zero-terminal"])
@pytest.mark.parametrize("name", ["ddim", "euler", pytest.param("euler-a", marks=pytest.mark.slow)])
def test_two_unets_are_the_two_pipelines(
    name: str, contract: PairContract, unets: list[Any], vae: Any, prompt: Prompt
) -> None:
    """Schedulers without a history: with one, the second pipeline begins anew and the one loop does not."""
    models = [ConditionedUnet(unet, "sdxl", TEXT_WIDTHS[1]) for unet in unets]
    for steps in (3, 8):
        settings = DrawSettings(steps, 5.0, None, name)
        ours = draw(ensemble_of(contract, base=models[0], refiner=models[1]), prompt, settings)
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn(1, 4, HW[0] // 8, HW[1] // 8, generator=generator)
        base = pipeline_of(StableDiffusionXLPipeline, unets[0], vae, make_scheduler(name, contract))
        half = base(
            **asked(prompt, settings, contract),
            height=HW[0], width=HW[1], latents=noise, generator=generator, denoising_end=0.65,
        ).images  # fmt: skip
        refiner = pipeline_of(StableDiffusionXLImg2ImgPipeline, unets[1], vae, make_scheduler(name, contract))
        sizes = {"original_size": HW, "target_size": HW}
        theirs = refiner(
            **asked(prompt, settings, contract), **sizes, image=half, generator=generator, denoising_start=0.65
        ).images
        assert torch.equal(ours, theirs), (steps, float((ours - theirs).abs().max()))
        assert not torch.equal(ours, half)


@pytest.mark.parametrize(("name", "contract"), COMBINATIONS)
def test_a_noised_picture_is_the_image_to_image_pipelines(
    name: str, contract: PairContract, unets: list[Any], vae: Any, prompt: Prompt
) -> None:
    settings, scheduler = DrawSettings(4, 5.0, None, name), make_scheduler(name, contract)
    x_0 = torch.randn(1, 4, HW[0] // 8, HW[1] // 8, generator=torch.Generator().manual_seed(5))
    ensemble = ensemble_of(contract, whole=ConditionedUnet(unets[0], "sdxl", TEXT_WIDTHS[1]))
    scheduler.set_timesteps(settings.steps)
    first = float(scheduler.timesteps[2 * scheduler.order])  # strength 1 / 2 leaves the first two steps out
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(x_0.shape, generator=generator)
    with torch.inference_mode():
        ours = ensemble.draw([prompt], [SIZE], settings, noise, [generator], Start(x_0, first))
    pipeline = pipeline_of(StableDiffusionXLImg2ImgPipeline, unets[0], vae, make_scheduler(name, contract))
    theirs = pipeline(
        **asked(prompt, settings, contract), original_size=HW, target_size=HW,
        image=x_0, strength=1 / 2, generator=torch.Generator().manual_seed(0),
    ).images  # fmt: skip
    assert torch.equal(ours, theirs), float((ours - theirs).abs().max())


@pytest.mark.parametrize("name", ["unipc", "euler-a", "ddim"])
def test_a_picture_does_not_depend_on_its_batch(name: str, unets: list[Any], prompt: Prompt) -> None:
    """Its noise is its own; what is left is the rounding of sums over other shapes."""
    models = [ConditionedUnet(unet, "sdxl", TEXT_WIDTHS[1]) for unet in unets]
    ensemble = ensemble_of(ZERO_TERMINAL, base=models[0], refiner=models[1])
    settings = DrawSettings(6, 5.0, None, name)
    alone = torch.cat([draw(ensemble, prompt, settings, seed) for seed in range(3)])
    generators = [torch.Generator().manual_seed(seed) for seed in range(3)]
    noise = torch.cat([torch.randn(1, 4, HW[0] // 8, HW[1] // 8, generator=generator) for generator in generators])

    def thrice(text: PromptEmbeds) -> PromptEmbeds:
        return PromptEmbeds(text.prompt_embeds.repeat(3, 1, 1), text.pooled_prompt_embeds.repeat(3, 1))

    prompts = [Prompt(thrice(prompt.positive), thrice(prompt.negative))] * 2
    with torch.inference_mode():
        together = ensemble.draw(prompts, [SIZE] * 3, settings, noise, generators)
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)
    assert float((alone[0] - alone[1]).abs().max()) > 0.1


def test_each_expert_has_its_own_guidance(unets: list[Any], prompt: Prompt) -> None:
    asked: dict[str, set[int]] = {"base": set(), "refiner": set()}

    def noting(name: str) -> Any:
        def model(x: Tensor, t: Tensor, text: PromptEmbeds, ids: Tensor, score: float) -> Tensor:
            asked[name].add(len(x))
            return torch.zeros_like(x)

        return model

    ensemble = ensemble_of(EPSILON, base=noting("base"), refiner=noting("refiner"))
    draw(ensemble, prompt, DrawSettings(6, (5.0, 1.0)))
    assert asked == {"base": {2}, "refiner": {1}}


class Noted:
    """Stands where a UNet stands and notes when it is asked; says that there is nothing."""

    def __init__(self) -> None:
        self.asked: list[float] = []

    def __call__(self, x: Tensor, t: Tensor, text: PromptEmbeds, time_ids: Tensor, score: float) -> Tensor:
        self.asked.append(float(t))
        return torch.zeros_like(x)


@pytest.mark.parametrize(("name", "contract"), COMBINATIONS)
def test_each_step_goes_once_to_the_expert_of_its_own_t(name: str, contract: PairContract, prompt: Prompt) -> None:
    for steps in range(1, 101):
        base, refiner = Noted(), Noted()
        ensemble = ensemble_of(contract, base=base, refiner=refiner)
        scheduler = make_scheduler(name, contract)
        scheduler.set_timesteps(steps)
        expected = [float(t) for t in scheduler.timesteps]
        is_trailing = contract.timestep_spacing == "trailing" and name != "dpm++-karras"
        if steps == 61 and is_trailing:  # diffusers counts one too many, at t = -1; Heun comes to it twice
            assert {expected.pop() for _ in range(2 if name == "heun" else 1)} == {-1.0}
        assert len(expected) == (2 * steps - 1 if name == "heun" else steps)
        planned = ensemble.plan(DrawSettings(steps, 1.0, None, name))
        assert [(t, who) for _, t, who in planned] == [(t, 0 if t >= 350 else 1) for t in expected]
        if steps in (1, 2, 3, 30, 61, 100):
            draw(ensemble, prompt, DrawSettings(steps, 1.0, None, name))
            assert base.asked + refiner.asked == expected
            assert all(350 <= t < 1000 for t in base.asked)
            assert all(0 <= t < 350 for t in refiner.asked)


@pytest.mark.parametrize(
    ("name", "contract", "steps", "counts"),
    [
        ("unipc", ZERO_TERMINAL, 40, (26, 14)),
        ("unipc", ZERO_TERMINAL, 30, (20, 10)),
        ("dpm++", ZERO_TERMINAL, 30, (20, 10)),
        ("ddim", ZERO_TERMINAL, 30, (20, 10)),
        ("euler", ZERO_TERMINAL, 30, (20, 10)),
        ("unipc", ZERO_TERMINAL, 10, (7, 3)),
        ("unipc", ZERO_TERMINAL, 5, (4, 1)),
        ("unipc", ZERO_TERMINAL, 3, (2, 1)),
        ("unipc", ZERO_TERMINAL, 1, (1, 0)),
        ("euler", contract_of("epsilon", "linspace"), 30, (19, 11)),
    ],
)
def test_where_the_hand_over_falls(
    name: str, contract: PairContract, steps: int, counts: tuple[int, int], prompt: Prompt
) -> None:
    base, refiner = Noted(), Noted()
    draw(ensemble_of(contract, base=base, refiner=refiner), prompt, DrawSettings(steps, 1.0, None, name))
    assert (len(base.asked), len(refiner.asked)) == counts
    if (steps, name) == (30, "ddim"):
        assert (round(base.asked[-1]), round(refiner.asked[0])) == (366, 332)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.7, 1.0])
def test_guidance_rescale_is_that_of_diffusers(share: float) -> None:
    generator = torch.Generator().manual_seed(0)
    guided, positive = torch.randn(2, 3, 4, 8, 8, generator=generator)
    assert torch.equal(rescale_guidance(guided, positive, share), rescale_noise_cfg(guided, positive, share))


def test_guidance_rescale_follows_the_schedule() -> None:
    assert DrawSettings().rescale(ZERO_TERMINAL) == 0.7
    assert DrawSettings().rescale(EPSILON) == 0.0
    assert DrawSettings(guidance_rescale=0.2).rescale(ZERO_TERMINAL) == 0.2


class Knowing:
    """Stands where a UNet stands and knows the picture: it predicts it without error."""

    def __init__(self, contract: PairContract, x_0: Tensor) -> None:
        self.contract, self.x_0 = contract, x_0

    def __call__(self, x: Tensor, t: Tensor, text: PromptEmbeds, time_ids: Tensor, score: float) -> Tensor:
        schedule, nearest = self.contract.schedule(), t.round().long().view(1)
        alpha, sigma = schedule.alpha(nearest), schedule.sigma(nearest)
        eps = (x - alpha * self.x_0) / sigma
        kind = self.contract.prediction_type
        return (
            eps if kind == "epsilon" else self.x_0.expand_as(x) if kind == "sample" else alpha * eps - sigma * self.x_0
        )


@pytest.mark.parametrize(("name", "contract"), COMBINATIONS)
@pytest.mark.parametrize(("who", "steps"), [(("base", "refiner"), 20), (("base", "refiner"), 61), (("base",), 20),
                                            (("refiner",), 20)])  # fmt: skip
def test_experts_that_know_the_picture_draw_it(
    who: Sequence[str], steps: int, name: str, contract: PairContract, prompt: Prompt
) -> None:
    """A pair, and each alone: the base ends in its estimate, the refiner begins in noise."""
    x_0 = torch.randn(1, 4, HW[0] // 8, HW[1] // 8, generator=torch.Generator().manual_seed(9))
    ensemble = ensemble_of(contract, **{expert: Knowing(contract, x_0) for expert in who})
    latents = draw(ensemble, prompt, DrawSettings(steps, 3.0, 0.0, name))
    # DDIM ends at the first timestep, where a trace of noise is left, and takes unequal steps for equal ones.
    assert float((latents - x_0).abs().max()) < (0.5 if name == "ddim" else 0.1)


def test_an_expert_that_no_step_comes_to_is_said(prompt: Prompt) -> None:
    with pytest.raises(ContractError, match="1 steps never come to a timestep of refiner"):
        draw(ensemble_of(ZERO_TERMINAL, refiner=Noted()), prompt, DrawSettings(1, 1.0))


@pytest.mark.parametrize(("name", "contract"), COMBINATIONS)
def test_schedulers_hold_our_schedule(name: str, contract: PairContract) -> None:
    scheduler = make_scheduler(name, contract)
    ours = contract.schedule().abar.float()
    # Some schedulers keep 2**-24 in place of the last, exact zero.
    torch.testing.assert_close(scheduler.alphas_cumprod, ours, rtol=2e-5, atol=1e-7)
    assert scheduler.config.prediction_type == contract.prediction_type
    assert scheduler.config.timestep_spacing == contract.timestep_spacing
    assert isinstance(scheduler, getattr(diffusers, SCHEDULERS[name][0]))


def test_no_guidance_asks_once(prompt: Prompt) -> None:
    for guidance, rows in ((0.0, 1), (1.0, 1), (1.1, 2)):
        shapes: list[int] = []

        def model(
            x: Tensor, t: Tensor, text: PromptEmbeds, ids: Tensor, score: float, shapes: list[int] = shapes
        ) -> Tensor:
            shapes.append(len(x))
            assert ids[0].tolist() == [*HW, 0, 0, *HW]
            return torch.zeros_like(x)

        draw(ensemble_of(EPSILON, whole=model), prompt, DrawSettings(2, guidance))
        assert shapes == [rows, rows]


def test_the_scheduler_of_a_checkpoint_is_known(pair: tuple[Path, Path]) -> None:
    """What stands in a checkpoint is enough to make its scheduler."""
    for run in pair:
        newest = json.loads((run / "checkpoints" / "latest.json").read_text())["path"]
        card = json.loads((run / "checkpoints" / newest / "expert.json").read_text())
        scheduler = make_scheduler("unipc", PairContract.model_validate(card["contract"]))
        assert scheduler.config.rescale_betas_zero_snr
        assert load_file(run / "checkpoints" / newest / "ema" / "diffusion_pytorch_model.safetensors")
