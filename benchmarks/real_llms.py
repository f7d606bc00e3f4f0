"""The case study on real language models: every system per domain, over seeds, in nats per answer byte.

    python benchmarks/real_llms.py [--seeds 0 1 2] [--recipe recipes/real_llms.yaml] [--set key=value …]
        [--out runs/real_llms] [--keep benchmarks/NAME] [--workers 2] [--report benchmarks/NAME.md]

A seed's run goes on where it was stopped, and is not run again once it is finished. With `--keep`, what the report
needs of a finished seed is kept in that folder, with machine and commit, and a seed that is found there is not run:
seeds may then come from several machines. The report is Markdown, on stdout too. Values are of test questions of
private groups, but for general text, of which there is no other.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from deepfusion import Recipe
from deepfusion.conclusion import portable
from deepfusion.labels import SYSTEMS, label
from seeds import commit, machine, run

NATS, CHOICE = "answer_nats_per_byte", "choice_accuracy"
KEY = ("system", "domain", "subset", "metric")
Results = Mapping[str, Any]


def main() -> None:
    """Parse, run, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--recipe", default="recipes/real_llms.yaml")
    parser.add_argument("--set", action="append", default=[], dest="overrides")
    parser.add_argument("--out", type=Path, default=Path("runs/real_llms"))
    parser.add_argument("--keep", type=Path)
    parser.add_argument("--workers", type=int)
    parser.add_argument("--report", type=Path)
    arguments = parser.parse_args()
    recipe = Recipe.load(arguments.recipe, [*arguments.overrides, "seed=0"])
    asked_for = portable(recipe.model_dump(mode="json"))
    found: dict[int, Results] = {}
    for seed in arguments.seeds:
        kept = arguments.keep / f"seed-{seed}.json" if arguments.keep else None
        if kept is None or not kept.exists():
            results = run(arguments.recipe, seed, arguments.overrides, arguments.out / str(seed), arguments.workers)
            found[seed] = needed(results)
            if kept is not None:
                kept.parent.mkdir(parents=True, exist_ok=True)
                partial = kept.with_suffix(".partial")
                partial.write_text(json.dumps(found[seed] | {"recipe": asked_for}, indent=1) + "\n", encoding="utf-8")
                partial.replace(kept)
        else:
            found[seed] = json.loads(kept.read_text(encoding="utf-8"))
            # Settings that there were not yet, when the seed was run, count as they are by default: as it was then.
            if Recipe.model_validate(found[seed]["recipe"]).model_dump(mode="json") != asked_for:
                raise SystemExit(f"{kept} is of another study: give --keep another folder")
    text = "\n".join(report(found, sys.argv[1:]))
    print(text)
    if arguments.report:
        arguments.report.write_text(text, encoding="utf-8")


def needed(results: Results) -> dict[str, Any]:
    """Of a run's results what the report is made of, and what they were measured on."""
    wanted = (*KEY, "item", "value", "count")
    rows = [
        {name: row[name] for name in wanted}
        for row in results["rows"]
        if row["metric"] in (NATS, CHOICE) and row["subset"] != "all" and row["domain"] != "all"
    ]
    phases = [{name: phase[name] for name in ("name", "item", "cpu_seconds", "tokens")} for phase in results["phases"]]
    facts = {"machine": machine(), "commit": commit(), "versions": results["versions"]}
    return {**facts, "rows": rows, "phases": phases}


