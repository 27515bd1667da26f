"""The run folder: begun once, gone on with by the identical command, never mixed up with another run.

RUN/config.toml     the resolved config, written first
RUN/expert.json     PairContract and ExpertFacts as of now
RUN/events.jsonl    what happened
RUN/checkpoints/    trainer/checkpoint.py
"""

import os
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from shared.atomic import write_atomically
from shared.config import dump_config, flatten, load_config
from shared.contract import ExpertCard, ExpertFacts, ManifestUse, PairContract
from shared.errors import CheckpointError, ConfigError, ContractError, ExpertsError, ManifestMismatch, Stopped
from shared.lease import Lease
from shared.manifest import Manifest, current_digest, open_manifest
from shared.model_folder import model_name, read_licence
from shared.progress import say
from shared.runlog import RunLog
from trainer.checkpoint import Checkpoint, open_checkpoint, resumable_checkpoint, set_aside_newer
from trainer.config import MAY_CHANGE, ExpertConfig, resolve_null_prompt
from trainer.partitions import PartitionedOrder, own_places, partitions_held, partitions_read, require_partitions
from trainer.partner import check_partner, exposure_facts, find_partner
from trainer.processes import Processes
from trainer.sampler import Pool
from trainer.start import Start, check_start, choose_start, same_start
from trainer.trained import check_names
from trainer.unet import choose_layout, read_unet_config, unet_digest


@dataclass(frozen=True)
class Request:
    """What a `train-expert` command asks for."""

    config: ExpertConfig
    store: Path
    manifest: str
    model: Path
    output: Path
    device: str = "auto"
    move_to_manifest: str | None = None
    start: Path | None = None  # another expert whose weights it begins with
    partner: Path | None = None  # the expert that hands over to it, for loss.exposure


@dataclass(frozen=True)
class Run:
    """An opened run: where it stands, and what it trains on."""

    folder: Path
    config: ExpertConfig
    card: ExpertCard
    manifest: Manifest
    checkpoint: Checkpoint | None
    start: Start
    log: RunLog
    lease: Lease | None  # None in processes that help the one that holds it
    partner: Checkpoint | None = None  # whose predictions it is exposed to

    @property
    def first_step(self) -> int:
        """Optimizer steps that are done."""
        return self.checkpoint.state.step if self.checkpoint else 0

    @property
    def manifest_use(self) -> ManifestUse:
        """The stretch of training that is going on."""
        return self.card.facts.manifests[-1]

    def close(self) -> None:
        """Close the log and let another process take the run."""
        self.log.close()
        if self.lease is not None:
            self.lease.release()


def open_run(request: Request, partitions: Sequence[int] | None = None) -> Run:
    """Begin the run that `request` asks for, or go on with the one in its output folder.

    `partitions` are those that this process reads and the store must have; None: all.

    Raises ConfigError where the folder is another run's, ManifestMismatch, ContractError or CheckpointError where what
    the run began with is no longer there, StoreLocked while another process trains it.
    """
    folder = request.output
    wanted = range(request.config.partitions) if partitions is None else partitions
    is_new = not (folder / "expert.json").exists()
    if is_new:
        new = _prospect_of_new(request, wanted)
        folder.mkdir(parents=True, exist_ok=True)
    lease = Lease(folder / "run.lock", f"run {folder} is being trained", "one process trains a run")
    try:
        if is_new and not (folder / "expert.json").exists():  # another process may have begun it in the meantime
            return _begin(request, new, lease)
        return _go_on(request, lease, wanted)
    except BaseException:
        lease.release()
        raise


@dataclass(frozen=True)
class Prospect:
    """What `train-expert` would open: nothing is written, and no lease is taken."""

    card: ExpertCard
    manifest: Manifest
    checkpoint: Checkpoint | None
    start: Start
    partner: Checkpoint | None = None


