"""What the benchmark of inference draws with: a model on disk, two experts as a trainer leaves them, and two pipelines.

The same weights stand in both forms, drawn at random: what drawing costs does not depend on them. Proportions of the
small shape are SSD-1B's: text encoders 0.6 of a UNet, the VAE a tenth.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.train_world import SHAPES, Shape, write_unet
from demo.model_files import (
    EOS,
    base_index,
    make_vocabulary,
    text_name,
    text_settings,
    write_json,
    write_tokenizer,
    write_transformer,
)
from shared.contract import AdapterFacts, ExpertCard, ExpertFacts, PairContract
from shared.text_encoders import read_text_facts
from shared.vae import read_vae_facts
from trainer.adapter import ADAPTER_FILE, adapter_metadata, adapter_weights, add_adapter, draw_adapter, shapes_of
from trainer.checkpoint import UNET_FILE, Export, TrainingState, save_checkpoint
from trainer.schedulers import make_scheduler
from trainer.unet import load_unet, read_unet_config, unet_digest
from trainer.weight_names import adapted_layers

BOUNDARY = 350
LORA = AdapterFacts(kind="lora", rank=16, alpha=16, targets=("attention",))
COMPONENTS = ("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")


@dataclass(frozen=True)
class Towers:
    """A VAE and two text encoders of some size."""

    vae_channels: tuple[int, ...]
    text_layers: tuple[int, int]
    text_heads: tuple[int, int]


_SMALL_UNET = dict(SHAPES["20M"].unet) | {
    "block_out_channels": (96, 192, 336),
    "attention_head_dim": (2, 3, 6),
    "cross_attention_dim": 768,
    "projection_class_embeddings_input_dim": 512 + 6 * 8,
    "sample_size": 32,
}
INFERENCE_SHAPES: dict[str, tuple[Shape, Towers]] = {
    "tiny": (SHAPES["tiny"], Towers((8, 16, 16, 32), (2, 3), (2, 4))),
    "small": (Shape(_SMALL_UNET, (256, 512), 512, 256), Towers((32, 64, 128, 128), (6, 8), (4, 8))),
    "ssd-1b": (SHAPES["ssd-1b"], Towers((128, 256, 512, 512), (12, 32), (12, 20))),
}


@dataclass(frozen=True)
class PairOnDisk:
    """Two experts in both forms."""

    model: Path
    experts: tuple[Path, Path]  # run folders
    stages: tuple[Path, Path]  # folders of pipelines; of adapters, the adapter's
    is_adapter: bool
    size_px: int


def write_pair(folder: Path, name: str, is_adapter: bool) -> PairOnDisk:
    """A model of a shape, a base and a refiner."""
    shape, towers = INFERENCE_SHAPES[name]
    model = folder / "model"
    write_unet(model / "unet", shape.unet)
    _write_towers(model, shape, towers)
    write_json(model / "model_index.json", base_index())
    contract = _contract(model)
    make_scheduler("unipc", contract).save_pretrained(model / "scheduler")
    runs = []
    for seed, (low, high) in enumerate(((BOUNDARY, 1000), (0, BOUNDARY))):
        facts = _facts(model, low, high)
        card = ExpertCard(contract=contract, facts=as_adapter(facts) if is_adapter else facts)
        runs.append(_save(folder / f"run-{seed}", model, card, seed))
    stages = [_stage(folder / f"stage_{i + 1}", model, run, is_adapter) for i, run in enumerate(runs)]
    return PairOnDisk(model, (runs[0], runs[1]), (stages[0], stages[1]), is_adapter, shape.size_px)


def as_adapter(facts: ExpertFacts) -> ExpertFacts:
    """The same expert as an adapter."""
    return facts.model_copy(update={"adapter": LORA})


def vae_config(towers: Towers) -> dict[str, Any]:
    """SDXL's VAE in these widths."""
    return {
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "block_out_channels": towers.vae_channels,
        "layers_per_block": 2,
        "norm_num_groups": 4 if towers.vae_channels[0] < 32 else 32,
        "latent_channels": 4,
        "scaling_factor": 0.13025,
        "force_upcast": True,
    }


def text_configs(shape: Shape, towers: Towers, vocabulary: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Settings of both text encoders; `vocabulary` is theirs of tokens."""
    return [
        {
            **vocabulary,
            "hidden_size": width,
            "intermediate_size": 4 * width,
            "projection_dim": shape.pooled_width if second else width,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "hidden_act": "gelu" if second else "quick_gelu",
        }
        for second, (width, layers, heads) in enumerate(
            zip(shape.text_widths, towers.text_layers, towers.text_heads, strict=True)
        )
    ]


def _write_towers(model: Path, shape: Shape, towers: Towers) -> None:
    from diffusers import AutoencoderKL
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    torch.manual_seed(1)
    AutoencoderKL(**vae_config(towers)).save_pretrained(model / "vae", safe_serialization=True)
    settings = text_configs(shape, towers, text_settings(make_vocabulary()[0], EOS))
    for name, cls, given in zip(COMPONENTS[1:3], (CLIPTextModel, CLIPTextModelWithProjection), settings, strict=True):
        config = CLIPTextConfig(**given)
        weights = {text_name(key): tensor for key, tensor in cls(config).state_dict().items()}
        write_transformer(model / name, cls.__name__, config, weights)
    for name in COMPONENTS[3:]:
        write_tokenizer(model / name, pad_token=EOS)


def _contract(model: Path) -> PairContract:
    vae = read_vae_facts(model)
    return PairContract(
        num_timesteps=1000,
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        zero_terminal_snr=True,
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        scaling_factor=vae.scaling_factor,
        vae_digest=vae.digest,
        text_digests=read_text_facts(model).digests,
    )


def _facts(model: Path, low: int, high: int) -> ExpertFacts:
    return ExpertFacts(
        name="base" if low else "refiner",
        low=low,
        high=high,
        layout="sdxl",
        null_prompt="zeros",
        text_chunks=1,
        aesthetic_score=6.0,
        negative_aesthetic_score=2.5,
        precision="fp32",
        start_model_digest=unet_digest(model / "unet"),
        manifests=(),
    )


def _save(run: Path, model: Path, card: ExpertCard, seed: int) -> Path:
    unet = load_unet(model / "unet", torch.device("cpu"))
    if card.facts.adapter is not None:
        add_adapter(unet, LORA, adapted_layers(LORA.targets, shapes_of(unet)), "expert")
        draw_adapter(unet, "expert", seed)
        export = Export(ADAPTER_FILE, adapter_metadata(unet, "expert"), None)
        weights = {name: weight.detach() for name, weight in adapter_weights(unet, "expert").items()}
    else:
        export = Export(UNET_FILE, {}, read_unet_config(model / "unet"))
        weights = {name: weight * (1 + 0.01 * seed) for name, weight in unet.state_dict().items()}
    run.mkdir()
    state = TrainingState(1, 0, 0, 0, 1, torch.__version__)
    save_checkpoint(run, state, card, "", export, {"unet": weights}, {"none": torch.zeros(1)}, 1)
    return run


def _stage(stage: Path, model: Path, run: Path, is_adapter: bool) -> Path:
    unet = run / "checkpoints" / "step-00000001" / "unet"
    if is_adapter:
        return unet
    stage.mkdir()
    for name in (*COMPONENTS, "scheduler", "model_index.json"):
        (stage / name).symlink_to(model / name)
    (stage / "unet").symlink_to(unet)
    return stage
