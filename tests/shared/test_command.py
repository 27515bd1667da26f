"""The frame of every command: one line on stderr, the documented exit code, no traceback."""

import errno
import sys
from pathlib import Path

import pytest

from shared import errors
from shared.command import one_line, run_command


def outcome(function: object, arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    with pytest.raises(SystemExit) as ended:
        run_command(function, arguments)  # type: ignore[arg-type]
    return int(ended.value.code or 0), capsys.readouterr().err


@pytest.mark.parametrize("kind", [kind for kind in vars(errors).values() if isinstance(kind, type)])
def test_every_error_of_the_tree_is_one_line_and_its_exit_code(
    kind: type[errors.ExpertsError], capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> None:
        raise kind("a\nforged\x1b[31m line")

    code, said = outcome(fail, [], capsys)
    assert code == kind.exit_code
    assert said == f"{'stopped' if kind is errors.Stopped else 'error'}: a\\nforged\\x1b[31m line\n"


@pytest.mark.parametrize("arguments", [["--no-such-option"], ["extra"], ["--count", "many"], []])
def test_a_wrong_command_line_is_a_usage_error(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    def command(*, count: int, folder: Path) -> None: ...

    code, said = outcome(command, arguments, capsys)
    assert code == 64
    assert said.startswith("error: ")
    assert said.count("\n") == 1


@pytest.mark.parametrize(("number", "code"), [(errno.ENOSPC, 74), (errno.EIO, 74), (errno.EACCES, 74)])
def test_what_the_system_refuses_is_told_in_one_line(
    number: int, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> None:
        raise OSError(number, "no luck", "/some/where")

    assert outcome(fail, [], capsys)[0] == code


def test_an_interrupt_says_that_the_command_goes_on(capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    code, said = outcome(interrupted, [], capsys)
    assert code == 75
    assert "goes on" in said


def test_success_is_zero_and_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert outcome(lambda: None, [], capsys) == (0, "")


def test_one_line_keeps_letters_and_escapes_the_rest() -> None:
    assert one_line("Käse 猫 \u202eevil\r\n\t\x00") == "Käse 猫 \\u202eevil\\r\\n\\t\\x00"


def test_several_functions_are_subcommands(capsys: pytest.CaptureFixture[str]) -> None:
    def seven() -> int:
        return 7

    def nothing(number: int) -> None:
        sys.stdout.write(f"{number}\n")

    def run(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            run_command({"seven": seven, "nothing": nothing}, list(arguments), about="What it is for.")
        out, err = capsys.readouterr()
        assert isinstance(ended.value.code, int)
        return ended.value.code, out, err

    assert run("seven") == (7, "", "")
    assert run("nothing", "3") == (0, "3\n", "")
    for wrong in ((), ("eight",), ("nothing",), ("nothing", "x"), ("seven", "--eight")):
        code, out, err = run(*wrong)
        assert (code, out, err.count("\n")) == (64, "", 1)
        assert err.startswith("error: ")
    code, out, _ = run("--help")
    assert (code, "What it is for." in out, "nothing" in out) == (0, True, True)
