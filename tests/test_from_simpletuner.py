"""The guide for people who come from SimpleTuner names settings that are there."""

import re
from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import BaseModel

from cache_builder.config import BuildConfig
from trainer.config import ExpertConfig

GUIDE = (Path(__file__).parents[1] / "docs" / "from-simpletuner.md").read_text(encoding="utf-8")
ROWS = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in GUIDE.splitlines() if line.startswith("| ")]
NAMED = sorted({key for row in ROWS for key in re.findall(r"`([a-z0-9_]+\.[a-z0-9_.]+)(?: = [^`]*)?`", row[-1])})
FILES = (".toml", ".jsonl", ".csv", ".txt", ".png", ".caption")


def has_field(model: Any, key: str) -> bool:
    for part in key.split("."):
        if not (isinstance(model, type) and issubclass(model, BaseModel) and part in model.model_fields):
            return False
        annotation = model.model_fields[part].annotation
        model = next((own for own in get_args(annotation) if own is not type(None)), annotation)  # a table may be unset
    return True


def test_every_row_says_something_of_something() -> None:
    assert len(ROWS) > 100
    assert all(len(row) == 2 and all(row) for row in ROWS)


@pytest.mark.parametrize("key", [key for key in NAMED if not key.endswith(FILES)])
def test_what_is_named_on_our_side_can_be_set(key: str) -> None:
    models = [model for model in (BuildConfig, ExpertConfig) if key.split(".")[0] in model.model_fields]
    assert not models or any(has_field(model, key) for model in models)
    assert models or key.split(".")[0] == "source"
