"""compose.yaml as docker would read it: anchors and merges resolved, variables filled in."""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

DOCKER = Path(__file__).resolve().parents[2] / "docker"
COMPOSE = DOCKER / "compose.yaml"
STORE = "/store"
GIVEN = {"MODEL": "/models/tiny", "DATA": "/pictures"}
_VARIABLE = re.compile(r"\$\{(?P<name>\w+)(?P<how>:-|:\?)?(?P<other>[^}]*)\}")


def read_compose(path: Path = COMPOSE, given: Mapping[str, str] = GIVEN) -> dict[str, Any]:
    """The whole file; raises KeyError for a variable that must be given and is not."""
    loader = YAML(typ="safe", pure=True)
    loader.constructor.add_constructor("!reset", lambda *_: None)
    filled: dict[str, Any] = _fill(loader.load(path.read_text()), given)
    return filled


def _fill(value: Any, given: Mapping[str, str]) -> Any:
    if isinstance(value, str):
        return _VARIABLE.sub(lambda found: _of(found, given), value)
    if isinstance(value, dict):
        return {key: _fill(part, given) for key, part in value.items()}
    return [_fill(part, given) for part in value] if isinstance(value, list) else value


def _of(found: "re.Match[str]", given: Mapping[str, str]) -> str:
    if found["name"] in given:
        return given[found["name"]]
    if found["how"] != ":-":
        raise KeyError(found["name"])
    return os.path.expandvars(found["other"])
