"""Is a store sound: `cache-store verify`. Quick: everything that is named is there. Deep: every record is whole.

pre-flight -> store.json -> seals and checksums of manifests -> named keys -> (deep) each record -> (quarantine)

A bad record that is set aside is gone from the store, and the next build encodes it anew. This and gc are the only
deletions there are.
"""

import contextlib
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from cache_builder.in_child import in_child
from cache_builder.key_arrays import Keys, as_keys, each, is_in
from cache_builder.named import needed_keys, union
from shared.atomic import write_atomically
from shared.errors import ManifestMismatch, RecordCorrupt, RecordNewer
from shared.manifest import Manifest
from shared.manifest_shelf import sealed_manifests
from shared.progress import progress
from shared.record import KEY_BYTES, Record
from shared.runlog import RunLog
from shared.snapshot import Snapshot
from shared.store import Store, StoreReader, StoreWriter

RECORDS_AT_ONCE = 32  # read in one transaction
SAMPLES_NAMED = 5  # of those that a bad record hits


@dataclass
class Fault:
    """One thing that is wrong: a record (with its key, hex) or a manifest."""

    what: str
    key: str
    why: str
    is_newer: bool = False
    """Whether it is whole and of a later version: nothing to set aside."""
    samples: list[str] = field(default_factory=list)
    """Samples that need it, a few of them, as NAME: DATASET/PATH."""


@dataclass
class Verdict:
    """What was looked at and what is wrong with it."""

    store: str
    mode: str
    manifests: int = 0
    records: int = 0
    bytes: int = 0
    faults: list[Fault] = field(default_factory=list)
    quarantined: int = 0
    seconds: float = 0.0

    def as_json(self) -> dict[str, Any]:
        """The verdict for programs."""
        return {"sound": not self.faults, **asdict(self)}


def verify_store(path: Path, *, deep: bool = False, quarantine: bool = False) -> Verdict:
    """Look at everything; with `quarantine` move bad records aside, as the store's writer.

    Raises StoreMissing or StoreFormat where there is no store to look at, StoreLocked where it is being written.
    """
    started_s = time.monotonic()
    with contextlib.closing(StoreReader(path)) as reader:  # never makes a store
        source: Store = StoreWriter(path) if quarantine else reader
        with contextlib.closing(source):
            source.close_environment()
            verdict = _from_json(in_child(path, lambda: asdict(_examine(source, deep))))
            if quarantine and isinstance(source, StoreWriter):
                verdict.quarantined = _set_aside(source, verdict.faults)
    verdict.seconds = round(time.monotonic() - started_s, 3)
    return verdict


def _from_json(answer: dict[str, Any]) -> Verdict:
    return Verdict(**answer | {"faults": [Fault(**fault) for fault in answer["faults"]]})


def _examine(source: Store, deep: bool) -> Verdict:
    verdict = Verdict(str(source.path), "deep" if deep else "quick")
    manifests = _open_manifests(source.path, verdict)
    verdict.manifests = len(manifests)
    present = _walk(source, deep, verdict)
    named = union(needed_keys(manifest) for manifest in manifests)
    for key in each(named[~is_in(named, present)]):
        verdict.faults.append(Fault("record", key.hex(), "is named by a manifest and not in the store"))
    _name_samples(verdict.faults, manifests)
    return verdict


def _open_manifests(store: Path, verdict: Verdict) -> list[Manifest]:
    manifests = []
    try:
        sealed = sealed_manifests(store)
    except ManifestMismatch as error:
        verdict.faults.append(Fault("manifest", "", str(error)))
        return []
    for each_sealed in sealed:
        try:
            manifests.append(each_sealed.open())
        except ManifestMismatch as error:
            verdict.faults.append(Fault("manifest", "", str(error)))
    return manifests


def _walk(source: Store, deep: bool, verdict: Verdict) -> Keys:
    """Every key that is there; deep reads each record too."""
    pages: list[Keys] = []
    with progress("records", source.count(), "records") as advance:
        for page in source.sizes():
            odd = [key for key, _ in page if len(key) != KEY_BYTES]
            verdict.faults += [Fault("record", key.hex(), f"its key has {len(key)} bytes, not 16") for key in odd]
            keys = [key for key, _ in page if len(key) == KEY_BYTES]
            verdict.records += len(page)
            verdict.bytes += sum(size for _, size in page)
            pages.append(as_keys(keys))
            for start in range(0, len(keys), RECORDS_AT_ONCE):
                chunk = keys[start : start + RECORDS_AT_ONCE]
                if deep:
                    with source.snapshot() as snapshot:
                        verdict.faults += [fault for key in chunk if (fault := _look(snapshot, key))]
                advance(len(chunk))
    return union(pages)


def _look(snapshot: Snapshot, key: bytes) -> Fault | None:
    try:
        record = snapshot.read(key)
    except RecordCorrupt as error:
        return Fault("record", key.hex(), str(error), isinstance(error, RecordNewer))
    if name := _not_finite(record):
        return Fault("record", key.hex(), f"record {key.hex()} ({record.kind}): {name} is not finite")
    return None


def _not_finite(record: Record) -> str:
    floats = ((name, tensor) for name, tensor in record.tensors.items() if tensor.dtype.kind == "f")
    return next((name for name, tensor in floats if not np.isfinite(tensor).all()), "")


def _name_samples(faults: list[Fault], manifests: list[Manifest]) -> None:
    """Say which samples need a bad record."""
    bad = {bytes.fromhex(fault.key): fault for fault in faults if len(fault.key) == 2 * KEY_BYTES}
    for manifest in manifests if bad else []:
        for row in manifest.rows(manifest.rows_naming(list(bad))):
            for key in {*(variant.latent_key for variant in row.variants), *row.text_keys} & bad.keys():
                if len(bad[key].samples) < SAMPLES_NAMED:
                    bad[key].samples.append(f"{manifest.name}: {row.dataset}/{row.path}")
        prompts = {bytes.fromhex(key): f"the prompt {text!r}" for text, key in manifest.settings.prompts.items()}
        for key, what in {**prompts, bytes.fromhex(manifest.settings.null_text_key): "the empty prompt"}.items():
            if key in bad:
                bad[key].samples.append(f"{manifest.name}: {what}")


def _set_aside(writer: StoreWriter, faults: list[Fault]) -> int:
    """Copy bad records to STORE/quarantine/, durably, and only then delete their keys; returns how many."""
    folder = writer.path / "quarantine"
    keys = []
    for fault in (fault for fault in faults if not fault.is_newer):
        key = bytes.fromhex(fault.key)
        with writer.snapshot() as snapshot:
            if not key or not snapshot.has(key):
                continue
            data = snapshot.raw(key)
        folder.mkdir(exist_ok=True)
        name = f"{fault.key[:64]}-{xxhash.xxh3_64_hexdigest(data)}.record"
        write_atomically(folder / name, data)
        with contextlib.closing(RunLog(folder / "log.jsonl")) as log:
            log.write("quarantined", key=fault.key, file=name, why=fault.why, samples=fault.samples)
        keys.append(key)
    return writer.delete_many(keys) if keys else 0
