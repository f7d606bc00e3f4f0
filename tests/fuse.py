"""Writing weights, watched, and stopped where a test wants it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from deepfusion import weights
from deepfusion.weights import Part


class Blown(BaseException):
    """Not an error, as a killed process is none."""


class Fuse:
    """Stands in for `weights.write`: small files, the names of the parts that were made, and an end after some."""

    def __init__(self, shard_bytes: int) -> None:
        self.shard_bytes = shard_bytes
        self.made: list[str] = []
        self.lasts = 10**6

    def write(self, folder: Path, parts: Iterable[Part], *, resume: bool = False) -> None:
        """As `weights.write`; what was made is counted from here."""
        self.made.clear()
        weights.write(folder, map(self._watched, parts), shard_bytes=self.shard_bytes, resume=resume)

    def _watched(self, part: Part) -> Part:
        def make() -> Tensor | Iterable[Tensor]:
            self.made.append(part.name)
            if len(self.made) > self.lasts:
                raise Blown
            return part.make()

        return replace(part, make=make)


def written(path: Path) -> tuple[int, int, int]:
    """What tells that a file was written again: its inode, size and time of change (reading alone moves `st_atime`)."""
    found = path.stat()
    return found.st_ino, found.st_size, found.st_mtime_ns


def contents(folder: Path) -> dict[str, bytes]:
    """All files below a folder."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
