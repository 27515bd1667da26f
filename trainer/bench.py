"""What candidates are judged by, set up once for all rounds: a manifest, its held-out samples, how to read them."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from shared.contract import ExpertFacts, ManifestUse
from shared.errors import DataError, ManifestMismatch
from shared.manifest import Manifest, open_manifest
from shared.store import StoreReader
from trainer.checkpoint import Checkpoint
from trainer.eval_loss import ReadSamples
from trainer.eval_samples import PinnedSample, choose_samples, read_sample_batch


@dataclass(frozen=True)
class Bench:
    """The held-out samples of one manifest, and a reader of their records."""

    manifest: Manifest
    samples: list[PinnedSample]
    read: ReadSamples
    notes: list[str]
    trained: frozenset[str]  # ids of held-out samples that an expert was trained on all the same

    def of_each_data_set(self, count: int) -> list[tuple[str, PinnedSample]]:
        """The first `count` held-out samples of each data set, with its name; an id in two of them comes once."""
        found: dict[str, tuple[str, PinnedSample]] = {}
        for name in self.manifest.settings.datasets:
            own = choose_samples(self.manifest, count + len(self.trained), name)
            for sample in [one for one in own if one.sample_id not in self.trained][:count]:
                found.setdefault(sample.sample_id, (name, sample))
        return list(found.values())


def open_bench(path: Path, store: StoreReader, name: str | None, checkpoints: Sequence[Checkpoint]) -> Bench:
    """Samples that manifest `name` holds out and no expert was trained on; None: the first expert's own manifest.

    Raises DataError where there is no such sample, ManifestMismatch where the manifest is not there.
    """
    facts = [checkpoint.card.facts for checkpoint in checkpoints]
    manifest = open_manifest(path, name) if name else _own_manifest(path, facts[0])
    chosen = choose_samples(manifest)
    if not chosen:
        raise DataError(
            f"manifest {manifest.name!r} holds no sample out, so there is nothing to evaluate with: "
            "build it with split.eval_fraction above 0"
        )
    trained, notes = _trained_on(path, manifest, facts)
    kept = [sample for sample in chosen if sample.sample_id not in trained]
    if not kept:
        raise DataError(
            f"every sample that manifest {manifest.name!r} holds out was trained on with an earlier one: "
            "name that with --manifest"
        )
    if len(kept) < len(chosen):
        notes.append(f"{len(chosen) - len(kept)} held-out samples are left out: an expert was trained on them")
    read = partial(read_sample_batch, store, manifest.settings)
    held_out = {sample.sample_id for sample in choose_samples(manifest, len(manifest))} if trained else set()
    return Bench(manifest, kept, read, notes, frozenset(trained & held_out))


def _own_manifest(path: Path, facts: ExpertFacts) -> Manifest:
    """What an expert was trained on last; the newest of that name where it is gone."""
    use = facts.manifests[-1]
    try:
        return open_manifest(path, use.name, use.digest)
    except ManifestMismatch:
        return open_manifest(path, use.name)


def _trained_on(path: Path, manifest: Manifest, facts: Sequence[ExpertFacts]) -> tuple[set[str], list[str]]:
    """Ids of samples that other manifests of the experts' runs trained on; and which of these are gone."""
    uses = {use.digest: use for one in facts for use in one.manifests if use.digest != manifest.digest}
    trained, gone = set[str](), []
    for use in uses.values():
        try:
            trained |= _train_ids(path, use)
        except ManifestMismatch:
            gone.append(f"an expert was trained on manifest {use.name} {use.digest[:16]}, which is no longer there")
    return trained, gone


def _train_ids(path: Path, use: ManifestUse) -> set[str]:
    manifest = open_manifest(path, use.name, use.digest)
    rows = [int(row) for bucket in manifest.buckets("train") for row in bucket.rows]
    return {sample_id.hex() for sample_id in manifest.sample_ids(rows)}