def report(found: Mapping[int, Results], given: Sequence[str]) -> Iterator[str]:
    """The Markdown page, line by line."""
    runs = list(found.values())
    first = runs[0]
    yield f"# Real language models, seeds {', '.join(map(str, found))}"
    yield ""
    yield f"    python benchmarks/real_llms.py {shlex.join(given)}".rstrip()
    yield ""
    for told, seeds in measured_on(found).items():
        yield f"Seeds {', '.join(map(str, seeds))}: {told}" if len(found) > len(seeds) else told
        yield ""
    yield "Nats per answer byte, on test questions of private groups; mean over seeds, in brackets seed by seed."
    yield ""
    private, general = asked(first, "private_only"), asked(first, "public")
    yield "| system | " + " | ".join([f"{d} ({n})" for d, n in (private | general).items()]) + " |"
    yield "|---|" + "---:|" * len(private | general)
    systems = [name for name in SYSTEMS if any(row["system"] == name for row in first["rows"])]
    for system in systems:
        cells = [over([best(r, system, d, "private_only", NATS) for r in runs], 4) for d in private]
        cells += [over([best(r, system, d, "public", NATS) for r in runs], 4) for d in general]
        yield f"| {label(system)}{', the best of each domain' if system == 'device' else ''} | {' | '.join(cells)} |"
    yield ""
    yield "## What was wanted"
    yield ""
    yield "| | " + " | ".join(private) + " |"
    yield "|---|" + "---:|" * len(private)
    for name, value, digits in (
        ("gap from base to centralised closed", closed, 2),
        ("below the base by", lambda r, d: of(r, "base", d) - of(r, "deepfusion", d), 4),
        ("below `pooled_text` by", lambda r, d: of(r, "pooled_text", d) - of(r, "deepfusion", d), 4),
        ("of the same gap, `pooled_text`", lambda r, d: closed(r, d, "pooled_text"), 2),
    ):
        yield f"| {name} | " + " | ".join(over([value(r, d) for r in runs], digits) for d in private) + " |"
    yield ""
    for domain in general:
        forgotten = over([of(r, "deepfusion", domain, "public") - of(r, "base", domain, "public") for r in runs], 4)
        yield f"Forgotten on {domain}, nats per byte more than the base's (0.02 is allowed): {forgotten}."
    yield ""
    yield "## Choice accuracy"
    yield ""
    counts = asked(first, "private_only", CHOICE)
    yield "| system | " + " | ".join(f"{domain} ({count})" for domain, count in counts.items()) + " |"
    yield "|---|" + "---:|" * len(counts)
    for system in systems:
        cells = [over([best(r, system, d, "private_only", CHOICE) for r in runs], 2) for d in counts]
        yield f"| {label(system)} | {' | '.join(cells)} |"
    yield ""
    yield "## Time"
    yield ""
    yield "| phase | processor minutes |"
    yield "|---|---:|"
    phases = dict.fromkeys(phase["name"] for phase in first["phases"])
    for name in phases:
        minutes = mean(sum(p["cpu_seconds"] for p in r["phases"] if p["name"] == name) for r in runs) / 60
        if minutes >= 0.5:
            yield f"| {name} | {minutes:.1f} |"
    total = mean(sum(phase["cpu_seconds"] for phase in results["phases"]) for results in runs) / 60
    yield f"| all | {total:.0f} |"
    yield ""


def measured_on(found: Mapping[int, Results]) -> dict[str, list[int]]:
    """Machine, versions and commit → the seeds that were measured there."""
    told: dict[str, list[int]] = {}
    for seed, results in found.items():
        versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
        told.setdefault(f"{results['machine']} Versions: {versions}. Commit {results['commit']}.", []).append(seed)
    return told


def asked(results: Results, subset: str, metric: str = NATS) -> dict[str, int]:
    """Domain → questions of a subset."""
    rows = (row for row in results["rows"] if row["system"] == "base" and row["subset"] == subset)
    return {row["domain"]: row["count"] for row in rows if row["metric"] == metric and row["domain"] != "all"}


def best(results: Results, system: str, domain: str, subset: str, metric: str) -> float | None:
    """A system's value, or that of its best item; none: it has none."""
    key = (system, domain, subset, metric)
    values = [row["value"] for row in results["rows"] if tuple(row[k] for k in KEY) == key]
    return (min if metric == NATS else max)(values, default=None)


def of(results: Results, system: str, domain: str, subset: str = "private_only") -> float:
    """Nats per byte of a system that has them."""
    value = best(results, system, domain, subset, NATS)
    assert value is not None, f"{system} was not measured on {domain}"
    return value


def closed(results: Results, domain: str, system: str = "deepfusion") -> float:
    """Share of the way from the base to centralised training."""
    base = of(results, "base", domain)
    return (base - of(results, system, domain)) / (base - of(results, "centralized", domain))


def over(values: Sequence[float | None], digits: int) -> str:
    """Mean of a value over seeds, and each seed's."""
    known = [value for value in values if value is not None]
    if not known:
        return ""
    shown = [f"{value:.{digits}f}" for value in known]
    return f"{mean(known):.{digits}f} ({', '.join(shown)})" if len(known) > 1 else shown[0]


if __name__ == "__main__":
    main()
