"""A diagnosis as a terminal prints it, 80 columns wide or more."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import RenderableType
from rich.markup import escape
from rich.table import Column, Table

from deepfusion.display import amount, duration, size
from deepfusion.doctor.diagnosis import Check, Cost, Diagnosis

COLOURS = {"ok": "green", "warning": "yellow", "problem": "bold red"}


def tables(diagnosis: Diagnosis, workers: int) -> Iterator[RenderableType]:
    """What was found, part by part; what each phase will cost; and the verdict."""
    for part in dict.fromkeys(check.part for check in diagnosis.checks):
        yield f"[bold]{part}[/]"
        yield _checks([check for check in diagnosis.checks if check.part == part])
        yield ""
    if diagnosis.costs:
        yield _costs(diagnosis.costs)
        yield ""
    yield from _verdict(diagnosis, workers)


def _checks(checks: list[Check]) -> Table:
    """A line or more for each: its state, what was looked at, what was found, and what to do."""
    columns = Column(no_wrap=True), Column(max_width=26, overflow="fold"), Column(overflow="fold")
    table = Table(*columns, box=None, show_header=False)
    for check in checks:
        told = escape(check.fact) + (f"\n[bold]→[/] {escape(check.advice)}" if check.advice else "")
        table.add_row(f"[{COLOURS[check.state]}]{check.state}[/]", escape(check.subject), told)
    return table


def _costs(costs: tuple[Cost, ...]) -> Table:
    heads = ("steps", "tokens", "FLOPs", "longest", "together", "memory", "disk")
    table = Table(
        "phase", *(Column(head, justify="right", no_wrap=True) for head in heads), box=None, padding=(0, 1, 0, 0)
    )
    for cost in costs:
        table.add_row(
            cost.phase,
            str(cost.steps),
            amount(cost.tokens) if cost.tokens else "",
            amount(cost.flops) if cost.flops else "",
            "" if cost.seconds_each is None else duration(cost.seconds_each),
            "" if cost.seconds is None else duration(cost.seconds),
            size(cost.peak_bytes),
            size(cost.disk_bytes) if cost.disk_bytes else "",
        )
    return table


def _verdict(diagnosis: Diagnosis, workers: int) -> Iterator[RenderableType]:
    if diagnosis.seconds is not None:
        side = "in this process" if not workers else "with one worker" if workers == 1 else f"with {workers} workers"
        flops = amount(sum(cost.flops for cost in diagnosis.costs))
        yield f"About {duration(diagnosis.seconds)} {side}, {flops} FLOPs. This is an estimate."
    problems, warnings = diagnosis.count("problem"), diagnosis.count("warning")
    counted = f"{problems} {'problem' if problems == 1 else 'problems'}, "
    counted += f"{warnings} {'warning' if warnings == 1 else 'warnings'}"
    if diagnosis.state == "problem":
        yield f"[{COLOURS['problem']}]{counted}[/]: it cannot run like this"
    else:
        yield f"[{COLOURS[diagnosis.state]}]{counted}[/]: it can run"
