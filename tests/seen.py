"""Who watches a run."""

from __future__ import annotations

from pathlib import Path


class Seen:
    """A watcher that notes what was run, found and said."""

    def __init__(self) -> None:
        self.ran: list[str] = []
        self.found: list[str] = []
        self.said: list[str] = []

    def started(self, name: str, folder: Path) -> None: ...

    def finished(self, name: str, seconds: float, cached: bool) -> None:
        (self.found if cached else self.ran).append(name)

    def failed(self, name: str, reason: str) -> None:
        self.said.append(reason)

    def message(self, text: str) -> None:
        self.said.append(text)
