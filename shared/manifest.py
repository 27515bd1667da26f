"""A sealed view of the store: which samples, in which bucket, under which keys, and the digest of all that.

    STORE/manifests/NAME/<digest>.arrow    Arrow IPC file, one record batch, memory-mapped by its readers
    STORE/manifests/NAME/<digest>.json     its seal: rows, bytes and xxh3-128 of the .arrow file
    STORE/manifests/NAME/current.json      a copy of the newest seal; replaced last

Whoever has one open holds a shared flock on its .arrow file: nobody drops it meanwhile (shared/manifest_shelf.py).

Rows are sorted by (dataset, bucket, sample id). The digest covers the schema version, the settings and the rows in that
order: keys name inputs, so no digest depends on the bytes of a record. The doors to Arrow's files are this one,
shared/manifest_rows.py, shared/manifest_columns.py and shared/manifest_shown.py.
"""

import fcntl
import json
import os
import re
import time
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import pyarrow as pa
import xxhash
from pydantic import ValidationError

from shared.atomic import sync_file, sync_folder, write_atomically
from shared.errors import ConfigError, ManifestMismatch
from shared.manifest_buckets import Bucket, buckets_of
from shared.manifest_check import Check, ManifestAbsent, require_sound, start_check
from shared.manifest_columns import make_columns
from shared.manifest_rows import (
    MANIFEST_FORMAT,
    META,
    ManifestRow,
    ManifestSettings,
    MetaValue,
    Split,
    manifest_digest,
    read_row,
    schema_of,
)
from shared.manifest_shown import ShownRows, key_column, show_rows
from shared.parts import PINNED_SAMPLES, Heads, Mask, Part, eval_order, in_any, joined_parts, parse_part

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_DIGEST = re.compile(r"[0-9a-f]{64}")
_METADATA_KEY = b"sdxl-experts"


@runtime_checkable
class SizedRows(Protocol):
    """Rows that are counted, and can be gone through as often as one likes."""

    def __len__(self) -> int: ...
    def __iter__(self) -> Iterator[ManifestRow]: ...


