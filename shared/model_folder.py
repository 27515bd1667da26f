"""`--model`: a folder in diffusers layout, a Hub id fetched into one, or one file in the original layout made into one.

Safetensors only, and no code that came along.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path

from shared.command import one_line
from shared.errors import ConfigError, DataError
from shared.single_file import TOKENIZERS, as_folder, open_original, require_parts
from shared.weights import read_json_object

COMPONENTS = ("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "unet", "scheduler")
SDXL = "stabilityai/stable-diffusion-xl-base-1.0"
_PICKLES = (".ckpt", ".pt", ".pth", ".bin")
FILE_SUFFIXES = (".safetensors", *_PICKLES)  # of one file as a model; the pickles are refused with a reason
_TEXT_SUFFIXES = (".json", ".txt")
_MOST_README, _LONGEST = 100_000, 300  # characters that are read of a card, and kept of what it says


def resolve_model(model: str, components: Sequence[str] = COMPONENTS, config: str | None = None) -> Path:
    """The folder of `model`, which may be three things:

    a folder in diffusers layout; a Hub id ("segmind/SSD-1B"), of which the `components` that are needed are fetched
    first; one .safetensors file in SDXL's original layout, converted once (shared/single_file.py). `config`, a folder
    or Hub id, has the tokenizers that such a file lacks, and settings that no shape tells.

    Raises DataError where there is none such or something of it is missing, ConfigError where `config` is for nothing.
    """
    path = Path(model).expanduser()
    if path.suffix in FILE_SUFFIXES and not path.is_dir():
        return _from_file(path, components, config)
    if config is not None:
        raise ConfigError(
            "--model-config is for a --model that is one .safetensors file: a folder has its own settings"
        )
    if path.is_dir():
        if not (path / "model_index.json").exists():
            raise DataError(f"{path} has no model_index.json: --model wants a model in diffusers layout, or a Hub id")
        return path
    if not _is_hub_id(model):
        raise DataError(f"no model folder {path}")
    return _fetch(model, components)


def resolve_clip(model: str) -> Path:
    """The folder of a CLIP in transformers' layout; a Hub id ("openai/clip-vit-large-patch14") is fetched first.

    Raises DataError where there is neither.
    """
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder
    if not _is_hub_id(model):
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


def _from_file(file: Path, components: Sequence[str], config: str | None) -> Path:
    if not file.is_file():
        raise DataError(f"no model file {file}")
    if file.suffix in _PICKLES:
        raise DataError(
            f"{file} is a pickle, which may hold any program: convert it to .safetensors once, in a place where "
            "you trust it"
        )
    original = open_original(file)
    require_parts(original, components)
    beside = file.with_suffix("")
    given = beside if (beside / "model_index.json").exists() else None
    if config is not None:
        given = _settings_folder(config)
    wanted = [part for part in TOKENIZERS if part in components]
    tokenizers = given if given is not None and all((given / part).is_dir() for part in wanted) else None
    if wanted and tokenizers is None:
        tokenizers = _sdxl_tokenizers(file, given)
    return as_folder(original, given, tokenizers)


def _settings_folder(config: str) -> Path:
    folder = Path(config).expanduser()
    if not folder.is_dir() and _is_hub_id(config):
        return _snapshot(config, ["*.json", "*.txt"], "model")
    if not any((folder / part).is_dir() for part in COMPONENTS):
        raise DataError(
            f"--model-config {config}: no folder with one of {', '.join(f'{part}/' for part in COMPONENTS)}"
        )
    return folder


def _sdxl_tokenizers(file: Path, given: Path | None) -> Path:
    """SDXL's own, which its whole family shares, from the Hub or its cache."""
    way_out = "name a folder (or Hub id) that has tokenizer/ and tokenizer_2/ with --model-config"
    if given is not None:
        raise DataError(f"{file} holds no tokenizers, as no such file does, and {given} has none: {way_out}")
    patterns = [f"{part}/*{suffix}" for part in TOKENIZERS for suffix in _TEXT_SUFFIXES]
    try:
        folder = _snapshot(SDXL, patterns, "tokenizer")
    except DataError as error:
        raise DataError(f"{file} holds no tokenizers, as no such file does; {error}; {way_out}") from None
    if not all((folder / part).is_dir() for part in TOKENIZERS):
        raise DataError(f"{file} holds no tokenizers, as no such file does, nor does the Hub's cache: {way_out}")
    return folder


def _is_hub_id(name: str) -> bool:
    return name.count("/") == 1 and not name.startswith((".", "/", "~"))


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
