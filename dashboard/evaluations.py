"""The newest pictures of the pair: what the last round of an evaluation drew, from OUT/report.json.

Pictures have numbers here. The paths in the report are data: each is opened below OUT, through no link, decoded and
encoded anew (gallery.py does the same with sources).
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dashboard.folders import REPORT, folder_id
from dashboard.runs import read_table
from dashboard.tail import number

MOST_REPORT_BYTES = 64 << 20
MOST_ROWS = 24  # prompts, and held-out pictures
START = "start model"

Json = dict[str, Any]


@dataclass(frozen=True)
class _Seen:
    """A report as it was read: its time and size, what the page shows of it, and where its pictures are."""

    stamp: tuple[int, int] = (0, 0)
    view: Json | None = None
    paths: tuple[str, ...] = ()


class WatchedEvaluation:
    """One evaluation's folder; the report is read again where it has changed."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.id = folder, folder_id(folder)
        self._seen = _Seen()  # replaced whole, so that threads never see half of it

    @property
    def changed_ns(self) -> int:
        """When its report was written; 0 where there is none."""
        return self._seen.stamp[0]

    def as_json(self) -> Json | None:
        """The last round as the page shows it; None where there is none that can be read."""
        return self._look().view

    def path(self, round_number: int, number_of: int) -> str | None:
        """Path below the folder of a picture of the last round, by its number; None where another is the last."""
        seen = self._look()
        is_last = seen.view is not None and seen.view["round"] == round_number
        return seen.paths[number_of] if is_last and number_of < len(seen.paths) else None

    def _look(self) -> _Seen:
        try:
            found = (self.folder / REPORT).stat()
        except OSError:
            self._seen = _Seen()
            return self._seen
        stamp = (found.st_mtime_ns, found.st_size)
        if stamp != self._seen.stamp:
            report, paths = read_table(self.folder / REPORT, json.loads, MOST_REPORT_BYTES), list[str]()
            try:
                self._seen = _Seen(stamp, self._read(report, paths), tuple(paths))
            except (KeyError, TypeError, ValueError, IndexError, AttributeError):
                self._seen = _Seen(stamp)
        return self._seen

    def _read(self, report: Json, paths: list[str]) -> Json | None:
        if not report.get("rounds"):
            return None
        last = report["rounds"][-1]
        choices = last.get("choices", [])
        shown = [choices[0], choices[-1]] if len(choices) > 1 else choices
        return {
            "id": self.id,
            "folder": self.folder.name,
            "round": int(last["number"]),
            "at": str(last.get("at", "")),
            "experts": [
                {"name": str(one["name"]), "state": str(one["state"]), "step": number(one.get("step"))}
                for one in last.get("experts", [])
            ],
            "ways": [self._way(choice) for choice in shown],
            "prompts": self._prompts(report, shown, paths),
            "held_out": self._held_out(last, paths),
            "history": _history(report["rounds"]),
        }

    def _way(self, choice: Json) -> Json:
        return {"who": _who(choice), "loss": number(choice.get("loss")), "clip": number(choice.get("clip"))}

    def _prompts(self, report: Json, shown: list[Json], paths: list[str]) -> list[Json]:
        rows = []
        for index, prompt in enumerate(report.get("prompts", [])[:MOST_ROWS]):
            pictures = [
                {"who": _who(choice), "picture": self._numbered(choice["pictures"][index], paths)}
                for choice in shown
                if index < len(choice.get("pictures", []))
            ]
            rows.append({"text": str(prompt), "pictures": pictures})
        return [row for row in rows if row["pictures"]]

    def _held_out(self, last: Json, paths: list[str]) -> list[Json]:
        rows = []
        for one in last.get("finished", [])[:MOST_ROWS]:
            made = [("the picture itself", one["source"]), *((str(who), path) for who, path in one["pictures"])]
            pictures = [{"who": who, "picture": self._numbered(path, paths)} for who, path in made]
            rows.append({"text": str(one.get("caption", "")), "pictures": pictures})
        return rows

    def _numbered(self, path: Any, paths: list[str]) -> int:
        paths.append(str(path))
        return len(paths) - 1


def newest(evaluations: list[WatchedEvaluation]) -> WatchedEvaluation | None:
    """The one whose report was written last, of those that have something to show."""
    shown = [one for one in evaluations if one.as_json() is not None]
    return max(shown, key=lambda one: one.changed_ns, default=None)


def _who(choice: Json) -> str:
    """Who draws: the candidates from high timesteps to low, each once."""
    names = [str(answer["candidate"]) for answer in reversed(choice["answers"])]
    return " and ".join(dict.fromkeys(names))


def _history(rounds: list[Json]) -> Json:
    """The pair's loss and CLIP score by round."""
    last = [(one["number"], one["choices"][-1]) for one in rounds if one.get("choices")]
    return {
        "round": [number for number, _ in last],
        "loss": [number(choice.get("loss")) for _, choice in last],
        "clip": [number(choice.get("clip")) for _, choice in last],
    }
