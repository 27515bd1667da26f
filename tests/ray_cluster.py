"""A Ray cluster that is not ours: nodes of one CPU each on loopback, in a process of its own, which asks for a token.

python ray_cluster.py      stdin: a line "add" -> stdout: pid of the new node's raylet     first line: the address
                                  a line "nodes" -> how many are alive                     end of stdin: all end
"""

import contextlib
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[1]
NODE = {"num_cpus": 1, "include_dashboard": False, "object_store_memory": 80 << 20}


@dataclass
class LiveCluster:
    """One that stands: a head, and the nodes that were added."""

    address: str
    head: psutil.Process
    """Who keeps its books."""
    environment: Mapping[str, str]
    """What those who join it need."""
    _process: "subprocess.Popen[str]"

    def add_node(self) -> psutil.Process:
        """A node more; its raylet."""
        return psutil.Process(int(self._ask("add")))

    def count_nodes(self) -> int:
        """Those alive, as the cluster itself says."""
        return int(self._ask("nodes"))

    def _ask(self, what: str) -> str:
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write(what + "\n")
        self._process.stdin.flush()
        return self._process.stdout.readline()


@contextlib.contextmanager
def live_cluster(**environment: str) -> Iterator[LiveCluster]:
    """One of a head alone; `environment` is what its machines have beside what this process has."""
    folder = tempfile.mkdtemp(prefix="ray-")  # a short name: sockets lie in it
    joining = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    own = {
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # its servers bind to 127.0.0.1
        "RAY_TMPDIR": folder,
        "RAY_USAGE_STATS_ENABLED": "0",
        "PYTHONPATH": str(ROOT),
        "HOME": folder,
    }
    process = subprocess.Popen(
        [sys.executable, __file__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=os.environ | joining | own | environment,
    )
    assert process.stdin
    assert process.stdout
    try:
        address, head = process.stdout.readline().split()
        assert address.startswith("127.0.0.1:")
        yield LiveCluster(address, psutil.Process(int(head)), joining, process)
    finally:
        process.stdin.close()
        process.wait(60)
        process.stdout.close()
        shutil.rmtree(folder, ignore_errors=True)


def kill_node(raylet: psutil.Process) -> None:
    """Kill all that runs on a node, at once."""
    for process in [raylet, *raylet.children(recursive=True)]:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def _serve() -> None:
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args=NODE)
    _say(cluster.address, cluster.head_node.all_processes["gcs_server"][0].process.pid)
    for line in sys.stdin:
        if line.strip() == "add":
            _say(cluster.add_node(**NODE).all_processes["raylet"][0].process.pid)
        else:
            _say(len(cluster.global_state._live_node_ids()))
    for node in [*cluster.worker_nodes, cluster.head_node]:
        node.kill_all_processes(check_alive=False, allow_graceful=False)


def _say(*what: object) -> None:
    sys.stdout.write(" ".join(map(str, what)) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    _serve()
