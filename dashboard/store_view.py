"""What is in the store: records, bytes, who writes, manifests, and what the current ones hold.

No manifest stays open between two looks, and no transaction: whoever drops a manifest or collects garbage never waits
for this page, not even for one that hangs.
"""

import calendar
import json
import os
import threading
import time
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np

from dashboard.set_aside import SetAside
from shared.errors import ExpertsError, ManifestMismatch, StoreMissing
from shared.lease import listed_holder
from shared.manifest import Manifest
from shared.manifest_rows import Split
from shared.manifest_shelf import Sealed, sealed_manifests
from shared.store import StoreReader

KEPT_SUMMARIES = 16

Json = dict[str, Any]


class StoreView:
    """A store that may not be there yet, may be written meanwhile, and may be replaced by another."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._reader: StoreReader | None = None
        self._inode: tuple[int, int] | None = None
        self._opening = threading.Lock()
        self._summaries: OrderedDict[str, Json] = OrderedDict()
        self._set_aside = SetAside(path)

    def reader(self) -> StoreReader:
        """The store, open to read; raises StoreMissing or another StoreError."""
        with self._opening:
            try:
                found = os.stat(self.path / "data.mdb")
            except OSError:
                raise StoreMissing(f"there is no store at {self.path} yet") from None
            inode = (found.st_dev, found.st_ino)
            if self._reader is None or inode != self._inode:
                self.close()
                self._reader, self._inode = StoreReader(self.path), inode
            return self._reader

    def close(self) -> None:
        """Close the store."""
        if self._reader is not None:
            self._reader.close()
        self._reader = None

    def as_json(self) -> Json:
        """Everything that the page says of it; `why` where it cannot be read."""
        facts: Json = {"path": str(self.path), "why": None, "records": 0, "file_bytes": 0, "used_bytes": 0}
        try:
            reader = self.reader()
            bad = self._set_aside.still_lacking(reader)
            facts |= {"records": reader.count(), "used_bytes": reader.used_bytes()}
            facts["file_bytes"] = (self.path / "data.mdb").stat().st_size
        except (ExpertsError, OSError) as error:
            facts["why"] = str(error)
            bad = self._set_aside.still_lacking(None)
        facts["writer"] = listed_holder(self.path / "writer.lock")
        return facts | self._manifests() | {"bad_records": bad}

    def current(self, name: str | None) -> Sealed:
        """The current manifest of a name, or of the first one; raises ManifestMismatch."""
        sealed = [one for one in sealed_manifests(self.path) if one.is_current and name in (None, one.name)]
        if not sealed:
            raise ManifestMismatch(f"no manifest {name!r} in {self.path}" if name else "no manifest is sealed yet")
        return sealed[0]

    def by_digest(self, digest: str) -> Sealed:
        """A manifest by its whole digest; raises ManifestMismatch."""
        found = next((one for one in sealed_manifests(self.path) if one.digest == digest), None)
        if found is None:
            raise ManifestMismatch("no such manifest")
        return found

    def _manifests(self) -> Json:
        """Seals of all manifests, and what the current ones hold."""
        listed: list[Json] = []
        data: list[Json] = []
        why: list[str] = []
        try:
            sealed = sealed_manifests(self.path)
        except ExpertsError as error:
            return {"manifests": [], "data": [], "manifests_why": [str(error)]}
        for one in sealed:
            try:
                listed.append(_seal(one))
                if one.is_current:
                    data.append(self._summary(one))
            except (ExpertsError, OSError, ValueError) as error:
                why.append(str(error))
        return {"manifests": listed, "data": data, "manifests_why": why}

    def _summary(self, sealed: Sealed) -> Json:
        if sealed.digest not in self._summaries:
            self._summaries[sealed.digest] = _summarise(sealed.open())
            while len(self._summaries) > KEPT_SUMMARIES:
                self._summaries.popitem(last=False)
        return {"name": sealed.name, **self._summaries[sealed.digest]}


def _seal(sealed: Sealed) -> Json:
    seal = json.loads(sealed.seal_bytes())
    return {
        "name": sealed.name,
        "digest": sealed.digest,
        "is_current": sealed.is_current,
        "rows": int(seal.get("rows", 0)),
        "sealed_at": str(seal.get("sealed_at", "")),
        "sealed_s": _seconds(str(seal.get("sealed_at", ""))),
    }


def _seconds(sealed_at: str) -> float | None:
    """Since 1970; None for what is no time."""
    try:
        return float(calendar.timegm(time.strptime(sealed_at, "%Y-%m-%dT%H:%M:%SZ")))
    except ValueError:
        return None


def _summarise(manifest: Manifest) -> Json:
    buckets: dict[tuple[int, int], dict[str, int]] = {}
    splits: tuple[Split, ...] = ("train", "eval")
    for split in splits:
        for bucket in manifest.buckets(split):
            buckets.setdefault(bucket.hw, {"train": 0, "eval": 0})[split] = len(bucket.rows)
    texts = manifest.text_keys()
    return {
        "digest": manifest.digest,
        "samples": len(manifest),
        "held_out": sum(counts["eval"] for counts in buckets.values()),
        "crops": len(manifest.latent_keys()),
        "captions": len(texts),
        "different_captions": len(np.unique(texts)),
        "datasets": list(manifest.settings.datasets),
        "buckets": [{"h": h, "w": w, **counts} for (h, w), counts in sorted(buckets.items(), key=_by_shape)],
    }


def _by_shape(item: tuple[tuple[int, int], dict[str, int]]) -> tuple[float, int]:
    """From tall to wide."""
    (h, w), _ = item
    return w / h, h
