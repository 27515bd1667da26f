"""The frame of every command: parse, call one function, and on an error one line on stderr and a documented exit code.

0 complete   64 usage or config   65 data or format   73 locked   74 I/O or disk full   75 stopped, run it again
"""

import functools
import logging
import os
import sys
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import typer

from shared.errors import ConfigError, ExpertsError, Stopped, StoreFull, StoreIO

# typer 0.29 carries a click of its own, earlier versions import click: the class is the same base either way.
_UsageError: Any = typer.BadParameter.__mro__[1]


def run_command(
    function: Callable[..., Any] | Mapping[str, Callable[..., Any]], arguments: list[str] | None = None, about: str = ""
) -> NoReturn:
    """Run `function` as a command line and end the process with its exit code: what it returns, or 0.

    Several functions are subcommands by their names; `about` is then what the whole is for.
    """
    quiet_libraries()
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, help=about or None)
    if isinstance(function, Mapping):
        for name, each in function.items():
            app.command(name)(_interruptible(each))
    else:
        app.command()(_interruptible(function))
    try:
        code = app(arguments, standalone_mode=False)
    except _UsageError as error:
        _fail(ConfigError(f"{error.format_message()} (--help shows the options)"))
    except ExpertsError as error:
        _fail(error)
    except OSError as error:
        _fail(explain_os_error(error))
    except UnicodeEncodeError as error:  # LMDB, Arrow and safetensors take paths as text
        _fail(ConfigError(f"{error.object}: names that are not UTF-8 cannot be used here"))
    sys.exit(code if isinstance(code, int) else 0)


def _interruptible(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def run(*arguments: Any, **options: Any) -> Any:
        try:
            return function(*arguments, **options)
        except KeyboardInterrupt:  # here, because typer would make an exit code of its own of it
            raise Stopped("interrupted; what was stored or saved stays, and the same command goes on") from None

    return run


def quiet_libraries() -> None:
    """Keep off stderr what is no business of the user's.

    diffusers and peft import bitsandbytes wherever it is, which then tells what of it this machine cannot use.
    """
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def yield_idle_threads() -> None:
    """Let OpenMP threads that wait sleep; call it before torch is imported.

    Two trainers on one machine's cores are the normal case here, and threads that spin for each other's cores slow
    both by an order of magnitude. What they compute is the same.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def one_line(text: str) -> str:
    """`text` with control characters escaped, so that file names and captions cannot forge lines of output."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def explain_os_error(error: OSError) -> ExpertsError:
    """An error of the system's as one of ours, with its exit code."""
    import errno

    where = f"{error.filename}: " if error.filename else ""
    message = f"{where}{error.strerror or error}"
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return StoreFull(f"{message}; free some space and run the same command again")
    return StoreIO(message)


def _fail(error: ExpertsError) -> NoReturn:
    prefix = "stopped" if isinstance(error, Stopped) else "error"
    print(f"{prefix}: {one_line(str(error))}", file=sys.stderr)  # noqa: T201 -- this is the place that prints
    sys.exit(error.exit_code)
