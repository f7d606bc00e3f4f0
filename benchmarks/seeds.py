"""Run a recipe over several seeds and report every system's median and range, with what they were measured on.

    python benchmarks/seeds.py demo --seeds 0 1 2 [--set key=value …] [--out runs/bench] [--report benchmarks/NAME.md]
        [--workers N]

Seeds that have run already are not run again. The report is Markdown, on stdout too.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from statistics import median
from typing import Any

from deepfusion.labels import METRICS, SUBSETS

MEASURES = ("token_accuracy", "token_log_perplexity", "choice_accuracy")


def main() -> None:
    """Parse, run, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--set", action="append", default=[], dest="overrides")
    parser.add_argument("--out", type=Path, default=Path("runs/bench"))
    parser.add_argument("--report", type=Path)
    parser.add_argument("--workers", type=int, help="steps at a time; changes nothing but the time")
    arguments = parser.parse_args()
    name = Path(arguments.recipe).stem
    found = [
        run(arguments.recipe, seed, arguments.overrides, arguments.out / f"{name}-{seed}", arguments.workers)
        for seed in arguments.seeds
    ]
    text = report(name, arguments.recipe, arguments.seeds, arguments.overrides, found)
    print(text)
    if arguments.report:
        arguments.report.write_text(text, encoding="utf-8")


def run(recipe: str, seed: int, overrides: list[str], out: Path, workers: int | None) -> dict[str, Any]:
    """Results of one seed."""
    command = [sys.executable, "-m", "deepfusion.cli", "run", recipe, "--quiet", "--out", str(out)]
    for override in [*overrides, f"seed={seed}"]:
        command += ["--set", override]
    if workers is not None:
        command += ["--workers", str(workers)]
    if failed := subprocess.run(command, check=False).returncode:  # it has said why
        raise SystemExit(failed)
    return json.loads((out / "results.json").read_text(encoding="utf-8"))


def report(name: str, recipe: str, seeds: list[int], overrides: list[str], found: list[dict[str, Any]]) -> str:
    """The Markdown page."""
    settings = "".join(f" --set {override}" for override in overrides)
    lines = [
        f"# {name}, seeds {', '.join(map(str, seeds))}",
        "",
        f"    python benchmarks/seeds.py {recipe} --seeds {' '.join(map(str, seeds))}{settings}",
        "",
        f"{machine()} Versions: {', '.join(f'{k} {v}' for k, v in found[0]['versions'].items())}. Commit {commit()}.",
        "Median over seeds, in brackets the smallest and largest. Of systems with several items (devices): the best.",
        "",
    ]
    closed = [results["headline"].get("gap_closed") for results in found]
    if all(value is not None for value in closed):
        lines += [f"Gap closed from base to centralised, accuracy on what only devices know: **{spread(closed)}**.", ""]
    for subset, title in SUBSETS.items():
        systems = dict.fromkeys(row["system"] for row in found[0]["rows"] if row["subset"] == subset)
        if not systems:
            continue
        lines += [
            f"## {title[0].upper() + title[1:]}",
            "",
            "| system | " + " | ".join(METRICS[m] for m in MEASURES) + " |",
        ]
        lines += ["|---|" + "---:|" * len(MEASURES)]
        for system in systems:
            cells = [spread([best(results, system, subset, metric) for results in found]) for metric in MEASURES]
            lines.append(f"| {system} | " + " | ".join(cells) + " |")
        lines.append("")
    lines += per_seed(seeds, found)
    lines += [
        "## Routing and server compute",
        "",
        "| seed | system | information about the domain (nats) | experts differ by |",
    ]
    lines += ["|---|---|---:|---:|"]
    for seed, results in zip(seeds, found, strict=True):
        for system, facts in results["routing"].items():
            difference = facts["expert_difference"]["mean"]
            lines.append(f"| {seed} | {system} | {facts['mutual_information']['mean']:.3f} | {difference:.3f} |")
    lines += ["", "| system | token-parameters | of it on the critical path |", "|---|---:|---:|"]
    for system in dict.fromkeys(part["system"] for part in found[0]["compute"]):
        parts = [part for part in found[0]["compute"] if part["system"] == system]
        total, longest = (sum(part[key] for part in parts) for key in ("token_parameters", "critical_path"))
        lines.append(f"| {system} | {total:.3g} | {longest:.3g} |")
    cpu = median(sum(phase["cpu_seconds"] for phase in results["phases"]) for results in found)
    lines += ["", f"Processor time of a whole run with all references, median: {cpu:.0f} s.", ""]
    return "\n".join(lines)


def per_seed(seeds: list[int], found: list[dict[str, Any]]) -> list[str]:
    """Accuracy / nats per answer token on what only devices know, one column a seed."""
    lines = [f"## Seed by seed: token accuracy / log-perplexity on {SUBSETS['private_only']}", ""]
    lines += ["| system | " + " | ".join(f"seed {seed}" for seed in seeds) + " |", "|---|" + "---:|" * len(seeds)]
    for system in dict.fromkeys(row["system"] for row in found[0]["rows"]):
        pairs = [[best(r, system, "private_only", f"token_{m}") for m in ("accuracy", "log_perplexity")] for r in found]
        cells = [" / ".join("" if value is None else f"{value:.3f}" for value in pair) for pair in pairs]
        lines.append(f"| {system} | " + " | ".join(cells) + " |")
    return [*lines, ""]


def best(results: dict[str, Any], system: str, subset: str, metric: str) -> float | None:
    """A system's value over all domains; of several items the best."""
    values = [
        row["value"]
        for row in results["rows"]
        if (row["system"], row["domain"], row["subset"], row["metric"]) == (system, "all", subset, metric)
    ]
    return (max if metric.endswith("accuracy") else min)(values) if values else None


def spread(values: list[float | None]) -> str:
    """Median and range as text."""
    known = [value for value in values if value is not None]
    return f"{median(known):.3f} ({min(known):.3f}–{max(known):.3f})" if known else ""


def machine() -> str:
    """Processor, cores, and the instructions that decide how fast they are."""
    import torch

    from deepfusion.precision import knows_bfloat16

    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        model = next(line.split(":")[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line)
    knows = f"{torch.backends.cpu.get_cpu_capability()}, {'with' if knows_bfloat16('cpu') else 'without'} bfloat16"
    return f"Machine: {os.cpu_count()} cores of {model.strip()} ({knows}), {platform.system()}."


def commit() -> str:
    """The commit that ran, marked if the tree had changes."""
    described = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False)
    return described.stdout.strip() or "unknown"


if __name__ == "__main__":
    main()
