"""The reports of `cache-store` for people; names, paths and captions are data and come out on one line."""

from collections.abc import Iterable, Mapping, Sequence

from cache_builder.diff import Difference
from cache_builder.gc import GcReport
from cache_builder.show import Shown
from cache_builder.stats import ManifestStats, StoreStats
from cache_builder.store_copy import CopyReport
from cache_builder.transfer.store_export import ExportReport
from cache_builder.transfer.store_import import ImportReport
from cache_builder.verify import Verdict
from shared.amounts import count_text, size_text
from shared.command import one_line

LISTED = 20


def table(rows: Sequence[Sequence[object]], left: Iterable[int] = (0,)) -> list[str]:
    """Rows as aligned lines, indented; columns stand at their right but for those in `left`."""
    cells = [[one_line(str(cell)) for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))] if cells else []
    aligned = [
        [cell.ljust(widths[i]) if i in set(left) else cell.rjust(widths[i]) for i, cell in enumerate(row)]
        for row in cells
    ]
    return ["  " + "  ".join(row).rstrip() for row in aligned]


def verdict_text(verdict: Verdict) -> str:
    """What `verify` found."""
    looked = "every record read" if verdict.mode == "deep" else "records listed, not read"
    lines = [
        f"{one_line(verdict.store)}: {count_text(verdict.records, 'record')}, {size_text(verdict.bytes)}, "
        f"{count_text(verdict.manifests, 'manifest')}; {looked} in {verdict.seconds:.1f} s"
    ]
    for fault in verdict.faults[:LISTED]:
        key = f"{fault.key[:16]} " if fault.key else ""
        lines.append(f"  {fault.what} {key}{one_line(_without_key(fault.why, fault.key))}")
        lines += [f"    needed by {one_line(sample)}" for sample in fault.samples]
    lines += _more(len(verdict.faults))
    if verdict.quarantined:
        lines.append(
            f"{count_text(verdict.quarantined, 'record')} moved to quarantine/; the same cache-build encodes them anew"
        )
    elif verdict.faults:
        aside = "--quarantine moves bad records aside, and " if verdict.mode == "deep" else ""
        lines.append(f"{aside}the same cache-build makes anew what is missing")
    lines.append("sound" if not verdict.faults else f"not sound: {count_text(len(verdict.faults), 'fault')}")
    return "\n".join(lines)


def stats_text(stats: StoreStats) -> str:
    """What `stats` counted."""
    total = max(1, stats.record_bytes)
    count = sum(tally.records for tally in stats.kinds.values())
    free = max(0, stats.file_bytes - stats.used_bytes)
    lines = [
        f"{one_line(stats.store)}: {count_text(count, 'record')}, {size_text(stats.record_bytes)}",
        f"  file {size_text(stats.file_bytes)} = records {size_text(stats.record_bytes)} + ends of pages and keys "
        f"{size_text(stats.used_bytes - stats.record_bytes)} + free {size_text(free)}",
        "",
    ]
    rows: list[Sequence[object]] = [("kind", "records", "bytes", "", "each")]
    for kind, tally in stats.kinds.items():
        share = f"{100 * tally.bytes / total:.1f} %"
        mean = size_text(tally.bytes / tally.records) if tally.records else "-"
        rows.append((kind, tally.records, size_text(tally.bytes), share, mean))
    lines += table(rows)
    if stats.captions:
        reuse = stats.captions / max(1, stats.different_captions)
        padding = 100 * (1 - stats.caption_tokens / max(1, stats.caption_slots))
        lines += [
            "",
            f"captions: {stats.captions} in current manifests, {stats.different_captions} different, each used "
            f"{reuse:.2f} times; {stats.truncated_captions} cut short, {padding:.0f} % of the tokens are padding",
        ]
    for manifest in stats.manifests:
        lines += ["", *_manifest_lines(manifest)]
    if any(kind.startswith("unnamed") for kind in stats.kinds):
        lines += ["", "unnamed records are what no manifest needs, or a build that has not completed; see gc --dry-run"]
    if stats.quarantined:
        lines += ["", f"quarantine/ holds {count_text(stats.quarantined, 'record')}"]
    return "\n".join(lines)


