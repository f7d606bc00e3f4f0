"""The same federation with more and more devices, under Flower's simulation engine: time, memory and bytes against N.

    python benchmarks/simulation.py --devices 16 128 1024 --out runs/simulation --report benchmarks/simulation.md

Each device holds about one private fact, so that facts have more holders the more devices there are, and all else
stays as it is. Collecting is measured by the clock, and so is the devices' training in it, over the processes in which
they take turns. The rest is in CPU seconds, which other programs on the machine change little.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from deepfusion.artifacts import Upload
from deepfusion.config import Recipe
from deepfusion.federation.messages import pack
from deepfusion.federation.project import Project

RECIPE = Path(__file__).with_suffix(".yaml")
TRAINED = ("write", "joint", "branch", "tune")  # what the method's compute on the server is made of
COLUMNS = {
    "devices": "N",
    "start": "to the first verdict",
    "collect": "from there to the last",
    "train": "of it devices' training",
    "train_cpu": "that in CPU",
    "door": "door, CPU",
    "cluster": "cluster, CPU",
    "proxy": "proxies, CPU",
    "distil": "write, distil, tune, CPU",
    "evaluate": "evaluate, CPU",
    "report": "report, CPU",
    "whole": "the whole run",
}


@dataclass(frozen=True)
class Peak:
    """The most memory that was held at once, in bytes: by the process of the server's app, and by it and all others."""

    server: int
    all: int


def simulated(devices: int, holders: int, out: Path, workers: int) -> tuple[Peak, float]:
    """Run a fleet in processes of its own; its peak memory and its seconds."""
    sets = [f"--set=data.partition.holders={holders}"]
    command = [sys.executable, "-m", "deepfusion.cli", "federation", "simulate", str(RECIPE), "--out", str(out)]
    begun = time.monotonic()
    log = out.with_suffix(".log")
    with log.open("ab") as stream:
        child = subprocess.Popen(
            [*command, "--devices", str(devices), "--workers", str(workers), *sets], stdout=stream, stderr=stream
        )
        peak = watch(psutil.Process(child.pid), child)
    if child.returncode:
        sys.exit(f"{' '.join(command)} ended with {child.returncode}: see {log}")
    return peak, time.monotonic() - begun


def watch(root: psutil.Process, child: subprocess.Popen[bytes]) -> Peak:
    """Look at a process and all that it has started, until it ends."""
    server = everything = 0
    while child.poll() is None:
        held = dict(proportional([root, *children(root)]))
        server, everything = max(server, held.get(root.pid, 0)), max(everything, sum(held.values()))
        time.sleep(5)
    return Peak(server, everything)


def children(root: psutil.Process) -> list[psutil.Process]:
    try:
        return root.children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def proportional(processes: Sequence[psutil.Process]) -> Iterator[tuple[int, int]]:
    """Each process's memory, with its share of what several hold (PSS)."""
    for process in processes:
        try:
            yield process.pid, process.memory_full_info().pss
        except psutil.Error:
            continue


def measured(devices: int, root: Path, workers: int) -> dict[str, Any]:
    """Everything about one fleet."""
    out = root / f"{devices}"
    project = Project(out)
    holders = max(1, devices // facts())
    peak, whole = simulated(devices, holders, out, workers)
    first, last = collecting(project)
    results = json.loads((project.run / "results.json").read_text())
    cpu, flops = defaultdict[str, float](float), 0.0
    for phase in results["phases"]:
        cpu[phase["name"]] += phase["cpu_seconds"]
        flops += (phase["flops"] or 0.0) if phase["name"] in TRAINED else 0.0
    uploads = [Upload.load(folder) for folder in sorted((project.inbox / "uploads").iterdir())]
    trained = [json.loads(path.read_text()) for path in out.glob("devices/*/store/steps/device/*/manifest.json")]
    assert len(uploads) == len(trained) == devices
    [corpus] = (project.run / "steps" / "public").iterdir()
    texts = {name: (corpus / name).read_bytes() for name in ("public.jsonl", "questions.jsonl")}
    return {
        "devices": devices,
        "start": first,
        "collect": last - first,
        "train": sum(one["seconds"] for one in trained) / workers,
        "train_cpu": sum(one["cpu_seconds"] for one in trained),
        "door": cpu["upload"],
        "cluster": cpu["cluster"],
        "proxy": cpu["proxy"],
        "distil": sum(cpu[name] for name in (*TRAINED, "assemble")),
        "evaluate": cpu["evaluate"],
        "report": report_cpu(project),
        "whole": whole,
        "server_bytes": peak.server,
        "all_bytes": peak.all,
        "step_bytes": max(phase["peak_bytes"] for phase in results["phases"]),
        "up": sum(upload.bytes for upload in uploads),
        "down": sum(map(len, pack(texts).values())),
        "flops": flops,
    }


def facts() -> int:
    """Private facts in the recipe's world."""
    source = Recipe.load(RECIPE).data.source
    assert source.kind == "synthetic"
    return source.domains * source.private_facts


def collecting(project: Project) -> tuple[float, float]:
    """Seconds from the start of collecting to the first verdict, before which processes start, and to the last."""
    begun = float(json.loads((project.inbox / "started.json").read_text()))
    times = [path.stat().st_mtime - begun for path in (project.inbox / "verdicts").glob("*.json")]
    return min(times), max(times)


def report_cpu(project: Project) -> float:
    """Of the report, which cannot tell of itself."""
    [manifest] = project.run.glob("steps/report/*/manifest.json")
    return float(json.loads(manifest.read_text())["cpu_seconds"])


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Seconds in one table, memory, bytes and compute in another."""
    lines = ["Seconds:", "", f"| {' | '.join(COLUMNS.values())} |", f"|{'---:|' * len(COLUMNS)}"]
    lines += [f"| {' | '.join(_figure(row[name]) for name in COLUMNS)} |" for row in rows]
    lines += [
        "",
        "| N | server's app, MiB | all processes, MiB | largest step, MiB | up, bytes a device | up, MB in all | down, "
        "bytes a device | server's compute, GFLOP |",
        f"|{'---:|' * 8}",
    ]
    for row in rows:
        memory = " | ".join(f"{row[name] / 2**20:,.0f}" for name in ("server_bytes", "all_bytes", "step_bytes"))
        lines.append(
            f"| {row['devices']:,} | {memory} | {row['up'] / row['devices']:,.0f} | {row['up'] / 1e6:,.1f} | "
            f"{row['down']:,} | {row['flops'] / 1e9:.2f} |"
        )
    return "\n".join(lines)


def _figure(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:,.0f}" if value >= 10 else f"{value:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", type=int, nargs="+", default=[16, 128, 1024])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("runs/simulation"))
    parser.add_argument("--report", type=Path)
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    for devices in given.devices:
        kept = given.out / f"{devices}.json"
        if not kept.is_file():  # a fleet that was measured is not measured again
            kept.write_text(json.dumps(measured(devices, given.out, given.workers), indent=1))
        rows.append(json.loads(kept.read_text()))
        print(table(rows), end="\n\n", flush=True)
    if given.report:
        given.report.write_text(f"# Scale by simulation\n\n    {' '.join(['python', *sys.argv])}\n\n{table(rows)}\n")


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()
