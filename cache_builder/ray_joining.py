"""The door to Ray: a cluster that is joined, or a Ray of this machine alone that is started and ended with the block.

--ray-address -> joined_ray -> ray_runner.py                 Head.gone -> the build ends before Ray would end it

A Ray that is started here listens on loopback alone, has no dashboard and reports no usage. It asks for a token of its
own that stands in no file; else Ray writes one into the home folder, maybe a read-only one, and later clusters ask
for it.
"""

import os
import re
import secrets
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from shared.errors import ConfigError
from shared.progress import say

ROOT = Path(__file__).parents[1]
STORE_BYTES = 512 << 20  # of shared memory that a Ray started here may take
ANSWER_S = 10.0  # for an address to answer at all
START_TRIES = 3  # a Ray that has not begun after 30 s gives up, as on a machine that is busy with something else
LOOK_S, GONE_S = 5.0, 30.0  # between two looks at a head; without an answer: after 60 s Ray ends this process
_QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # or Ray warns that it will be so
}
_PRIVATE = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}  # on any system: its servers bind to 127.0.0.1
_JOINING = {"RAY_NUM_REDIS_GET_RETRIES": "4"}  # with a line of Ray's own each, and a second; it has answered already
_HOST_PORT = re.compile(r"(.+):(\d+)")
_HERE = ("127.0.0.1:", "localhost:")
_TOKEN = (
    "it asks for a token: RAY_AUTH_MODE=token, with the cluster's own in RAY_AUTH_TOKEN or in the file that "
    "RAY_AUTH_TOKEN_PATH names (~/.ray/auth_token)"
)
_SIGNS = {
    "InvalidAuthToken": _TOKEN,
    "AuthenticationError": _TOKEN,
    "resolve node to connect to": "this machine is none of it; `ray start --address HOST:PORT --num-cpus 0` adds it",
}


@contextmanager
def joined_ray(address: str | None) -> Iterator[tuple[Any, Callable[[], str]]]:
    """Ray, connected, and a look at whether it still stands: what has gone of it, or "".

    Raises ConfigError where Ray is not installed, or nobody answers at the address.
    """
    try:
        os.environ |= _QUIET | (_JOINING if address else {"RAY_AUTH_TOKEN": secrets.token_hex(32)})
        os.environ |= {} if address and not address.startswith(_HERE) else _PRIVATE
        import ray
    except ModuleNotFoundError as error:
        if error.name != "ray":
            raise
        raise ConfigError("--runner ray needs Ray: pip install 'sdxl-experts[ray]'") from None
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    say(f"connecting to Ray at {address}" if address else "starting Ray on this machine")
    try:
        _connect(ray, address)
        for number, handler in before.items():  # Ray sets its own
            signal.signal(number, handler)
        yield ray, Head(ray.get_runtime_context().gcs_address).gone if address else _own_node()
    finally:
        ray.shutdown()


def _connect(ray: Any, address: str | None) -> None:
    if address and "://" in address:
        raise ConfigError(f"--ray-address {address}: name HOST:PORT of the cluster's head, as `ray start` was told")
    if address and (found := _HOST_PORT.fullmatch(address)) and (refused := _refused(found[1].strip("[]"), found[2])):
        raise ConfigError(f"--ray-address {address}: no Ray cluster can be joined there: {refused}")  # Ray tries on
    for _ in range(START_TRIES):
        if (error := _tried(ray, address)) is None or "timed out during startup" not in error:
            break
    if error is not None:
        where = f"--ray-address {address}: no Ray cluster can be joined there" if address else "Ray cannot be started"
        raise ConfigError(f"{where}: {error}")


def _refused(host: str, port: str) -> Exception | None:
    try:
        socket.create_connection((host, int(port)), ANSWER_S).close()
    except (OSError, OverflowError) as refused:
        return refused
    return None


def _tried(ray: Any, address: str | None) -> str | None:
    """Join or start; what Ray says where that fails."""
    common: dict[str, Any] = {"log_to_driver": False, "logging_level": "critical"}
    try:
        if address:
            ray.init(address=address, **common)
        else:
            here = {"env_vars": {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}}
            ray.init("local", include_dashboard=False, object_store_memory=STORE_BYTES, runtime_env=here, **common)
    except Exception as error:  # noqa: BLE001 -- Ray raises what it likes; each is one line
        ray.shutdown()
        causes = [*_causes(error)]
        said = "\n".join(map(str, causes))
        hint = next((hint for sign, hint in _SIGNS.items() if address and sign in said), None)
        first = " ".join(str(causes[-1]).partition("Traceback")[0].split())
        return hint or first[:300] or type(error).__name__
    return None


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _own_node() -> Callable[[], str]:
    """A look at what of Ray was started here: who keeps the books, and who starts workers."""
    node = [child for child in psutil.Process().children() if child.name() in ("gcs_server", "raylet")]
    return lambda: "" if all(map(_lives, node)) else "the Ray that was started here has died"


def _lives(process: psutil.Process) -> bool:
    with suppress(psutil.NoSuchProcess):
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    return False


@dataclass
class Head:
    """The machine that keeps a cluster's books, looked at now and then."""

    address: str
    _seen_s: float = field(default_factory=time.monotonic)
    _looked_s: float = field(default_factory=time.monotonic)

    def gone(self) -> str:
        """What to say where nobody has answered there for GONE_S; else ""."""
        now_s = time.monotonic()
        if now_s - self._looked_s >= LOOK_S:
            self._looked_s = now_s
            host, _, port = self.address.rpartition(":")
            if _refused(host.strip("[]"), port) is None:
                self._seen_s = now_s
        if now_s - self._seen_s < GONE_S:
            return ""
        return f"the head of the Ray cluster has not answered at {self.address} for {GONE_S:.0f} s"
