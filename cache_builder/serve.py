"""`cache-serve`: keep a store up to date as pictures arrive, say how that goes, and keep the page beside it alive.

watch.py: something changed -> quiet (agenda.py) -> build_process.py: sealed, old manifests dropped (keep.py)

STORE/service/status.json says how it is (service_status.py), events.jsonl what happened. The writer's lease is the
build's alone: between builds others may write, and while they do a build waits.
"""

import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from cache_builder.agenda import Agenda
from cache_builder.build_process import COMMAND, BuildProcess, Outcome
from cache_builder.datasets import open_sources
from cache_builder.page_process import PageProcess, page_command
from cache_builder.runners import device_names
from cache_builder.serve_config import ServeConfig
from cache_builder.service_status import ServiceStatus, read_last_seal
from cache_builder.watch import Watch
from shared.command import one_line
from shared.errors import ConfigError, DataError, Stopped, StoreLocked
from shared.file_system import refuse_network
from shared.lease import Lease, holder
from shared.model_folder import resolve_model
from shared.progress import say
from shared.prompts import read_prompts_file
from shared.runlog import RunLog
from shared.stopping import stop_requests
from shared.store_card import refuse_foreign_folder

FOLDER = "service"
TICK_S = 0.1
LOCKED_S = 1.0  # between two looks at another build's lease
NEEDED = ("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")


@dataclass(frozen=True)
class ServeOptions:
    """What the first build may do, and how processes are started."""

    replace: bool = False
    allow_shrink: bool = False
    build_command: Sequence[str] = COMMAND
    page_command: Sequence[str] | None = None
    """Another one than the page's own."""


def serve(config: ServeConfig, options: ServeOptions = ServeOptions()) -> None:
    """Build now and after every change, until SIGTERM or SIGINT; raises Stopped where a build was cut by that.

    Raises ConfigError or DataError for what cannot be meant or is not there at the start, and StoreLocked where another
    service keeps the store. Later faults are said, and end nothing.
    """
    model, folder = _check(config), config.store / FOLDER
    with ExitStack() as stack:
        stop = stack.enter_context(stop_requests())
        folder.mkdir(parents=True, exist_ok=True)
        lease = Lease(folder / "service.lock", f"store {config.store} is served", "one cache-serve keeps a store")
        stack.callback(lease.release)
        log = RunLog(folder / "events.jsonl")
        stack.callback(log.close)
        status = ServiceStatus(folder / "status.json", config.manifest, [_address(one.root) for one in config.datasets])
        status.last_seal = read_last_seal(config.store, config.manifest)
        log.write("service_start", manifest=status.manifest, folders=status.folders)
        stack.callback(_note_stop, status, log)
        builds = _Builds(config, options, model, status, log)
        stack.callback(builds.kill)
        page = PageProcess(options.page_command or page_command(config), folder, log, config.page.hung_s)
        if config.page.enabled:
            shown = "localhost" if config.page.host in ("0.0.0.0", "::") else config.page.host
            say(f"the page: http://{shown}:{config.page.port}")
            page.look()
        stack.callback(page.close)
        status.write()
        not_pictures = [config.store, *config.runs, *([config.runs_under] if config.runs_under else [])]
        watch = Watch(config.datasets, not_pictures, config.service.look_s, config.service.poll_s)
        stack.callback(watch.close)
        while not stop.asked():
            if config.page.enabled:
                page.look()
            builds.note(watch.take())
            builds.go_on()
            status.write()
            time.sleep(TICK_S)
        builds.stop()


