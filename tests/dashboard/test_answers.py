"""What the page says, against the store, the manifests and the logs that it says it of."""

import json
import os
import shutil
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from starlette.testclient import TestClient

from benchmarks.dashboard_world import PREVIEW, write_run, write_store
from dashboard.history import COLUMNS
from shared.lease import Lease, listed_holder
from shared.manifest import open_manifest
from shared.manifest_shelf import drop_manifest, sealed_manifests
from shared.pictures import PixelLimits, PixelRules, decode
from shared.preview import preview_picture
from shared.runlog import RunLog
from shared.store import StoreReader

Ask = Callable[..., TestClient]


def json_of(client: TestClient, address: str) -> Any:
    answer = client.get(address)
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_the_status_is_that_of_the_store(world: Any, ask: Ask) -> None:
    with StoreReader(world.store) as reader:
        count, used_bytes = reader.count(), reader.used_bytes()
    said = json_of(ask(world.store), "/api/status")["store"]
    manifest = open_manifest(world.store, "main")
    assert (said["records"], said["used_bytes"]) == (count, used_bytes)
    assert count == 80
    assert said["file_bytes"] == (world.store / "data.mdb").stat().st_size
    (data,) = said["data"]
    assert (data["samples"], data["captions"], data["different_captions"]) == (60, 60, 20)
    assert data["digest"] == manifest.digest
    counted = {(b["h"], b["w"]): (b["train"], b["eval"]) for b in data["buckets"]}
    for split, index in (("train", 0), ("eval", 1)):
        for bucket in manifest.buckets(split):  # type: ignore[arg-type]
            assert counted[bucket.hw][index] == len(bucket.rows)
    assert sum(train + held for train, held in counted.values()) == len(manifest)


def test_a_store_may_come_to_be_later(tmp_path: Path, ask: Ask) -> None:
    client = ask(tmp_path / "store")
    assert client.get("/readyz").status_code == 503
    assert "no store" in json_of(client, "/api/status")["store"]["why"]
    assert client.get("/api/gallery").status_code == 503
    write_store(tmp_path / "store", 4)
    assert client.get("/readyz").text == "ok\n"
    assert json_of(client, "/api/status")["store"]["data"][0]["samples"] == 4
    shutil.rmtree(tmp_path / "store")
    write_store(tmp_path / "store", 8)
    assert json_of(client, "/api/status")["store"]["records"] == 12


def test_runs_stand_side_by_side(world: Any, ask: Ask) -> None:
    base, refiner = json_of(ask(world.store, under=world.runs), "/api/runs")["runs"]
    assert [(one["name"], one["low"], one["high"]) for one in (base, refiner)] == [
        ("base", 350, 1000),
        ("refiner", 0, 350),
    ]
    assert (base["step"], base["steps"], base["state"]) == (5000, 5000, "interrupted")
    assert base["steps_per_s"] == pytest.approx(10)
    assert [bin_[0] for bin_ in base["bins"]] == list(range(350, 1000, 50))
    events = [json.loads(line) for line in (world.runs / "base" / "events.jsonl").read_text().splitlines()]
    losses = [event["loss"] for event in events if event["event"] == "step"]
    recent = [event["bins"][0][2] for event in events if event["event"] == "step"][-100:]
    assert base["bins"][0][2] == pytest.approx(np.mean(recent), rel=1e-5)
    curves = base["curves"]
    assert len(curves["step"]) <= COLUMNS < len(losses)
    assert curves["step"] == sorted(set(curves["step"]))
    assert curves["step"][-1] == 5000
    assert min(curves["loss_low"]) == pytest.approx(min(losses), rel=1e-5)
    assert max(curves["loss_high"]) == pytest.approx(max(losses), rel=1e-5)