def difference_text(found: Difference) -> str:
    """What `diff` found."""
    lines = [
        f"data set {one_line(found.dataset)} against manifest {found.manifest} {found.digest[:16]}: "
        f"{found.same} the same, {len(found.new)} new, {len(found.changed)} changed, {len(found.moved)} moved, "
        f"{len(found.gone)} gone",
        *_listed("new", dict.fromkeys(found.new, "")),
        *_listed("changed", found.changed),
        *_listed("moved", {path: f"was {old}" for path, old in found.moved.items()}),
        *_listed("gone", dict.fromkeys(found.gone, "")),
        *_listed("unreadable", found.unreadable),
    ]
    left_out = [f"{count} {one_line(reason)}" for reason, count in found.skipped.items()]
    left_out += [f"{found.duplicate} duplicate"] if found.duplicate else []
    if left_out:
        lines.append(f"left out: {', '.join(left_out)}")
    lines.append(
        f"a build would encode {count_text(found.pictures_to_encode, 'picture')} and "
        f"{count_text(found.captions_to_encode, 'caption')}, the rest is stored"
    )
    return "\n".join(lines)


def garbage_text(report: GcReport) -> str:
    """What `gc` deleted, or would."""
    verb = "would drop" if report.dry_run else "dropped"
    lines = [f"{verb} manifest {one_line(label)}" for label in report.dropped_manifests]
    verb = "would delete" if report.dry_run else "deleted"
    lines.append(
        f"{verb} {count_text(report.records, 'record')}, {size_text(report.bytes)}, that no manifest names; "
        f"{report.kept_records} stay for {count_text(len(report.kept_manifests), 'manifest')}"
    )
    if report.dry_run and report.records:
        lines.append("records of a build that has not completed are among them: let it complete first if it shall")
    if report.records and not report.dry_run:
        lines.append(
            "the file stays as long as it was and the next records fill it; cache-store copy makes a short one"
        )
    return "\n".join(lines)


def shown_text(shown: Shown) -> str:
    """What `show` drew."""
    lines = [
        f"{count_text(shown.samples, 'sample')} of {shown.manifest} {shown.digest[:16]}, {shown.decoded_by}: "
        f"{one_line(shown.out)}"
    ]
    if shown.sources_missing:
        lines.append(f"{count_text(shown.sources_missing, 'source picture')} could not be shown; the sheet says why")
    lines += [f"  damaged {one_line(each)}" for each in shown.damaged[:LISTED]]
    return "\n".join([*lines, *_more(len(shown.damaged))])


def copy_text(report: CopyReport) -> str:
    """What `copy` made."""
    return (
        f"{one_line(report.copy)}: {_held(report)}, every record read and "
        f"verified; {size_text(report.bytes_before)} became {size_text(report.bytes_after)} in {report.seconds:.1f} s"
    )


def export_text(report: ExportReport) -> str:
    """What `export` wrote."""
    kept = f", {report.shards_kept} of them there already" if report.shards_kept else ""
    return (
        f"{one_line(report.to)}: {_held(report)} in {count_text(report.shards, 'shard')}"
        f"{kept}, {size_text(report.bytes)}, in {report.seconds:.1f} s"
    )


def import_text(report: ImportReport) -> str:
    """What `import` stored."""
    part = f"part {report.part}, " if report.part else ""
    return (
        f"{one_line(report.store)}: {part}{_held(report)}; "
        f"{report.new} records, {size_text(report.bytes)}, were new and verified, from {report.shards_read} of "
        f"{count_text(report.shards, 'shard')}, in {report.seconds:.1f} s"
    )


def _held(report: CopyReport | ExportReport | ImportReport) -> str:
    return f"{count_text(report.records, 'record')} and {count_text(report.manifests, 'manifest')}"


def _manifest_lines(manifest: ManifestStats) -> list[str]:
    current = "current" if manifest.is_current else "older"
    samples = ", ".join(f"{count} {split}" for split, count in manifest.samples.items())
    datasets = ", ".join(map(one_line, manifest.datasets))
    lines = [
        f"manifest {manifest.name} {manifest.digest[:16]}, {current}, sealed {one_line(manifest.sealed_at)}",
        f"  {samples} samples of {datasets}; {manifest.crops} crops, {manifest.captions} captions "
        f"({manifest.different_captions} different)",
    ]
    if not manifest.is_current:
        return lines
    rows: list[Sequence[object]] = [("bucket", "train", "eval")]
    rows += [(label, counts["train"], counts["eval"] or "-") for label, counts in manifest.buckets.items()]
    return [*lines, *table(rows)]


def _listed(word: str, items: Mapping[str, str]) -> list[str]:
    lines = [
        f"  {word} {one_line(path)}" + (f": {one_line(note)}" if note else "")
        for path, note in list(items.items())[:LISTED]
    ]
    return [*lines, *_more(len(items), word)]


def _more(count: int, word: str = "") -> list[str]:
    return [f"  and {count - LISTED} more{' ' + word if word else ''} (--json lists all)"] if count > LISTED else []


def _without_key(why: str, key: str) -> str:
    return why.removeprefix(f"record {key} ")
