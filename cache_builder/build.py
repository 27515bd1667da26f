"""A build: scan -> plan -> encode what is missing -> commit -> seal. A kill at any point loses nothing committed.

The store grows in commits of one batch; the manifest is sealed at the end, from what the store then holds. A second
build of the same pictures finds every key there, loads no weights and seals the same digest.
"""

import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from cache_builder.config import BuildConfig
from cache_builder.encode import SampleEncoder
from cache_builder.fill import Filler
from cache_builder.keys import text_key
from cache_builder.meta import meta_types
from cache_builder.preview_fit import PreviewKeeper
from cache_builder.report import BuildReport
from cache_builder.runners import device_names, open_runner
from cache_builder.scan import Scanner
from cache_builder.sealing import SampleRows
from cache_builder.sources import Source
from cache_builder.split import held_out
from shared.errors import DataError
from shared.manifest import check_data_sets, seal_manifest
from shared.manifest_rows import ManifestSettings, MetaType
from shared.store import StoreWriter
from shared.text_encoders import TextFacts, read_text_facts
from shared.vae import EncodeDtype, VaeFacts, choose_encode_dtype, read_vae_facts
from shared.weights import find_weights, read_json_object

if TYPE_CHECKING:
    from cache_builder.ray_runner import RayCluster
    from cache_builder.transfer.shard_output import ShardOutput


@dataclass(frozen=True)
class BuildOptions:
    """Where a build goes and how it may change what is there."""

    store: Path
    manifest: str
    device: str = "auto"
    wait: bool = False
    replace: bool = False
    allow_shrink: bool = False
    prompts: Sequence[str] = ()
    """Further texts to embed as they are, each once; the manifest lists their keys."""
    rehash: bool = False
    """Whether files are read that have not changed since the last build, by their size, times and inode."""
    runner: Literal["local", "ray"] = "local"
    """Where pictures and captions are encoded: on `device`, or by the workers of a Ray cluster."""
    ray_address: str | None = None
    """Of a running cluster, as ray.init takes it; None starts one on this machine."""
    shards_to: str | None = None
    """Folder or bucket into which workers write records, as an export; the store keeps what a scan needs."""


def build(
    sources: Sequence[Source],
    model: Path,
    config: BuildConfig,
    options: BuildOptions,
    report: BuildReport | None = None,
) -> BuildReport:
    """Encode what is missing of `sources` into the store and seal a manifest of them; returns the account.

    An empty `report` that is given is filled, also where the build then fails.
    Raises DataError (nothing to train on, too much unreadable), StoreLocked, StoreFull and the other StoreErrors.
    """
    started_s = time.monotonic()
    report = report or BuildReport()
    report.manifest = options.manifest
    device_names(options.device)  # a wrong device or model is said before a store is made
    for part in ("vae", "text_encoder", "text_encoder_2"):
        find_weights(model / part)
    index = read_json_object(model / "model_index.json")
    datasets = tuple(sorted({source.dataset_id for source in sources}))
    check_data_sets(options.store, options.manifest, datasets, replace=options.replace)
    shards = _shards(options)  # a wrong address is said before anything is scanned
    with _cluster(options, config) as cluster, StoreWriter(options.store, wait=options.wait) as store:
        vae, text = read_vae_facts(model), read_text_facts(model)
        if cluster is None:
            dtype = encode_dtype(config, vae, options.device)
        else:
            dtype = choose_encode_dtype(config.encode.dtype, vae, cluster.device)
        scanner = Scanner(
            config,
            vae.digest,
            dtype,
            text.digests,
            report,
            memory=options.store,
            scratch=options.store,
            rehash=options.rehash,
        )
        samples = scanner.scan(sources, store)
        meta = meta_types(samples)
        encoder = SampleEncoder(model, options.device, dtype, config.encode.latents, config.text.chunks)
        with cluster.runner(encoder, vae.digest, text.digests, shards) if cluster else open_runner(encoder) as runner:
            preview, elsewhere = PreviewKeeper(options.store, vae.digest), shards.keys if shards else None
            filler = Filler(store, config, report, runner, preview, elsewhere)
            filler.encode_captions(samples, text, options.prompts)
            usable = filler.encode_pictures(samples, vae)
        report.quarantined.sort()
        check_quarantine(config, report, len(usable))
        split = held_out(config.split, (sample.path for sample in usable), usable.facts["thumbnail"], options.store)
        report.held_out = int(split.sum())
        settings = _settings(config, vae, text, dtype, datasets, index, meta, options.prompts)
        report.digest = _seal(options, settings, SampleRows(usable, split, meta), shards)
    report.check()
    report.seconds = time.monotonic() - started_s
    return report


