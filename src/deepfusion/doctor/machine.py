"""What there is to run on, and whether it is enough."""

from __future__ import annotations

import heapq
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil
import torch

from deepfusion.config import Runtime
from deepfusion.display import size
from deepfusion.doctor.diagnosis import Check, Machine
from deepfusion.labels import joined

CGROUP = Path("/sys/fs/cgroup")  # what a container may have, where there is one
MAIN = 250e6  # bytes of the process that the run is started by


def look(out: Path, runtime: Runtime) -> Machine:
    """The machine as it is now; `out` need not be there."""
    there = next(folder for folder in (out.absolute(), *out.absolute().parents) if folder.exists())
    accelerators = [torch.cuda.get_device_name(n) for n in range(torch.cuda.device_count())]
    return Machine(
        cores=os.cpu_count() or 1,
        accelerator=runtime.accelerator,
        accelerators=(*accelerators, *(["mps"] if torch.backends.mps.is_available() else [])),
        memory_bytes=_memory(runtime.accelerator),
        disk_bytes=shutil.disk_usage(there).free,
    )


def _memory(accelerator: str) -> int:
    """Bytes that are free for a run."""
    if accelerator == "cuda" and torch.cuda.is_available():
        return torch.cuda.mem_get_info()[0]
    free = psutil.virtual_memory().available
    try:
        limit, used = (int((CGROUP / f"memory.{name}").read_text()) for name in ("max", "current"))
    except (OSError, ValueError):  # no container, or one without a limit
        return free
    return min(free, limit - used)


def available(runtime: Runtime) -> bool:
    """Whether the accelerator that was asked for is there."""
    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    return there[runtime.accelerator]


def checks(machine: Machine, runtime: Runtime) -> Iterator[Check]:
    """What is to be said of the machine alone."""
    has = ", ".join(machine.accelerators) or "no accelerator"
    fact = f"{machine.cores} cores, {has}, {size(machine.memory_bytes)} of memory and {size(machine.disk_bytes)}"
    yield Check("machine", "machine", "ok", f"{fact} of disk free")
    if not available(runtime):
        yield Check(
            "machine", "--accelerator", "problem", f"there is no {runtime.accelerator} accelerator on this machine",
            "leave --accelerator out",
        )  # fmt: skip
    threads = max(1, runtime.workers) * runtime.threads
    if threads > machine.cores:
        yield Check(
            "machine", "--workers", "warning",
            f"{runtime.workers} workers of {runtime.threads} threads share {machine.cores} cores",
            "more than there are cores make a run slower: lower --workers or --threads",
        )  # fmt: skip


def without_bfloat16(widened: Sequence[str], slow: Sequence[str], runtime: Runtime) -> Iterator[Check]:
    """What is computed in float32 for want of bfloat16, and what is not and takes all the longer."""
    lacks = f"this {runtime.accelerator} has no instructions for bfloat16"
    if widened:
        fact = f"{lacks}: float32 is used for {joined(list(widened))}, which is faster here and takes more memory"
        yield Check("machine", "bfloat16", "ok", fact)
    for key in slow:
        yield Check(
            "machine", key, "warning", f"{lacks}, and what is saved in it is trained in it: several times slower",
            f"set {key}=float32",
        )  # fmt: skip


def memory(peaks: Sequence[tuple[float, str]], machine: Machine, runtime: Runtime) -> Check:
    """Whether the largest steps fit side by side; `peaks` has the bytes of every step's process, and its phase."""
    workers = max(1, runtime.workers)
    of = heapq.nlargest(workers, peaks)
    largest = [peak for peak, _ in of]
    need, free = sum(largest) + (MAIN if runtime.workers else 0), machine.memory_bytes
    side = f"{workers} steps side by side take up to {size(largest[0])} each" if workers > 1 else "for one step"
    side += f" ({of[0][1]})"
    fact = f"{size(need)} at most: {side}"
    if need <= free:
        return Check("machine", "memory", "ok", fact)
    told = f"{fact}, and {size(free)} are free"
    fitting = next((n for n in range(workers - 1, 0, -1) if sum(largest[:n]) + MAIN <= free), 0)
    if fitting:
        return Check("machine", "memory", "warning", told, f"run with --workers {fitting}")
    smaller = (
        "lower rows and context of the `training` of that phase (device, distill or tune), or set its "
        "gradient_checkpointing; for devices device.method: lora; or choose smaller models"
    )
    return Check("machine", "memory", "problem", told, smaller)


def disk(kept: float, working: float, machine: Machine) -> Check:
    """Whether there is room for what steps leave, and for what trainings save on their way."""
    fact = f"{size(kept)}, and up to {size(working)} more while models are trained"
    if kept + working <= machine.disk_bytes:
        return Check("machine", "disk", "ok", fact)
    told = f"{fact}, and {size(machine.disk_bytes)} are free"
    return Check("machine", "disk", "problem", told, "give --out a folder on a larger disk, or make room")
