"""What a terminal of 80 columns shows of a diagnosis."""

from __future__ import annotations

import io
import json
from dataclasses import asdict, replace

import pytest
from rich.console import Console

from deepfusion.doctor.diagnosis import Check, Cost, Diagnosis, Machine
from deepfusion.doctor.tables import tables

LONG = "/a/very/long/path/" + "q" * 90 + "/rows.jsonl, line 12 of [them]"
CHECKS = (
    Check("text", "data", "ok", "3 documents"),
    Check("text", "models.ancestors.a_rather_long_name", "warning", LONG, "mend [it] with --set a.b=c"),
)
COSTS = tuple(
    Cost(phase, 1234, 1.234e9, 5.67e15, 36_060.0, 363_660.0, 9.99e9, 1.23e9)
    for phase in ("data", "pooled_text_dense", "centralized")
)
FOUND = Diagnosis("mine", CHECKS, COSTS, Machine(2, "cpu", (), 10, 10), 3_661.0)


def shown(found: Diagnosis, workers: int = 2) -> list[str]:
    console = Console(file=io.StringIO(), width=80, color_system=None)
    for part in tables(found, workers):
        console.print(part)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().splitlines()


def test_everything_is_read_at_80_columns() -> None:
    lines = shown(FOUND)
    assert max(map(len, lines)) <= 80
    assert sum(line.count("q") for line in lines) == 90  # nothing is cut
    assert "line 12 of [them]" in "\n".join(lines)
    assert "→ mend [it] with --set a.b=c" in "\n".join(lines)
    assert [line.split()[0] for line in lines if line.startswith(("pooled", "central"))] == [
        "pooled_text_dense", "centralized",
    ]  # fmt: skip
    assert not [line for line in lines if "…" in line]


@pytest.mark.parametrize(
    ("states", "verdict"),
    [
        (("ok",), "0 problems, 0 warnings: it can run"),
        (("warning", "ok"), "0 problems, 1 warning: it can run"),
        (("warning", "problem", "problem"), "2 problems, 1 warning: it cannot run like this"),
    ],
)
def test_the_worst_decides(states: tuple[str, ...], verdict: str) -> None:
    found = replace(FOUND, checks=tuple(replace(CHECKS[0], state=state) for state in states))
    assert shown(found)[-1] == verdict
    assert found.state == max(states, key=("ok", "warning", "problem").index)


def test_without_timing_nothing_is_said_of_time() -> None:
    costs = tuple(replace(cost, seconds=None, seconds_each=None) for cost in COSTS)
    text = "\n".join(shown(replace(FOUND, costs=costs, seconds=None)))
    assert "About" not in text
    assert " min" not in text


@pytest.mark.parametrize(("workers", "words"), [(0, "in this process"), (1, "with one worker"), (3, "with 3 workers")])
def test_how_it_would_run(workers: int, words: str) -> None:
    assert f"About 1 h 01 min {words}, 17 P FLOPs." in "\n".join(shown(FOUND, workers))


def test_it_is_plain_json() -> None:
    assert json.loads(json.dumps(asdict(FOUND)))["checks"][1]["advice"] == CHECKS[1].advice
