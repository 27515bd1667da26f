"""What is damaged, silent or not known yet: the page names it, and goes on showing all the rest."""

import contextlib
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from benchmarks.dashboard_world import write_run, write_store
from cache_builder.verify import verify_store
from dashboard.runs import WatchedRun
from shared.lease import Lease
from shared.manifest_shelf import sealed_manifests
from shared.runlog import RunLog
from shared.store import StoreReader, StoreWriter

Ask = Callable[..., TestClient]
NOWHERE = "x" * 300  # longer than a name may be: to look at it is an OSError, as without the right to


def json_of(client: TestClient, address: str) -> Any:
    answer = client.get(address)
    assert answer.status_code == 200, answer.text
    return answer.json()


def figures_of(client: TestClient) -> dict[str, float]:
    lines = client.get("/metrics").text.splitlines()
    pairs = (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    return {name: float(value) for name, value in pairs}


@pytest.mark.parametrize("broken", [".", "report.json", "config.toml", "events.jsonl"])
def test_a_folder_that_cannot_be_looked_into_costs_itself_alone(tmp_path: Path, ask: Ask, broken: str) -> None:
    write_run(tmp_path / "runs/base", "base", 350, 1000, 3)
    if broken == ".":
        (tmp_path / "runs/another").symlink_to(NOWHERE)
    else:
        write_run(tmp_path / "runs/another", "another", 0, 350, 3)
        (tmp_path / "runs/another" / broken).unlink(missing_ok=True)
        (tmp_path / "runs/another" / broken).symlink_to(NOWHERE)
    runs = json_of(ask(tmp_path / "store", under=tmp_path / "runs"), "/api/runs")["runs"]
    assert ("base", 30) in [(run["name"], run["step"]) for run in runs]


@pytest.mark.parametrize("name", ["config.toml", "expert.json", "events.jsonl"])
def test_a_pipe_in_a_run_folder_is_not_waited_for(tmp_path: Path, ask: Ask, name: str) -> None:
    write_run(tmp_path / "runs/base", "base", 350, 1000, 3)
    (tmp_path / "runs/base" / name).unlink()
    os.mkfifo(tmp_path / "runs/base" / name)
    client = ask(tmp_path / "store", under=tmp_path / "runs")
    (run,) = json_of(client, "/api/runs")["runs"]
    assert run["step"] == (0 if name == "events.jsonl" else 30)


def test_a_run_says_which_of_its_files_is_damaged(tmp_path: Path, ask: Ask) -> None:
    write_run(tmp_path / "runs/base", "base", 350, 1000, 3)
    client = ask(tmp_path / "store", under=tmp_path / "runs")
    assert json_of(client, "/api/runs")["runs"][0]["why"] is None
    (tmp_path / "runs/base/config.toml").write_bytes(b"\xff[[")
    (run,) = json_of(client, "/api/runs")["runs"]
    assert (run["why"], run["name"], run["low"]) == ("config.toml cannot be read", "base", 350)
    (tmp_path / "runs/base/expert.json").write_text('{"facts": 3')
    (run,) = json_of(client, "/api/runs")["runs"]
    assert (run["why"], run["step"]) == ("expert.json and config.toml cannot be read", 30)


def test_how_a_run_ended_is_not_said_before_its_log_is_read(tmp_path: Path) -> None:
    write_run(tmp_path / "base", "base", 350, 1000, 2000)
    with contextlib.closing(RunLog(tmp_path / "base/events.jsonl")) as log:
        log.write("complete", step=20000)
    run = WatchedRun(tmp_path / "base")
    assert not run.read(0.0)  # one slice
    assert run.as_json()["state"] == "reading"
    assert run.read(time.monotonic() + 60)
    assert run.as_json()["state"] == "finished"


def test_a_record_is_set_aside_until_it_is_encoded_anew(tmp_path: Path, ask: Ask) -> None:
    store = tmp_path / "store"
    write_store(store, 4)
    with StoreReader(store) as reader, reader.snapshot() as snapshot:
        key = next(key for part in reader.sizes() for key, _ in part)
        whole = snapshot.raw(key)
    with StoreWriter(store) as writer:
        writer.delete_many([key])
        writer.put_many([(key, whole[:-1] + bytes([whole[-1] ^ 1]))])
    client = ask(store)
    assert json_of(client, "/api/status")["store"]["bad_records"] == []
    client.watched.store.close()  # one process opens a store once
    verify_store(store, deep=True, quarantine=True)
    (aside,) = json_of(client, "/api/status")["store"]["bad_records"]
    assert aside["path"] == f"record {key.hex()}"
    assert "checksum" in aside["reason"]
    assert figures_of(client)["sdxl_bad_records"] == 1
    client.watched.store.close()
    with StoreWriter(store) as writer:
        writer.put_many([(key, whole)])
    assert json_of(client, "/api/status")["store"]["bad_records"] == []


def test_a_service_that_has_not_looked_yet_knows_of_nothing_set_aside(tmp_path: Path, ask: Ask) -> None:
    write_store(tmp_path / "store", 2)
    client = ask(tmp_path / "store")
    say(tmp_path / "store", quarantined=None)
    assert json_of(client, "/api/status")["service"]["quarantined"] is None
    assert "sdxl_quarantined_pictures" not in figures_of(client)


def test_a_service_that_lives_and_says_nothing_is_silent(tmp_path: Path, ask: Ask) -> None:
    client, here = ask(tmp_path / "store"), {"pid": os.getpid(), "host": os.uname().nodename}
    for ago_s, is_silent in ((1.0, False), (100.0, True)):
        say(tmp_path / "store", beat_s=time.time() - ago_s, **here)
        said = json_of(client, "/api/status")["service"]
        assert (said["is_alive"], said["is_silent"]) == (True, is_silent)


def test_every_figure_that_is_promised_for_prometheus(tmp_path: Path, ask: Ask) -> None:
    """Records, bytes, queue lengths, images/s, quarantined, last seal, lease."""
    store = tmp_path / "store"
    write_store(store, 6)
    client, now_s = ask(store), time.time()
    say(store, state="building", done=3, total=10, images_per_s=2.5, quarantined=4, changed=7, beat_s=now_s)
    lease = Lease(store / "writer.lock", "store", "wait")
    found = figures_of(client)
    lease.release()
    assert (found["sdxl_store_records"], found["sdxl_store_is_readable"]) == (9, 1)
    assert found["sdxl_store_file_bytes"] == (store / "data.mdb").stat().st_size >= found["sdxl_store_used_bytes"] > 0
    assert (found["sdxl_build_queue"], found["sdxl_service_changed_paths"]) == (7, 7)
    assert (found["sdxl_build_images_per_second"], found["sdxl_quarantined_pictures"]) == (2.5, 4)
    assert found["sdxl_service_beat_timestamp_seconds"] == now_s
    assert found["sdxl_store_writer"] == 1
    (sealed,) = sealed_manifests(store)
    wrote_s = (sealed.folder / f"{sealed.digest}.json").stat().st_mtime
    assert found["sdxl_last_seal_timestamp_seconds"] == pytest.approx(wrote_s, abs=2)
    assert figures_of(client)["sdxl_store_writer"] == 0


def say(store: Path, **fields: Any) -> None:
    """Write what a service would."""
    (store / "service").mkdir(parents=True, exist_ok=True)
    (store / "service/status.json").write_text(json.dumps({"version": 1, "state": "waiting", **fields}))
