"""A process that runs steps: it imports torch once, then forks a fresh child for every step it is told to run.

A child of its own gives each step its own peak memory, lets one be killed without the others noticing, and costs
milliseconds instead of the seconds that importing torch takes. The protocol is private to `engine`: length-prefixed pickles on
stdin, JSON lines on stdout.
"""

from __future__ import annotations

import importlib
import inspect
import json
import os
import pickle
import signal
import struct
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any

ERROR = ".error.json"
POLL_SECONDS = 0.01


def call(function: str, arguments: dict[str, Any], into: Path, runtime: Any) -> None:
    """Import `module:name` and call it with the arguments, `into`, and `runtime` if it takes one."""
    module, name = function.split(":")
    target = getattr(importlib.import_module(module), name)
    extra = {"runtime": runtime} if "runtime" in inspect.signature(target).parameters else {}
    target(**arguments, **extra, into=into)


def settle(runtime: Any) -> None:
    """Make results the same whatever runs beside: fixed threads, no tokenizer threads, quiet libraries."""
    import torch
    import transformers

    torch.set_num_threads(runtime.threads)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def _run_child(task: dict[str, Any], log: Path) -> None:
    parent = os.getppid()

    def die_with_parent() -> None:
        while os.getppid() == parent:
            time.sleep(0.2)
        os._exit(1)

    threading.Thread(target=die_with_parent, daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    log.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    try:
        settle(task["runtime"])
        call(task["function"], task["arguments"], task["into"], task["runtime"])
    except BaseException as error:
        traceback.print_exc()
        sys.stderr.flush()
        kind = "user" if isinstance(error, ValueError) else "disk" if isinstance(error, OSError) else "crash"
        message = f"{type(error).__name__}: {error}" if kind == "crash" else str(error)
        facts = {"kind": kind, "message": message, "errno": getattr(error, "errno", None)}
        (task["into"] / ERROR).write_text(json.dumps(facts))
        os._exit(1)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def main() -> None:
    """Serve steps until stdin closes or the parent is gone."""
    parent = os.getppid()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the engine's to handle
    requests, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    import accelerate  # noqa: F401  (imported before forking: every child needs it, and it is slow)
    import sklearn.cluster  # noqa: F401
    import torch  # noqa: F401
    import transformers.trainer  # noqa: F401

    import deepfusion.preload  # noqa: F401

    while header := requests.read(4):
        task = pickle.loads(requests.read(struct.unpack("<I", header)[0]))  # noqa: S301  (from our own parent)
        started = time.monotonic()
        child = os.fork()
        if child == 0:
            _run_child(task, task["log"])
        while True:
            done, status, usage = os.wait4(child, os.WNOHANG)
            if done:
                break
            if os.getppid() != parent:
                os.kill(child, signal.SIGKILL)
                os._exit(1)
            time.sleep(POLL_SECONDS)
        facts = {
            "status": os.waitstatus_to_exitcode(status),
            "seconds": time.monotonic() - started,
            "cpu_seconds": usage.ru_utime + usage.ru_stime,
            "peak_bytes": usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024),
        }
        answers.write(json.dumps(facts) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
