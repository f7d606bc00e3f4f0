"""A process that runs steps: it imports torch once, then forks a fresh child for every step it is told to run.

A child of its own gives each step its own peak memory, lets one be killed without the others noticing, and costs
milliseconds instead of the seconds that importing torch takes. The protocol is private to `engine`: length-prefixed
pickles on stdin, JSON lines on stdout.
"""

from __future__ import annotations

import ctypes
import errno
import gc
import importlib
import inspect
import json
import logging
import os
import pickle
import shutil
import signal
import struct
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any

from deepfusion.errors import InputError

# Every step needs these, and they are slow to import: once before forking, instead of once per step.
PRELOADED = ("accelerate", "sklearn.cluster", "torch", "transformers.trainer", "deepfusion.preload")
PR_SET_PDEATHSIG = 1  # of prctl(2)
TRIM_THRESHOLD, TOP_PAD, MMAP_THRESHOLD = -1, -2, -3  # of mallopt(3), in bytes
LONGEST_MESSAGE = 2000  # characters: what is told about an error must fit into a pipe at once

# Where it is installed, transformers imports it, and it complains that there are faster kernels to download.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def call(function: str, arguments: dict[str, Any], into: Path, runtime: Any) -> None:
    """Import `module:name` and call it with the arguments, `into`, and what else it takes of `runtime` and `resume`.

    It may always resume: a step's folder has nothing in it but what an attempt at the same step has left.
    """
    module, name = function.split(":")
    target = getattr(importlib.import_module(module), name)
    takes = inspect.signature(target).parameters
    extra = {key: value for key, value in {"runtime": runtime, "resume": True}.items() if key in takes}
    target(**arguments, **extra, into=into)


def keep_freed_memory() -> None:
    """Let this process's allocator keep what is freed for what comes next, where it is glibc's.

    By default it gives large tensors back to the system and has them cleared page by page when the next ones are made,
    which is a quarter of the time of training a model of 135 million parameters on a processor.
    """
    if sys.platform == "linux" and hasattr(allocator := ctypes.CDLL(None), "mallopt"):
        # Until glibc 2.34 it could be no more than 32 MiB, and not to set it, but the others, froze it at 128 KiB.
        if not allocator.mallopt(MMAP_THRESHOLD, 1 << 30):
            allocator.mallopt(MMAP_THRESHOLD, 1 << 25)
        allocator.mallopt(TRIM_THRESHOLD, (1 << 31) - 1)
        allocator.mallopt(TOP_PAD, 1 << 26)


def preload() -> None:
    """Import what every step needs, for good.

    What is imported stays: nobody, children included, need look through it for garbage again and again, nor copy the
    pages that looking writes to. Without this, runs of tiny models take twice as long.
    """
    for module in PRELOADED:
        importlib.import_module(module)
    gc.collect()
    gc.freeze()


def settle(runtime: Any) -> None:
    """Make results the same whatever runs beside: fixed threads, no tokenizer threads, quiet libraries."""
    import torch
    import transformers

    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not available[runtime.accelerator]:
        raise InputError(f"there is no {runtime.accelerator} accelerator on this machine: leave --accelerator out")
    torch.set_num_threads(runtime.threads)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def described(error: BaseException, into: Path) -> dict[str, Any]:
    """Whose error it is (`input`, `value`, `system` or `crash`), its words, and the system's number of it, if any.

    Libraries word a full disk in their own ways (safetensors keeps the system's words, torch does not), so a crash
    with no room left is taken for one.
    """
    if isinstance(error, OSError):
        kind, number = "system", error.errno or errno.EIO
    elif isinstance(error, ValueError):
        kind, number = "input" if isinstance(error, InputError) else "value", None
    elif os.strerror(errno.ENOSPC) in str(error) or shutil.disk_usage(into).free < 2**16:
        kind, number = "system", errno.ENOSPC
    else:
        kind, number = "crash", None
    message = f"{type(error).__name__}: {error}" if kind == "crash" else str(error)
    return {"kind": kind, "message": message[:LONGEST_MESSAGE], "errno": number}


def _die_with(parent: int) -> None:
    """End this process when its parent ends: at once on Linux, within a fifth of a second elsewhere.

    What outlives a run would write into the folders that the next run goes on from.
    """

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.2)
        os._exit(1)

    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it has ended already
            os._exit(1)
    else:
        threading.Thread(target=watch, daemon=True).start()


def _run_child(task: dict[str, Any], parent: int, tell: int) -> None:
    _die_with(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        log: Path = task["log"]
        log.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        settle(task["runtime"])
        keep_freed_memory()
        call(task["function"], task["arguments"], task["into"], task["runtime"])
    except BaseException as error:
        try:
            os.write(tell, json.dumps(described(error, task["into"])).encode())  # not by a file: the disk may be full
            traceback.print_exc()
        finally:
            os._exit(1)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def main() -> None:
    """Serve steps until stdin closes or the engine, whose process id is the one argument, is gone."""
    _die_with(int(sys.argv[1]))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the engine's to handle
    requests, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    preload()
    while header := requests.read(4):
        task = pickle.loads(requests.read(struct.unpack("<I", header)[0]))
        started = time.monotonic()
        told, tell = os.pipe()
        own, child = os.getpid(), os.fork()
        if child == 0:
            _run_child(task, own, tell)
        os.close(tell)
        _, status, usage = os.wait4(child, 0)
        with os.fdopen(told, "rb") as stream:
            error = stream.read()
        facts = {
            "error": json.loads(error) if error else None,
            "status": os.waitstatus_to_exitcode(status),
            "seconds": time.monotonic() - started,
            "cpu_seconds": usage.ru_utime + usage.ru_stime,
            "peak_bytes": usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024),
        }
        answers.write(json.dumps(facts) + "\n")
        answers.flush()
