"""What a build would do, without doing it: every check, the scan and the plan of a build, and a timed sample.

scan.py -> todo.py (what is missing) -> rehearsal.py (how long) -> dry_run_report.py

Writes nothing and takes no lease; a store that is there is only read. What would stop the build stops nothing here: it
is told with all that is known by then, and decides the exit code. The one thing that only decoding tells is damage
behind a picture's header, so `decode` decodes all that a build would.
"""

import contextlib
import functools
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import cast

import numpy as np

from cache_builder.build import BuildOptions, check_quarantine, encode_dtype
from cache_builder.config import BuildConfig
from cache_builder.dry_run_report import DryRunReport
from cache_builder.encode import SampleEncoder
from cache_builder.key_arrays import Indices, parts
from cache_builder.meta import meta_types
from cache_builder.rehearsal import decode_pictures, rehearse
from cache_builder.report import BuildReport
from cache_builder.runners import device_names
from cache_builder.samples import Samples
from cache_builder.scan import Scanner
from cache_builder.sources import Source
from cache_builder.todo import Todo, account_for, add_prompts, find_todo, require_space, sealing_bytes
from cache_builder.truncated import UNKNOWN, Told, count_texts, tell_truncated
from shared.errors import ConfigError, ExpertsError, StoreIO, StoreLocked
from shared.file_system import refuse_network
from shared.lease import holder
from shared.manifest import check_data_sets, check_shrinking
from shared.snapshot import Snapshot
from shared.store import Store, StoreReader, free_bytes
from shared.store_card import refuse_foreign_folder
from shared.text_encoders import TokenCounter, read_text_facts
from shared.vae import read_vae_facts
from shared.weights import find_weights, read_json_object


@dataclass(frozen=True)
class DryRunOptions:
    """How closely a dry run looks."""

    timing: bool = True
    """Encode a few captions and crops with the real models."""
    decode: bool = False
    """Decode every picture that a build would."""


@dataclass
class _Refusals:
    """What would stop the build; the first is what it would end with."""

    errors: list[ExpertsError] = field(default_factory=list)

    @contextlib.contextmanager
    def noted(self) -> Iterator[None]:
        try:
            yield
        except ConfigError:
            raise  # what cannot be meant is said at once
        except ExpertsError as error:
            self.errors.append(error)


def dry_run(
    sources: Sequence[Source], model: Path, config: BuildConfig, options: BuildOptions, how: DryRunOptions
) -> DryRunReport:
    """What `build` would do with the same arguments, and whether it would work.

    Raises where nothing can be told: DataError of a wrong model, StoreFormat of what is no store.
    """
    begun_s = time.monotonic()
    refusals, devices = _Refusals(), device_names(options.device)
    for part in ("vae", "text_encoder", "text_encoder_2"):
        find_weights(model / part)
    read_json_object(model / "model_index.json")
    refuse_network(options.store)
    refuse_foreign_folder(options.store)
    with refusals.noted():
        names = tuple(sorted({source.dataset_id for source in sources}))
        check_data_sets(options.store, options.manifest, names, replace=options.replace)
    with refusals.noted():
        _check_store_is_free(options)
    vae, text = read_vae_facts(model), read_text_facts(model)
    dtype = encode_dtype(config, vae, options.device)
    report = DryRunReport(BuildReport(manifest=options.manifest), free_bytes(_standing(options.store)))
    scanned: list[Samples] = []
    with _opened(options.store) as store:
        with refusals.noted():
            scanner = Scanner(config, vae.digest, dtype, text.digests, report.account)
            scanner = replace(scanner, memory=options.store, rehash=options.rehash, remember=False)
            scanner = replace(scanner, scratch=_standing(options.store))
            scanned.append(scanner.scan(sources, store))
            meta_types(scanned[0])
        report.scan_s = time.monotonic() - begun_s
        if not scanned:
            return report.refused(refusals.errors)
        (samples,) = scanned
        add_prompts(samples, options.prompts)
        todo = find_todo(store, samples)
        report.account.encoded_captions = len(todo.texts)
        count_texts(report.account, samples, _Captions(model, config, store, samples).tell)
    encoder = SampleEncoder(model, devices[0], dtype, config.encode.latents, config.text.chunks)
    lost = _look_closer(report, samples, todo, config, encoder, len(devices), how)
    left = todo.without(lost)
    report.bytes_to_write = left.bytes_to_write(config, text, vae)
    report.bytes_passing = samples.nbytes + sealing_bytes(samples)
    with refusals.noted():
        require_space(options.store, report.bytes_to_write, report.bytes_free, report.bytes_passing)
    usable = _account(report, samples, todo, lost)
    with refusals.noted():
        check_quarantine(config, report.account, usable)
        check_shrinking(options.store, options.manifest, usable, allow_shrink=options.allow_shrink)
    return report.refused(refusals.errors)