class Manifest:
    """A sealed manifest, memory-mapped.

    Of one that is verified beside, what a row says is told when that is done, and raises ManifestMismatch where it was
    damaged; how many rows there are, in which bucket and of which split, is told before.
    """

    def __init__(self, name: str, path: Path, table: pa.RecordBatch, parts: tuple[Part, ...], check: Check) -> None:
        self._check: Check | None = check  # still going on; rows are read once it is done
        self.name = name
        self.path = path
        self.parts = parts  # those whose records this store has; () for all
        card = json.loads(table.schema.metadata[_METADATA_KEY])
        self.digest: str = card["digest"]
        self.settings = ManifestSettings.model_validate(card["settings"])
        self._table = table

    def verified(self) -> None:
        """Return once the whole file is known to be what was sealed; raises ManifestMismatch."""
        if self._check is not None:
            require_sound(self.path, self._check)
            self._check = None

    def latent_keys(self) -> np.ndarray[Any, np.dtype[np.bytes_]]:
        """Keys of the latents of every variant of every row, in order, S16 (numpy cuts trailing zeros)."""
        self.verified()
        return key_column(self._table.column("variants").flatten().field("latent_key"))

    def text_keys(self) -> np.ndarray[Any, np.dtype[np.bytes_]]:
        """Keys of the texts of every row, in order, S16; the empty prompt's is in the settings."""
        self.verified()
        return key_column(self._table.column("texts").flatten())

    def rows_naming(self, keys: Sequence[bytes]) -> list[int]:
        """Indices of the rows that name any of the record `keys`."""
        wanted, rows = np.array(list(keys), "S16"), set[int]()
        for name, named in (("variants", self.latent_keys()), ("texts", self.text_keys())):
            ends = self._table.column(name).offsets.to_numpy()[1:]
            rows.update(np.searchsorted(ends, np.flatnonzero(np.isin(named, wanted)), side="right").tolist())
        return sorted(rows)

    def caption_counts(self) -> np.ndarray[Any, np.dtype[np.int64]]:
        """How many captions each row has, int64 [rows]."""
        self.verified()
        counts: np.ndarray[Any, np.dtype[np.int64]] = np.diff(self._table.column("texts").offsets.to_numpy())
        return counts.astype(np.int64)

    def variant_counts(self) -> np.ndarray[Any, np.dtype[np.int64]]:
        """How many crops each row has, int64 [rows]."""
        self.verified()
        counts: np.ndarray[Any, np.dtype[np.int64]] = np.diff(self._table.column("variants").offsets.to_numpy())
        return counts.astype(np.int64)

    def sample_heads(self, rows: np.ndarray[Any, Any] | None = None) -> Heads:
        """The first 32 bits of the sample id of each row, or of `rows`, uint32: what parts are told by."""
        heads = key_column(self._table.column("sample_id")).view(">u4").reshape(-1, 4)[:, 0]
        return (heads if rows is None else heads[rows]).astype(np.uint32)

    def rows_in(self, parts: Sequence[Part]) -> Mask:
        """Whether each row belongs to one of `parts`, bool [rows]; of none, all do.

        The held-out samples that runs are scored on belong to every part.
        """
        if not parts:
            return np.ones(len(self), np.bool_)
        mask = in_any(parts, self.sample_heads())
        held_out = [int(row) for bucket in self.buckets("eval") for row in bucket.rows]
        first = eval_order(self.sample_ids(held_out), PINNED_SAMPLES)
        mask[[held_out[i] for i in first]] = True
        return mask

    def original_sizes(self) -> np.ndarray[Any, np.dtype[np.int64]]:
        """Size of each row's picture, int64 [rows, 2], (h, w) in pixels."""
        self.verified()
        flat = self._table.column("original_size_hw").flatten().to_numpy()
        sizes: np.ndarray[Any, np.dtype[np.int64]] = flat.reshape(-1, 2).astype(np.int64)
        return sizes

    def in_dataset(self, name: str) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """Whether each row is of data set `name`, bool [rows]."""
        self.verified()
        codes = self._table.column("dataset")
        known = codes.dictionary.to_pylist()
        is_in: np.ndarray[Any, np.dtype[np.bool_]] = codes.indices.to_numpy() == (
            known.index(name) if name in known else -1
        )
        return is_in

    def meta(self, name: str) -> list[MetaValue | None]:
        """What travelled along in column meta_NAME, row by row; None where a row has nothing."""
        self.verified()
        values: list[Any] = self._table.column(META + name).to_pylist()
        return [tuple(value) if isinstance(value, list) else value for value in values]

    def image_digests(self, indices: Sequence[int] | None = None) -> list[bytes]:
        """Digest of each row's picture, or of those at `indices`, in that order."""
        self.verified()
        column = self._table.column("image_digest")
        return list((column if indices is None else column.take(pa.array(indices, pa.int64()))).to_pylist())

    def all_sample_ids(self) -> np.ndarray[Any, np.dtype[np.bytes_]]:
        """Ids of all rows, in order, S16 (numpy cuts trailing zeros)."""
        self.verified()
        return key_column(self._table.column("sample_id"))

    def sample_ids(self, indices: Sequence[int]) -> list[bytes]:
        """Ids of the rows at `indices`, in that order."""
        self.verified()
        return list(self._table.column("sample_id").take(pa.array(indices, pa.int64())).to_pylist())

    def __len__(self) -> int:
        return int(self._table.num_rows)

    def rows(self, indices: Sequence[int] | np.ndarray[Any, Any]) -> list[ManifestRow]:
        """The rows at `indices`, in that order."""
        self.verified()
        return [read_row(row) for row in self._table.take(pa.array(indices, pa.int64())).to_pylist()]

    def shown_rows(self) -> ShownRows:
        """What a batch shows of each row, as views of the mapped columns."""
        self.verified()
        return show_rows(self._table)

    def buckets(self, split: Split = "train") -> list[Bucket]:
        """Rows of `split` by bucket, smallest bucket first; the same bucket of several data sets is one."""
        hw = self._table.column("bucket_hw").flatten().to_numpy().reshape(-1, 2)
        split_codes = self._table.column("split")
        try:
            split_codes.dictionary.validate(full=True)
        except pa.ArrowInvalid:
            self.verified()
            raise
        names = split_codes.dictionary.to_pylist()
        return buckets_of(hw, split_codes.indices.to_numpy(), names.index(split) if split in names else -1)


