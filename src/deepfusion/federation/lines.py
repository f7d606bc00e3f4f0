"""What steps do, in lines, where no terminal is watched all the time: in the log of a server's or a device's app."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Self

from deepfusion.display import duration, read_progress

FIRST_S, MOST_S = 10.0, 1800.0  # from a step's start to its first line, and between two lines at most


def print_line(line: str) -> None:
    """Say a line where `flwr run --stream`, or the terminal of a `flower-supernode`, shows it."""
    print(f"deepfusion: {line}", flush=True)


class Lines:
    """A watcher, and a context manager, that says when a step is done, and how far one is that takes long: after some
    seconds, and then ever less often.

    Args:
        say: what is told each line.
        first: seconds from the start of a step to its first line.
    """

    def __init__(self, say: Callable[[str], None] = print_line, first: float = FIRST_S) -> None:
        self.say, self.first = say, first
        self._running: dict[str, threading.Timer] = {}
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        """Say no more of steps that came to no end."""
        for name in list(self._running):
            self._ended(name)

    def started(self, name: str, folder: Path) -> None:
        """A step begins."""
        with self._lock:
            self._again(name, folder, self.first)

    def finished(self, name: str, seconds: float, cached: bool) -> None:
        """A step is done."""
        self._ended(name)
        if not cached:
            self.say(f"done {name} {seconds:.1f} s")

    def failed(self, name: str, reason: str) -> None:
        """A step is given up."""
        self._ended(name)
        self.say(f"failed {name}: {reason}")

    def message(self, text: str) -> None:
        """Something worth knowing."""
        self.say(text)

    def _again(self, name: str, folder: Path, wait: float) -> None:
        timer = threading.Timer(wait, self._tell, (name, folder, wait))
        timer.daemon = True  # nobody waits for a line
        self._running[name] = timer
        timer.start()

    def _tell(self, name: str, folder: Path, waited: float) -> None:
        with self._lock:
            if name not in self._running:
                return
            self._again(name, folder, min(2 * waited, MOST_S))
        if (reading := read_progress(folder, time.time())) and reading.total:
            left = "" if reading.remaining is None else f", about {duration(reading.remaining)} left"
            self.say(f"{name}: {min(1.0, reading.done / reading.total):.0%}{left}")

    def _ended(self, name: str) -> None:
        with self._lock:
            if timer := self._running.pop(name, None):
                timer.cancel()