def test_a_run_is_read_on_and_not_again(tmp_path: Path, ask: Ask) -> None:
    """Steps after the checkpoint that a run went on from were not taken; a torn line waits for its end."""
    write_run(tmp_path / "base", "base", 350, 1000, 20, steps=1000)
    client = ask(tmp_path / "store", tmp_path / "base", tmp_path / "other")
    run, other = json_of(client, "/api/runs")["runs"]
    assert (run["step"], run["state"], other["state"]) == (200, "interrupted", "not started")
    lease = Lease(tmp_path / "base" / "run.lock", "run", "wait")
    with closing(RunLog(tmp_path / "base" / "events.jsonl")) as log:
        log.write("resume", step=150, digest="ee")
        log.write("step", step=160, loss=float("nan"), learning_rate=1e-5, bins=[])
        time.sleep(0.01)
        log.write("step", step=170, loss=0.25, learning_rate=1e-5, bins=[[350, 400, 0.2, 4]])
    with (tmp_path / "base" / "events.jsonl").open("a") as file:
        file.write('{"event": "step", "st')
    run = json_of(client, "/api/runs")["runs"][0]
    assert (run["step"], run["state"], run["loss"]) == (170, "training", 0.25)
    assert run["curves"]["step"] == [*range(10, 160, 10), 160, 170]
    assert run["curves"]["loss"][-2:] == [None, 0.25]
    assert run["left_s"] > 0
    lease.release()
    assert json_of(client, "/api/runs")["runs"][0]["state"] == "interrupted"
    with closing(RunLog(tmp_path / "base" / "events.jsonl")) as log:
        log.write("complete", step=170)
    assert json_of(client, "/api/runs")["runs"][0]["state"] == "finished"
    shutil.rmtree(tmp_path / "base")
    write_run(tmp_path / "base", "base", 350, 1000, 3)
    assert json_of(client, "/api/runs")["runs"][0]["curves"]["step"] == [10, 20, 30]


def test_events_are_told_newest_first(tmp_path: Path, ask: Ask) -> None:
    write_run(tmp_path / "run", "base", 350, 1000, 200)
    (tmp_path / "store" / "service").mkdir(parents=True)
    with closing(RunLog(tmp_path / "store" / "service" / "events.jsonl")) as log:
        log.write("build_failed", message="<b>no space</b>", exit_code=74)
        log.write("something_new", of="next year")
    told = json_of(ask(tmp_path / "store", tmp_path / "run"), "/api/events")["events"]
    assert [event["text"] for event in told[:3]] == [
        "Something new: of next year",
        "A build failed: <b>no space</b>",
        "Saved at step 2,000",
    ]
    assert "step" not in {event["event"] for event in told}


def test_the_service_is_told_as_it_is(world: Any, ask: Ask, tmp_path: Path) -> None:
    shutil.copytree(world.store, tmp_path / "store")
    own = type(world)(tmp_path / "store", world.pictures, world.runs)
    client = ask(own.store)
    assert json_of(client, "/api/status")["service"] is None
    aside = [{"path": f"{n}.png", "reason": "damaged"} for n in range(3)]
    own.say_status(state="building", done=3, total=10, images_per_s=2.5, quarantined=3, quarantine=aside)
    said = json_of(client, "/api/status")["service"]
    assert (said["is_alive"], said["done"], said["total"], said["images_per_s"]) == (True, 3, 10, 2.5)
    assert said["quarantine"] == aside
    own.say_status(beat_s=1.0, pid=2**22)
    assert json_of(client, "/api/status")["service"]["is_alive"] is False
    own.say_status(beat_s=1.0, pid=os.getpid(), host=os.uname().nodename)
    assert json_of(client, "/api/status")["service"]["is_alive"] is True


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{",
        '{"version": 1}',
        '{"version": 1, "folders": 3, "quarantine": [1], "done": "x", "last_seal": [], "beat_s": {}}',
        "[" * 3000,
        "\xff",
    ],
)
def test_damaged_files_are_no_accident(text: str, tmp_path: Path, ask: Ask) -> None:
    """Whatever stands in the files that others write, the page answers."""
    write_run(tmp_path / "run", "base", 350, 1000, 3)
    write_store(tmp_path / "store", 2)
    (tmp_path / "store" / "service").mkdir()
    (tmp_path / "evaluation").mkdir()
    hostile = text.encode("latin-1")
    for file in ("store/service/status.json", "evaluation/report.json", "run/config.toml", "run/expert.json"):
        (tmp_path / file).write_bytes(hostile)
    lines = [
        hostile,
        b'{"event": "step", "step": "x", "time_s": []}',
        b'{"event": "step", "step": 50, "time_s": 5, "bins": [[1]]}',
    ]
    lines += [b'{"event": "eval", "step": 50, "bins": {}}', b'{"event": "begin", "step": null}', b'{"event": 3}']
    with (tmp_path / "run" / "events.jsonl").open("ab") as log:
        log.write(b"\n".join(lines) + b"\n")
    client = ask(tmp_path / "store", under=tmp_path)
    for address in ("/api/status", "/api/runs", "/api/events", "/metrics", "/api/gallery"):
        assert client.get(address).status_code == 200, address


