"""A store on a network file system is refused with the way out; what is local is not held up."""

from pathlib import Path

import psutil
import pytest

from shared.errors import ConfigError
from shared.file_system import network_kind, refuse_network
from shared.store import StoreReader, StoreWriter


@pytest.fixture
def mounts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A table of mounts to be written."""
    table = tmp_path / "proc" / "self" / "mounts"
    table.parent.mkdir(parents=True)
    monkeypatch.setattr(psutil, "PROCFS_PATH", str(tmp_path / "proc"))
    return table


def line(point: str, kind: str) -> str:
    return f"server:/x {point} {kind} rw,noatime 0 0\n"


@pytest.mark.parametrize(
    "kind", ["nfs", "nfs4", "cifs", "smb3", "9p", "fuse.sshfs", "fuse.s3fs", "fuse", "lustre", "fuse.glusterfs", "ceph"]
)
def test_network_file_systems_are_named(kind: str, mounts: Path) -> None:
    mounts.write_text(line("/", "ext4") + line("/data", kind) + line("/data/disk", "xfs"))
    assert network_kind(Path("/data/sets/store")) == network_kind(Path("/data")) == kind
    assert network_kind(Path("/data/disk/store")) == network_kind(Path("/database")) == network_kind(Path("/x")) == ""
    with pytest.raises(ConfigError, match=f"/data/store lies on {kind}, .*local disk"):
        refuse_network(Path("/data/store"))


@pytest.mark.parametrize("kind", ["ext4", "xfs", "btrfs", "zfs", "tmpfs", "overlay", "fuse.fuse-overlayfs", "fuseblk"])
def test_local_ones_are_not(kind: str, mounts: Path) -> None:
    mounts.write_text(line("/", "overlay") + line("/data", kind))
    refuse_network(Path("/data/store"))


def test_a_sandbox_may_have_any_root(mounts: Path) -> None:
    mounts.write_text(line("/", "9p"))
    refuse_network(Path("/home/store"))


def test_spaces_later_mounts_and_no_table(mounts: Path) -> None:
    mounts.write_text(line("/my\\040data", "nfs"))
    assert network_kind(Path("/my data/store")) == "nfs"
    mounts.write_text(line("/d", "nfs") + line("/d", "ext4") + "\nodd\n\n")
    assert network_kind(Path("/d/store")) == ""
    mounts.unlink()
    assert network_kind(Path("/d/store")) == ""


def test_stores_there_are_opened_only_when_forced(
    tmp_path: Path, mounts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    StoreWriter(tmp_path / "store").close()
    mounts.write_text(line(str(tmp_path), "nfs4"))
    for open_store in (StoreReader, StoreWriter):
        with pytest.raises(ConfigError, match="nfs4"):
            open_store(tmp_path / "store")
    with pytest.raises(ConfigError, match="nfs4"):
        StoreWriter(tmp_path / "new")
    assert not (tmp_path / "new").exists()
    monkeypatch.setenv("SDXL_EXPERTS_NETWORK_STORE", "1")
    for open_store in (StoreReader, StoreWriter):
        open_store(tmp_path / "store").close()
