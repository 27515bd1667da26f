"""Stages as diffusers folders: a UNet or an adapter of ours, the rest byte for byte from the model, one scheduler.

    DIR/stage_1/    StableDiffusionXLPipeline          {unet, vae, text_encoder, ..., scheduler}/, model_index.json
    DIR/stage_2/    StableDiffusionXLImg2ImgPipeline   the same; what stage 1 holds too is the same file on disk

Of an adapter a stage holds the adapter and the scheduler alone, as diffusers and as peft read it.
"""

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from shared.atomic import sync_file
from shared.conditioning import Layout
from shared.contract import PairContract
from shared.pipeline_index import pipeline_index
from shared.tensor_file import file_bytes, read_metadata, write_lazily
from shared.weights import find_weights, weights_variant
from trainer.adapter import ADAPTER_FILE, PREFIX
from trainer.bundle_stage import Stage
from trainer.checkpoint import UNET_FILE
from trainer.schedulers import make_scheduler

SCHEDULER = "unipc"
# Settings that UniPC does not have and its neighbours read: whoever takes another scheduler from this config gets ours.
NEIGHBOURS = {"clip_sample": False, "set_alpha_to_one": False, "interpolation_type": "linear", "skip_prk_steps": True}
PEFT_FILE, PEFT_PREFIX = "adapter_model.safetensors", "base_model.model."
WHOLE: dict[Layout, tuple[str, ...]] = {
    "sdxl": ("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"),
    "sdxl-refiner": ("vae", "text_encoder_2", "tokenizer_2"),
}


def folders_bytes(stages: Sequence[Stage], model: Path) -> int:
    """What the stages take on a disk, the parts that they share counted once."""
    parts = {part for stage in stages if not stage.is_adapter for part in WHOLE[stage.facts.layout]}
    copied = sum(file.stat().st_size for part in parts for file in component_files(model / part))
    return copied + sum(file_bytes(stage.tensors()) * (2 if stage.is_adapter else 1) for stage in stages)


def write_folders(stages: Sequence[Stage], model: Path, out: Path) -> dict[str, str]:
    """Write each stage's folder into `out`; returns the sha256 of each file of ours that holds weights."""
    sums: dict[str, str] = {}
    for stage in stages:
        folder = out / stage.folder
        folder.mkdir()
        write_scheduler(stage.card.contract, folder / "scheduler")
        if stage.is_adapter:
            sums |= _write_adapter(stage, folder)
            continue
        for part in WHOLE[stage.facts.layout]:
            copy_component(model / part, folder / part, [out / other.folder / part for other in stages])
        write_json(folder / "model_index.json", index_of(stage))
        (folder / "unet").mkdir()
        write_json(folder / "unet" / "config.json", stage.config())
        name = f"{stage.folder}/unet/{UNET_FILE}"
        sums[name] = write_lazily(out / name, stage.tensors(), stage.tags())
    return sums


def write_scheduler(contract: PairContract, folder: Path) -> None:
    """The contract's schedule as a scheduler_config.json, for UniPC and for whatever is made from it."""
    scheduler = make_scheduler(SCHEDULER, contract)
    scheduler.register_to_config(**NEIGHBOURS)
    scheduler.save_pretrained(folder)


def index_of(stage: Stage) -> dict[str, Any]:
    """model_index.json of a stage's pipeline; the null prompt is the one that its expert was trained with."""
    import diffusers

    parts = (*WHOLE[stage.facts.layout], "unet")
    index = pipeline_index(parts, "UniPCMultistepScheduler", from_images=stage.number > 1)
    index["_diffusers_version"] = diffusers.__version__
    index["force_zeros_for_empty_prompt"] = stage.facts.null_prompt == "zeros"
    if stage.number > 1:
        index["requires_aesthetics_score"] = stage.facts.layout == "sdxl-refiner"
    return index


def component_files(folder: Path) -> list[Path]:
    """The files of a component that are handed on: its settings, and weights in safetensors where it has any."""
    files = [file for file in folder.iterdir() if file.suffix in (".json", ".txt") and ".index" not in file.name]
    if (folder / "config.json").exists():  # a tokenizer has none
        weights = find_weights(folder)
        indexes = list(folder.glob("*.safetensors.index*.json")) if "-of-" in weights[0].name else []
        files += [*weights, *sorted(indexes, key=lambda index: index.name.count("."))[:1]]  # the plain one first
    return sorted(file for file in files if file.is_file())


def copy_files(files: Sequence[Path], target: Path) -> None:
    """Copy files byte for byte into a new folder."""
    target.mkdir()
    for file in files:
        shutil.copyfile(file, target / file.name)
        sync_file(target / file.name)


def copy_component(source: Path, target: Path, others: Sequence[Path] = ()) -> None:
    """Copy a component byte for byte, or link to the copy in one of `others`.

    Where a model has its weights as a variant alone ("fp16"), the copy has them under the plain name, so that
    whoever loads it need not know.
    """
    target.mkdir()
    variant = weights_variant(source) if (source / "config.json").exists() else None
    for file in component_files(source):
        copy = target / (file.name.replace(f".{variant}", "", 1) if variant and "-of-" not in file.name else file.name)
        twin = next((other / copy.name for other in others if (other / copy.name).exists()), None)
        if twin is None or not _linked(twin, copy):
            shutil.copyfile(file, copy)
            sync_file(copy)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """A JSON file of ours, synced."""
    write_text(path, json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """A text file of ours, synced."""
    path.write_text(text, encoding="utf-8")
    sync_file(path)


def _linked(file: Path, name: Path) -> bool:
    """Whether `file` could be given a second name; not every file system has them."""
    try:
        os.link(file, name)
    except OSError:
        return False
    return True


def _write_adapter(stage: Stage, folder: Path) -> dict[str, str]:
    """The adapter as `load_lora_weights` reads it, and as `PeftModel.from_pretrained` does."""
    tensors = stage.tensors()
    known = read_metadata(stage.checkpoint.path / stage.weights / ADAPTER_FILE)
    settings = json.loads(known["lora_adapter_metadata"])
    write_json(folder / "adapter_config.json", dict(_plain(settings)))
    ours = {PEFT_PREFIX + name.removeprefix(PREFIX): tensor for name, tensor in tensors.items()}
    return {
        f"{stage.folder}/{ADAPTER_FILE}": write_lazily(folder / ADAPTER_FILE, tensors, known | stage.tags()),
        f"{stage.folder}/{PEFT_FILE}": write_lazily(folder / PEFT_FILE, ours, stage.tags()),
    }


def _plain(settings: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for key, value in settings.items():
        yield key.removeprefix(PREFIX), value
