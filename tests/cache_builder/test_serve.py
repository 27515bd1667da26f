"""cache-serve as its users and its page meet it: pictures arrive, builds are sealed, and no fault ends it for ever."""

import contextlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from cache_builder.verify import verify_store
from shared.lease import holder
from shared.manifest import open_manifest
from shared.runlog import read_events
from shared.store import StoreWriter
from tests.pictures import write_shapes

ROOT = Path(__file__).parents[2]
PATIENCE_S = 150
QUICK = ("service.quiet_s=0.2", "service.retry_s=0.2", "page.enabled=false")
CONFIG = """
store = "store"
model = {model}
device = "cpu"
images = {{resolution = 64, step = 16}}
encode = {{batch = 1, text_batch = 2}}
[[datasets]]
id = "shapes"
root = "shapes"
"""


class Service:
    """One service that has been started, and the folder that it keeps."""

    def __init__(self, folder: Path, pid: int, err: Path) -> None:
        self.folder, self.store, self.pid, self.err = folder, folder / "store", pid, err

    def status(self) -> dict[str, Any]:
        """What it last said of itself; {} where it has not yet."""
        try:
            found: dict[str, Any] = json.loads((self.store / "service/status.json").read_text())
        except FileNotFoundError:
            return {}
        return found if found["pid"] == self.pid else {}

    def events(self, kind: str | None = None) -> list[dict[str, Any]]:
        return [one for one in read_events(self.store / "service/events.jsonl") if kind in (None, one["event"])]

    def said(self) -> list[str]:
        return [line for line in self.err.read_text().splitlines() if not line.startswith("loading ")]

    def is_alive(self) -> bool:
        return psutil.pid_exists(self.pid)

    def wait_for(self, condition: Callable[[dict[str, Any]], object]) -> dict[str, Any]:
        """Until its status is so."""
        end_s = time.monotonic() + PATIENCE_S
        while True:
            status = self.status()
            if status and condition(status):
                return status
            assert time.monotonic() < end_s, (status, self.said())
            assert self.is_alive(), self.said()
            time.sleep(0.02)

    def end(self, number: int = signal.SIGTERM) -> int | None:
        """Send a signal and wait; returns the exit code, None where it was killed."""
        os.kill(self.pid, number)
        return self.code()

    def code(self) -> int | None:
        end_s = time.monotonic() + PATIENCE_S
        while self.is_alive():
            assert time.monotonic() < end_s, self.said()
            time.sleep(0.01)
        code = Path(f"{self.err}.code")
        return int(code.read_text()) if code.exists() else None


class Services:
    """Starts them, in forks of service_server.py."""

    def __init__(self, server: Any) -> None:
        self._server = server
        self._started: list[Service] = []
        self.build_command = server.command("cache_builder.build_job")

    def start(self, folder: Path, *sets: str, **options: Any) -> Service:
        """cache-serve --config FOLDER/serve.toml, told `sets`, with ServeOptions(`options`)."""
        self._server.wait()
        err = folder / f"{len(self._started)}.err"
        job = {"config": str(folder / "serve.toml"), "sets": [*QUICK, *sets], "out": os.devnull, "err": str(err)}
        job |= {"options": {"build_command": self.build_command} | options}
        err.touch()
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(self._server.socket)
            connection.sendall(json.dumps(job).encode())
            pid = int(connection.makefile().readline())
        self._started.append(Service(folder, pid, err))
        return self._started[-1]

    def end_all(self) -> None:
        """Kill what a test has left."""
        for service in self._started:
            with contextlib.suppress(ProcessLookupError):
                os.kill(service.pid, signal.SIGKILL)
        self._started.clear()


@pytest.fixture
def services(fork_server: Any) -> Iterator[Services]:
    started = Services(fork_server)
    yield started
    started.end_all()


@pytest.fixture
def world(tmp_path: Path, tiny_model: Path) -> Path:
    """A folder with eight pictures and a configuration."""
    write_shapes(tmp_path / "shapes", 8)
    (tmp_path / "serve.toml").write_text(CONFIG.format(model=json.dumps(str(tiny_model))))
    return tmp_path


