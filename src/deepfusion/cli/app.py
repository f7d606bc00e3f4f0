"""What all commands have in common: how they are called, and how what they raise is told."""

from __future__ import annotations

import errno
import functools
import json
import os
import sys
import traceback
from collections.abc import Callable, Generator
from contextlib import contextmanager
from importlib.metadata import version
from typing import Annotated, Any, NoReturn, ParamSpec

import click
import typer
from rich.console import Console
from typer.core import TyperGroup

P = ParamSpec("P")
DEBUG = "DEEPFUSION_DEBUG"


class _Commands(TyperGroup):
    """Tells a mistake in the command line itself like every other: in one line."""

    def main(self, *args: Any, **extra: Any) -> NoReturn:
        """Run a command and exit."""
        try:
            status = super().main(*args, **extra | {"standalone_mode": False})
        except click.exceptions.NoArgsIsHelpError as error:
            error.show()
            sys.exit(error.exit_code)
        except click.UsageError as error:
            asked = error.ctx.command_path if error.ctx else self.name
            STDERR.print(
                f"deepfusion: error: {error.format_message()} (see {asked} --help)", markup=False, soft_wrap=True
            )
            sys.exit(error.exit_code)
        sys.exit(status if isinstance(status, int) else 0)


app = typer.Typer(
    name="deepfusion",
    cls=_Commands,
    no_args_is_help=True,
    suggest_commands=False,  # click does, and twice is once too often
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    epilog="Try it: `deepfusion demo`",
)
STDOUT = Console(highlight=False)
STDERR = Console(stderr=True, highlight=False)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(version("deepfusion-moe"))
        raise typer.Exit


@app.callback()
def _options(  # pyright: ignore[reportUnusedFunction]
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.", envvar=DEBUG)] = False,
    _version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Train one Mixture-of-Experts language model out of many small, different ones that never share their data."""
    os.environ[DEBUG] = "1" if debug else "0"


@contextmanager
def _told_in_one_line() -> Generator[None]:
    """Turn what a command raises into one line on stderr and an exit code: 2 is the user's to mend, 1 ours."""
    try:
        yield
    except KeyboardInterrupt:
        _leave("stopped; the same command goes on from here", 130)
    except (typer.Exit, BrokenPipeError):  # typer's own to handle
        raise
    except ValueError as error:
        _leave(f"error: {error}", 2)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            _leave(f"error: {error}", 1)
        where = error.filename or error.strerror
        _leave(f"error: disk full while writing {where} (deepfusion doctor says what a run needs)", 2)
    except Exception as error:
        hint = "" if os.environ.get(DEBUG) == "1" else " (traceback: deepfusion --debug …)"
        _leave(f"internal error: {type(error).__name__}: {error}{hint}", 1)


def _leave(message: str, code: int) -> None:
    if os.environ.get(DEBUG) == "1":
        traceback.print_exc()
    STDERR.print(f"deepfusion: {' '.join(message.split())}", markup=False, soft_wrap=True)
    raise typer.Exit(code)


def command(function: Callable[P, None]) -> Callable[P, None]:
    """Register a command whose errors are told in one line."""
    return app.command()(guarded(function))


def guarded(function: Callable[P, None]) -> Callable[P, None]:
    """A command whose errors are told in one line."""

    @functools.wraps(function)
    def told(*args: P.args, **kwargs: P.kwargs) -> None:
        with _told_in_one_line():
            function(*args, **kwargs)

    return told


def emit(document: Any) -> None:
    """Print one JSON document."""
    sys.stdout.write(json.dumps(document, ensure_ascii=False, indent=1) + "\n")
