"""The page as a process of its own: how it starts, what it refuses, and that its death or hang is nobody else's."""

import json
import os
import shutil
import signal
import socket
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from benchmarks.dashboard_world import write_store
from dashboard.cli import _cache_dashboard
from shared.command import run_command
from shared.manifest_shelf import drop_manifest, sealed_manifests
from shared.store import StoreWriter
from tests.dashboard.page_process import PATIENCE_S, answer_of, page

ROUNDS = 10


def test_it_says_where_it_is_and_goes_when_asked(world: Any, tmp_path: Path) -> None:
    store = shutil.copytree(world.store, tmp_path / "store")
    with page(store) as (process, address):
        assert json.loads(answer_of(address + "api/status"))["store"]["records"] == 80
        card = json.loads((store / "service" / "page.json").read_text())
        assert (card["pid"], card["host"]) == (process.pid, "127.0.0.1")
        assert card["port"] == int(address.rstrip("/").rpartition(":")[2])
        assert card["created_s"] == pytest.approx(psutil.Process(process.pid).create_time(), abs=1)
        assert psutil.Process(process.pid).nice() == min(19, psutil.Process().nice() + 5)
        loaded = [Path(mapped.path).name for mapped in psutil.Process(process.pid).memory_maps()]
        assert any("lmdb" in name or name.startswith("cpython") for name in loaded)
        assert not [name for name in loaded if "torch" in name]
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE_S) == 0
        assert process.stderr is not None
        assert process.stderr.read() == ""
    assert not (store / "service" / "page.json").exists()


def test_it_refuses_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        for options, said in (
            (["--port", port], f"error: port {port} on 127.0.0.1 is taken"),
            (["--host", "0.0.0.0"], "error: --host 0.0.0.0 can be reached from other machines"),
        ):
            with pytest.raises(SystemExit) as ended:
                run_command(_cache_dashboard, ["--store", str(tmp_path / "store"), *options])
            assert ended.value.code == 64
            written = capsys.readouterr().err
            assert written.startswith(said)
            assert written.count("\n") == 1
    assert not (tmp_path / "store").exists()  # a reader makes no store


def test_a_page_that_hangs_keeps_nobody_out(tmp_path: Path) -> None:
    """Stopped in the midst of answers: the store is written, its lease taken, its manifests dropped."""
    store = tmp_path / "store"
    write_store(store, 40)
    with page(store) as (process, address):
        answer_of(address + "api/gallery")
        for number in range(ROUNDS):
            asking = threading.Thread(target=answer_of, args=(f"{address}api/gallery?page={number}",))
            asking.start()
            time.sleep(0.003 * number)
            os.kill(process.pid, signal.SIGSTOP)
            with StoreWriter(store) as writer:
                assert writer.put_many([(number.to_bytes(16, "big"), b"something")]) == 1
            os.kill(process.pid, signal.SIGCONT)
            asking.join(PATIENCE_S)
        os.kill(process.pid, signal.SIGSTOP)
        for sealed in sealed_manifests(store):
            drop_manifest(sealed)
        os.kill(process.pid, signal.SIGCONT)
        time.sleep(1.1)  # an answer is kept for a second
        assert json.loads(answer_of(address + "api/status"))["store"]["records"] == 60 + ROUNDS
