"""Whose fault an error is: what a run was given, or the work on it."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager


class InputError(ValueError):
    """The recipe, or a file that it or the command line names, is at fault: one line with the culprit and what to do.

    It stops a run wherever it comes up, for everyone was given the same. Other errors of a device stop that device.
    """


def concerns_all(error: BaseException) -> bool:
    """Whether an error is of what all steps share, the inputs and the disk, and not of one step's own work."""
    return isinstance(error, InputError | OSError)


@contextmanager
def reading_inputs() -> Generator[None]:
    """Around what reads shared inputs: a ValueError in here is the inputs' fault, and not that of who reads them."""
    try:
        yield
    except InputError:
        raise
    except ValueError as error:
        raise InputError(str(error)) from error
