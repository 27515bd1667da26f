"""One .safetensors file in SDXL's original layout as a folder in diffusers layout, converted once.

    FILE -> read_parts -> $XDG_CACHE_HOME/sdxl-experts/models/<digest of FILE>/
                weights/unet.safetensors, ...      its tensors, streamed one by one
                <digest of settings>/NAME/         the folder: settings, tokenizers, links to the weights

Disposable, and keyed by content: the same file under another name is the same model, a changed one another. Weights
have the digests of the folder that the file was made from, so stores and experts made with either are each other's.
"""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shared.amounts import size_text
from shared.atomic import new_folder, sync_file, sync_folder
from shared.command import one_line
from shared.errors import DataError
from shared.lease import Lease, holder
from shared.original_reading import MARKS, Part, foreign_names, read_parts
from shared.original_settings import fitted
from shared.pipeline_index import pipeline_index
from shared.progress import say
from shared.room import require_room
from shared.tensor_file import file_bytes, read_lazily, read_metadata, write_lazily
from shared.weights import read_json_object
from shared.weights_memory import cache_folder, remembered_digest

FORMAT = 1  # of what is written: one more whenever the same file would give other folders
TOKENIZERS = ("tokenizer", "tokenizer_2")
_WEIGHTS_FILE = {
    "unet": "diffusion_pytorch_model.safetensors",
    "vae": "diffusion_pytorch_model.safetensors",
    "text_encoder": "model.safetensors",
    "text_encoder_2": "model.safetensors",
}
_CHUNK_BYTES = 16 << 20


@dataclass(frozen=True)
class Original:
    """A file of the original layout, its header read."""

    file: Path
    parts: dict[str, Part]
    marks: frozenset[str]  # of MARKS, those that it has
    said: dict[str, str]  # its metadata

    @property
    def is_refiner(self) -> bool:
        """Whether it has the second text encoder alone."""
        return "text_encoder" not in self.parts and "text_encoder_2" in self.parts


def open_original(file: Path) -> Original:
    """Read a file's header; raises DataError where it is not whole or holds no SDXL in the original layout."""
    tensors = read_lazily([file])
    try:
        parts = read_parts(tensors)
    except DataError as error:
        raise DataError(f"{file}: {error}") from None
    return Original(file, parts, frozenset(name for name in MARKS if name in tensors), read_metadata(file))


def as_folder(original: Original, given: Path | None, tokenizers: Path | None) -> Path:
    """The folder of a file, converted now if that was never done; two commands at once convert it once.

    `given` holds settings (unet/config.json, scheduler/...) that go before those read off the file, `tokenizers` the
    tokenizers, which no such file has.

    Raises DataError where the settings are of another model, StoreFull where there is no room.
    """
    files = _settings(original, given) | _tokenizer_files(tokenizers)
    place = _models() / _file_digest(original.file)
    place.mkdir(parents=True, exist_ok=True)
    key = hashlib.blake2b(json.dumps({name: text.hex() for name, text in sorted(files.items())}).encode())
    folder = place / key.hexdigest()[:16] / (one_line(original.file.stem).lstrip(".") or "model")
    if holder(place / "lock"):
        say(f"waiting for another command that converts {original.file}")
    lease = Lease(place / "lock", f"{original.file} is converted", "wait for it", wait=True)
    try:
        _write_weights(original, place / "weights")
        if not folder.is_dir():
            _write_folder(original, folder, files)
    finally:
        lease.release()
    return folder


def _write_weights(original: Original, folder: Path) -> None:
    """Write what is not there; what another command was killed in the middle of is written again."""
    folder.mkdir(exist_ok=True)
    todo = {part: own for part, own in original.parts.items() if not (folder / f"{part}.safetensors").exists()}
    if not todo:
        return
    needed = sum(file_bytes(own.tensors) for own in todo.values())
    require_room(folder, needed, f"{original.file.name} in diffusers layout (XDG_CACHE_HOME names another place)")
    say(f"{original.file.name}: {size_text(needed)} in SDXL's original layout, converted once into {folder.parent}")
    foreign = foreign_names(read_lazily([original.file]))
    if foreign:
        say(f"{len(foreign)} tensors of it are no part of SDXL and left out: {one_line(foreign[0])}, ...")
    for part, own in todo.items():
        temporary = folder / f".{part}.safetensors"
        try:
            write_lazily(temporary, own.tensors, {})
            os.replace(temporary, folder / f"{part}.safetensors")
        finally:
            temporary.unlink(missing_ok=True)  # where the disk is full after all, it is given back
    sync_folder(folder)


