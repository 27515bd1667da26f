"""An expert on disk: written beside, synced, renamed; every file hashed; no pickle.

RUN/checkpoints/step-00001000/
    README.md                the model card
    unet/, ema/              diffusers folders of a whole UNet, or of an adapter (ema/ only where an average is kept)
    optimizer.safetensors    the optimizer's state, in the newest two checkpoints
    state.json               step and counters
    expert.json              PairContract and ExpertFacts
    checksums.json           size and sha256 of each of these files
RUN/checkpoints/latest.json  the newest, replaced last; best.json beside it: trainer/rotation.py
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from torch import Tensor

from shared.atomic import sync_file, sync_folder, write_atomically
from shared.contract import ExpertCard
from shared.errors import CheckpointError, StoreIO
from shared.progress import say
from trainer.adapter import ADAPTER_FILE
from trainer.rotation import (
    BEST_FILE,
    OPTIMIZER_FILE,
    best_checkpoints,
    checkpoint_name,
    list_checkpoints,
    point_to_best,
    rotate,
    write_score,
)

CHECKPOINT_FORMAT = 1
UNET_FILE = "diffusion_pytorch_model.safetensors"


@dataclass(frozen=True)
class TrainingState:
    """Everything of a run that is neither weights nor a function of (seed, what, where)."""

    step: int  # optimizer steps done
    epoch: int  # of the last micro-batch trained on
    ema_updates: int
    skipped: int  # optimizer steps skipped because gradients were not finite
    threads: int  # sums are taken in another order with another number
    torch: str
    partner_step: int | None = None  # of the partner's checkpoint that was asked last; None where nobody is
    partner_sha256: str | None = None  # of the weights in it


@dataclass(frozen=True)
class Export:
    """The form in which weights stand in unet/ and ema/: what diffusers loads."""

    file: str  # name of the safetensors file
    metadata: Mapping[str, str]  # in its header
    config: Mapping[str, Any] | None  # of config.json beside it; an adapter has none


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint."""

    path: Path
    card: ExpertCard
    state: TrainingState

    def optimizer_tensors(self) -> dict[str, Tensor]:
        """The optimizer's state; raises CheckpointError where this checkpoint keeps none."""
        return read_tensors(self.path / OPTIMIZER_FILE)

    def weights_folder(self) -> Path:
        """The folder of the weights to draw with: averaged where they are kept."""
        return self.path / ("ema" if (self.path / "ema").is_dir() else "unet")

    def weights_sha256(self, folder: str) -> str:
        """sha256 of the weights in unet/ or ema/, hex, as it was verified."""
        name = ADAPTER_FILE if self.card.facts.adapter else UNET_FILE
        sums = json.loads((self.path / "checksums.json").read_text())
        return str(sums[f"{folder}/{name}"]["sha256"])

    def weights(self, folder: str) -> dict[str, Tensor]:
        """The tensors in unet/ or ema/."""
        return read_tensors(self.path / folder / (ADAPTER_FILE if self.card.facts.adapter else UNET_FILE))


def save_checkpoint(
    run: Path,
    state: TrainingState,
    card: ExpertCard,
    readme: str,
    export: Export,
    weights: Mapping[str, Mapping[str, Tensor]],
    optimizer: Mapping[str, Tensor],
    keep: int,
    keep_best: int = 0,
    score: float | None = None,
) -> Path:
    """Save and return checkpoints/step-N; `weights` are named tensors by folder ("unet", "ema").

    `score` is its eval loss, where it was measured. A checkpoint is whole under its name or not there; the previous
    ones are touched only after it is.
    """
    parent = run / "checkpoints"
    parent.mkdir(exist_ok=True)
    _remove_leftovers(parent)
    temporary, final = parent / f".saving-{state.step}", parent / checkpoint_name(state.step)
    temporary.mkdir()
    for folder, tensors in weights.items():
        (temporary / folder).mkdir()
        if export.config is not None:
            _write_json(temporary / folder / "config.json", dict(export.config))
        _write_tensors(temporary / folder / export.file, tensors, export.metadata)
    _write_tensors(temporary / OPTIMIZER_FILE, optimizer)
    known = {name: value for name, value in state.__dict__.items() if value is not None}
    _write_json(temporary / "state.json", {"format": CHECKPOINT_FORMAT, **known})
    _write_json(temporary / "expert.json", card.model_dump(mode="json"))
    _write_text(temporary / "README.md", readme)
    _write_json(temporary / "checksums.json", {str(p.relative_to(temporary)): _sum(p) for p in _files(temporary)})
    for folder_path in (*(temporary / folder for folder in weights), temporary):
        sync_folder(folder_path)
    if final.exists():  # left by a run that was rewound to an older step because this one did not verify
        shutil.rmtree(final)
    write_score(run, state.step, score)
    os.rename(temporary, final)
    sync_folder(parent)
    latest = {"step": state.step, "path": final.name}
    write_atomically(parent / "latest.json", json.dumps(latest).encode() + b"\n")
    rotate(run, keep, keep_best)
    return final