def seal_manifest(
    store: Path,
    name: str,
    settings: ManifestSettings,
    rows: Iterable[ManifestRow],
    *,
    in_order: bool = False,
    replace: bool = False,
    allow_shrink: bool = False,
) -> Manifest:
    """Write, sync and rename a manifest into place and make it NAME's current one; the same content is sealed once.

    Rows that are `in_order` by ManifestRow.order, and can be gone through twice, are not all held in memory. What is
    there but damaged is made anew. Raises ManifestMismatch where NAME holds other data sets and `replace` is
    not given, or where more than a tenth of its rows would be lost and `allow_shrink` is not given.
    """
    ordered = rows if in_order and isinstance(rows, SizedRows) else sorted(rows, key=ManifestRow.order)
    digest = manifest_digest(settings, ordered)
    folder = manifest_folder(store, name)
    check_data_sets(store, name, settings.datasets, replace=replace)
    _check_shrinking(_sound(store, name), len(ordered), allow_shrink)
    folder.mkdir(parents=True, exist_ok=True)
    found = _sound(store, name, digest)
    if found is None:
        _write(folder, digest, settings, ordered)
    elif found.parts:  # the build has made what this store lacked of it
        mark_parts(folder, digest, ())
    write_atomically(folder / "current.json", (folder / f"{digest}.json").read_bytes())
    return open_manifest(store, name)


def open_manifest(store: Path, name: str, digest: str | None = None, *, check_beside: bool = False) -> Manifest:
    """NAME's current manifest, or the one of `digest`; verified, then memory-mapped, or mapped while it is verified.

    Raises ManifestMismatch where it is absent, damaged or of a newer format.
    """
    folder = manifest_folder(store, name)
    seal = _read_seal(folder, digest)
    return map_manifest(name, folder / f"{seal['digest']}.arrow", seal, check_beside=check_beside)


def map_manifest(name: str, path: Path, seal: Mapping[str, Any], *, check_beside: bool = False) -> Manifest:
    """The manifest in the file `path`, verified by its seal and mapped; raises ManifestMismatch.

    Reading gigabytes takes its time: `check_beside` verifies in a thread, and whoever asks for a row waits for it.
    """
    try:
        hold = _hold(path)
        try:
            check = start_check(hold, seal)
            if not check_beside:
                require_sound(path, check)
            with pa.memory_map(str(path)) as mapped:
                batch = pa.ipc.open_file(mapped).get_batch(0)
            batch.validate()
            parts = joined_parts(parse_part(part) for part in seal.get("parts", ()))
            manifest = Manifest(name, path, batch, parts, check)
            if not batch.schema.equals(schema_of(manifest.settings)):
                require_sound(path, check)
        except BaseException:
            os.close(hold)
            raise
        weakref.finalize(manifest, os.close, hold)
    except (OSError, pa.ArrowException, ValidationError, KeyError, ValueError, TypeError, ConfigError) as error:
        raise ManifestAbsent(f"manifest {path} is damaged: {str(error).splitlines()[0]}; build it again") from None
    if manifest.digest != seal["digest"]:
        raise ManifestAbsent(f"manifest {path} is not the one its seal names")
    return manifest


def mark_parts(folder: Path, digest: str, parts: Sequence[Part]) -> None:
    """Say in the seal of a manifest which parts of it the store has, () for all; the caller is the store's writer."""
    path = folder / f"{digest}.json"
    seal = {key: value for key, value in json.loads(path.read_text()).items() if key != "parts"}
    seal |= {"parts": [str(part) for part in parts]} if parts else {}
    write_atomically(path, json.dumps(seal, indent=1).encode() + b"\n")


def current_digest(store: Path, name: str) -> str | None:
    """Digest of NAME's current manifest; None where there is none that could be opened."""
    try:
        return str(_read_seal(manifest_folder(store, name), None)["digest"])
    except ManifestMismatch:
        return None


def check_data_sets(store: Path, name: str, datasets: Sequence[str], *, replace: bool) -> None:
    """Require that NAME may be sealed from `datasets`: hours of encoding should not end in finding that it may not.

    Raises ConfigError where NAME cannot be a name, ManifestMismatch where it holds other data sets, unless `replace`.
    """
    current = _sound(store, name)
    if current is None or replace or set(current.settings.datasets) == set(datasets):
        return
    held, built = ", ".join(current.settings.datasets), ", ".join(datasets)
    raise ManifestMismatch(
        f"manifest {name!r} is of data sets {held}, this build of {built}: another --manifest, or --replace"
    )


