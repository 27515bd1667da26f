"""Work that reads a store of unknown health, in a child: LMDB follows page numbers before anybody can look at them.

A damaged tree may lead it past the end of the file or trip one of its assertions: a bus error or an abort in the child,
and one line here.
"""

import faulthandler
import json
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from shared import errors
from shared.errors import ExpertsError, Stopped, StoreFormat
from shared.store import Store

_OF_DAMAGE = (signal.SIGBUS, signal.SIGSEGV, signal.SIGABRT)


def in_child(store: Path, work: Callable[[], Any]) -> Any:
    """What `work` returns (JSON) or raises; StoreFormat where it dies of `store`. LMDB must not be open here."""
    read_end, write_end = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of threads: the child starts nothing that they hold
        pid = os.fork()
    if pid == 0:
        os.close(read_end)
        _be_child(work, write_end)
    os.close(write_end)
    with os.fdopen(read_end, "rb") as pipe:
        said = pipe.read()
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if code < 0 and -code not in _OF_DAMAGE:
        raise Stopped(f"reading {store} was ended by {signal.Signals(-code).name}; nothing was changed")
    if code < 0:
        raise StoreFormat(
            f"{store}/data.mdb is damaged: reading it ended in {signal.Signals(-code).name}; restore it from a copy, "
            "or build again with a new --store"
        )
    if code:
        raise AssertionError(f"the child that read {store} ended with {code}")
    answer = json.loads(said)
    if "error" in answer:
        raise getattr(errors, answer["error"])(answer["message"])
    return answer["result"]


def require_readable(source: Store) -> None:
    """List every key of a store in a child first; raises StoreFormat where that cannot be done."""
    source.close_environment()

    def listed() -> int:
        source.leave_lease()  # or a child that outlives its killed parent would hold it
        return sum(len(page) for page in source.sizes())

    in_child(source.path, listed)


def _be_child(work: Callable[[], Any], write_end: int) -> None:
    code = 1
    try:
        _mute_c()
        try:
            answer = {"result": work()}
        except ExpertsError as error:
            kind = next(base for base in type(error).__mro__ if base.__module__ == errors.__name__)
            answer = {"error": kind.__name__, "message": str(error)}
        with os.fdopen(write_end, "wb") as pipe:
            pipe.write(json.dumps(answer).encode())
        code = 0
    except KeyboardInterrupt:
        code = 130
    except BaseException:  # noqa: BLE001 -- told, and then the child ends whatever it was
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _mute_c() -> None:
    """Keep what C prints when it dies off stderr, and let Python's own lines (progress) through."""
    faulthandler.disable()
    sys.stderr = os.fdopen(os.dup(2), "w", buffering=1, errors="backslashreplace")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