def look_at_run(request: Request) -> Prospect:
    """The run that the same request would begin or go on with; raises what open_run would, but for a lease.

    Of a store that has some of the run's partitions, these will do.
    """
    folder = request.output
    if not (folder / "expert.json").exists():
        return _prospect_of_new(request)
    _refuse_changes(folder, _changes(load_config(ExpertConfig, [folder / "config.toml"]), request.config))
    card, checkpoint = _read_card(folder), resumable_checkpoint(folder, lambda why: say(f"passed over: {why}"))
    start = _start_again(request, card) or _own_start(request, card, checkpoint)
    step = checkpoint.state.step if checkpoint else 0
    card = _with_manifests(card, tuple(use for use in card.facts.manifests if use.from_step <= step))
    if request.move_to_manifest:
        manifest, card = _move(request, card, checkpoint)
    else:
        manifest = _same_manifest(request, card)
    return Prospect(card, manifest, checkpoint, start, _partner(request, card, checkpoint))


def _prospect_of_new(request: Request, partitions: Sequence[int] | None = None) -> Prospect:
    if request.output.exists() and _is_foreign(request.output):
        raise ConfigError(f"{request.output} is not empty and no run: name a new folder with --output")
    manifest = _open(request, request.move_to_manifest or request.manifest, None, partitions)
    start = choose_start(request.config, request.model, request.start)
    check_names(request.config, start)
    card = _new_card(request, manifest, start)
    check_start(card, start)
    partner = _partner(request, card, None)
    card = _with(card, exposure=exposure_facts(request.config, partner))
    return Prospect(card, manifest, None, start, partner)


def _partner(request: Request, card: ExpertCard, going_on: Checkpoint | None) -> Checkpoint | None:
    partner = find_partner(request.config, request.partner, going_on)
    check_partner(card, request.config, request.model, partner)
    return partner


def _start_again(request: Request, card: ExpertCard) -> Start | None:
    """What the run started from, None where it is gone; raises ContractError where it is another now."""
    start = same_start(request.config, request.model, request.start, card.facts.start)
    if start is not None and unet_digest(start.unet) != card.facts.start_model_digest:
        raise ContractError(
            f"{request.output} began from another UNet than {request.model}: name a new folder with --output"
        )
    return start


def open_run_together(request: Request, processes: Processes) -> Run:
    """The same run in every process: the first opens it and tells the others where it stands.

    Raises what open_run raises, in the first; the others then end with Stopped.
    """
    accumulation, count = request.config.accumulation, request.config.partitions
    partitions = partitions_read(own_places(processes.index, processes.count, accumulation, count), count)
    if processes.count == 1:
        return open_run(request, partitions)
    if not processes.is_first:
        return _join_run(request, processes.tell(), partitions)
    try:
        run = open_run(request, partitions)
    except ExpertsError:
        processes.tell({})
        raise
    use, checkpoint, partner = run.manifest_use, run.checkpoint, run.partner
    where = {"manifest": use.name, "digest": use.digest, "checkpoint": checkpoint.path.name if checkpoint else None}
    where["partner"] = str(partner.path) if partner else None
    processes.tell(where)
    return run


def _join_run(request: Request, told: dict[str, Any], partitions: Sequence[int]) -> Run:
    """The run that the first process has opened, without its lease and its log."""
    if not told:
        raise Stopped("the first process could not open the run")
    folder = request.output
    manifest = _open(request, told["manifest"], told["digest"], partitions)
    path = told["checkpoint"] and folder / "checkpoints" / told["checkpoint"]
    checkpoint = open_checkpoint(path) if path else None
    card = _read_card(folder)
    begun = same_start(request.config, request.model, request.start, card.facts.start)
    start = begun or _own_start(request, card, checkpoint)
    partner = open_checkpoint(Path(told["partner"])) if told["partner"] else None
    return Run(folder, request.config, card, manifest, checkpoint, start, RunLog(Path(os.devnull)), None, partner)


def _is_foreign(folder: Path) -> bool:
    """Whether a folder holds anything but what a run leaves that was killed while it began."""
    if not folder.is_dir():
        return True
    names = {path.name for path in folder.iterdir() if not (path.name.startswith(".") and path.suffix == ".tmp")}
    return bool(names - {"run.lock", "config.toml"})


