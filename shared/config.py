"""Layered TOML into frozen models: files in order, then `--set a.b=1`; what is unknown is refused by name.

[--config FILE]... -> merge -> [--set key=value]... -> validate -> a frozen model that lives beside its consumer
"""

import difflib
import tomllib
import typing
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import tomli_w
from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import ErrorDetails

from shared.errors import ConfigError

ModelT = TypeVar("ModelT", bound=BaseModel)
ConfigT = TypeVar("ConfigT", bound="Config")


class Config(BaseModel):
    """Base of every configuration: frozen, strict about unknown keys, documented under each field."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)

    @classmethod
    def located(cls, table: Mapping[str, Any], folder: Path) -> Mapping[str, Any]:
        """`table` as it is meant when it was read from a file in `folder`; for configurations that name paths."""
        return table


def load_config(model: type[ConfigT], files: Sequence[Path] = (), sets: Iterable[str] = ()) -> ConfigT:
    """Read `files` in order, then apply `sets` ("a.b=1"), later ones winning; raises ConfigError naming the key."""
    merged: dict[str, Any] = {}
    for file in files:
        merged = merge(merged, model.located(read_toml(file), file.parent))
    for assignment in sets:
        merged = merge(merged, _parse_assignment(assignment))
    return validate(model, merged)


def validate(model: type[ModelT], data: Mapping[str, Any]) -> ModelT:
    """`data` as a `model`; raises ConfigError with one line for the first thing that is wrong."""
    try:
        return model.model_validate(data)
    except ValidationError as error:
        raise ConfigError(_explain(model, error.errors(include_url=False)[0])) from None


def merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Both tables as one; where both hold a key, tables are merged and anything else is taken from `above`."""
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        merged[key] = merge(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return merged


def read_toml(file: Path) -> dict[str, Any]:
    """The table in `file`; raises ConfigError where it is missing or is not TOML."""
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"config file {file}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"config file {file} is not TOML: {error}") from None


def dump_config(config: Config) -> str:
    """`config` as TOML that `load_config` reads back to an equal value; unset (None) fields are left out."""
    return tomli_w.dumps(config.model_dump(mode="json", exclude_none=True))


def flatten(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested tables as {"a.b": value}."""
    flat: dict[str, Any] = {}
    for key, value in table.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _parse_assignment(assignment: str) -> dict[str, Any]:
    """ "a.b=1" as {"a": {"b": 1}}; what is not a TOML value is a string, so that `--set name=base` needs no quotes."""
    path, equals, text = assignment.partition("=")
    if not equals or not path.strip():
        raise ConfigError(f"--set {assignment}: write it as key=value, for example --set seed=1")
    try:
        value: Any = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    for key in reversed(path.strip().split(".")):
        value = {key: value}
    return typing.cast(dict[str, Any], value)


def _explain(model: type[BaseModel], error: ErrorDetails) -> str:
    path = ".".join(str(part) for part in error["loc"])
    if error["type"] != "extra_forbidden":
        message = error["msg"].removeprefix("Value error, ")
        return f"{path}: {message[0].lower()}{message[1:]}" if path else message
    known = list(_known_keys(model))
    leaf_matches = [key for key in known if key.rsplit(".", 1)[-1] == path.rsplit(".", 1)[-1]]
    nearest = difflib.get_close_matches(path, known, n=1, cutoff=0.5) or leaf_matches[:1]
    hint = f"; did you mean {nearest[0]!r}?" if nearest else f"; known here: {', '.join(sorted(model.model_fields))}"
    return f"unknown config key {path!r}{hint}"


def _known_keys(model: type[BaseModel], prefix: str = "") -> Iterable[str]:
    for name, field in model.model_fields.items():
        yield prefix + name
        for inner in (field.annotation, *typing.get_args(field.annotation)):
            if isinstance(inner, type) and issubclass(inner, BaseModel):
                yield from _known_keys(inner, f"{prefix}{name}.")