def check_shrinking(store: Path, name: str, count: int, *, allow_shrink: bool) -> None:
    """Require that NAME may be sealed with `count` rows; raises ManifestMismatch."""
    _check_shrinking(_sound(store, name), count, allow_shrink)


def list_manifests(store: Path) -> list[str]:
    """Names of the manifests in a store."""
    return sorted(path.parent.name for path in (store / "manifests").glob("*/current.json"))


def _sound(store: Path, name: str, digest: str | None = None) -> Manifest | None:
    """The manifest, or None where it is absent or damaged: it is then made anew."""
    try:
        return open_manifest(store, name, digest)
    except ManifestAbsent:
        return None


def _check_shrinking(old: Manifest | None, count: int, allow_shrink: bool) -> None:
    if old is not None and not allow_shrink and count < 0.9 * len(old):
        raise ManifestMismatch(
            f"manifest {old.name!r} has {len(old)} samples and would keep {count}: is a disk missing? "
            "If this is meant, --allow-shrink"
        )


def _write(folder: Path, digest: str, settings: ManifestSettings, ordered: SizedRows) -> None:
    card = {"format": MANIFEST_FORMAT, "digest": digest, "settings": settings.as_json()}
    schema = schema_of(settings).with_metadata({_METADATA_KEY: json.dumps(card, sort_keys=True).encode()})
    columns = make_columns(schema, ordered, folder)
    temporary, final = folder / f".{digest}.{os.getpid()}.tmp", folder / f"{digest}.arrow"
    with pa.OSFile(str(temporary), "wb") as file, pa.ipc.new_file(file, schema) as writer:
        writer.write_batch(pa.record_batch(columns, schema=schema))
    sync_file(temporary)
    with pa.memory_map(str(temporary)) as mapped:
        checksum = xxhash.xxh3_128(mapped.read_buffer()).hexdigest()
    seal = {
        "format": MANIFEST_FORMAT,
        "digest": digest,
        "rows": len(ordered),
        "bytes": temporary.stat().st_size,
        "xxh3_128": checksum,
        "sealed_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    os.replace(temporary, final)
    sync_folder(folder)
    write_atomically(folder / f"{digest}.json", json.dumps(seal, indent=1).encode() + b"\n")


def manifest_folder(store: Path, name: str) -> Path:
    """Where the manifests of NAME lie; raises ConfigError where that cannot be a name."""
    if not _NAME.fullmatch(name):
        raise ConfigError(f"manifest name {name!r}: use letters, digits, '.', '_' and '-', up to 100")
    return store / "manifests" / name


def _read_seal(folder: Path, digest: str | None) -> dict[str, Any]:
    if digest is not None and not _DIGEST.fullmatch(digest):
        raise ManifestAbsent(f"{digest!r} is no digest of a manifest")
    path = folder / (f"{digest}.json" if digest else "current.json")
    try:
        seal = json.loads(path.read_text())
        version, _, _ = seal["format"], seal["digest"], seal["bytes"]
    except FileNotFoundError:
        raise ManifestAbsent(_absent(folder, digest)) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ManifestAbsent(f"{path} is damaged: {error}; build it again") from None
    if version != MANIFEST_FORMAT:
        raise ManifestMismatch(
            f"{path} is of manifest format {version}; this program reads {MANIFEST_FORMAT}: update it"
        )
    if not _DIGEST.fullmatch(str(seal["digest"])) or digest not in (None, seal["digest"]):
        raise ManifestAbsent(f"{path} is damaged: it names another digest; build it again")
    return dict(seal)


def _hold(path: Path) -> int:
    """A descriptor with a shared lock, which keeps the manifest from being dropped as long as it is open."""
    hold = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(hold, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(hold)
        raise ManifestAbsent(f"manifest {path} is being dropped") from None
    except OSError:
        pass  # a file system without locks: reading goes before protection
    return hold


def _absent(folder: Path, digest: str | None) -> str:
    store = folder.parent.parent
    if digest and folder.is_dir():
        way_out = f"a run that began with it goes on by --move-to-manifest {folder.name}"
        return f"manifest {folder.name!r} of digest {digest} is no longer in {store}; {way_out}"
    known = list_manifests(store)
    return f"no manifest {folder.name!r} in {store}; " + (
        f"there are: {', '.join(known)}" if known else "a build that completes makes one (cache-build)"
    )
