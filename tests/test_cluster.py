"""The examples for clusters: they parse, their commands have these options, and their numbers fit each other."""

import itertools
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from torch.distributed.run import get_args_parser

from cache_builder.store_cli import import_
from shared.config import load_config
from shared.parts import Part, covers
from trainer.cli import _train_expert
from trainer.config import ExpertConfig
from trainer.partitions import own_places, partitions_read

ROOT = Path(__file__).parents[1]
SBATCH, JOB = (ROOT / "docs" / "cluster" / name for name in ("train.sbatch", "train-job.yaml"))


def slurm_commands() -> Iterator[list[str]]:
    """What `srun bash -c '...'` runs."""
    for quoted in re.findall(r"srun bash -c '([^']+)'", SBATCH.read_text()):
        yield shlex.split(quoted.replace("\\\n", " "))


def kubernetes_job() -> dict[str, Any]:
    service, job = yaml.safe_load_all(JOB.read_text())
    assert (service["kind"], job["kind"]) == ("Service", "Job")
    assert service["metadata"]["name"] == job["spec"]["template"]["spec"]["subdomain"] == job["metadata"]["name"]
    return dict(job["spec"])


def kubernetes_commands() -> Iterator[list[str]]:
    pod = kubernetes_job()["template"]["spec"]
    yield pod["initContainers"][0]["command"]
    yield shlex.split(pod["containers"][0]["args"][0])[1:]


def options_of(function: Any) -> set[str]:
    app = typer.Typer()
    app.command()(function)
    command: Any = typer.main.get_command(app)
    return {name for parameter in command.params for name in parameter.opts}


@pytest.mark.parametrize("commands", [slurm_commands, kubernetes_commands])
def test_the_commands_have_these_options_and_each_machine_reads_its_part(commands: Any) -> None:
    carry, train = ([re.sub(r"\$SLURM_NODEID|\$JOB_COMPLETION_INDEX", "3", word) for word in one] for one in commands())
    assert carry[:2] == ["cache-store", "import"]
    assert {word for word in carry if word.startswith("--")} <= options_of(import_)
    assert carry[-2] == "--partition"

    own = next(i for i, word in enumerate(train) if "train-expert" in word)
    launcher, _ = get_args_parser().parse_known_args([*train[1:own], "script"])
    options = train[own + 1 :]
    assert {word for word in options if word.startswith("--")} <= options_of(_train_expert)
    configs = [ROOT / value.replace("$EXPERT", "base") for value in following(options, "--config")]
    config = load_config(ExpertConfig, configs, following(options, "--set"))
    machines, processes = 4, 4 * int(launcher.nproc_per_node)
    assert launcher.nnodes in ("4", "$SLURM_NNODES")
    for process in range(processes):
        places = own_places(process, processes, config.accumulation, config.partitions)
        machine = Part(process // int(launcher.nproc_per_node), machines)
        read = partitions_read(places, config.partitions)
        assert all(covers([machine], Part(number, config.partitions)) for number in read)


def test_as_many_machines_as_partitions() -> None:
    spec = kubernetes_job()
    assert spec["completions"] == spec["parallelism"] == 4
    assert "#SBATCH --nodes=4\n" in SBATCH.read_text()


def following(words: list[str], option: str) -> list[str]:
    return [value for name, value in itertools.pairwise(words) if name == option]
