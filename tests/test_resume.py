"""What `kill -9` leaves is gone on from, and nobody can tell from the result."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

import pytest

TESTS = Path(__file__).parent
RUN = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from deepfusion import Runtime, run
from tiny import recipe
run(recipe("device.epochs=30", "distill.budget_tokens=20000"), sys.argv[2], Runtime(workers=2, checkpoint_seconds=0.05))
"""
KILLS = 10
PATIENCE = 120.0  # seconds that anything may take on a busy machine

pytestmark = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for orphans in /proc")


def launched(out: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", RUN, str(TESTS), str(out)], start_new_session=True)


def members(group: int) -> Iterator[int]:
    """Processes of a group that are alive: the main process started it, and its workers stayed in it."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, its_group, *_ = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue  # ended while we looked
        if int(its_group) == group and state != "Z":
            yield int(stat.parent.name)


def until(true: Callable[[], object], seconds: float) -> bool:
    """Whether it came true in time."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if true():
            return True
        time.sleep(0.01)
    return bool(true())


def state(out: Path) -> set[tuple[str, int]]:
    """What changes as soon as a step begins or ends."""
    return {(str(path), path.stat().st_ino) for path in out.glob("steps/*/*") if path.exists()}


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
    out, random = tmp_path / "disturbed", Random(0)
    out.mkdir()
    resumable = 0
    for number in range(KILLS):
        process, before = launched(out), state(out)
        if number % 5:  # while steps run
            assert until(lambda before=before: state(out) != before, PATIENCE)
            time.sleep(random.uniform(0.0, 1.2))
        else:  # while it starts
            time.sleep(random.uniform(0.5, 3.0))
        assert process.poll() is None, "it was through before it could be killed: kill earlier"
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        at = time.monotonic()
        gone = until(lambda group=process.pid: not list(members(group)), PATIENCE)
        print(number, time.monotonic() - at, len(list(out.glob("steps/*/*/manifest.json"))))
        assert gone
        resumable += bool(list(out.glob("steps/*/*.partial/.trainer/checkpoint-*/complete")))
    print(resumable)
    assert finished(out) == undisturbed