def _begin(request: Request, new: Prospect, lease: Lease) -> Run:
    write_config(request.output, request.config)
    write_card(request.output, new.card)
    log = RunLog(request.output / "events.jsonl")
    log.write("begin", name=request.config.name, manifest=new.manifest.name, digest=new.manifest.digest, step=0)
    return Run(request.output, request.config, new.card, new.manifest, None, new.start, log, lease, new.partner)


def _go_on(request: Request, lease: Lease, partitions: Sequence[int]) -> Run:
    folder = request.output
    old = load_config(ExpertConfig, [folder / "config.toml"])
    changes = _changes(old, request.config)
    _refuse_changes(folder, changes)
    card = _read_card(folder)
    start = _start_again(request, card)
    with ExitStack() as on_error:
        log = on_error.enter_context(closing(RunLog(folder / "events.jsonl")))

        def pass_over(why: str) -> None:
            say(f"passed over: {why}")
            log.write("bad_checkpoint", why=why)

        checkpoint = resumable_checkpoint(folder, pass_over)
        if checkpoint is not None:
            set_aside_newer(checkpoint)
        start = start or _own_start(request, card, checkpoint)
        partner = _partner(request, card, checkpoint)
        step = checkpoint.state.step if checkpoint else 0
        card = _with_manifests(card, tuple(use for use in card.facts.manifests if use.from_step <= step))
        if request.move_to_manifest:
            before = card.facts.manifests[-1].digest
            manifest, card = _move(request, card, checkpoint, partitions)
            if manifest.digest != before:
                log.write("move", manifest=manifest.name, digest=manifest.digest, step=step)
        else:
            manifest = _same_manifest(request, card, partitions)
        for key, (was, now) in changes.items():
            log.write("config", key=key, before=was, after=now)
        write_config(folder, request.config)
        write_card(folder, card)
        log.write("resume", step=step, digest=manifest.digest)
        on_error.pop_all()
    return Run(folder, request.config, card, manifest, checkpoint, start, log, lease, partner)


def _own_start(request: Request, card: ExpertCard, checkpoint: Checkpoint | None) -> Start:
    """A run with whole weights of its own needs no others any more."""
    if checkpoint is not None and card.facts.adapter is None:
        return Start(checkpoint.path / "unet")
    gone = f"step {card.facts.start.step} of {card.facts.start.name}" if card.facts.start else "what it started from"
    raise CheckpointError(f"{request.start} no longer holds {gone}, which {request.output} started from and stands on")


def make_order(run: Run, pools: Sequence[Pool], partitions: Sequence[int] = (0,)) -> PartitionedOrder:
    """The order of samples since the run's manifest began to be used, as far as `partitions` give it."""
    config, first_epoch = run.config, run.manifest_use.from_epoch
    return PartitionedOrder(
        pools, config.batch, config.seed, first_epoch, partitions=partitions, count=config.partitions
    )


def write_config(folder: Path, config: ExpertConfig) -> None:
    """Put the resolved config into the run folder."""
    write_atomically(folder / "config.toml", dump_config(config).encode())


def write_card(folder: Path, card: ExpertCard) -> None:
    """Put the contract and the facts into the run folder."""
    write_atomically(folder / "expert.json", card.model_dump_json(indent=1).encode() + b"\n")


def _new_card(request: Request, manifest: Manifest, start: Start) -> ExpertCard:
    config, known = request.config, manifest.settings
    unet_config = read_unet_config(start.unet)
    facts = ExpertFacts(
        name=config.name,
        low=config.timesteps.low,
        high=config.timesteps.high,
        layout=choose_layout(unet_config, known.text_widths, known.pooled_width),
        null_prompt=resolve_null_prompt(config.loss.null_prompt, known.zeros_for_empty_prompt),
        text_chunks=known.text_chunks,
        aesthetic_score=config.loss.aesthetic_score,
        negative_aesthetic_score=config.loss.negative_aesthetic_score,
        precision=config.precision,
        start_model_digest=unet_digest(start.unet),
        base_model=model_name(request.model),
        base_licence=read_licence(request.model),
        trainable=config.trainable,
        adapter=config.adapter.facts() if config.adapter else None,
        start=start.facts,
        manifests=(ManifestUse(name=manifest.name, digest=manifest.digest, from_step=0, from_epoch=0),),
    )
    return ExpertCard(contract=_contract(config, manifest, facts), facts=facts)