def _write_folder(original: Original, folder: Path, files: Mapping[str, bytes]) -> None:
    with new_folder(folder) as written:
        for name, text in files.items():
            (written / name).parent.mkdir(exist_ok=True)
            (written / name).write_bytes(text)
            sync_file(written / name)
        for part in original.parts:
            (written / part / _WEIGHTS_FILE[part]).symlink_to(Path("../../../weights") / f"{part}.safetensors")


def _settings(original: Original, given: Path | None) -> dict[str, bytes]:
    """Every file of settings, by its path in the folder."""
    known = {part: _given(given, f"{part}/config.json") for part in original.parts}
    try:
        settings = {
            f"{part}/config.json": fitted(part, own.settings, known[part]) for part, own in original.parts.items()
        }
    except DataError as error:
        raise DataError(f"{original.file}: {error}") from None
    settings["scheduler/scheduler_config.json"] = _given(given, "scheduler/scheduler_config.json") or _schedule(
        original
    )
    settings["model_index.json"] = _index(original, _given(given, "model_index.json") or {})
    settings["model_index.json"]["scheduler"][1] = settings["scheduler/scheduler_config.json"].get("_class_name")
    return {name: json.dumps(own, indent=2, sort_keys=True).encode() + b"\n" for name, own in settings.items()}


def _given(folder: Path | None, name: str) -> dict[str, Any] | None:
    return read_json_object(folder / name) if folder is not None and (folder / name).exists() else None


def _schedule(original: Original) -> dict[str, Any]:
    """SDXL's scheduler; what the UNet predicts by ComfyUI's marks or modelspec's word, eps where neither says."""
    is_v = "v_pred" in original.marks or original.said.get("modelspec.prediction_type") in ("v", "v_prediction")
    is_zero_snr = "ztsnr" in original.marks
    return {
        "_class_name": "EulerDiscreteScheduler",
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "interpolation_type": "linear",
        "num_train_timesteps": 1000,
        "prediction_type": "v_prediction" if is_v else "epsilon",
        "rescale_betas_zero_snr": is_zero_snr,
        "steps_offset": 1,
        "timestep_spacing": "trailing" if is_zero_snr else "leading",
    }


def _index(original: Original, given: Mapping[str, Any]) -> dict[str, Any]:
    parts = original.parts.keys() | {part.replace("text_encoder", "tokenizer") for part in original.parts}
    index = pipeline_index(parts, "EulerDiscreteScheduler", from_images=original.is_refiner)
    index["force_zeros_for_empty_prompt"] = not original.is_refiner
    if original.is_refiner:
        index["requires_aesthetics_score"] = True
    licence = original.said.get("modelspec.license", "")
    if licence and licence != "unknown":
        index["license"] = licence
    kept = ("force_zeros_for_empty_prompt", "requires_aesthetics_score")
    return index | {key: given[key] for key in kept if key in given}


def _tokenizer_files(folder: Path | None) -> dict[str, bytes]:
    if folder is None:
        return {}
    files = [
        file for part in TOKENIZERS for file in sorted((folder / part).glob("*")) if file.suffix in (".json", ".txt")
    ]
    return {f"{file.parent.name}/{file.name}": file.read_bytes() for file in files}


def _models() -> Path:
    try:
        return cache_folder() / "models"
    except RuntimeError:
        raise DataError("no home to convert --model in: set XDG_CACHE_HOME to a folder with room") from None


def _file_digest(file: Path) -> str:
    def work_out() -> str:
        digest = hashlib.blake2b(b"%d " % FORMAT, digest_size=16)
        with file.open("rb") as opened:
            while chunk := opened.read(_CHUNK_BYTES):
                digest.update(chunk)
        return digest.hexdigest()

    return remembered_digest(f"the whole file, format {FORMAT}", [file], work_out)


def require_parts(original: Original, components: Sequence[str]) -> None:
    """Raise DataError where a file lacks a component that is needed."""
    for part in components:
        if part in _WEIGHTS_FILE and part not in original.parts:
            kind = "a refiner's: it has no" if original.is_refiner and part == "text_encoder" else "without a"
            raise DataError(f"{original.file} is a checkpoint {kind} {part}, which this command needs")