@dataclass(frozen=True)
class _Captions:
    """What is needed to count tokens; the tokenizer is loaded when the store does not know them all."""

    model: Path
    config: BuildConfig
    store: Store
    samples: Samples

    def tell(self, texts: Indices) -> Told:
        """Which of these texts are cut short."""
        told = tell_truncated(self.store, self.samples.texts["key"][texts], remember=False)
        for some in parts(np.flatnonzero(told == UNKNOWN)):
            captions = [self.samples.text(index) for index in texts[some].tolist()]
            told[some] = [count.truncated for count in self._tokenizer.count(captions)]
        return told

    @functools.cached_property
    def _tokenizer(self) -> TokenCounter:
        return TokenCounter(self.model, self.config.text.chunks)


def _look_closer(
    report: DryRunReport,
    samples: Samples,
    todo: Todo,
    config: BuildConfig,
    encoder: SampleEncoder,
    devices: int,
    how: DryRunOptions,
) -> dict[bytes, str]:
    """Decode and time what was asked for; returns why what picture, by its facts key, cannot be used."""
    lost: dict[bytes, str] = {}
    report.to_decode = len(todo.pictures)
    if how.decode:
        lost = decode_pictures(todo.pictures, config.encode.threads)
        report.decoded = len(todo.pictures)
    left = todo.without(lost)
    if how.timing and (len(left.texts) or len(left.pictures)):
        report.timing, more = rehearse(samples, left, config, encoder, devices)
        lost |= more
    return lost


def _account(report: DryRunReport, samples: Samples, todo: Todo, lost: Mapping[bytes, str]) -> int:
    """What will become of each sample; returns how many will be usable."""
    encoded, reasons = todo.without(lost).pictures.crops, dict[bytes, str]()
    for crop in np.setdiff1d(todo.pictures.crops, encoded).tolist():
        why = lost[samples[int(samples.of_crop(crop))].facts_key]
        reasons[samples.crop(crop).latent_key] = why
    usable = account_for(report.account, samples, encoded, reasons)
    report.account.encoded_crops = len(encoded)
    report.count_buckets(samples, usable, encoded)
    report.account.quarantined.sort()
    report.account.check()
    return len(usable)


def _check_store_is_free(options: BuildOptions) -> None:
    standing, lock = _standing(options.store), options.store / "writer.lock"
    if not standing.is_dir():
        raise StoreIO(f"{options.store}: {standing} is a file")
    if not os.access(standing, os.W_OK | os.X_OK):
        raise StoreIO(f"{options.store}: Permission denied")
    if not options.wait and (who := holder(lock)) is not None:
        raise StoreLocked(f"store {options.store} is being written by {who}; wait for it (--wait)")


def _standing(path: Path) -> Path:
    """The nearest of `path` and the folders above it that is there."""
    return next(place for place in (path, *path.absolute().parents) if place.exists())


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Store]:
    """The store at `path`, to be read; where there is none yet, one that holds nothing."""
    if (path / "store.json").exists() and (path / "data.mdb").exists():
        with StoreReader(path) as store:
            yield store
    else:
        yield cast(Store, _NoStore(path))  # a scan takes snapshots and nothing else


class _Nothing:
    """A transaction that finds no key."""

    def get(self, key: bytes) -> None:
        return None

    def cursor(self) -> contextlib.nullcontext["_Nothing"]:
        return contextlib.nullcontext(self)

    def set_key(self, key: bytes) -> bool:
        return False


@dataclass(frozen=True)
class _NoStore:
    """A store before its first build."""

    path: Path

    @contextlib.contextmanager
    def snapshot(self) -> Iterator[Snapshot]:
        yield Snapshot(_Nothing())