def _contract(config: ExpertConfig, manifest: Manifest, facts: ExpertFacts) -> PairContract:
    known = manifest.settings
    second_only = facts.layout == "sdxl-refiner"
    digests = {part: d for part, d in known.text_digests.items() if part.endswith("_2") or not second_only}
    return PairContract(
        **config.schedule.model_dump(),
        scaling_factor=known.scaling_factor,
        vae_digest=known.vae_digest,
        text_digests=digests,
    )


def _changes(old: ExpertConfig, new: ExpertConfig) -> dict[str, tuple[Any, Any]]:
    before, after = (flatten(config.model_dump(mode="json")) for config in (old, new))
    keys = [
        *before,
        *(key for key in after if key not in before),
    ]  # a table that may be unset has keys only where it is
    return {key: (before.get(key), after.get(key)) for key in keys if before.get(key) != after.get(key)}


def _refuse_changes(folder: Path, changes: dict[str, tuple[Any, Any]]) -> None:
    refused = [f"{key} was {b!r}, is {a!r}" for key, (b, a) in changes.items() if key not in MAY_CHANGE]
    if refused:
        raise ConfigError(f"{folder} is another run: {'; '.join(refused)}. Name a new folder with --output")


def _read_card(folder: Path) -> ExpertCard:
    try:
        return ExpertCard.model_validate_json((folder / "expert.json").read_text())
    except (OSError, ValidationError) as error:
        raise CheckpointError(f"{folder}/expert.json is damaged: {str(error).splitlines()[0]}") from None


def _with_manifests(card: ExpertCard, uses: tuple[ManifestUse, ...]) -> ExpertCard:
    return _with(card, manifests=uses)


def _with(card: ExpertCard, **facts: Any) -> ExpertCard:
    return card.model_copy(update={"facts": card.facts.model_copy(update=facts)})


def _same_manifest(request: Request, card: ExpertCard, partitions: Sequence[int] | None = None) -> Manifest:
    use = card.facts.manifests[-1]
    manifest = _open(request, use.name, use.digest, partitions)
    newest = current_digest(request.store, request.manifest)
    if newest not in (None, use.digest):
        begun = f"manifest {use.name} {use.digest[:16]}"
        say(f"going on with {begun} as begun; --move-to-manifest {request.manifest} moves on to {newest[:16]}")
    return manifest


def _open(request: Request, name: str, digest: str | None, partitions: Sequence[int] | None) -> Manifest:
    """A manifest of whose `partitions` the store has all records, or, of None, of some; raises ConfigError if not."""
    manifest, count = open_manifest(request.store, name, digest, check_beside=True), request.config.partitions
    require_partitions(manifest, partitions or partitions_held(manifest, count) or range(count), count)
    return manifest


def _move(
    request: Request, card: ExpertCard, checkpoint: Checkpoint | None, partitions: Sequence[int] | None = None
) -> tuple[Manifest, ExpertCard]:
    assert request.move_to_manifest is not None
    manifest = _open(request, request.move_to_manifest, None, partitions)
    old = card.facts.manifests[-1]
    if manifest.digest == old.digest:
        return manifest, card
    contract = _contract(request.config, manifest, card.facts)
    if contract != card.contract or manifest.settings.text_chunks != card.facts.text_chunks:
        raise ManifestMismatch(
            f"manifest {manifest.name!r} was built with another VAE, text encoder or text.chunks than {request.output} "
            "began with: name a new folder with --output"
        )
    step, epoch = (checkpoint.state.step, checkpoint.state.epoch + 1) if checkpoint else (0, 0)
    use = ManifestUse(name=manifest.name, digest=manifest.digest, from_step=step, from_epoch=epoch)
    return manifest, _with_manifests(card, (*(u for u in card.facts.manifests if u.from_step < step), use))
