"""Tables of what a run would do, found, and did inside: from `results.json` to what a terminal prints."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from rich.console import RenderableType
from rich.markup import escape
from rich.table import Column, Table

from deepfusion.artifacts import MANIFEST
from deepfusion.display import amount, duration
from deepfusion.findings import RESULT, relative
from deepfusion.labels import LISTED, METRICS, SUBSETS, in_order, joined, kind, left_out
from deepfusion.outcome import SCHEMA

if TYPE_CHECKING:
    from deepfusion.metrics import ResultRow, Subset
    from deepfusion.planner import PlannedStep

INSIDE = ("clusters", "transfer", "routing", "bytes", "memory", "rejected", "warnings")
KINDS = {
    "control": "same text and compute:",
    "baseline": "baselines:",
    "bound": "all text in one place:",
    "other": "others:",
}
ALWAYS = ("data", "device", "upload", "cluster", "proxy", "transfer", "assemble", "evaluate", "report")


def read_results(run: Path) -> dict[str, Any]:
    """The results of a finished run, from its folder or the file itself.

    Raises:
        ValueError: there are none, and then how far the run is; or they were written by another version.
    """
    path = run if run.is_file() else run / "results.json"
    try:
        results = cast("dict[str, Any]", json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise ValueError(_unfinished(run)) from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if results.get("schema") != SCHEMA:
        raise ValueError(f"{path} has schema {results.get('schema')!r}; this version reads {SCHEMA}")
    return results


def _unfinished(run: Path) -> str:
    """Of a folder without results: what is done in it, what is missing, and how to go on."""
    counts: dict[str, dict[bool, int]] = {}
    for step in sorted((run / "steps").glob("*/*")):
        done = (step / MANIFEST).is_file() and not step.name.endswith(".partial")
        phase = counts.setdefault(step.parent.name, {True: 0, False: 0})
        phase[done] += 1
    if not counts:
        return f"{run} is not a finished run: it has no results.json"

    def told(done: bool) -> str:
        named = [f"{phase} ({of[done]})" if of[done] > 1 else phase for phase, of in counts.items() if of[done]]
        return joined(named) or "nothing"

    missing = [phase for phase in ALWAYS if not counts.get(phase, {}).get(True)]
    begun = f"; begun: {told(False)}" if any(of[False] for of in counts.values()) else ""
    return (
        f"{run} is not a finished run, or is still running. Done: {told(True)}{begun}; missing: {joined(missing)}, and "
        f"what the recipe asks for beside. Go on with the command that began it; `deepfusion plan RECIPE --out {run}` "
        "and the --set of that command list every step that is left"
    )


def inside(results: Mapping[str, Any]) -> dict[str, Any]:
    """The part of the results that tells how they came about."""
    return {"run": results["run"], **{key: results[key] for key in INSIDE if key in results}}


def plan(steps: Sequence[PlannedStep]) -> list[RenderableType]:
    """What would run, and why."""
    table = Table("phase", "item", "state", "why", box=None)
    colours = {"done": "green", "run": "yellow", "wait": "dim"}
    for step in steps:
        state = f"[{colours[step.state]}]{step.state}[/]"
        table.add_row(escape(step.phase), escape(step.item or ""), state, escape(step.reason))
    counts = {state: sum(step.count for step in steps if step.state == state) for state in colours}
    waits = "waits" if counts["wait"] == 1 else "wait"
    return [table, f"{counts['done']} done, {counts['run']} would run, {counts['wait']} {waits} for those"]


def overview(results: Mapping[str, Any]) -> list[RenderableType]:
    """What the systems answer beside what each took the server, what that was spent on, and where the time went."""
    rows = [row for row in results["rows"] if row["domain"] == "all" and row["value"] is not None]
    subsets: list[Subset] = [subset for subset in SUBSETS if any(row["subset"] == subset for row in rows)]
    parts = results.get("compute", [])
    spent = relative((part["system"], part["part"], float(part["token_parameters"])) for part in parts)
    tables = [_systems([row for row in rows if row["subset"] == subsets[0]], SUBSETS[subsets[0]], spent)]
    if len(subsets) > 1:
        tables.append(_by_subset([row for row in rows if row["metric"] == "token_accuracy"]))
    notes = ["Server compute beside a system is in multiples of deepfusion's."] if spent else []
    notes.append("Times are those of the runs that did the work, summed over steps.")
    return [*_spaced([*tables, _compute(parts), _time(results["phases"])]), *notes, *_left_out(results)]


def inspection(results: Mapping[str, Any]) -> list[RenderableType]:
    """Clusters and their teachers, devices and what they sent, routing, and what was warned of."""
    rejected = _left_out(results)
    warnings = [f"warning: {escape(warning)}" for warning in results.get("warnings", [])]
    tables = [_clusters(results), _devices(results), _routing(results.get("routing", {}))]
    return [*_spaced(tables), *rejected, *warnings]


def _left_out(results: Mapping[str, Any]) -> list[str]:
    return [f"left out: {escape(left_out(r['device'], r['reason']))}" for r in results["rejected"]]


def _spaced(tables: Sequence[Table]) -> list[RenderableType]:
    """The tables that have rows, a line between them."""
    return [part for table in tables if table.row_count for part in (table, "")]


def metrics(rows: Iterable[ResultRow]) -> Table:
    """One checkpoint's metrics by domain and subset."""
    values: dict[tuple[str, str], dict[str, float]] = {}
    counts: dict[tuple[str, str], int] = {}
    for row in rows:
        values.setdefault((row.domain, row.subset), {})[row.metric] = row.value
        counts[row.domain, row.subset] = max(row.count, counts.get((row.domain, row.subset), 0))
    names = [name for name in METRICS if any(name in part for part in values.values())]
    table = Table("domain", "questions", *(METRICS[name] for name in names), box=None)
    for (domain, subset), part in values.items():
        label = domain if subset == "all" else f"{domain}, {SUBSETS.get(cast('Subset', subset), subset)}"
        cells = [f"{part[name]:.3f}" if name in part else "" for name in names]
        table.add_row(escape(label), str(counts[domain, subset]), *cells)
    return table


