"""Which file system a store would lie on: LMDB's shared map and locks are not safe over a network.

A store on one is refused before LMDB opens it. The root file system is taken as it is: in containers and sandboxes it
is often a fuse or 9p one that only they see.
"""

import os
from pathlib import Path

from shared.errors import ConfigError

FORCE = "SDXL_EXPERTS_NETWORK_STORE"
_NETWORK = {
    "nfs", "nfs4", "cifs", "smb3", "smbfs", "9p", "fuse", "lustre", "ceph", "glusterfs", "afs", "beegfs", "gpfs",
}  # fmt: skip
_LOCAL_FUSE = {"fuse.fuse-overlayfs", "fuse.overlayfs"}


def refuse_network(path: Path) -> None:
    """Raise ConfigError where `path` lies on a network file system, unless the environment has FORCE=1."""
    kind = network_kind(path)
    if kind and os.environ.get(FORCE) != "1":
        raise ConfigError(
            f"{path} lies on {kind}, a network file system, where LMDB's map and locks are not safe: name a store on a "
            f"local disk; cache-store export and import carry one from machine to machine. {FORCE}=1 opens it all the "
            "same; then let one machine alone use it"
        )


def network_kind(path: Path) -> str:
    """Type of the network file system that holds `path`, or would; "" where it is local or cannot be told."""
    where, best, kind = os.path.realpath(path), "", ""
    for mount_point, file_system in _mounts():
        inside = where == mount_point or where.startswith(mount_point.rstrip("/") + "/")
        if inside and len(mount_point) >= len(best):  # of two on one point the later one covers the earlier
            best, kind = mount_point, file_system
    is_network = kind not in _LOCAL_FUSE and kind.partition(".")[0] in _NETWORK
    return kind if is_network and best != "/" else ""


def _mounts() -> list[tuple[str, str]]:
    """(mount point, type) of everything that is mounted, in order; () where the system does not say."""
    import psutil

    try:
        return [(partition.mountpoint, partition.fstype) for partition in psutil.disk_partitions(all=True)]
    except OSError:
        return []
