"""Which folders are shown: those that were named, and those that come to be below one that was.

A run folder has a config.toml or an events.jsonl (docs/formats.md), an evaluation's folder a report.json. One that
may not be looked into is passed over: os.path answers False there, where pathlib raises, which would cost all others.
"""

import contextlib
import hashlib
import os
from pathlib import Path

MOST_FOLDERS = 200  # below --runs-under
REPORT = "report.json"


def find_folders(named: tuple[Path, ...], under: Path | None) -> tuple[list[Path], list[Path]]:
    """(run folders, folders of evaluations), in order; named runs that have not begun are among the runs."""
    inside: list[Path] = []
    if under is not None:
        with contextlib.suppress(OSError):  # it may come to be later
            inside = sorted(path for path in under.iterdir() if os.path.isdir(path) and not path.name.startswith("."))
    found = list(dict.fromkeys([*named, *(path for path in inside[:MOST_FOLDERS] if _is_ours(path))]))
    evaluations = [path for path in found if os.path.exists(path / REPORT)]
    return [path for path in found if path not in evaluations], evaluations


def folder_id(path: Path) -> str:
    """What a folder is called in addresses: never by its path."""
    return hashlib.blake2b(str(path.absolute()).encode(errors="surrogateescape"), digest_size=8).hexdigest()


def _is_ours(path: Path) -> bool:
    return any(os.path.exists(path / name) for name in (REPORT, "config.toml", "events.jsonl"))
