"""What a dry run tells people and programs; a count is called as the build's report calls it."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from cache_builder.key_arrays import Indices
from cache_builder.rehearsal import Timing
from cache_builder.report import BuildReport
from cache_builder.samples import Samples
from cache_builder.store_text import table
from shared.amounts import duration_text, size_text
from shared.command import one_line
from shared.errors import ExpertsError

BUCKETS_LISTED = 40


@dataclass
class BucketCount:
    """The samples of one bucket, and the crops of them that are not stored yet."""

    samples: int = 0
    crops: int = 0
    encoded_crops: int = 0


@dataclass
class DryRunReport:
    """What a build would do; `account` is the report that it would give, as far as can be told."""

    account: BuildReport
    bytes_free: int
    bytes_to_write: int = 0
    bytes_passing: int = 0
    """What the build keeps beside the store while it runs, in unnamed files."""
    buckets: dict[tuple[int, int], BucketCount] = field(default_factory=dict)
    to_decode: int = 0
    decoded: int = 0
    """Pictures that were decoded to find damage, of those that a build would decode."""
    scan_s: float = 0.0
    timing: Timing | None = None
    refusals: list[ExpertsError] = field(default_factory=list)
    """What would stop the build, in the order in which it would meet it."""

    def refused(self, errors: Sequence[ExpertsError]) -> "DryRunReport":
        """The same with what would stop the build."""
        self.refusals = list(errors)
        return self

    def count_buckets(self, samples: Samples, usable: Indices, encoded: Indices) -> None:
        """Sort the `usable` samples by their buckets; of each bucket count those of the `encoded` crops in it too."""
        rows, sizes_hw = samples.rows, samples.crops["target_hw"]
        buckets, members = np.unique(sizes_hw[rows["crops"][usable]], axis=0, return_inverse=True)
        crops = np.bincount(members.reshape(-1), rows["crop_count"][usable], len(buckets))
        counts = np.bincount(members.reshape(-1), minlength=len(buckets))
        of_encoded = Counter(map(tuple, sizes_hw[encoded].tolist()))
        for bucket, count, crop_count in zip(buckets.tolist(), counts.tolist(), crops.tolist(), strict=True):
            hw = (bucket[0], bucket[1])
            self.buckets[hw] = BucketCount(count, int(crop_count), of_encoded[hw])

    @property
    def needed_s(self) -> float | None:
        """Seconds that the build will take, its own scan included; None where nothing was timed."""
        return None if self.timing is None else self.scan_s + self.timing.needed_s

    def as_json(self) -> dict[str, Any]:
        """The report for programs."""
        unknown = ("held_out", "digest", "seconds")
        account = {key: value for key, value in self.account.as_json().items() if key not in unknown}
        return {
            "dry_run": True,
            **account,
            "buckets": [{"height": h, "width": w, **asdict(count)} for (h, w), count in self.buckets.items()],
            "bytes_to_write": self.bytes_to_write,
            "bytes_passing": self.bytes_passing,
            "bytes_free": self.bytes_free,
            "to_decode": self.to_decode,
            "decoded": self.decoded,
            "scan_seconds": round(self.scan_s, 3),
            "needed_seconds": None if self.needed_s is None else round(self.needed_s, 1),
            "timing": None if self.timing is None else asdict(self.timing),
            "refusals": [{"code": error.exit_code, "reason": str(error)} for error in self.refusals],
        }

    def as_text(self) -> str:
        """The report for people."""
        account = self.account
        lines = [
            "dry run: nothing is written",
            f"seen {account.seen} = to encode {account.stored} + stored already {account.reused}"
            f" + quarantined {len(account.quarantined)} + skipped {account.skipped.total()}"
            f" + duplicate {account.duplicate}",
            f"captions {account.captions}, {account.unique_captions} different, {account.encoded_captions} to encode,"
            f" {account.truncated} cut short",
        ]
        if account.prompts:
            lines.append(f"prompts {account.prompts}, {account.truncated_prompts} cut short")
        lines += account.remarks()
        lines += self._bucket_lines()
        sizes = map(size_text, (self.bytes_to_write, self.bytes_passing, self.bytes_free))
        lines.append("to write {}, and {} that go again; free {}".format(*sizes))
        lines += self._work_lines()
        return "\n".join(lines)

    def _bucket_lines(self) -> list[str]:
        largest = sorted(self.buckets.items(), key=lambda item: (-item[1].samples, item[0]))
        rows = [[f"{h} x {w}", n.samples, n.crops, n.encoded_crops] for (h, w), n in largest[:BUCKETS_LISTED]]
        more = len(largest) - BUCKETS_LISTED
        lines = [f"{len(largest)} buckets, height x width"] if rows else []
        lines += table([["", "samples", "crops", "to encode"], *rows]) if rows else []
        return [*lines, f"  and {more} more (--json lists all)"] if more > 0 else lines

    def _work_lines(self) -> list[str]:
        lines = []
        if self.decoded < self.to_decode:
            lines.append(f"{self.to_decode} pictures were not decoded: damage behind a header is found by --decode")
        if self.timing is not None and self.needed_s is not None:
            timing = self.timing
            timed = [f"{timing.crops} crops, {timing.crop_s:.3g} s each"] if timing.crops else []
            timed += [f"{timing.captions} captions, {timing.caption_s:.2g} s each"] if timing.captions else []
            lines.append(f"the build will take about {duration_text(self.needed_s)} (timed: {'; '.join(timed)})")
        lines += [f"would end with {error.exit_code}: {one_line(str(error))}" for error in self.refusals]
        if not self.refusals:
            lines.append(f"manifest {self.account.manifest} would be sealed")
        return lines