def test_the_gallery_turns_pages(world: Any, ask: Ask) -> None:
    client = ask(world.store, sources=(world.pictures,))
    pages = [json_of(client, f"/api/gallery?page={number}") for number in range(4)]
    ids = [card["id"] for page in pages[:3] for card in page["cards"]]
    assert len(set(ids)) == 60
    assert pages[2] == pages[3]  # past the end is the end
    some = json_of(client, "/api/gallery?bucket=80x48&split=eval")
    manifest = open_manifest(world.store, "main")
    held = next(bucket for bucket in manifest.buckets("eval") if bucket.hw == (80, 48))
    assert {card["id"] for card in some["cards"]} == {key.hex() for key in manifest.sample_ids(held.rows.tolist())}
    card = some["cards"][0]
    assert card["bucket_hw"] == [80, 48]
    assert card["original_hw"] == [160, 96]
    assert card["captions"][0].startswith("a caption, number")


def test_pictures_are_those_of_the_sample(world: Any, ask: Ask) -> None:
    """The preview is the stored latents', pixel for pixel; the source comes back encoded anew."""
    client, manifest = ask(world.store, sources=(world.pictures,)), open_manifest(world.store, "main")
    row = manifest.rows([7])[0]
    address = f"/picture/{manifest.digest}/{row.sample_id.hex()}"
    with StoreReader(world.store) as reader, reader.snapshot() as snapshot:
        latents = snapshot.read(row.variants[0].latent_key).tensors["mean"]
    preview = client.get(f"{address}/preview.png")
    assert preview.headers["content-type"] == "image/png"
    shown = decode(preview.content, PixelRules(), PixelLimits())
    np.testing.assert_array_equal(shown, preview_picture(latents, PREVIEW))
    source = client.get(f"{address}/source.jpg")
    assert source.headers["content-type"] == "image/jpeg"
    original = (world.pictures / row.path).read_bytes()
    assert source.content[:2] == b"\xff\xd8"
    assert original[:100] not in source.content
    wanted = decode(original, PixelRules(), PixelLimits()).astype(int)
    assert abs(decode(source.content, PixelRules(), PixelLimits()).astype(int) - wanted).max() < 8


def test_a_source_is_shown_only_as_it_was_built(world: Any, ask: Ask, tmp_path: Path) -> None:
    pictures = shutil.copytree(world.pictures, tmp_path / "pictures")
    rows = open_manifest(world.store, "main").rows(range(4))
    changed, linked, gone, kept = (pictures / row.path for row in rows)
    changed.write_bytes(kept.read_bytes())
    shutil.move(linked, tmp_path / "outside.png")
    linked.symlink_to(tmp_path / "outside.png")
    gone.unlink()
    client, digest = ask(world.store, sources=(pictures,)), open_manifest(world.store, "main").digest
    answers = [client.get(f"/picture/{digest}/{row.sample_id.hex()}/source.jpg") for row in rows]
    assert [answer.status_code for answer in answers] == [404, 404, 404, 200]
    assert "another picture" in answers[0].text
    assert not any(str(tmp_path) in answer.text for answer in answers[:3])


