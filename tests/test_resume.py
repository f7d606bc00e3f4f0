"""What `kill -9` leaves is gone on from, and nobody can tell from the result."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from random import Random

import psutil

TESTS = Path(__file__).parent
RUN = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from deepfusion import Runtime, run
from tiny import recipe
runtime = Runtime(workers=int(sys.argv[3]), checkpoint_seconds=0.02)
run(recipe("device.epochs=30", "distill.budget_tokens=20000"), sys.argv[2], runtime)
"""
KILLS = 10
PATIENCE = 120.0  # seconds that anything may take on a busy machine


def launched(out: Path, workers: int = 2) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", RUN, str(TESTS), str(out), str(workers)]
    return subprocess.Popen(command, start_new_session=True)


def members(group: int) -> Iterator[int]:
    """Processes of a group that are alive: the main process started it, and its workers stayed in it."""
    for process in psutil.process_iter(["status"]):
        with suppress(OSError):  # ended while we looked, or another user's
            if os.getpgid(process.pid) == group and process.info["status"] != psutil.STATUS_ZOMBIE:
                yield process.pid


def until(true: Callable[[], object], seconds: float) -> bool:
    """Whether it came true in time."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if true():
            return True
        time.sleep(0.01)
    return bool(true())


def steps(out: Path) -> set[str]:
    """Step folders, finished or not."""
    return {str(path) for path in out.glob("steps/*/*")}


def saved(out: Path) -> set[str]:
    """Checkpoints of trainings under way that can be gone on from."""
    return {str(path) for path in out.glob("steps/*/*.partial/.trainer/checkpoint-*/complete")}


def digests(out: Path) -> dict[tuple[str, str | None], str]:
    """Every step's digest; a report tells how long things took, and so has never the same."""
    manifests = [json.loads(path.read_text()) for path in out.glob("steps/*/*/manifest.json")]
    return {(m["phase"], m["item"]): m["digest"] for m in manifests if m["phase"] != "report"}


def finished(out: Path) -> dict[tuple[str, str | None], str]:
    """Run, or go on, to the end."""
    process = launched(out)
    assert process.wait(PATIENCE) == 0
    assert list(members(process.pid)) == []
    assert list(out.glob("steps/*/*.partial")) == []
    return digests(out)


def test_killing_it_again_and_again_changes_nothing(tmp_path: Path) -> None:
    undisturbed = finished(tmp_path / "undisturbed")
    assert len(undisturbed) > 30
    out, random, left = tmp_path / "disturbed", Random(0), 0
    for number in range(KILLS):
        process = launched(out, workers=2 if number % 3 == 0 else 1)
        if number % 5 == 0:  # while it starts
            time.sleep(random.uniform(0.5, 3.0))
        else:  # soon after a training was saved, and later after a step began or ended
            seen, most = (saved, 0.1) if number < 5 else (steps, 1.2)
            before = seen(out)
            assert until(lambda seen=seen, before=before: seen(out) - before, PATIENCE)
            time.sleep(random.uniform(0.0, most))
        assert process.poll() is None, "it came to its end before it could be killed: kill earlier"
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        assert until(lambda group=process.pid: not list(members(group)), 1.0), "its workers outlive it"
        left += bool(saved(out))
    assert left, "no training was interrupted: kill more often"
    assert finished(out) == undisturbed
