"""`--model`: a folder in diffusers layout, or a Hub id fetched into one; safetensors only, no code that came along."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from shared.errors import DataError

COMPONENTS = ("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "unet", "scheduler")
_TEXT_SUFFIXES = (".json", ".txt")


def resolve_model(model: str, components: Sequence[str] = COMPONENTS) -> Path:
    """The folder of `model`; a Hub id ("segmind/SSD-1B") is fetched first, only the `components` that are needed.

    Raises DataError where there is neither such a folder nor such a repository.
    """
    folder = Path(model).expanduser()
    if folder.is_dir():
        if not (folder / "model_index.json").exists():
            raise DataError(f"{folder} has no model_index.json: --model wants a model in diffusers layout, or a Hub id")
        return folder
    if model.count("/") != 1 or model.startswith((".", "/", "~")):
        raise DataError(f"no model folder {folder}")
    return _fetch(model, components)


def _fetch(repository: str, components: Sequence[str]) -> Path:
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

    try:
        try:
            files = HfApi().list_repo_files(repository)
            wanted = sorted(_choose(files, components))
        except OfflineModeIsEnabled:
            wanted = [f"{part}/*{suffix}" for part in components for suffix in (".safetensors", *_TEXT_SUFFIXES)]
        return Path(snapshot_download(repository, allow_patterns=["model_index.json", *wanted]))
    except (OfflineModeIsEnabled, LocalEntryNotFoundError, HfHubHTTPError, HFValidationError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise DataError(f"no model folder {repository}, and the Hub did not give it: {reason}") from None


def _choose(files: Iterable[str], components: Sequence[str]) -> Iterable[str]:
    """Settings of every component, and its plain safetensors, or the variants where it has no plain ones."""
    for part in components:
        own = [file for file in files if file.rpartition("/")[0] == part]
        yield from (file for file in own if file.endswith(_TEXT_SUFFIXES))
        weights = [file for file in own if file.endswith(".safetensors")]
        yield from [file for file in weights if file.count(".") == 1] or weights