def test_pictures_that_arrive_are_in_a_sealed_manifest(
    world: Path, services: Services, tmp_path_factory: pytest.TempPathFactory
) -> None:
    service = services.start(world)
    first = service.wait_for(lambda status: status["builds"] == 1 and status["state"] == "waiting")
    assert first["last_seal"]["rows"] == 8
    assert first["kept"] == [first["last_seal"]["digest"]]
    assert holder(service.store / "writer.lock") is None
    more = write_shapes(tmp_path_factory.mktemp("more"), 2, seed=7)
    for file in more.iterdir():
        shutil.copy(file, world / "shapes" / f"new-{file.name}")
    second = service.wait_for(lambda status: status["builds"] == 2)
    assert second["last_seal"]["rows"] == len(open_manifest(service.store, "main")) == 10
    (world / "shapes/broken.png").write_bytes((more / "shape-00000.png").read_bytes()[:200])
    (world / "shapes/broken.txt").write_text("half a picture")
    third = service.wait_for(lambda status: status["builds"] == 3)
    assert third["last_seal"] == second["last_seal"]  # nothing new, and nothing is sealed
    assert (third["quarantined"], third["quarantine"][0]["path"]) == (1, "broken.png")
    assert third["last_error"] is None
    assert service.end() == 0
    assert json.loads((service.store / "service/status.json").read_text())["state"] == "stopped"
    kinds = [event["event"] for event in service.events()]
    build = ["build_start", "build_end"]
    assert kinds == ["service_start", *build, "change_seen", *build, "change_seen", *build, "service_stop"]
    assert [event["encoded"] for event in service.events("build_end")] == [8, 2, 0]


def test_what_is_said_of_the_folders_holds_from_anywhere(world: Path, services: Services) -> None:
    """The page may run elsewhere; and before a build has looked, nobody knows what could not be used."""
    relative = os.path.relpath(world / "shapes")
    build = fake_build(world, "sys.stdin.read(); sys.exit()")  # ends with the service
    service = services.start(world, f"datasets=[{{id='shapes', root='{relative}'}}]", build_command=build)
    status = service.wait_for(lambda status: status["state"] == "building")
    (folder,) = status["folders"]
    assert Path(folder).is_absolute()
    assert Path(folder).samefile(world / "shapes")
    assert status["quarantined"] is None
    assert service.end(signal.SIGKILL) is None


def undisturbed_digest(world: Path, services: Services, place: Path) -> str:
    """The manifest of a service that nobody disturbs."""
    place.mkdir()
    shutil.copy(world / "serve.toml", place)
    shutil.copytree(world / "shapes", place / "shapes")
    service = services.start(place)
    service.wait_for(lambda status: status["builds"] == 1)
    assert service.end() == 0
    return open_manifest(place / "store", "main").digest


@pytest.mark.parametrize("kills", [4, pytest.param(20, marks=pytest.mark.slow)])
def test_a_service_that_is_killed_while_it_builds_loses_nothing(
    world: Path, services: Services, tmp_path_factory: pytest.TempPathFactory, kills: int
) -> None:
    rng, met = random.Random(kills), 0
    for kill in range(kills):
        write_shapes(world / f"shapes/{kill}", 8, seed=kill + 1)  # there is always something to do
        service = services.start(world)
        service.wait_for(lambda status: status["state"] == "building" or status["builds"])
        time.sleep(rng.uniform(0, 0.4))
        met += service.status()["state"] == "building"
        assert service.end(signal.SIGKILL) is None
    expected = undisturbed_digest(world, services, tmp_path_factory.mktemp("undisturbed") / "world")
    service = services.start(world)
    service.wait_for(lambda status: status["builds"] == 1)
    assert service.end() == 0
    assert met >= kills // 2
    assert open_manifest(world / "store", "main").digest == expected
    assert verify_store(world / "store", deep=True).faults == []


def test_a_service_that_is_stopped_in_a_build_ends_with_75_and_goes_on(world: Path, services: Services) -> None:
    write_shapes(world / "shapes", 200)  # seconds of work: the signal must come before its end
    service = services.start(world)
    service.wait_for(lambda status: status["phase"] == "pictures" and status["done"] > 2)
    assert service.end() == 75
    assert service.said()[-1] == "stopped: the build was cut; what was stored stays, and the same command goes on"
    assert holder(world / "store/writer.lock") is None
    again = services.start(world)
    again.wait_for(lambda status: status["builds"] == 1)
    (cut,) = again.events("build_failed")
    assert cut["exit_code"] == 75
    (end,) = again.events("build_end")
    assert end["reused"] > 0
    assert again.end() == 0


def test_a_service_that_hangs_holds_up_no_build(world: Path, services: Services) -> None:
    service = services.start(world)
    service.wait_for(lambda status: status["state"] == "building")
    os.kill(service.pid, signal.SIGSTOP)
    end_s = time.monotonic() + PATIENCE_S
    while holder(world / "store/writer.lock") or not (world / "store/manifests/main/current.json").exists():
        assert time.monotonic() < end_s
        time.sleep(0.02)
    assert service.status()["builds"] == 0
    os.kill(service.pid, signal.SIGCONT)
    assert service.wait_for(lambda status: status["builds"] == 1)["last_seal"]["rows"] == 8
    assert service.end() == 0


