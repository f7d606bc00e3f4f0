"""Memory of this process: what it holds resident, libraries, shared pages and mapped files included."""

from __future__ import annotations

import json
import resource
import sys
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

NOTE = ".memory.json"  # hidden: never part of an artifact
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")  # Linux


@dataclass(frozen=True)
class Training:
    """What a training took, in bytes."""

    before_bytes: int  # resident before the model was opened
    peak_bytes: int  # most that was ever resident until training ended


def resident() -> int:
    """Bytes resident now; where there is no /proc, the most that ever were."""
    return _status("VmRSS")


def peak() -> int:
    """The most bytes that were resident since `forget`, or since the process began."""
    return _status("VmHWM")


def forget() -> None:
    """Let `peak` begin anew, where the system can (Linux)."""
    with suppress(OSError):
        CLEAR.write_text("5", encoding="ascii")


def note(into: Path, before: int) -> None:
    """Leave a word in a step's folder on a training that ends now; the engine reads it before the step is sealed."""
    (into / NOTE).write_text(json.dumps(asdict(Training(before, peak()))), encoding="utf-8")


def noted(into: Path) -> Training | None:
    """What a step left word of."""
    try:
        return Training(**json.loads((into / NOTE).read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None


def _status(field: str) -> int:
    if STATUS.exists():
        line = next(line for line in STATUS.read_text(encoding="utf-8").splitlines() if line.startswith(field))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
