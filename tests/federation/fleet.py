"""A federation of real Flower processes on this machine, none of which outlives the test that started it."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Self

import psutil

BIN = Path(sys.executable).parent
MARK = "DEEPFUSION_TEST_FLEET"  # in the environment of every process of a fleet, also of those that left its group
PATIENCE = 240.0  # seconds that anything may take on a busy machine


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def _die_with_the_test() -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)


class Fleet:
    """Processes by name. Leaving it, by whatever way, ends them and all that they started."""

    def __init__(self, root: Path) -> None:
        self.root, self.mark = root, uuid.uuid4().hex
        self.logs = root / "logs"
        self.running: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> Self:
        self.logs.mkdir(parents=True)
        return self

    def __exit__(self, *error: object) -> None:
        end = time.monotonic() + 30
        while (left := list(self.processes())) and time.monotonic() < end:
            for process in left:
                with suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
            for one in self.running.values():
                one.poll()
            time.sleep(0.1)
        for one in self.running.values():
            one.wait(30)
        assert not left, f"processes are left: {left}"

    @property
    def environment(self) -> dict[str, str]:
        """Quiet, offline, and with our own Flower home."""
        return os.environ | {
            "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
            "FLWR_HOME": str(self.root / "flwr"),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "PYTHONUNBUFFERED": "1",
            MARK: self.mark,
        }

    def start(self, name: str, command: list[str], folder: Path, **environment: str) -> None:
        """Start a process whose output goes to `logs/<name>.log`."""
        with (self.logs / f"{name}.log").open("ab") as log:
            self.running[name] = subprocess.Popen(
                [str(BIN / command[0]), *command[1:]], cwd=folder, env=self.environment | environment, stdout=log,
                stderr=log, stdin=subprocess.DEVNULL, start_new_session=True,
                preexec_fn=_die_with_the_test if sys.platform == "linux" else None,
            )  # fmt: skip

    def call(self, command: list[str], folder: Path, seconds: float = PATIENCE, **environment: str) -> str:
        """Run a command to its end; gives what it printed."""
        done = subprocess.run(
            [str(BIN / command[0]), *command[1:]], cwd=folder, env=self.environment | environment, check=False,
            capture_output=True, text=True, timeout=seconds,
        )  # fmt: skip
        assert done.returncode == 0, f"{' '.join(command)}: {done.stdout}{done.stderr}"
        return done.stdout

    def kill(self, name: str) -> None:
        """End a process without warning; what it started ends by itself."""
        process = self.running.pop(name)
        process.kill()
        process.wait()

    def interrupt(self, name: str) -> None:
        """Press Ctrl-C in the terminal of a process."""
        os.killpg(self.running[name].pid, signal.SIGINT)

    def ended(self, name: str) -> bool:
        """Whether a process has come to its end by itself."""
        return self.running[name].poll() is not None

    def log(self, name: str) -> str:
        """What a process has printed so far."""
        path = self.logs / f"{name}.log"
        return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""

    def processes(self) -> Iterator[int]:
        """All processes of the fleet that are alive, whatever group they are in."""
        for process in psutil.process_iter(["environ", "status"]):
            marked = (process.info["environ"] or {}).get(MARK) == self.mark  # None: another user's
            if marked and process.info["status"] != psutil.STATUS_ZOMBIE:
                yield process.pid


def until(true: Callable[[], object], what: str, seconds: float = PATIENCE) -> None:
    """Wait for something to come true."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, f"waited {seconds:g} s in vain until {what}"
        time.sleep(0.2)
