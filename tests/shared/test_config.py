"""Layered TOML: what wins, what is refused, and that a dumped config is the config."""

import tomllib
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field

from shared.config import Config, dump_config, flatten, load_config, merge, read_toml, validate
from shared.errors import ConfigError


class Optimizer(Config):
    learning_rate: float = 1e-5
    betas: tuple[float, float] = (0.9, 0.999)


class Source(Config):
    path: Path
    weight: float = 1.0


class Expert(Config):
    name: str = "base"
    seed: int = 0
    kind: Literal["full", "lora"] = "full"
    timesteps: dict[str, int] = Field(default={"low": 0, "high": 1000})
    optimizer: Optimizer = Optimizer()
    warmup: Optimizer | None = None
    sources: tuple[Source, ...] = ()
    note: str | None = None


def write(folder: Path, name: str, text: str) -> Path:
    (folder / name).write_text(text, encoding="utf-8")
    return folder / name


def test_later_layers_win_key_by_key(tmp_path: Path) -> None:
    common = write(tmp_path, "common.toml", "seed = 1\n[optimizer]\nlearning_rate = 0.1\nbetas = [0.8, 0.9]\n")
    own = write(tmp_path, "own.toml", 'name = "refiner"\ntimesteps = {high = 350}\n[optimizer]\nlearning_rate = 0.2\n')
    config = load_config(Expert, [common, own], ["optimizer.betas=[0.5, 0.6]", "seed=3"])
    assert config.name == "refiner"
    assert config.seed == 3
    assert config.optimizer == Optimizer(learning_rate=0.2, betas=(0.5, 0.6))
    assert config.timesteps == {"high": 350}
    assert load_config(Expert, [own, common]).optimizer.learning_rate == 0.1
    assert load_config(Expert) == Expert()


@pytest.mark.parametrize(
    ("assignment", "field", "value"),
    [
        ("name=refiner", "name", "refiner"),
        ("name=a=b", "name", "a=b"),
        ("name=", "name", ""),
        ('name="007"', "name", "007"),
        ("name=two words", "name", "two words"),
        ("seed=7", "seed", 7),
        (" seed =7", "seed", 7),
        ("optimizer.learning_rate=1e-4", "optimizer", Optimizer(learning_rate=1e-4)),
        ("warmup={learning_rate = 0.5}", "warmup", Optimizer(learning_rate=0.5)),
        ("sources=[{path = 'a b', weight = 2}]", "sources", (Source(path=Path("a b"), weight=2),)),
    ],
)
def test_set(assignment: str, field: str, value: object) -> None:
    assert getattr(load_config(Expert, sets=[assignment]), field) == value


@pytest.mark.parametrize("assignment", ["seed", "=1", " =1", ""])
def test_set_without_key_or_value_says_how(assignment: str) -> None:
    with pytest.raises(ConfigError, match="key=value"):
        load_config(Expert, sets=[assignment])


@pytest.mark.parametrize(
    ("assignment", "named", "nearest"),
    [
        ("sed=1", "sed", "seed"),
        ("optimizer.learning_rat=1", "optimizer.learning_rat", "optimizer.learning_rate"),
        ("optimiser.learning_rate=1", "optimiser", "optimizer"),
        ("weight=1", "weight", "sources.weight"),
        ("warmup.learningrate=1", "warmup.learningrate", "warmup.learning_rate"),
        ("sources=[{path='a', wieght=1}]", "sources.0.wieght", "sources.weight"),
    ],
)
def test_unknown_keys_name_the_nearest(assignment: str, named: str, nearest: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(Expert, sets=[assignment])
    assert f"unknown config key {named!r}" in str(caught.value)
    assert f"did you mean {nearest!r}" in str(caught.value)


def test_a_key_like_no_other_lists_what_is_known() -> None:
    with pytest.raises(ConfigError, match="known here: kind, name, note, optimizer"):
        load_config(Expert, sets=["zzzzzzzz=1"])


@pytest.mark.parametrize(
    ("assignment", "start"),
    [
        ("seed=many", "seed: "),
        ("seed=1.5", "seed: "),
        ("kind=huge", "kind: "),
        ("optimizer.learning_rate=nan", "optimizer.learning_rate: "),
        ("optimizer.learning_rate=inf", "optimizer.learning_rate: "),
        ("optimizer.betas=[1]", "optimizer.betas"),
        ("optimizer=3", "optimizer: "),
        ("sources=[{weight=1}]", "sources.0.path: "),
        ("name=3", "name: "),
    ],
)
def test_errors_are_one_line_that_begins_with_the_key(assignment: str, start: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(Expert, sets=[assignment])
    assert str(caught.value).startswith(start)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 64


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    for file in (
        tmp_path / "absent.toml",
        tmp_path,
        write(tmp_path, "torn.toml", "seed = "),
        write(tmp_path, "twice.toml", "seed = 1\nseed = 2\n"),
    ):
        with pytest.raises(ConfigError) as caught:
            read_toml(file)
        assert str(file) in str(caught.value)
        assert "\n" not in str(caught.value)
    (tmp_path / "latin.toml").write_bytes('name = "é"'.encode("latin-1"))
    with pytest.raises(ConfigError, match="not TOML"):
        read_toml(tmp_path / "latin.toml")


def test_configs_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Expert().seed = 1  # type: ignore[misc]


finite = st.floats(allow_nan=False, allow_infinity=False)
text = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
optimizers = st.builds(Optimizer, learning_rate=finite, betas=st.tuples(finite, finite))
paths = st.from_regex(r"[a-z0-9 ./é-]{1,12}", fullmatch=True).map(Path)
experts = st.builds(
    Expert,
    name=text,
    seed=st.integers(-(2**63), 2**63 - 1),
    kind=st.sampled_from(["full", "lora"]),
    timesteps=st.dictionaries(text, st.integers(0, 1000), max_size=3),
    optimizer=optimizers,
    warmup=st.none() | optimizers,
    sources=st.lists(st.builds(Source, path=paths, weight=finite), max_size=3).map(tuple),
    note=st.none() | text,
)


@given(experts)
def test_a_dumped_config_is_read_back_equal(config: Expert) -> None:
    assert validate(Expert, tomllib.loads(dump_config(config))) == config


tables = st.recursive(
    st.dictionaries(st.sampled_from("abc"), st.integers(0, 3), max_size=3),
    lambda inner: st.dictionaries(st.sampled_from("abc"), inner | st.integers(0, 3), max_size=3),
    max_leaves=8,
)


@given(tables, tables, tables)
def test_layers_may_be_merged_in_any_grouping(a: dict, b: dict, c: dict) -> None:
    if _kinds_agree(a, b) and _kinds_agree(b, c) and _kinds_agree(a, c):
        assert merge(merge(a, b), c) == merge(a, merge(b, c))
    assert merge(a, a) == a
    assert merge({}, a) == merge(a, {}) == a


def _kinds_agree(one: dict, other: dict) -> bool:
    """Whether no key is a table on one side and a value on the other."""
    both = [(one[key], other[key]) for key in one.keys() & other.keys()]
    return all(
        _kinds_agree(x, y)
        if isinstance(x, dict) and isinstance(y, dict)
        else isinstance(x, dict) == isinstance(y, dict)
        for x, y in both
    )


def test_flatten() -> None:
    assert flatten({"a": {"b": 1, "c": {"d": [2]}}, "e": 3}) == {"a.b": 1, "a.c.d": [2], "e": 3}
