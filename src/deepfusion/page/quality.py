"""Sections on how well the systems do."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from markupsafe import Markup

from deepfusion import figures
from deepfusion.findings import BASE, CEILING, RESULT, main_subset, mean
from deepfusion.metrics import ResultRow, Subset
from deepfusion.page.parts import (
    METRICS,
    QUESTIONS,
    REFERENCES,
    STAGES,
    SUBSETS,
    Section,
    Table,
    label,
    share_of_gap,
    value,
)


def results(rows: Sequence[ResultRow]) -> Section:
    """Every system by subset and metric."""
    present = {(row.subset, row.metric) for row in rows if row.domain == "all"}
    columns: list[tuple[Subset, str]] = [(s, m) for s in SUBSETS for m in METRICS if (s, m) in present]
    spans: Counter[Subset] = Counter(part for part, _ in columns)
    systems, subset = _systems(rows), main_subset(rows)
    values = [[mean(rows, system, metric, part) for part, metric in columns] for system in systems]
    base, ceiling = (mean(rows, system, "token_accuracy", subset) for system in (BASE, CEILING))
    table = Table(
        heads=["system", *(METRICS[metric] for _, metric in columns), "gap closed, %"],
        rows=[
            [
                _label(rows, system),
                *(value(number, metric) for number, (_, metric) in zip(line, columns, strict=True)),
                share_of_gap(mean(rows, system, "token_accuracy", subset), base, ceiling),
            ]
            for system, line in zip(systems, values, strict=True)
        ],
        groups=[("", 1), *((SUBSETS[part], span) for part, span in spans.items()), ("", 1)],
        strong=_ours(systems),
        best=_best(values, systems, [metric == "token_log_perplexity" for _, metric in columns]),
        caption="▲ best of each column, centralised training aside.",
    )
    text = (
        "Accuracy is the share of the answers' tokens that the model would choose itself, given those before. "
        "Log-perplexity is in nats per answer token. Choice: the right option has the highest likelihood per byte. "
        f"Gap closed: how far accuracy on {QUESTIONS[subset]} has come from the base model's towards that of "
        "centralised training."
    )
    return Section("results", "Results", [text], tables=[table])


def stages(rows: Sequence[ResultRow]) -> Section | None:
    """The same as bars, in the order of the method."""
    subset = main_subset(rows)
    bars = [
        (
            _label(rows, system),
            "result" if system == RESULT else "stage" if system in STAGES else "reference",
            accuracy,
            mean(rows, system, "token_log_perplexity", subset),
        )
        for system in _systems(rows)
        if (accuracy := mean(rows, system, "token_accuracy", subset)) is not None
    ]
    text = f"On {QUESTIONS[subset]}. Plain bars are stages of this run, in order; hatched bars are references."
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
        rows=[
            [_label(rows, system), *(value(number, "token_accuracy") for number in line)]
            for system, line in zip(systems, values, strict=True)
        ],
        strong=_ours(systems),
        best=_best(values, systems, [False] * len(names)),
    )
    text = f"Token accuracy in % on {QUESTIONS[subset]}; how many in brackets."
    return Section("domains", "By domain", [text], tables=[table])


def _systems(rows: Sequence[ResultRow]) -> list[str]:
    """Measured systems: stages in the method's order, then references, then what we do not know by name."""
    measured = list(dict.fromkeys(row.system for row in rows))
    known = [*STAGES, *REFERENCES]
    return [name for name in known if name in measured] + [name for name in measured if name not in known]


def _label(rows: Sequence[ResultRow], system: str) -> str:
    items = len({row.item for row in rows if row.system == system})
    return label(system) + (f", mean of {items}" if items > 1 else "")


def _ours(systems: Sequence[str]) -> frozenset[int]:
    return frozenset(i for i, system in enumerate(systems) if system == RESULT)


def _best(
    values: Sequence[Sequence[float | None]], systems: Sequence[str], lowest: Sequence[bool]
) -> frozenset[tuple[int, int]]:
    """(row, column) of the cells that are best in their column, the first column being the systems' names."""
    cells: set[tuple[int, int]] = set()
    rivals = [(i, line) for i, line in enumerate(values) if systems[i] != CEILING]
    for column, low in enumerate(lowest):
        known = {i: number for i, line in rivals if (number := line[column]) is not None}
        if len(known) > 1:
            best = min(known.values()) if low else max(known.values())
            cells |= {(i, column + 1) for i, number in known.items() if number == best}
    return frozenset(cells)
