"""store.json, the card of a store: which format it is of, and what is known about it beside its records.

Written by the holder of the writer's lease, read by anybody; a key that a reader does not know is left alone.
"""

import json
import os
from pathlib import Path
from typing import Any

from shared.atomic import write_atomically
from shared.errors import StoreFormat

STORE_FORMAT = 1
_OWN_NAMES = {"data.mdb", "lock.mdb", "store.json", "writer.lock", "manifests", "quarantine", "scans", "service"}


def read_card(store: Path) -> dict[str, Any]:
    """What store.json says; raises StoreFormat where it cannot be read or is of another format."""
    try:
        card = json.loads((store / "store.json").read_text())
        version = card["format"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StoreFormat(f"{store}/store.json cannot be read: {error}") from None
    if version != STORE_FORMAT:
        raise StoreFormat(f"{store} is of store format {version}; this program reads {STORE_FORMAT}: update it")
    return dict(card)


def write_card(store: Path, card: dict[str, Any] | None = None) -> None:
    """Put a card in place; a new store's unless one is given."""
    card = card or {"format": STORE_FORMAT, "engine": "lmdb 0.9"}
    write_atomically(store / "store.json", json.dumps(card).encode() + b"\n")


def refuse_foreign_folder(path: Path) -> None:
    """Require that `path` is a store, or could become one; raises StoreFormat."""
    if path.exists() and not path.is_dir():
        raise StoreFormat(f"{path} is a file, not a store")
    foreign = sorted(set(os.listdir(path)) - _OWN_NAMES) if path.exists() else []
    foreign = [name for name in foreign if not name.startswith(".store.json.")]  # left by a kill while it was written
    if foreign and not (path / "store.json").exists():
        raise StoreFormat(f"{path} is not a store and not empty (it holds {foreign[0]!r}): name a new folder")