def open_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint at `path`, every file checked against its sum; raises CheckpointError naming what is wrong."""
    try:
        sums = json.loads((path / "checksums.json").read_text())
        for name, expected in sums.items():
            if _sum(path / _inside(name)) != expected:
                raise CheckpointError(f"{path / name} is damaged: it is not what was saved")
        state = json.loads((path / "state.json").read_text())
        if state.pop("format") != CHECKPOINT_FORMAT:
            raise CheckpointError(f"{path} is of a checkpoint format that this program does not read: update it")
        card = ExpertCard.model_validate_json((path / "expert.json").read_text())
        whole, adapter = (f"unet/{UNET_FILE}", "unet/config.json"), (f"unet/{ADAPTER_FILE}",)
        for needed in ("state.json", "expert.json", *(adapter if card.facts.adapter else whole)):
            if needed not in sums:
                raise CheckpointError(f"{path} has no checksum of {needed}")
        return Checkpoint(path, card, TrainingState(**state))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ValidationError) as error:
        raise CheckpointError(f"checkpoint {path} is damaged or incomplete: {str(error).splitlines()[0]}") from None


def newest_checkpoint(run: Path, on_bad: Callable[[str], None]) -> Checkpoint | None:
    """The newest that verifies; each newer one that does not is told to `on_bad`. None where there is none at all.

    Raises CheckpointError where there are checkpoints and none of them verifies.
    """
    paths = list_checkpoints(run)
    for path in paths:
        try:
            return open_checkpoint(path)
        except CheckpointError as error:
            on_bad(str(error))
    if paths:
        raise CheckpointError(f"no checkpoint of {run} verifies; start again with a new --output")
    return None


def best_checkpoint(run: Path, on_bad: Callable[[str], None]) -> Checkpoint:
    """The one of the lowest eval loss that verifies; each better one that does not is told to `on_bad`.

    Raises CheckpointError where no checkpoint with an eval loss verifies.
    """
    for path in best_checkpoints(run):
        try:
            return open_checkpoint(path)
        except CheckpointError as error:
            on_bad(str(error))
    raise CheckpointError(
        f"no checkpoint of {run} has an eval loss and verifies; {run} itself stands for its newest one"
    )


def open_expert(path: Path) -> Checkpoint:
    """The newest checkpoint of a run folder, its best (RUN/checkpoints/best.json), or the one at `path`; verified.

    Raises CheckpointError: the one that was named is never passed over for another.
    """
    if (path / "checksums.json").exists() or (path.parent.name == "checkpoints" and path.name != BEST_FILE):
        return open_checkpoint(path)
    if path.name == BEST_FILE:
        return best_checkpoint(path.parent.parent, lambda why: say(f"passed over: {why}"))
    if not path.is_dir():
        raise CheckpointError(f"no run folder {path}")
    checkpoint = newest_checkpoint(path, lambda why: say(f"passed over: {why}"))
    if checkpoint is None:
        raise CheckpointError(f"{path} holds no checkpoint yet: train it first (train-expert --output {path})")
    return checkpoint


def resumable_checkpoint(run: Path, on_bad: Callable[[str], None]) -> Checkpoint | None:
    """The newest checkpoint that verifies and keeps its optimizer's state."""
    checkpoint = newest_checkpoint(run, on_bad)
    if checkpoint is not None and OPTIMIZER_FILE not in json.loads((checkpoint.path / "checksums.json").read_text()):
        raise CheckpointError(f"{checkpoint.path} no longer keeps its optimizer state and newer ones do not verify")
    return checkpoint


def set_aside_newer(checkpoint: Checkpoint) -> None:
    """Rename checkpoints newer than the one that a run goes on with: they do not verify, and must not count as kept.

    They are removed when the next one has been saved.
    """
    for path in list_checkpoints(checkpoint.path.parent.parent):
        if path.name > checkpoint.path.name:
            aside = path.with_name(f"damaged-{path.name}")
            shutil.rmtree(aside, ignore_errors=True)
            os.rename(path, aside)
    point_to_best(checkpoint.path.parent.parent)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Tensors of a safetensors file on the CPU; raises CheckpointError where it cannot be read."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors: dict[str, Tensor] = load_file(path)
        return tensors
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None


def _remove_leftovers(parent: Path) -> None:
    for left in (*parent.glob(".saving-*"), *parent.glob(".removing-*")):
        shutil.rmtree(left)


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    _write_text(path, json.dumps(content, indent=1, sort_keys=True) + "\n")


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
    sync_file(path)


def _write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        plain = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
        save_file(plain, path, {"format": "pt", **(metadata or {})})
    except SafetensorError as error:  # how safetensors reports a full disk
        raise StoreIO(f"{path} cannot be written: {error}; the checkpoints before it are whole") from None
    os.chmod(path, 0o666 & ~_umask())  # safetensors makes it readable to its owner alone, whatever the umask says
    sync_file(path)


def _umask() -> int:
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _sum(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _inside(name: str) -> str:
    if name.startswith("/") or ".." in Path(name).parts:
        raise CheckpointError(f"checksums.json names a file outside its checkpoint: {name}")
    return name
