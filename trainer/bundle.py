"""A pair of experts handed over: in one folder what other people's programs load, proved before it has its name.

    experts, model -> read_stages -> write (beside) -> pair.json, cards -> prove -> rename

DIR/README.md, DIR/pair.json    what this is, for people and for programs
DIR/...                         by form: trainer/bundle_folder.py, original_file.py, kohya.py
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from shared.atomic import new_folder, require_nothing_at
from shared.contract import ExpertFacts
from shared.errors import ConfigError
from shared.model_folder import model_name
from shared.progress import say
from shared.room import require_room
from shared.tensor_file import FloatDtype
from trainer.bundle_card import bundle_card, stage_card
from trainer.bundle_folder import folders_bytes, write_folders, write_json, write_text
from trainer.bundle_proof import prove_folders
from trainer.bundle_stage import Stage, one_model, read_stages
from trainer.kohya import kohya_bytes, prove_kohya, write_kohya
from trainer.merge_loss import WholeLoss, merge_losses
from trainer.original_file import files_bytes, prove_files, write_files

PAIR_FORMAT = 1
Form = Literal["diffusers", "single-file", "kohya-lora"]
DTYPES: dict[str, FloatDtype] = {"fp32": "F32", "fp16": "F16", "bf16": "BF16"}


@dataclass(frozen=True)
class BundleRequest:
    """What a `bundle-experts` command asks for."""

    experts: Sequence[Path]
    model: Path
    out: Path
    form: str = "diffusers"
    raw: bool = False  # raw weights in place of averaged ones
    merge: float | None = None  # both as one model, with so much of the low-noise expert in it
    merge_adapters: bool = False  # add adapters to the UNets that they stand on
    dtype: str | None = None  # fp32, fp16, bf16; None: as saved
    base: Path | None = None  # what adapters stand on, if it is not the model's UNet
    prove: bool = True
    device: str = "auto"
    store: Path | None = None  # whose held-out samples say what merging costs
    manifest: str | None = None  # of that store; the experts' own by default
    draws: int = 256  # of the eval loss over each part of the schedule


@dataclass(frozen=True)
class _Writer:
    """How stages become files in one form."""

    takes_merged: Callable[[ExpertFacts, bool], bool]
    size_bytes: Callable[[Sequence[Stage], Path], int]
    write: Callable[[Sequence[Stage], Path, Path], dict[str, str]]
    prove: Callable[[Path, Sequence[Stage], Path, str], list[str]]


FORMS: dict[str, _Writer] = {
    "diffusers": _Writer(lambda facts, merge: merge, folders_bytes, write_folders, prove_folders),
    "single-file": _Writer(lambda facts, merge: True, files_bytes, write_files, prove_files),
    "kohya-lora": _Writer(lambda facts, merge: False, kohya_bytes, write_kohya, prove_kohya),
}


def bundle(request: BundleRequest) -> Path:
    """Write the bundle to `request.out` and return it; what does not pass its proof is not there afterwards.

    Raises ConfigError where something is there already, StoreFull where the disk has no room, CheckpointError and
    ContractError where the experts are damaged or do not belong together or to the model.
    """
    require_nothing_at(request.out)
    form, dtype = _form(request.form), _dtype(request.dtype)
    _check_merge(request)
    stages = read_stages(
        request.experts,
        request.model,
        request.base,
        lambda facts: form.takes_merged(facts, request.merge_adapters),
        raw=request.raw,
        dtype=dtype,
    )
    if request.merge is not None:
        stages = [one_model(stages, request.merge)]
    require_room(request.out, form.size_bytes(stages, request.model), "the bundle")
    with new_folder(request.out) as folder:
        sums = form.write(stages, request.model, folder)
        name = model_name(request.model)
        losses = _measured(request, stages[0], folder)
        write_json(folder / "pair.json", pair_facts(stages, request.form, name, sums, losses))
        write_text(folder / "README.md", bundle_card(stages, request.form, name, losses))
        for stage in stages:
            _write_lineage(stage, folder / stage.folder, request.form, name)
        if request.prove:
            for line in form.prove(folder, stages, request.model, request.device):
                say(line)
    return request.out


def pair_facts(
    stages: Sequence[Stage], form: str, model: str, sums: dict[str, str], losses: Sequence[WholeLoss] = ()
) -> dict[str, Any]:
    """The content of pair.json."""
    contract = stages[0].card.contract
    measured = {"losses": [asdict(loss) for loss in losses]} if losses else {}
    return measured | {
        "format": PAIR_FORMAT,
        "form": form,
        "boundaries": [stage.facts.low for stage in stages[:-1]],
        "contract": contract.model_dump(mode="json"),
        "model": model,
        "stages": [_stage_facts(stage) for stage in stages],
        "sha256": sums,
    }


def _measured(request: BundleRequest, stage: Stage, folder: Path) -> list[WholeLoss]:
    if request.store is None:
        return []
    one = folder / stage.folder / "unet"
    losses = merge_losses(
        request.experts,
        request.model,
        request.base,
        one,
        stage.facts,
        request.store,
        request.manifest,
        request.device,
        request.draws,
    )
    for loss in losses:
        say(f"eval loss over all timesteps: {loss.name} {loss.loss:.5f}")
    return losses


def _stage_facts(stage: Stage) -> dict[str, Any]:
    blend = {} if stage.blend is None else {"blend": _stage_facts(stage.blend.other) | {"share": stage.blend.share}}
    return blend | {
        "path": stage.folder,
        "denoising_start": stage.starts,
        "denoising_end": stage.ends,
        "step": stage.checkpoint.state.step,
        "weights": stage.weights,
        "is_adapter": stage.is_adapter,
        "facts": stage.facts.model_dump(mode="json"),
    }


def _write_lineage(stage: Stage, folder: Path, form: str, model: str) -> None:
    """A stage's card, and beside it what each checkpoint in it said of itself."""
    folder.mkdir(exist_ok=True)
    write_text(folder / "README.md", stage_card(stage, form, model))
    for checkpoint, name in zip(stage.checkpoints, ("expert", "expert_2"), strict=False):
        (folder / name).mkdir()
        write_text(folder / name / "README.md", (checkpoint.path / "README.md").read_text(encoding="utf-8"))
        write_json(folder / name / "expert.json", json.loads(checkpoint.card.model_dump_json()))


def _check_merge(request: BundleRequest) -> None:
    if request.merge is not None and not 0 <= request.merge <= 1:
        raise ConfigError(f"--merge {request.merge:g}: from 0, the high-noise expert alone, to 1, the low-noise one")
    if request.merge is not None and request.form == "kohya-lora":
        raise ConfigError("--merge gives a whole model: --format diffusers or single-file")
    if request.store is not None and (request.merge is None or request.form != "diffusers"):
        raise ConfigError("--store measures what --merge costs, on the folders of --format diffusers")


def _form(name: str) -> _Writer:
    if name not in FORMS:
        raise ConfigError(f"--format {name}: known are {', '.join(FORMS)}")
    return FORMS[name]


def _dtype(name: str | None) -> FloatDtype | None:
    if name is None:
        return None
    if name not in DTYPES:
        raise ConfigError(f"--dtype {name}: known are {', '.join(DTYPES)}")
    return DTYPES[name]