def _seal(options: BuildOptions, settings: ManifestSettings, rows: SampleRows, shards: "ShardOutput | None") -> str:
    """Seal the manifest, with shards among those; returns its digest."""
    seal = partial(
        seal_manifest,
        name=options.manifest,
        settings=settings,
        rows=rows,
        in_order=True,
        replace=options.replace,
        allow_shrink=options.allow_shrink,
    )
    return shards.finish(options.store, options.manifest, seal) if shards else seal(options.store).digest


def _cluster(options: BuildOptions, config: BuildConfig) -> "AbstractContextManager[RayCluster | None]":
    if options.runner == "local":
        return nullcontext()
    from cache_builder.ray_runner import open_ray

    return open_ray(options.ray_address, options.device, config.ray)


def _shards(options: BuildOptions) -> "ShardOutput | None":
    if options.shards_to is None:
        return None
    from cache_builder.transfer.shard_output import ShardOutput

    return ShardOutput(options.shards_to)


def encode_dtype(config: BuildConfig, vae: VaeFacts, device: str) -> EncodeDtype:
    """The dtype that the VAE of a build will run in."""
    if config.encode.dtype == "auto" and not vae.force_upcast and device != "cpu":
        from shared.device import choose_device

        device = choose_device(device.partition(",")[0]).type
    return choose_encode_dtype(config.encode.dtype, vae, device.partition(":")[0])


def check_quarantine(config: BuildConfig, report: BuildReport, usable: int) -> None:
    """Raise DataError where no sample is usable, or more cannot be used than max_quarantined allows."""
    count = len(report.quarantined)
    if not usable or count > config.max_quarantined * report.seen:
        path, reason = report.quarantined[0]
        limit = f", more than max_quarantined = {config.max_quarantined}" if usable else ""
        raise DataError(
            f"{count} of {report.seen} pictures cannot be used (first {path}: {reason}){limit}; nothing was sealed, "
            "what could be encoded is stored"
        )


def _settings(
    config: BuildConfig,
    vae: VaeFacts,
    text: TextFacts,
    dtype: EncodeDtype,
    datasets: tuple[str, ...],
    index: Mapping[str, Any],
    meta: dict[str, MetaType],
    prompts: Sequence[str],
) -> ManifestSettings:
    declared = config.model_dump(mode="json", exclude={"encode", "max_quarantined", "datasets", "ray"})
    declared["datasets"] = {dataset.id: _rules(config.for_dataset(dataset.id)) for dataset in config.datasets}
    declared["encode"] = {"dtype": dtype, "latents": config.encode.latents}
    return ManifestSettings(
        vae_digest=vae.digest,
        scaling_factor=vae.scaling_factor,
        latent_channels=vae.latent_channels,
        downscale=vae.downscale,
        latents=config.encode.latents,
        text_digests=text.digests,
        text_widths=text.widths,
        pooled_width=text.pooled_width,
        text_chunks=config.text.chunks,
        null_text_key=_text_key("", config, text),
        zeros_for_empty_prompt=bool(index.get("force_zeros_for_empty_prompt", True)),
        datasets=datasets,
        build=declared,
        meta=meta,
        prompts={prompt: _text_key(prompt, config, text) for prompt in prompts},
    )


def _rules(config: BuildConfig) -> dict[str, Any]:
    """The rules of one data set; where its root is does not count, so that it may move."""
    return config.model_dump(mode="json", include={"source", "images", "captions"})


def _text_key(prompt: str, config: BuildConfig, text: TextFacts) -> str:
    return text_key(prompt, config.text.chunks, text.digests).hex()
