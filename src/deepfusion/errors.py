"""Whose fault an error is: what a run was given, or the work on it."""

from __future__ import annotations

import codecs
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path


class InputError(ValueError):
    """The recipe, or a file that it or the command line names, is at fault: one line with the culprit and what to do.

    It stops a run wherever it comes up, for everyone was given the same. Other errors of a device stop that device.
    """


def one_line(text: str, most: int = 1000) -> str:
    """Text from elsewhere that can be shown and kept: in one line, without control characters, cut after `most`."""
    words = " ".join(text[: 2 * most].split())
    shown = "".join(letter if letter.isprintable() else "�" for letter in words)
    return shown if len(shown) <= most else shown[: most - 1] + "…"


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


def read_file(path: Path, kind: str = "") -> bytes:
    """The content of a file that somebody named, without a byte order mark; `kind` says what it is to them.

    Raises:
        InputError: it is not there, or cannot be read.
    """
    called = f"{kind} {path}".strip()
    try:
        return path.read_bytes().removeprefix(codecs.BOM_UTF8)
    except FileNotFoundError:
        raise InputError(f"{called} does not exist") from None
    except IsADirectoryError:
        raise InputError(f"{called} is a folder, not a file") from None
    except OSError as error:
        raise InputError(f"{called} cannot be read: {error.strerror}") from None


def as_text(content: bytes, origin: str) -> str:
    """Bytes as text; `origin` says where they stand.

    Raises:
        InputError: they are not UTF-8.
    """
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise InputError(f"{origin} is not UTF-8 (byte {error.start}): save the file as UTF-8") from None