FAKE = """
import json, os, signal, sys, time
count = os.path.join({folder!r}, "count")
number = int(open(count).read()) + 1 if os.path.exists(count) else 1
sys.stdin.readline() or sys.exit()
open(count, "w").write(str(number))
faults = {faults!r}
if number <= len(faults):
    exec(faults[number - 1])
report = dict(seen=1, stored=1, reused=0, quarantined=0, quarantined_files=[], digest="ab" * 32)
print(json.dumps(dict(report=report, keep=dict(kept=[], dropped=[], remarks=[]))), flush=True)
"""


def fake_build(folder: Path, *faults: str) -> list[str]:
    """A build that does nothing; its first ones meet `faults`."""
    return [sys.executable, "-S", "-c", FAKE.format(folder=str(folder), faults=faults)]


def test_a_build_that_hangs_or_dies_is_ended_and_tried_again(world: Path, services: Services) -> None:
    hangs = "signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(1000)"
    dies = "os.kill(os.getpid(), signal.SIGSEGV)"
    fails = 'print(json.dumps(dict(failed="no space left", code=74, report={})), flush=True); sys.exit(74)'
    command = fake_build(world, hangs, dies, fails)
    service = services.start(world, "service.hung_s=0.5", "service.ready=false", build_command=command)
    done = service.wait_for(lambda status: status["builds"] == 1)
    assert done["last_error"] is None
    hung, died, failed = service.events("build_failed")
    assert hung["message"].startswith("the build has said nothing for 0.5 s (starting)")
    assert died["message"] == "the build's process was ended by SIGSEGV; what was stored stays"
    assert (failed["message"], failed["exit_code"]) == ("no space left", 74)
    assert [one["retry_s"] for one in (hung, died, failed)] == [0.2, 0.4, 0.8]
    assert service.end() == 0


def test_what_only_a_person_can_mend_is_said_and_the_next_change_is_built(world: Path, services: Services) -> None:
    """Most pictures are broken: nothing is sealed; when they are whole again everything is."""
    whole = {path: path.read_bytes() for path in sorted((world / "shapes").glob("*.png"))[:4]}
    for path, data in whole.items():
        path.write_bytes(data[:100])
    service = services.start(world)
    failed = service.wait_for(lambda status: status["last_error"])
    assert "more than max_quarantined = 0.1; nothing was sealed" in failed["last_error"]
    assert failed["quarantined"] == len(failed["quarantine"]) == 4
    assert (failed["last_seal"], failed["builds"]) == (None, 0)
    for path, data in whole.items():
        path.write_bytes(data)
    done = service.wait_for(lambda status: status["builds"] == 1)
    assert (done["last_error"], done["quarantined"], done["last_seal"]["rows"]) == (None, 0, 8)
    shutil.move(world / "shapes", world / "unmounted")
    gone = service.wait_for(lambda status: status["last_error"])
    assert gone["last_error"] == f"data set shapes: folder {world}/shapes: No such file or directory"
    (world / "shapes").mkdir()
    for path in [*whole, *(path.with_suffix(".txt") for path in whole)]:
        shutil.copy(world / "unmounted" / path.name, path)
    fewer = service.wait_for(lambda status: "disk missing" in (status["last_error"] or ""))
    assert fewer["last_seal"] == done["last_seal"]
    shutil.rmtree(world / "shapes")
    shutil.move(world / "unmounted", world / "shapes")
    service.wait_for(lambda status: status["builds"] == 2 and status["last_error"] is None)
    end_as_told(service)  # what moved may be told late, and be built once more


def test_another_writer_is_waited_for(world: Path, services: Services) -> None:
    with StoreWriter(world / "store"):
        service = services.start(world)
        status = service.wait_for(lambda status: status["phase"])
        assert status["state"] == "waiting"
        assert status["phase"].startswith(f"another writer: pid {os.getpid()} on ")
        assert (status["builds"], status["last_error"]) == (0, None)
    service.wait_for(lambda status: status["builds"] == 1)
    rival = services.start(world)
    assert rival.code() == 73
    assert rival.said()[-1].endswith("one cache-serve keeps a store")
    assert service.end() == 0


