"""Events of a run and of the service in words for people; what is not known here is told by its name."""

from collections.abc import Callable, Mapping
from typing import Any

from dashboard.tail import Event, number
from shared.amounts import duration_text

MOST_CHARACTERS = 300
ALARMS = frozenset({"corrupt", "bad_checkpoint", "unsaved", "build_failed"})
QUIET = frozenset({"step"})
"""Too many to be told: they are the curves."""


def say_event(event: Event) -> str:
    """One sentence, cut short where a file wrote a long one."""
    say = SAYINGS.get(event["event"])
    text = say(_Fields(event)) if say else _other(event)
    return text if len(text) <= MOST_CHARACTERS else text[: MOST_CHARACTERS - 1] + "\N{HORIZONTAL ELLIPSIS}"


class _Fields:
    """The fields of an event as text, whatever they hold."""

    def __init__(self, event: Event) -> None:
        self._event = event

    def __getitem__(self, name: str) -> str:
        value = self._event.get(name)
        if name == "digest":
            return str(value or "?")[:12]
        if name == "step" and (step := number(value)) is not None:
            return f"{step:,.0f}"
        if isinstance(value, float):
            return f"{value:.4g}"
        return "?" if value is None else str(value)

    def number(self, name: str) -> float | None:
        """The field, where it is one."""
        return number(self._event.get(name))

    def has(self, name: str) -> bool:
        """Whether there is something to say."""
        return self._event.get(name) not in (None, "", 0)


def _eval(of: _Fields) -> str:
    ema = f", of the average {of['loss_ema']}" if of.has("loss_ema") else ""
    return f"Held-out loss {of['loss']}{ema} at step {of['step']}"


def _build_end(of: _Fields) -> str:
    seconds = of.number("seconds")
    counts = [f"{of[name]} {name}" for name in ("encoded", "reused", "quarantined") if of.has(name)]
    took = f" in {duration_text(seconds)}" if seconds is not None else ""
    told = ", ".join(counts).replace("quarantined", "set aside")
    sealed = f"; manifest {of['digest']}" if of.has("digest") else ""
    return f"Build finished{took}" + (f": {told}" if told else "") + sealed


def _change(of: _Fields) -> str:
    more = (of.number("count") or 1) - 1
    return f"Changes seen: {of['path']}" + (f" and {more:,.0f} more" if more > 0 else "")


def _other(event: Mapping[str, Any]) -> str:
    others = {name: value for name, value in event.items() if name not in ("event", "time_s")}
    fields = [f"{name} {value}" for name, value in others.items() if _is_plain(value)]
    name = str(event["event"]).replace("_", " ")
    return f"{name[:1].upper()}{name[1:]}" + (f": {', '.join(fields)}" if fields else "")


def _is_plain(value: Any) -> bool:
    return isinstance(value, (str, int, float)) and not isinstance(value, bool)


SAYINGS: dict[str, Callable[[_Fields], str]] = {
    "begin": lambda of: f"Training began on manifest {of['manifest']} {of['digest']}",
    "resume": lambda of: f"Training went on from step {of['step']}",
    "eval": _eval,
    "advice": lambda of: of["why"],
    "checkpoint": lambda of: f"Saved at step {of['step']}",
    "config": lambda of: f"{of['key']} changed from {of['before']} to {of['after']}",
    "move": lambda of: f"Moved on to manifest {of['manifest']} {of['digest']} at step {of['step']}",
    "corrupt": lambda of: f"A damaged sample was replaced: {of['path']}: {of['why']}",
    "partner": lambda of: f"From step {of['step']} on it meets {of['partner']} as of its step {of['partner_step']}",
    "bad_checkpoint": lambda of: f"A damaged checkpoint was passed over: {of['why']}",
    "unsaved": lambda of: f"Not saved at step {of['step']}: {of['why']}",
    "stopped": lambda of: f"Stopped at step {of['step']}, saved",
    "complete": lambda of: f"Training finished at step {of['step']}",
    "service_start": lambda of: "The service started",
    "service_stop": lambda of: "The service stopped",
    "change_seen": _change,
    "build_start": lambda of: "A build began",
    "build_end": _build_end,
    "build_failed": lambda of: f"A build failed: {of['message']}",
    "manifest_dropped": lambda of: f"Manifest {of['digest']} was dropped",
    "page_start": lambda of: "The page was started",
    "page_end": lambda of: "The page ended" + (f": {of['said']}" if of.has("said") else ""),
}
