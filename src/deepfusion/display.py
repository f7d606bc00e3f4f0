"""What a command shows on stderr while steps run: a bar per running step on a terminal, elsewhere a line per event."""

from __future__ import annotations

import json
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn

from deepfusion.progress import PROGRESS

POLL_SECONDS = 0.25


@dataclass(frozen=True)
class Reading:
    """How far a running step is."""

    done: float
    total: float
    unit: str
    rate: float | None  # units a second, since this attempt began; None before anything happened
    remaining: float | None  # seconds


def read_progress(folder: Path, now: float) -> Reading | None:
    """What a step's Ticker last wrote, at time `now` (seconds since the epoch); None if it has not written yet."""
    try:
        facts = json.loads((folder / PROGRESS).read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):
        return None
    done, elapsed = float(facts["done"]), now - float(facts["started_at"])
    since_start = done - float(facts["done_at_start"])
    rate = since_start / elapsed if since_start > 0 and elapsed > 0 else None
    left = max(float(facts["total"]) - done, 0.0)
    return Reading(done, float(facts["total"]), facts["unit"], rate, None if rate is None else left / rate)


def duration(seconds: float) -> str:
    """Seconds as people read them: `0.4 s`, `12 s`, `3 min 05 s`, `2 h 01 min`, `6 d 23 h`."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    if whole >= 2 * 86400:
        return f"{whole // 86400} d {whole % 86400 // 3600} h"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def amount(value: float) -> str:
    """A quantity to three digits with its prefix: `950`, `1.23 k`, `45.6 M`, `7.89 G`."""
    for prefix in ("", " k", " M", " G", " T", " P"):
        if abs(value) < 999.5:
            return f"{value:.3g}{prefix}"
        value /= 1000
    return f"{value:.3g} E"


def size(count: float) -> str:
    """Bytes as people read them: `950 B`, `1.23 kB`, `45.6 MB`."""
    number = amount(count)
    return f"{number}B" if " " in number else f"{number} B"


class Display:
    """Watches an engine and draws what it does; a context manager. `quiet` shows nothing: errors are the caller's."""

    def __init__(self, *, quiet: bool = False, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True, highlight=False)
        self._quiet = quiet
        self._bars: Progress | None = None
        self._running: dict[str, tuple[TaskID, Path]] = {}
        self._cached = 0
        self._lock = threading.Lock()
        self._over = threading.Event()
        self._poller: threading.Thread | None = None

    def __enter__(self) -> Self:
        if self._console.is_terminal and not self._quiet:
            self._bars = Progress(
                TextColumn("  {task.description}"),
                BarColumn(bar_width=24),
                TaskProgressColumn(),
                TextColumn("{task.fields[detail]}", style="dim"),
                console=self._console,
                transient=True,
                refresh_per_second=4,
            )
            self._bars.start()
            self._poller = threading.Thread(target=self._poll, name="display", daemon=True)
            self._poller.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        if self._poller is not None:
            self._poller.join()
        if self._bars is not None:
            self._bars.stop()
        if self._cached:
            self._say(f"{self._cached} {'step was' if self._cached == 1 else 'steps were'} already done", style="dim")

    def started(self, name: str, folder: Path) -> None:
        """Open a bar, or write a line."""
        if self._bars is None:
            self._say(f"start   {name}")
            return
        with self._lock:
            self._running[name] = (self._bars.add_task(escape(name), total=None, detail=""), folder)

    def finished(self, name: str, seconds: float, cached: bool) -> None:
        """Close the bar and leave a line; what was there already is only counted."""
        self._close(name)
        if cached:
            with self._lock:
                self._cached += 1
            return
        self._say(f"done    {name}  {duration(seconds)}")

    def failed(self, name: str, reason: str) -> None:
        """Close the bar and say why."""
        self._close(name)
        self._say(f"failed  {reason if reason.startswith(name) else f'{name}: {reason}'}", style="red")

    def message(self, text: str) -> None:
        """Pass a remark on."""
        self._say(text)

    def _say(self, text: str, style: str | None = None) -> None:
        if not self._quiet:
            self._console.print(text, style=style, markup=False, soft_wrap=True)

    def _close(self, name: str) -> None:
        with self._lock:
            task = self._running.pop(name, None)
        if task is not None and self._bars is not None:
            self._bars.remove_task(task[0])

    def _poll(self) -> None:
        while not self._over.wait(POLL_SECONDS):
            with self._lock:
                for task, folder in self._running.values():
                    self._draw(task, read_progress(folder, time.time()))

    def _draw(self, task: TaskID, reading: Reading | None) -> None:
        if reading is None or self._bars is None:
            return
        unit = reading.unit.removesuffix("s") if reading.total == 1 else reading.unit
        detail = f"{amount(reading.done)} of {amount(reading.total)} {unit}"
        if reading.rate is not None and reading.remaining is not None:
            detail += f", {amount(reading.rate)}/s, {duration(reading.remaining)} left"
        self._bars.update(task, completed=reading.done, total=max(reading.total, 1e-9), detail=detail)
