"""The tree of errors as its page draws it."""

import re

import pytest

from shared import errors

DRAWN = dict(re.findall(r"\+-- (\w+) +(\d+)", errors.__doc__ or ""))
CLASSES = {name: value for name, value in vars(errors).items() if isinstance(value, type)}


def test_every_error_is_drawn() -> None:
    assert DRAWN.keys() | {"ExpertsError"} == CLASSES.keys()


@pytest.mark.parametrize("name", sorted(DRAWN))
def test_exit_code_is_the_one_drawn(name: str) -> None:
    assert CLASSES[name].exit_code == int(DRAWN[name])
    assert issubclass(CLASSES[name], errors.ExpertsError)
    assert CLASSES[name].__doc__


def test_store_errors_are_store_errors() -> None:
    inside = re.findall(r"\|   \+-- (\w+)", errors.__doc__ or "")
    assert inside
    assert all(issubclass(CLASSES[name], errors.StoreError) for name in inside)