def test_old_manifests_go_and_those_that_are_used_stay(world: Path, services: Services) -> None:
    service = services.start(world, "service.keep=2", f"runs=['{world}/run']")
    digests = []
    for count in range(4):
        status = service.wait_for(lambda status, count=count: status["builds"] == count + 1)
        digests.append(status["last_seal"]["digest"])
        if count == 0:
            card = {"facts": {"manifests": [{"digest": digests[0]}]}}
            (world / "run").mkdir()
            (world / "run/expert.json").write_text(json.dumps(card))
        (world / "shapes/shape-00000.txt").write_text(f"caption {count}")
    end_as_told(service)
    kept = [digests[3], digests[2], digests[0]]
    assert status["kept"] == kept
    assert [event["digest"] for event in service.events("manifest_dropped")] == [digests[1]]
    assert {path.stem for path in (world / "store/manifests/main").glob("*.arrow")} >= set(kept)
    assert not (world / f"store/manifests/main/{digests[1]}.arrow").exists()


def end_as_told(service: Service) -> None:
    """End it, with 75 where its log says that this cut a build, and with 0 else."""
    code = service.end()
    cut = [event for event in service.events("build_failed") if event["message"] == "the service was asked to stop"]
    assert code == (75 if cut else 0)


PAGE = """
import json, os, psutil, socket, sys
folder = sys.argv[sys.argv.index("--store") + 1] + "/service"
listening = socket.create_server(("127.0.0.1", 0))
port = listening.getsockname()[1]
card = dict(pid=os.getpid(), host="127.0.0.1", port=port, created_s=psutil.Process().create_time())
open(folder + "/page.json.new", "w").write(json.dumps(card))
os.rename(folder + "/page.json.new", folder + "/page.json")
print("it is up", flush=True)
while True:
    with listening.accept()[0] as asked:
        asked.recv(1000)
        asked.sendall(b"HTTP/1.1 200 OK\\r\\n\\r\\n")
"""


def page_pid(world: Path, other_than: int = 0) -> int:
    """Pid of the page that is up; waits for another one than the one given."""
    end_s = time.monotonic() + PATIENCE_S
    while True:
        with contextlib.suppress(OSError, ValueError):
            pid = int(json.loads((world / "store/service/page.json").read_text())["pid"])
            if pid != other_than and psutil.pid_exists(pid):
                return pid
        assert time.monotonic() < end_s
        time.sleep(0.02)


def wait_until_gone(pid: int) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        psutil.Process(pid).wait(PATIENCE_S)


def test_page_and_service_outlive_each_other(world: Path, services: Services) -> None:
    page = [sys.executable, "-c", PAGE, "dashboard", "--store", str(world / "store")]
    more: dict[str, Any] = {"build_command": fake_build(world), "page_command": page}
    service = services.start(world, "page.enabled=true", **more)
    first = page_pid(world)
    os.kill(first, signal.SIGKILL)
    second = page_pid(world, first)
    (end,) = service.events("page_end")
    assert (end["pid"], end["said"]) == (first, "it is up")
    service.end(signal.SIGKILL)
    assert psutil.pid_exists(second)
    again = services.start(world, "page.enabled=true", **more)
    again.wait_for(lambda status: status["builds"] == 1)
    assert page_pid(world) == second  # taken over
    assert again.end(signal.SIGKILL) is None
    other = services.start(world, "page.enabled=true", **(more | {"page_command": [*page, "--port", "2"]}))
    third = page_pid(world, second)
    wait_until_gone(second)  # it was told otherwise than this one
    assert other.end() == 0
    wait_until_gone(third)
    kinds = [(one["event"], one["pid"]) for one in other.events() if one["event"].startswith("page")]
    assert kinds == [
        ("page_start", first),
        ("page_end", first),
        ("page_start", second),
        ("page_start", second),
        ("page_end", second),
        ("page_start", third),
        ("page_end", third),
    ]


def test_a_page_that_hangs_is_started_again_and_one_that_answers_is_left_alone(world: Path, services: Services) -> None:
    page = [sys.executable, "-c", PAGE, "dashboard", "--store", str(world / "store")]
    more: dict[str, Any] = {"build_command": fake_build(world), "page_command": page}
    service = services.start(world, "page.enabled=true", "page.hung_s=2", **more)
    first = page_pid(world)
    time.sleep(3)  # longer than a page may be silent
    assert service.events("page_end") == []
    os.kill(first, signal.SIGSTOP)
    second = page_pid(world, first)
    assert [(one["pid"], one["said"]) for one in service.events("page_end")] == [
        (first, "it had answered nothing for 2 s")
    ]
    assert not psutil.pid_exists(first)
    (said,) = [line for line in service.said() if line.startswith("the page has ended")]
    assert said == "the page has ended (it had answered nothing for 2 s); it is started again in 1 s"
    assert service.end() == 0
    wait_until_gone(second)


