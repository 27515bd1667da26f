"""Is there room on the disk: asked before anything large is written."""

import shutil
from pathlib import Path

from shared.amounts import size_text
from shared.errors import StoreFull


def require_room(path: Path, needed_bytes: int, what: str) -> None:
    """Raises StoreFull where `what` would not fit the disk that `path` lies on, or will lie on."""
    there = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    free_bytes = shutil.disk_usage(there).free
    if needed_bytes > free_bytes:
        raise StoreFull(f"{path}: {what} takes {size_text(needed_bytes)}, {size_text(free_bytes)} are free: free some")