class _Builds:
    """The build that runs, or the process that is ready for the next one, and when that is due."""

    def __init__(
        self, config: ServeConfig, options: ServeOptions, model: Path, status: ServiceStatus, log: RunLog
    ) -> None:
        self._config, self._options, self._rules = config, options, config.service
        self._job = {"config": config.model_dump(mode="json"), "model": str(model)}
        self._status, self._log, self._agenda = status, log, Agenda(config.service)
        self._changed: set[str] = set()
        self._is_building = False
        self._began_s = 0.0
        self._blocked: str | None = None
        self._process: BuildProcess | None = BuildProcess(options.build_command)

    def note(self, changed: set[str]) -> None:
        """Take over what has changed."""
        if changed:
            self._agenda.change()
            if not self._changed:
                self._log.write("change_seen", path=min(changed), count=len(changed))
            self._changed |= changed
            self._status.changed = len(self._changed)

    def go_on(self) -> None:
        """Follow the build that runs; begin one that is due, unless somebody else writes just now."""
        if self._is_building:
            self._follow()
        elif not self._agenda.is_due():
            self._status.rest("quiet" if self._agenda.waits_for_quiet else "waiting", self._blocked)
        elif (writes := holder(self._config.store / "writer.lock")) is None:
            self._begin()
        else:
            self._wait_for_lease(writes)

    def stop(self) -> None:
        """Let a build end after its batch; raises Stopped where that cuts it."""
        if not self._is_building or self._process is None:
            return
        self._process.ask_to_stop()
        until_s = time.monotonic() + self._rules.stop_s
        while (outcome := self._process.outcome()) is None and time.monotonic() < until_s:
            self._status.write()
            time.sleep(TICK_S)
        self.kill()
        if outcome is not None and outcome.message is None:
            self._conclude(outcome)
            return
        self._log.write(
            "build_failed", message="the service was asked to stop", exit_code=Stopped.exit_code, retry_s=None
        )
        raise Stopped("the build was cut; what was stored stays, and the same command goes on")

    def kill(self) -> None:
        """End the process, whatever it does."""
        if self._process is not None:
            self._process.kill()
        self._process, self._is_building = None, False

    def _begin(self) -> None:
        if self._process is None or not self._process.is_alive():
            self.kill()
            self._process = BuildProcess(self._options.build_command)
        is_first = self._status.builds == 0
        may = {"replace": is_first and self._options.replace, "allow_shrink": is_first and self._options.allow_shrink}
        self._process.begin(self._job | may)
        self._log.write("build_start", changed=len(self._changed))
        self._agenda.begin()
        self._changed, self._blocked = set(), None
        self._is_building, self._began_s = True, time.monotonic()
        self._status.rest("building", "starting")
        self._status.changed = 0

    def _follow(self) -> None:
        assert self._process is not None
        for news in self._process.news():
            if "task" in news:
                self._status.advance(news["task"], news["done"], news["total"])
        outcome = self._process.outcome()
        if outcome is None and self._process.silent_s > self._rules.hung_s:
            silence = f"the build has said nothing for {self._rules.hung_s:g} s ({self._status.phase}) and was ended"
            outcome = Outcome(message=silence, code=None)
        if outcome is not None:
            self.kill()
            self._conclude(outcome)
            self._process = BuildProcess(self._options.build_command) if self._rules.ready else None

    def _conclude(self, outcome: Outcome) -> None:
        self._status.rest("waiting")
        if outcome.message is None:
            self._succeed(outcome)
        elif outcome.code == StoreLocked.exit_code:
            self._wait_for_lease(outcome.message)
        elif outcome.code == ConfigError.exit_code and self._status.builds == 0:
            self._log.write("build_failed", message=outcome.message, exit_code=outcome.code)
            raise ConfigError(outcome.message)
        else:
            self._fail(outcome, outcome.message)

    def _succeed(self, outcome: Outcome) -> None:
        report, keep, before = outcome.report, outcome.keep, self._status.last_seal
        self._agenda.succeed()
        self._status.builds += 1
        self._status.last_error = None
        self._status.take_quarantine(report)
        self._status.kept = keep["kept"]
        self._status.last_seal = read_last_seal(self._config.store, self._config.manifest)
        counts = {"encoded": report["stored"], "reused": report["reused"], "quarantined": report["quarantined"]}
        seconds = round(time.monotonic() - self._began_s, 3)
        self._log.write("build_end", seconds=seconds, **counts, digest=report["digest"])
        is_new = before is None or before["digest"] != report["digest"]
        what = f"sealed {report['digest'][:16]}" if is_new else f"{report['digest'][:16]} as before"
        told = ", ".join(f"{count} {name}" for name, count in counts.items())
        say(f"manifest {self._config.manifest} {what}: {told}, {seconds:.1f} s")
        for digest in keep["dropped"]:
            self._log.write("manifest_dropped", manifest=self._config.manifest, digest=digest)
            say(
                f"manifest {self._config.manifest} {digest[:16]} dropped: no longer among the newest {self._rules.keep}"
            )
        for remark in keep["remarks"]:
            say(one_line(remark))

    def _fail(self, outcome: Outcome, message: str) -> None:
        self._status.take_quarantine(outcome.report)
        self._status.last_error = message
        is_hopeless = outcome.code in (ConfigError.exit_code, DataError.exit_code)
        retry_s = None if is_hopeless else self._agenda.fail()
        self._log.write("build_failed", message=message, exit_code=outcome.code, retry_s=retry_s)
        then = "the next change is built" if retry_s is None else f"it is tried again in {retry_s:g} s"
        say(f"the build failed: {one_line(message)}; {then}")

    def _wait_for_lease(self, why: str) -> None:
        if self._blocked is None:
            say(f"waiting: {one_line(why)} writes the store")
        self._blocked = f"another writer: {why}"
        self._agenda.again(LOCKED_S)
        self._status.rest("waiting", self._blocked)


def _address(root: Path | str) -> str:
    """A data set's root as whoever reads the status finds it, from any working directory."""
    return str(root.absolute()) if isinstance(root, Path) else root


def _check(config: ServeConfig) -> Path:
    """Say at once what cannot be meant or is not there; returns the model's folder."""
    if not config.datasets:
        raise ConfigError("which pictures? Write [[datasets]] with an id and a root into the configuration")
    refuse_network(config.store)
    refuse_foreign_folder(config.store)
    device_names(config.device)
    token = config.page.token_file
    if config.page.enabled and token is not None and not token.is_file():
        raise ConfigError(f"page.token_file {token}: no such file; write the token into it")
    open_sources(config.datasets)
    if config.prompts is not None:
        read_prompts_file(config.prompts)
    return resolve_model(config.model, NEEDED, config.model_settings)


def _note_stop(status: ServiceStatus, log: RunLog) -> None:
    status.rest("stopped")
    status.write(at_once=True)
    log.write("service_stop")
