"""export.json: which shards and which sealed manifests an export is made of. Written last, read first, checked whole.

Names in it are data: only those that an export gives are taken, so that none leads elsewhere.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from cache_builder.places import Place, require_there
from shared.errors import DataError

FILE = "export.json"
MAX_BYTES = 256 << 20
_Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
_Count = Annotated[int, Field(ge=0)]


class _Listed(BaseModel):
    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)


class ListedShard(_Listed):
    """One Parquet file of frames."""

    digest: _Digest
    """blake2b-256 over the key and the checksum of each frame in order, hex."""
    records: _Count
    """Frames in it."""
    bytes: _Count
    """Size of the file."""

    @property
    def name(self) -> str:
        """Where it lies."""
        return shard_name(self.digest)


class ListedManifest(_Listed):
    """One sealed manifest."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")]
    """What it is called in the store."""
    digest: _Digest
    """Its digest, hex."""
    is_current: bool
    """Whether it was the current one of its name."""
    seal: dict[str, Any]
    """Its seal, as it stands in the store."""

    @property
    def file(self) -> str:
        """Where its Arrow file lies."""
        return f"manifests/{self.digest}.arrow"


class Listing(_Listed):
    """Everything that an export holds; what is not listed does not count."""

    format: Literal[1] = 1
    """Version of all this."""
    card: dict[str, Any]
    """What store.json says beside its format."""
    records: _Count
    """Frames in all shards."""
    shards: tuple[ListedShard, ...]
    """In the order of the samples that their records belong to."""
    manifests: tuple[ListedManifest, ...]
    """Those that travel along."""


def shard_name(digest: str) -> str:
    """Where the shard of a digest lies: content has one name, so nothing is ever written over by something else."""
    return f"shards/{digest[:32]}.parquet"


def listed(place: Place, digest: str, records: int) -> ListedShard:
    """The shard of a digest as it has been written; raises DataError where it is not there."""
    name = shard_name(digest)
    if (size := place.size(name)) is None:
        raise DataError(f"{place.label(name)} has just been written and is not there: does another program clear it?")
    return ListedShard(digest=digest, records=records, bytes=size)


def write_listing(place: Place, listing: Listing) -> None:
    """Put an export in force: from here on its shards count."""
    place.write(FILE, listing.model_dump_json(indent=1).encode() + b"\n")


def read_listing(place: Place) -> Listing:
    """What an export holds; raises StoreMissing where there is none, DataError where its list cannot be meant."""
    require_there(place, FILE, "an export that completes writes it last (cache-store export STORE --to URL)")
    data = place.read(FILE, MAX_BYTES)
    try:
        listing = Listing.model_validate_json(data)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        if where == "format" and first["type"] == "literal_error":
            raise DataError(f"{place.label(FILE)} is of export format {first['input']}; this program reads 1") from None
        raise DataError(
            f"{place.label(FILE)} is damaged: {where}: {first['msg']}; run the same cache-store export again"
        ) from None
    for manifest in listing.manifests:
        if manifest.seal.get("digest") != manifest.digest:
            raise DataError(f"{place.label(FILE)} is damaged: manifest {manifest.name} has the seal of another")
    return listing