def test_nothing_is_held_between_two_looks(world: Any, ask: Ask, tmp_path: Path) -> None:
    """A manifest that was just shown can be dropped, a lease is seen and not taken, no reader stays in the store."""
    store = shutil.copytree(world.store, tmp_path / "store")
    client = ask(store)
    assert json_of(client, "/api/status")["store"]["writer"] is None
    json_of(client, "/api/gallery")
    assert client.watched.store.reader().readers() == []
    lease = Lease(store / "writer.lock", "store", "wait")
    assert f"pid {os.getpid()}" in json_of(client, "/api/status")["store"]["writer"]
    assert listed_holder(store / "writer.lock") is not None
    lease.release()
    assert listed_holder(store / "writer.lock") is None
    (sealed,) = sealed_manifests(store)
    drop_manifest(sealed)
    assert json_of(client, "/api/status")["store"]["data"] == []


def test_figures_for_prometheus(world: Any, ask: Ask) -> None:
    text = ask(world.store, under=world.runs).get("/metrics").text
    figures = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert float(figures["sdxl_store_records"]) == 80
    assert float(figures['sdxl_manifest_samples{manifest="main"}']) == 60
    assert float(figures['sdxl_run_step{expert="refiner",run="refiner"}']) == 5000
    assert float(figures["sdxl_service_up"]) == 0


def test_the_newest_pictures_of_the_pair(world: Any, ask: Ask, tmp_path: Path) -> None:
    out, picture = tmp_path / "evaluation", next(world.pictures.rglob("*.png"))
    (out / "pictures").mkdir(parents=True)
    shutil.copy(picture, out / "pictures" / "pair.png")
    (out / "secret.png").symlink_to(picture)
    answers = [{"low": 0, "high": 350, "candidate": "refiner"}, {"low": 350, "high": 1000, "candidate": "base"}]
    alone = [{"low": 0, "high": 1000, "candidate": "start model"}]
    choices = [
        {"answers": alone, "loss": 0.5, "pictures": ["../../etc/passwd", "secret.png"]},
        {"answers": answers, "loss": 0.25, "clip": 30.0, "pictures": ["pictures/pair.png", "pictures/none.png"]},
    ]
    experts = [{"name": "base", "run": "x", "state": "judged", "step": 12}]
    round_ = {"number": 3, "at": "now", "experts": experts, "choices": choices}
    (out / "report.json").write_text(json.dumps({"format": 1, "prompts": ["a", "b"], "rounds": [round_]}))
    client = ask(world.store, under=tmp_path)
    shown = json_of(client, "/api/runs")["evaluation"]
    assert [way["who"] for way in shown["ways"]] == ["start model", "base and refiner"]
    numbers = [picture["picture"] for row in shown["prompts"] for picture in row["pictures"]]
    codes = [client.get(f"/picture/evaluation/{shown['id']}/3/{number}.jpg").status_code for number in numbers]
    assert codes == [404, 200, 404, 404]  # out of the folder, there, a link, gone
    assert client.get(f"/picture/evaluation/{shown['id']}/2/{numbers[1]}.jpg").status_code == 404


def test_what_has_not_changed_is_not_sent_again(world: Any, ask: Ask) -> None:
    client = ask(world.store, under=world.runs)
    for address in ("/", "/api/status", "/api/runs", "/static/page.js"):
        tag = client.get(address).headers["etag"]
        assert client.get(address, headers={"if-none-match": tag}).status_code == 304