@pytest.mark.parametrize(
    ("sets", "code", "pattern"),
    [
        (["service.quiet=1"], 64, "unknown config key 'service.quiet'; did you mean 'service.quiet_s'?"),
        (["service.keep=0"], 64, 'keep = 0 would drop the current manifest: 1 or more, or "all"'),
        (["service.pinned=['ab']"], 64, "pinned 'ab': write 8 digits or more of a digest"),
        (["page.host=0.0.0.0"], 64, "host 0.0.0.0 is open to others: name a token_file, or listen on 127.0.0.1"),
        (["page.enabled=true", "page.token_file=nowhere"], 64, "page.token_file nowhere: no such file"),
        (["datasets=[]"], 64, "which pictures? Write [[datasets]] with an id and a root into the configuration"),
        (["datasets=[{id='gone', root='gone'}]"], 65, "data set gone: folder gone: No such file or directory"),
        (["model=nowhere"], 65, "no model folder nowhere"),
        (["device=gpu"], 64, "--device gpu cannot be used"),
        (["prompts=nowhere.txt"], 64, "nowhere.txt: No such file"),
        (["encode.dtype=float16"], 64, "this VAE overflows"),  # only the first build tells
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_meant_is_one_line(
    world: Path, services: Services, sets: list[str], code: int, pattern: str
) -> None:
    service = services.start(world, *sets)
    assert service.code() == code
    assert len(service.said()) == 1
    assert service.said()[0].startswith("error: ")
    assert pattern in service.said()[0]


TRAIN = (
    "steps=60", "batch=2", "log.every=1", "log.trackers=[]", "checkpoint.every=1000", "eval.every=1000",
    "schedule.prediction_type=v_prediction", "optimizer.learning_rate=1e-3",
)  # fmt: skip
RANGES = {"base": "{low=350, high=1000}", "refiner": "{low=0, high=350}"}
TRAINER = "from trainer.cli import train_expert; train_expert()"


def train_pair(world: Path, model: Path, runs: Path) -> list["subprocess.Popen[bytes]"]:
    """Both experts, started."""
    own = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    started = []
    for name, timesteps in RANGES.items():
        sets = [part for one in (f"name={name}", f"timesteps={timesteps}", *TRAIN) for part in ("--set", one)]
        places = ["--store", str(world / "store"), "--model", str(model), "--output", str(runs / name)]
        command = [sys.executable, "-c", TRAINER, *places, "--device", "cpu", *sets]
        started.append(subprocess.Popen(command, env=os.environ | own, stderr=subprocess.DEVNULL))
    return started


def losses(runs: Path) -> dict[str, list[float]]:
    events = {name: read_events(runs / name / "events.jsonl") for name in RANGES}
    return {name: [one["loss"] for one in found if one["event"] == "step"] for name, found in events.items()}


@pytest.mark.slow
def test_neither_trainer_notices_that_the_service_hangs_or_is_killed(
    world: Path, services: Services, tiny_model: Path
) -> None:
    """Twenty times: it is killed at once, or hangs for a while first, in turns."""
    write_shapes(world / "shapes", 24)
    first = services.start(world)
    first.wait_for(lambda status: status["builds"] == 1)
    assert first.end() == 0
    assert [one.wait() for one in train_pair(world, tiny_model, world / "alone")] == [0, 0]
    beside = train_pair(world, tiny_model, world / "beside")
    while not all((world / "beside" / name / "expert.json").exists() for name in RANGES):
        time.sleep(0.05)
    met = 0
    for kill in range(20):
        write_shapes(world / f"shapes/{kill}", 2, seed=kill + 1)
        service = services.start(world, "service.keep=1")
        service.wait_for(lambda status: status["state"] == "building" or status["builds"])
        time.sleep(0.3)
        met += any(one.poll() is None for one in beside)
        if kill % 2:
            os.kill(service.pid, signal.SIGSTOP)
            time.sleep(0.5)
        service.end(signal.SIGKILL)
    assert [one.wait() for one in beside] == [0, 0]
    assert met >= 5
    alone = losses(world / "alone")
    assert {name: len(found) for name, found in alone.items()} == dict.fromkeys(RANGES, 60)
    assert losses(world / "beside") == alone
    assert verify_store(world / "store", deep=True).faults == []
