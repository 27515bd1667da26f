"""What became of everything that was seen: seen = stored + reused + quarantined + skipped + duplicate, always."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from shared.command import one_line

LISTED = 20


@dataclass
class BuildReport:
    """The account of one build; `skipped` counts by reason, `quarantined` lists (path, reason)."""

    seen: int = 0
    stored: int = 0
    reused: int = 0
    duplicate: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    quarantined: list[tuple[str, str]] = field(default_factory=list)
    captions: int = 0
    unique_captions: int = 0
    encoded_captions: int = 0
    truncated: int = 0
    prompts: int = 0
    truncated_prompts: int = 0
    crops: int = 0
    encoded_crops: int = 0
    enlarged: int = 0
    """Samples smaller than their bucket; `most_enlarged` is the largest factor among them."""
    most_enlarged: float = 1.0
    sided: int = 0
    """Samples with a caption that says left or right, counted where images.flip is not off."""
    held_out: int = 0
    manifest: str = ""
    digest: str = ""
    seconds: float = 0.0

    def add_scan(self, other: "BuildReport") -> None:
        """Take over what the scan of one data set counted."""
        self.seen += other.seen
        self.duplicate += other.duplicate
        self.skipped += other.skipped
        self.quarantined += other.quarantined
        self.enlarged += other.enlarged
        self.most_enlarged = max(self.most_enlarged, other.most_enlarged)
        self.sided += other.sided

    def check(self) -> None:
        """The sum holds, or the accounting has a fault that nobody should train on."""
        parts = self.stored + self.reused + self.duplicate + self.skipped.total() + len(self.quarantined)
        if parts != self.seen:
            raise AssertionError(f"saw {self.seen} pictures and accounts for {parts}")

    def as_json(self) -> dict[str, Any]:
        """The report for programs."""
        return {
            "seen": self.seen,
            "stored": self.stored,
            "reused": self.reused,
            "quarantined": len(self.quarantined),
            "skipped": self.skipped.total(),
            "duplicate": self.duplicate,
            "captions": self.captions,
            "unique_captions": self.unique_captions,
            "encoded_captions": self.encoded_captions,
            "truncated": self.truncated,
            "prompts": self.prompts,
            "truncated_prompts": self.truncated_prompts,
            "crops": self.crops,
            "encoded_crops": self.encoded_crops,
            "enlarged": self.enlarged,
            "most_enlarged": round(self.most_enlarged, 3),
            "sided": self.sided,
            "held_out": self.held_out,
            "manifest": self.manifest,
            "digest": self.digest,
            "seconds": round(self.seconds, 3),
            "skipped_by_reason": dict(self.skipped),
            "quarantined_files": [{"path": path, "reason": reason} for path, reason in self.quarantined],
        }

    def as_text(self) -> str:
        """The report for people."""
        lines = [
            f"seen {self.seen} = stored {self.stored} + reused {self.reused} + quarantined {len(self.quarantined)}"
            f" + skipped {self.skipped.total()} + duplicate {self.duplicate}",
            f"captions {self.captions}, {self.unique_captions} different, {self.encoded_captions} encoded now,"
            f" {self.truncated} cut short; {self.held_out} samples held out",
        ]
        if self.prompts:
            lines.append(f"prompts {self.prompts}, {self.truncated_prompts} cut short")
        if self.crops > self.stored + self.reused:
            lines.append(f"crops {self.crops}, {self.encoded_crops} encoded now")
        lines += self.remarks()
        if not self.stored and not self.encoded_captions:
            lines.append("nothing to encode: every picture and caption was stored already, no weights were loaded")
        lines.append(f"manifest {self.manifest} {self.digest[:16]} in {self.seconds:.1f} s")
        return "\n".join(lines)

    def remarks(self) -> list[str]:
        """What of the pictures people should know, and what was left out and why, as indented lines."""
        lines = []
        if self.enlarged:
            lines.append(f"  enlarged {self.enlarged}, at most {self.most_enlarged:.2f} times: they will look soft")
        if self.sided:
            lines.append(f'  sided {self.sided}: a caption says left or right; only images.flip = "force" mirrors them')
        lines += [f"  skipped {count}: {one_line(reason)}" for reason, count in self.skipped.most_common(LISTED)]
        if len(self.skipped) > LISTED:
            lines.append(f"  and for {len(self.skipped) - LISTED} more reasons (--json lists all)")
        lines += [f"  quarantined {one_line(path)}: {one_line(why)}" for path, why in self.quarantined[:LISTED]]
        if len(self.quarantined) > LISTED:
            lines.append(f"  and {len(self.quarantined) - LISTED} more (--json lists all)")
        return lines