def _systems(rows: Sequence[Mapping[str, Any]], title: str, spent: Mapping[str, float]) -> Table:
    """Every system over all domains; of several items (devices, clusters) the mean and the best."""
    names = [name for name in METRICS if any(row["metric"] == name for row in rows)]
    if "judge_score" in names:  # one column more than a terminal has room for
        names.remove("answer_nats_per_byte")
    heads = [*(METRICS[name] for name in names), *(["server compute"] if spent else [])]
    table = Table(Column(title, no_wrap=True), *map(_number, heads), box=None)
    for system, several in _grouped(table, rows):
        values = {
            name: [float(r["value"]) for r in rows if r["system"] == system and r["metric"] == name] for name in names
        }
        cost = f"{spent[system]:.2f}" if system in spent else ""
        means = [f"{sum(v) / len(v):.3f}" if v else "" for v in values.values()]
        table.add_row(_called(system, several), *means, cost, style="bold" if system == RESULT else None)
        if several > 1:
            best = [f"{(max if name.endswith('accuracy') else min)(v):.3f}" if v else "" for name, v in values.items()]
            table.add_row(f"{escape(system)}, best of {several}", *best)
    return table


def _by_subset(rows: Sequence[Mapping[str, Any]]) -> Table:
    """One metric of every system on each part of the questions, the mean of several items."""
    table = Table(Column(METRICS[rows[0]["metric"]], no_wrap=True), *map(_number, SUBSETS.values()), box=None)
    for system, several in _grouped(table, rows):
        own = [row for row in rows if row["system"] == system]
        values = [[float(row["value"]) for row in own if row["subset"] == subset] for subset in SUBSETS]
        means = [f"{sum(v) / len(v):.3f}" if v else "" for v in values]
        table.add_row(_called(system, several), *means, style="bold" if system == RESULT else None)
    return table


