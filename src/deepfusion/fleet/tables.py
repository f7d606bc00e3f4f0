"""A fleet's plan as a terminal prints it, 80 columns wide or more."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from rich.console import RenderableType
from rich.markup import escape
from rich.table import Column, Table

from deepfusion.display import amount, size
from deepfusion.fleet.assumptions import Assumptions
from deepfusion.fleet.paper import Compared
from deepfusion.fleet.planning import Plan, Total

INFERRED = "That a bar comes out under these assumptions does not confirm them: other sets of them fit as well."


def plan(of: Plan) -> Iterator[RenderableType]:
    """What each model takes, then what all devices send, and FedJETS both ways for each byte of that."""
    rows = [
        (member.name, amount(member.parameters), amount(member.trained), size(member.up_bytes), "", member.memory_bytes)
        for member in of.members
    ]
    if (client := of.client) is not None:
        held = f"FedJETS: {client.name}, {client.experts} of {client.of_experts} experts"
        every = amount(client.parameters)
        rows.append((held, every, every, size(client.up_bytes), size(client.down_bytes), client.memory_bytes))
    cells = [[*row[:-1], size(row[-1])] for row in rows]
    yield _table(("each device", "weights", "trained", "up", "down", "memory"), cells)
    yield ""
    heads = ("devices", "DeepFusion up", *(("FedJETS up", "FedJETS down", "FedJETS / DeepFusion") if client else ()))
    yield _table(heads, [_sent(total) for total in of.totals])


def _sent(total: Total) -> list[str]:
    cells = [str(total.devices), size(total.up_bytes)]
    if total.ratio is not None:
        cells += [size(total.fedjets_up_bytes or 0), size(total.fedjets_down_bytes or 0), f"{total.ratio:.1f}"]
    return cells


def figures(rows: Sequence[Compared]) -> Table:
    """Bars of the paper's figures, and the plan's."""
    cells = [
        [f"Fig. {row.figure}", row.study, row.name, size(row.paper_bytes), size(row.planned_bytes), _percent(row)]
        for row in rows
    ]
    return _table(("", "task", "bar", "paper", "plan", "deviation"), cells, texts=3)


def _percent(row: Compared) -> str:
    return f"{100 * row.deviation:+.1f} %".replace("-", "−")


def assumptions(of: Assumptions, sources: Mapping[str, str]) -> RenderableType:
    """What a plan assumes, and where that comes from, if it is told."""
    told = {name: _value(value) for name, value in asdict(of).items()}
    if not sources:
        return escape("assumed: " + ", ".join(f"{name} {value}" for name, value in told.items()))
    table = Table("assumed", "", "from", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name, value in told.items():
        table.add_row(name, escape(value), escape(sources[name]))
    return table


def _value(value: Any) -> str:
    return (" and ".join(value) or "none") if isinstance(value, tuple) else str(value)


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]], texts: int = 1) -> Table:
    columns = [
        Column(head, justify="left" if place < texts else "right", no_wrap=place >= texts, overflow="fold")
        for place, head in enumerate(heads)
    ]
    table = Table(*columns, box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for row in rows:
        table.add_row(*map(escape, row))
    return table
