"""Steps that are done in no time, or fail in each of the ways that a step can fail."""

from __future__ import annotations

import errno
import os
import signal
import time
from functools import partial
from pathlib import Path

import torch

from deepfusion import memory
from deepfusion.artifacts import Artifact
from deepfusion.errors import InputError
from deepfusion.progress import PROGRESS, Ticker
from deepfusion.store import Step
from deepfusion.weights import Part, write


class Note(Artifact):
    """A file with a text."""

    text: str


def step(text: str, function: str = "note", version: int = 1, item: str | None = "a") -> Step[Note]:
    return Step("notes", item, f"steps:{function}", version, Note, {"text": text})


def note(text: str, *, into: Path) -> Note:
    """Write the text down."""
    (into / "note.txt").write_text(text)
    return Note(folder=into, text=text).sealed()


def joined(notes: list[Note], by: dict[str, Note], *, into: Path) -> Note:
    """Write down what other notes say, read from their folders."""
    return note(" ".join((n.folder / "note.txt").read_text() for n in [*notes, *by.values()]), into=into)


def tried(text: str, *, into: Path) -> Note:
    """Count the attempts in what is left behind; only the third comes to an end."""
    Ticker(into, 3, "attempts").advance(1)
    with (into / "attempts").open("a") as attempts:
        attempts.write("x")
    if len((into / "attempts").read_text()) < 3:
        raise RuntimeError("not yet")
    assert (into / PROGRESS).is_file()
    return note(text, into=into)


def ended(text: str, *, into: Path) -> Note:
    """Take a moment, and leave a mark at its end."""
    (into / "begun").touch()
    time.sleep(float(text))
    return note(text, into=into)


def trained(text: str, *, into: Path) -> Note:
    """Hold some memory for a moment, and leave word of it."""
    before = memory.resident()
    held = bytearray(2**20 * int(text))
    held[::4096] = b"x" * len(held[::4096])
    del held
    memory.note(into, before)
    return note(text, into=into)


def mistaken(text: str, *, into: Path) -> Note:
    """The user's mistake."""
    (into / "half.txt").write_text("half")
    raise InputError(f"{text} is wrong")


def confused(text: str, *, into: Path) -> Note:
    """A value that the step itself got wrong."""
    raise ValueError(f"cannot reshape {text}")


def interrupted(text: str, *, into: Path) -> Note:
    """Ctrl-C, the first time that it is tried."""
    if not (into / "begun").exists():
        (into / "begun").touch()
        signal.raise_signal(signal.SIGINT)
        time.sleep(60)
    return note(text, into=into)


def full(text: str, *, into: Path) -> Note:
    """No room left on the disk."""
    (into / "half.txt").write_text("half")
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(into / text))


def full_in_other_words(text: str, *, into: Path) -> Note:
    """No room left on the disk, as safetensors says it."""
    (into / "half.txt").write_text("half")
    raise RuntimeError(f"Error while serializing: I/O error: {os.strerror(errno.ENOSPC)} (os error 28)")


def killed(text: str, *, into: Path) -> Note:
    """Out of memory, as the kernel sees to it."""
    (into / "half.txt").write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
    return note(text, into=into)


def cut_short(text: str, *, into: Path, resume: bool = False) -> Note:
    """Write a file of weights per letter; out of memory at the third, the first time that it is tried."""

    def made(letter: str) -> torch.Tensor:
        with (into / ".made").open("a") as log:
            log.write(letter)
        if (into / ".made").read_text() == text[:3]:
            os.kill(os.getpid(), signal.SIGKILL)
        return torch.tensor([float(ord(letter))])

    write(into, [Part(x, torch.float32, (1,), partial(made, x)) for x in text], shard_bytes=4, resume=resume)
    return note((into / ".made").read_text(), into=into)


def killed_with_its_worker(text: str, *, into: Path) -> Note:
    """The kernel chose the larger process."""
    os.kill(os.getppid(), signal.SIGKILL)
    return killed(text, into=into)


def noisy(text: str, *, into: Path) -> Note:
    """Print, from Python and from below."""
    print("from python")
    os.write(2, b"from below\n")
    return note(text, into=into)
