"""What `cache-serve` may be told: where the store is, when it builds, what it keeps, its page; and what a build may.

serve.toml -> ServeConfig -> BuildConfig, the part that makes a manifest what it is
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from cache_builder.config import BuildConfig
from shared.config import Config

OWN_ADDRESSES = ("127.0.0.1", "localhost", "::1")
_PATHS = (("store",), ("prompts",), ("runs_under",), ("page", "token_file"))


class ServiceRules(Config):
    """When the service builds, and what it keeps."""

    quiet_s: float = Field(10.0, ge=0)
    """A build begins when nothing has changed in the folders for so long, seconds."""
    patience_s: float = Field(600.0, ge=0)
    """A build begins at the latest so long after the first change, though more keep coming, seconds."""
    look_s: float = Field(600.0, gt=0)
    """How often the folders are looked through for changes that no file system told of, seconds."""
    poll_s: float = Field(30.0, gt=0)
    """The same where the system tells of nothing, as on network disks; a tenth of the time at most, seconds."""
    hung_s: float = Field(900.0, gt=0)
    """A build that says nothing for so long is ended and tried again, seconds."""
    retry_s: float = Field(30.0, gt=0)
    """Wait before a build that died is tried again, doubled each time up to an hour, seconds."""
    stop_s: float = Field(45.0, gt=0)
    """How long a build that was asked to stop may take for its batch before it is ended, seconds."""
    keep: Literal["all"] | int = 5
    """How many manifests of the name are kept, the current one among them; "all" drops none."""
    pinned: tuple[str, ...] = ()
    """Digests of manifests that are kept besides; their first 8 digits or more."""
    ready: bool = True
    """Whether the next build's process waits with its libraries loaded: 0.5 GB, and seconds less to a manifest."""

    @model_validator(mode="after")
    def _keeps_one(self) -> "ServiceRules":
        if self.keep != "all" and self.keep < 1:
            raise ValueError(f'keep = {self.keep} would drop the current manifest: 1 or more, or "all"')
        if short := next((digest for digest in self.pinned if len(digest) < 8), None):
            raise ValueError(f"pinned {short!r}: write 8 digits or more of a digest")
        return self


class PageRules(Config):
    """The web page beside the service."""

    enabled: bool = True
    """Whether the service starts it."""
    host: str = "127.0.0.1"
    """Address that it listens on; any other than this machine's own needs token_file."""
    port: int = Field(8765, ge=1, le=65535)
    """Port that it listens on."""
    token_file: Path | None = None
    """File whose text everybody who asks must know."""
    allowed_hosts: tuple[str, ...] = ()
    """Further names that it may be asked by, such as this machine's in the network."""
    hung_s: float = Field(60.0, gt=0)
    """A page that answers nothing for so long is ended and started again, seconds."""

    @model_validator(mode="after")
    def _is_guarded(self) -> "PageRules":
        if self.host not in OWN_ADDRESSES and self.token_file is None:
            raise ValueError(f"host {self.host} is open to others: name a token_file, or listen on 127.0.0.1")
        return self


class ServeConfig(BuildConfig):
    """Everything the service is told; paths in a file are relative to its folder."""

    store: Path
    """The store; made where there is none."""
    model: str = Field(min_length=1)
    """Model in SDXL's diffusers layout, a folder or a Hub id; or one .safetensors file."""
    model_settings: str | None = None
    """Folder or Hub id with the tokenizers that a model of one file lacks, as cache-build --model-config."""
    manifest: str = "main"
    """Name of the manifest that is sealed after each build that changed something."""
    device: str = "auto"
    """auto, cuda, mps or cpu; or several: cuda:0,cuda:1."""
    prompts: Path | None = None
    """Text file with a prompt on each line, embedded for validation."""
    runs: tuple[Path, ...] = ()
    """Run folders of experts: shown on the page, and the manifests that they name are kept."""
    runs_under: Path | None = None
    """Folder whose run folders count among them as they come."""
    service: ServiceRules = ServiceRules()
    page: PageRules = PageRules()

    @classmethod
    def located(cls, table: Mapping[str, Any], folder: Path) -> Mapping[str, Any]:
        """`table` with its paths under `folder`, whose file it is."""
        found = {**super().located(table, folder)}
        for path in _PATHS:
            found = _placed(found, path, folder)
        for name in ("model", "model_settings"):
            if isinstance(model := found.get(name), str) and (folder / Path(model).expanduser()).exists():
                found[name] = str(folder / Path(model).expanduser())  # else a Hub id, or from the working directory
        if isinstance(runs := found.get("runs"), list):
            found["runs"] = [str(folder / Path(run).expanduser()) if isinstance(run, str) else run for run in runs]
        return found

    @property
    def build(self) -> BuildConfig:
        """What a build is told, and nothing else: the digest of a manifest depends on it."""
        return BuildConfig(**{name: getattr(self, name) for name in BuildConfig.model_fields})


def _placed(table: dict[str, Any], path: tuple[str, ...], folder: Path) -> dict[str, Any]:
    """`table` with the string at `path`, if there is one, as a path under `folder`."""
    first, *rest = path
    value = table.get(first)
    if rest and isinstance(value, Mapping):
        return {**table, first: _placed(dict(value), tuple(rest), folder)}
    if rest or not isinstance(value, str):
        return table
    return {**table, first: str(folder / Path(value).expanduser())}