def _grouped(table: Table, rows: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, int]]:
    """Every system and its number of items, in order; a line above those that are not stages says what they are."""
    last = "stage"
    for system in in_order({row["system"] for row in rows}):
        if kind(system) != last:
            last = kind(system)
            table.add_row(KINDS[last], style="dim")
        yield system, len({row["item"] for row in rows if row["system"] == system})


def _called(system: str, several: int) -> str:
    return escape(system) if several == 1 else f"{escape(system)}, mean of {several}"


def _number(head: str) -> Column:
    """A column of numbers, no wider than its head's longest word."""
    return Column("\n".join(head.rsplit(" ", 1)) if len(head) < 20 else head, justify="right", no_wrap=True)


def _time(phases: Sequence[Mapping[str, Any]]) -> Table:
    table = Table("phase", "steps", "time", "processor time", box=None)
    for name in dict.fromkeys(phase["name"] for phase in phases):
        steps = [phase for phase in phases if phase["name"] == name]
        wall, cpu = (sum(float(step[key]) for step in steps) for key in ("seconds", "cpu_seconds"))
        table.add_row(escape(name), str(len(steps)), duration(wall), duration(cpu))
    return table


def _compute(parts: Sequence[Mapping[str, Any]]) -> Table:
    """Token-parameters of the server's training: forward counts once, backward twice."""
    table = Table("server compute", "total", "critical path", "of which", box=None)
    for system in dict.fromkeys(part["system"] for part in parts):
        own = [part for part in parts if part["system"] == system]
        total, longest = (sum(float(part[key]) for part in own) for key in ("token_parameters", "critical_path"))
        names = ", ".join(f"{part['part']} {amount(part['token_parameters'])}" for part in own)
        table.add_row(escape(system), amount(total), amount(longest), escape(names))
    return table


def _clusters(results: Mapping[str, Any]) -> Table:
    table = Table("cluster", "devices", "lineages, and how far members lie from their mean", "documents", box=None)
    clusters, written = results.get("clusters", {}), results.get("transfer", {}).get("per_cluster", [])
    for number, members in enumerate(clusters.get("members", [])):
        proxies = [
            f"{proxy['model_type']} of {len(proxy['members'])} ({proxy['distance']:.2f})"
            for proxy in clusters["proxies"]
            if proxy["cluster"] == number
        ]
        documents = str(written[number]) if number < len(written) else ""
        table.add_row(str(number), escape(", ".join(members)), escape(", ".join(proxies)), documents)
    return table


def _devices(results: Mapping[str, Any]) -> Table:
    """Devices, and the proxies that wrote: whose cluster, what they taught, what travelled."""
    groups = results.get("clusters", {}).get("members", [])
    cluster = {device: str(number) for number, members in enumerate(groups) for device in members}
    wrote = results.get("transfer", {}).get("by_writer", {})
    sent = results["bytes"]["per_device"]
    table = Table("device or writer", "cluster", "documents written", "bytes up", "bytes down", box=None)
    for name in dict.fromkeys([*cluster, *sent, *wrote]):
        travelled = [amount(sent[name][way]) if name in sent else "" for way in ("up", "down")]
        table.add_row(escape(name), cluster.get(name, ""), str(wrote.get(name, "")), *travelled)
    table.add_row("all", "", str(sum(wrote.values())), *(amount(results["bytes"][way]) for way in ("up", "down")))
    return table


def _routing(systems: Mapping[str, Mapping[str, Any]]) -> Table:
    table = Table("MoE", "I(domain; expert), nats", "difference of experts", "dead [layer, expert]", box=None)
    for system, facts in systems.items():
        information, difference = (facts[key]["mean"] for key in ("mutual_information", "expert_difference"))
        found = facts["dead"]
        dead = escape(", ".join(map(str, found))) or "none" if len(found) <= LISTED else f"{len(found)} in all"
        table.add_row(escape(system), f"{information:.3f}", f"{difference:.3f}", dead)
    return table
