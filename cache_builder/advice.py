"""What to say when a data set gives nothing to train on: what was seen of it, and the way out; scan.py raises it."""

from cache_builder.config import BuildConfig
from cache_builder.report import BuildReport
from cache_builder.sources import Source
from cache_builder.sources.rules import TABLE_SUFFIXES, SourceRules
from shared.pictures import EXTENSIONS

REASONS = 5
_OTHER_KINDS = {".tar": "webdataset", ".parquet": "table", ".jsonl": "table", ".csv": "table"}


def caption_place(config: BuildConfig) -> str:
    """How the pictures of a data set with these rules are given captions."""
    if config.source.kind == "table":
        return f"source.caption_columns names their column (now {' or '.join(config.source.caption_columns)})"
    extensions = " or ".join(config.captions.extensions)
    if config.source.kind == "webdataset":
        return f"write each one into the shard beside its picture as {extensions} or .json"
    return f"write each one beside its picture as {extensions}, or all of them into a metadata.csv"


def nothing_found(source: Source, rules: SourceRules, report: BuildReport) -> str:
    """Why no picture of a data set can be used, from what its scan reported."""
    if report.seen:
        reasons = [f"{count} {reason}" for reason, count in report.skipped.most_common(REASONS)]
        reasons += [f"{path}: {reason}" for path, reason in report.quarantined[:3]]
        more = len(report.skipped) - REASONS
        reasons += [f"and for {more} more reasons"] if more > 0 else []
        return f"no picture of {source.dataset_id} can be used: {report.seen} seen; {'; '.join(reasons)}"
    what, wanted = _wanted(rules, source.containers)
    others = source.passed_over
    kinds = ", ".join(f"{count} {suffix}" for suffix, count in others.most_common(8))
    seen = f"{others.total()} files seen, none of them {what} by name ({kinds})" if others else "it holds no files"
    if source.containers and (rules.kind == "table" or not others):
        seen = "its tables have no rows" if rules.kind == "table" else "its shards hold no files"
    return f"no pictures in {source.dataset_id}: {seen}; {wanted}{_other_kind(source, rules)}"


def _wanted(rules: SourceRules, containers: int) -> tuple[str, str]:
    if rules.kind == "table":
        return "tables", f"tables end in {', '.join(TABLE_SUFFIXES)} and have a row for each picture"
    if rules.kind == "webdataset" and not containers:
        return "shards", "shards end in .tar and hold key.jpg with key.txt"
    return "pictures", f"pictures end in {', '.join(sorted(EXTENSIONS))}"


def _other_kind(source: Source, rules: SourceRules) -> str:
    for suffix, kind in _OTHER_KINDS.items():
        if source.passed_over[suffix] and kind != (rules.kind or "folder"):
            return f"; to read its {suffix} files: --set source.kind={kind}"
    return ""
