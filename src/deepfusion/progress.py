"""Progress of a running step, told through a small file so that any process can show it."""

from __future__ import annotations

import json
import time
from pathlib import Path

from deepfusion.files import write_whole

PROGRESS = ".progress.json"


class Ticker:
    """Counts work inside a step's folder; `cli` draws it. Writes at most twice a second."""

    def __init__(self, into: Path, total: float, unit: str = "tokens", done: float = 0) -> None:
        self._path, self._total, self._unit, self._done = into / PROGRESS, total, unit, done
        self._started_at, self._first, self._last = time.time(), done, 0.0
        self._write()

    def advance(self, amount: float) -> None:
        """Add to what is done."""
        self._done += amount
        if time.monotonic() - self._last > 0.5:
            self._write()

    def _write(self) -> None:
        self._last = time.monotonic()
        facts = {
            "done": self._done,
            "total": self._total,
            "unit": self._unit,
            "started_at": self._started_at,
            "done_at_start": self._first,
        }
        write_whole(self._path, json.dumps(facts))
