"""Sections on how well the systems do."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from markupsafe import Markup

from deepfusion import figures
from deepfusion.findings import BASE, CEILING, RESULT, Findings, main_subset, mean
from deepfusion.labels import KINDS, METRICS, QUESTIONS, SUBSETS, in_order, kind, label
from deepfusion.metrics import ResultRow, Subset
from deepfusion.page.parts import Section, Table, share_of_gap, value

SHOWN = ("token_accuracy", "token_log_perplexity", "choice_accuracy", "judge_score")


def results(findings: Findings, rows: Sequence[ResultRow]) -> Section:
    """Every system by subset and metric, beside what it cost."""
    present = {(row.subset, row.metric) for row in rows if row.domain == "all"}
    columns: list[tuple[Subset, str]] = [(s, m) for s in SUBSETS for m in SHOWN if (s, m) in present]
    spans: Counter[Subset] = Counter(part for part, _ in columns)
    systems, subset = _systems(rows), main_subset(rows)
    values = [[mean(rows, system, metric, part) for part, metric in columns] for system in systems]
    table = Table(
        heads=["system", *(METRICS[metric] for _, metric in columns)],
        rows=[[_label(rows, system), *map(value, line)] for system, line in zip(systems, values, strict=True)],
        groups=[("", 1), *((SUBSETS[part], span) for part, span in spans.items())],
        headings=_headings(systems),
        strong=_ours(systems),
        best=_best(values, systems, [metric == "token_log_perplexity" for _, metric in columns]),
        caption="▲ best of each column, centralised training aside. Token accuracy is the share of the answers' tokens "
        "that the model would choose itself, given those before; log-perplexity is in nats per answer token, less is "
        "better; choice accuracy is the share of questions whose right option has the highest likelihood per byte.",
    )
    if any(metric == "judge_score" for _, metric in columns):
        judge = findings.recipe.get("judge") or {}
        more = (
            f" Judge's score: what {judge.get('model', 'an LLM')} thinks of the answers that models write, from 0 to "
            f"100, on at most {judge.get('questions', 'some')} questions of each domain."
        )
        table = replace(table, caption=table.caption + more)
    if spent := findings.relative_compute():
        more = (
            " Server compute is in multiples of this run's; a stage has all that was spent until then, and what was "
            "not trained at the server has none."
        )
        cells = [f"{spent[system]:.2f}" if system in spent else "" for system in systems]
        table = _wider(table, "server compute", cells, more)
    base, ceiling = (mean(rows, system, "token_accuracy", subset) for system in (BASE, CEILING))
    if base is not None and ceiling is not None and base != ceiling:
        more = (
            f" Gap closed: how far token accuracy on {QUESTIONS[subset]} has come from the base model's (0) towards "
            "that of centralised training (1)."
        )
        accuracy = [mean(rows, system, "token_accuracy", subset) for system in systems]
        table = _wider(table, "gap closed", [share_of_gap(number, base, ceiling) for number in accuracy], more)
    return Section("results", "Results", tables=[table])


def _wider(table: Table, head: str, cells: Sequence[str], caption: str) -> Table:
    """A table with one column and one sentence more."""
    return replace(
        table,
        heads=[*table.heads, head],
        rows=[[*row, cell] for row, cell in zip(table.rows, cells, strict=True)],
        groups=[*table.groups, ("", 1)],
        caption=table.caption + caption,
    )


def stages(rows: Sequence[ResultRow]) -> Section | None:
    """The same as bars, in the order of the method."""
    subset = main_subset(rows)
    kinds = {RESULT: "result"}
    bars = [
        (
            _label(rows, system),
            kinds.get(system, "stage" if kind(system) == "stage" else "reference"),
            accuracy,
            mean(rows, system, "token_log_perplexity", subset),
        )
        for system in _systems(rows)
        if (accuracy := mean(rows, system, "token_accuracy", subset)) is not None
    ]
    text = (
        f"On {QUESTIONS[subset]}. Plain bars are stages of this run, in order, and the filled one is its result; "
        "hatched bars are what it is compared with."
    )
    return Section("stages", "Quality by stage", [text], figures=[Markup(figures.quality(bars))]) if bars else None


def domains(rows: Sequence[ResultRow]) -> Section | None:
    """Token accuracy of every system in every domain."""
    subset = main_subset(rows)
    counts = {row.domain: row.count for row in rows if row.subset == subset and row.domain != "all"}
    if len(counts) < 2:
        return None
    names, systems = sorted(counts), _systems(rows)
    values = [[mean(rows, system, "token_accuracy", subset, name) for name in names] for system in systems]
    table = Table(
        heads=["system", *(f"{name} ({counts[name]})" for name in names)],
        rows=[[_label(rows, system), *map(value, line)] for system, line in zip(systems, values, strict=True)],
        headings=_headings(systems),
        strong=_ours(systems),
        best=_best(values, systems, [False] * len(names)),
        caption="▲ best of each column, centralised training aside.",
    )
    text = f"Token accuracy on {QUESTIONS[subset]}, whose number is in brackets."
    return Section("domains", "By domain", [text], tables=[table])


def _systems(rows: Sequence[ResultRow]) -> list[str]:
    return in_order({row.system for row in rows})


def _label(rows: Sequence[ResultRow], system: str) -> str:
    items = len({row.item for row in rows if row.system == system})
    return label(system) + (f", mean of {items}" if items > 1 else "")


def _headings(systems: Sequence[str]) -> dict[int, str]:
    """Row → what it and those below have in common."""
    kinds = [kind(system) for system in systems]
    return {i: KINDS[name] for i, name in enumerate(kinds) if i == 0 or kinds[i - 1] != name}


def _ours(systems: Sequence[str]) -> frozenset[int]:
    return frozenset(i for i, system in enumerate(systems) if system == RESULT)


def _best(
    values: Sequence[Sequence[float | None]], systems: Sequence[str], lowest: Sequence[bool]
) -> frozenset[tuple[int, int]]:
    """(row, column) of the cells that are best in their column, the first column being the systems' names.

    Equal best ones share the mark; where all are equal none is best.
    """
    cells: set[tuple[int, int]] = set()
    rivals = [(i, line) for i, line in enumerate(values) if systems[i] != CEILING]
    for column, low in enumerate(lowest):
        known = {i: number for i, line in rivals if (number := line[column]) is not None}
        if not known or math.isclose(min(known.values()), max(known.values())):
            continue
        best = min(known.values()) if low else max(known.values())
        cells |= {(i, column + 1) for i, number in known.items() if math.isclose(number, best)}
    return frozenset(cells)
