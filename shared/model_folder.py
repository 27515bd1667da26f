"""`--model`: a folder in diffusers layout, or a Hub id fetched into one; safetensors only, no code that came along."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from shared.command import one_line
from shared.errors import DataError
from shared.weights import read_json_object

COMPONENTS = ("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "unet", "scheduler")
_SINGLE_FILES = (".safetensors", ".ckpt")
_TEXT_SUFFIXES = (".json", ".txt")
_MOST_README, _LONGEST = 100_000, 300  # characters that are read of a card, and kept of what it says


def resolve_model(model: str, components: Sequence[str] = COMPONENTS) -> Path:
    """The folder of `model`; a Hub id ("segmind/SSD-1B") is fetched first, only the `components` that are needed.

    Raises DataError where there is neither such a folder nor such a repository.
    """
    folder = Path(model).expanduser()
    if folder.is_dir():
        if not (folder / "model_index.json").exists():
            raise DataError(f"{folder} has no model_index.json: --model wants a model in diffusers layout, or a Hub id")
        return folder
    if folder.suffix in _SINGLE_FILES:
        raise DataError(
            f"{folder} is one file, and --model wants a folder in diffusers layout: load it by diffusers' "
            "StableDiffusionXLPipeline.from_single_file and write it with save_pretrained"
        )
    if model.count("/") != 1 or model.startswith((".", "/", "~")):
        raise DataError(f"no model folder {folder}")
    return _fetch(model, components)


def resolve_clip(model: str) -> Path:
    """The folder of a CLIP in transformers' layout; a Hub id ("openai/clip-vit-large-patch14") is fetched first.

    Raises DataError where there is neither.
    """
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder
    if model.count("/") != 1 or model.startswith((".", "/", "~")):
        raise DataError(f"no CLIP folder {folder}")
    return _snapshot(model, ["*.json", "*.txt", "*.safetensors"], "CLIP")


def model_name(folder: Path) -> str:
    """What to call a resolved model: the Hub id that it was fetched by, else the name of its folder."""
    repository = folder.parent.parent.name
    if folder.parent.name == "snapshots" and repository.startswith("models--"):
        return "/".join(repository.split("--")[1:])
    return folder.resolve().name


def read_licence(folder: Path) -> str:
    """A model's licence as its README's front matter (or model_index.json) names it, with its name and link if "other".

    Empty where neither says: what a file of somebody else's does not say is not guessed.
    """
    said = _front_matter(folder / "README.md")
    licence = said.get("license") or _index_licence(folder / "model_index.json")
    more = ", ".join(said[key] for key in ("license_name", "license_link") if said.get(key))
    return f"{licence}: {more}" if licence and more else licence


def _front_matter(readme: Path) -> dict[str, str]:
    """Plain `key: value` lines between the first two lines of dashes; anything nested is left out."""
    try:
        with readme.open(encoding="utf-8") as file:
            lines = file.read(_MOST_README).splitlines()
    except (OSError, ValueError):
        return {}
    if not lines or lines[0].strip() != "---" or "---" not in (ends := [line.strip() for line in lines[1:]]):
        return {}
    pairs = (line.partition(":") for line in lines[1 : 1 + ends.index("---")] if not line.startswith((" ", "#", "-")))
    return {key.strip(): one_line(value.strip().strip("'\""))[:_LONGEST] for key, colon, value in pairs if colon}


def _index_licence(path: Path) -> str:
    try:
        licence = read_json_object(path).get("license", "")
    except DataError:
        return ""
    return one_line(licence)[:_LONGEST] if isinstance(licence, str) else ""


def _fetch(repository: str, components: Sequence[str]) -> Path:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

    try:
        wanted = sorted(_choose(HfApi().list_repo_files(repository), components))
    except OfflineModeIsEnabled:
        wanted = [f"{part}/*{suffix}" for part in components for suffix in (".safetensors", *_TEXT_SUFFIXES)]
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise _not_given(repository, "model", error) from None
    return _snapshot(repository, ["model_index.json", "README.md", *wanted], "model")


def _snapshot(repository: str, wanted: Sequence[str], kind: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
    )

    try:
        return Path(snapshot_download(repository, allow_patterns=list(wanted)))
    except (OfflineModeIsEnabled, LocalEntryNotFoundError, HfHubHTTPError, HFValidationError, OSError) as error:
        raise _not_given(repository, kind, error) from None


def _not_given(repository: str, kind: str, error: Exception) -> DataError:
    reason = str(error).strip().splitlines()[0]
    return DataError(f"no {kind} folder {repository}, and the Hub did not give it: {reason}")


def _choose(files: Iterable[str], components: Sequence[str]) -> Iterable[str]:
    """Settings of every component, and its plain safetensors, or the variants where it has no plain ones."""
    for part in components:
        own = [file for file in files if file.rpartition("/")[0] == part]
        yield from (file for file in own if file.endswith(_TEXT_SUFFIXES))
        weights = [file for file in own if file.endswith(".safetensors")]
        yield from [file for file in weights if file.count(".") == 1] or weights
