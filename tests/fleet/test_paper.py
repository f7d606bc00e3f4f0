"""Figs. 7 and 8 of the paper, and what a plan says of them."""

import re
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from deepfusion.display import size
from deepfusion.fleet import Assumptions
from deepfusion.fleet.paper import SOURCES, Compared, compared, sources, studied

PAGE = Path(__file__).parents[2] / "docs" / "fleet.md"
NEAR = 0.15
MISSED: set[tuple[int, str, str]] = set()  # (figure, study, bar) of what is further off


@pytest.fixture(scope="module")
def rows() -> list[Compared]:
    return compared(Assumptions())


def test_every_bar_is_near_but_those_that_are_listed(rows: list[Compared]) -> None:
    assert len(rows) == 11
    assert {(row.figure, row.study, row.name) for row in rows if abs(row.deviation) > NEAR} == MISSED


def test_the_largest_saving() -> None:
    """71 % in the paper."""
    [total] = studied([128], Assumptions())["medical"].totals
    assert total.fedjets_up_bytes is not None
    assert 1 - total.up_bytes / total.fedjets_up_bytes == pytest.approx(0.71, abs=0.005)


def test_a_deviation_is_the_plans() -> None:
    assert Compared(7, "medical", "gpt2", 2_000_000_000, 3_000_000_000).deviation == 0.5


def test_the_page_shows_what_the_plan_says(rows: list[Compared]) -> None:
    page = PAGE.read_text(encoding="utf-8")
    shown = re.findall(r"^\| Fig\. (\d) \| (\w+) \| (\S+) \| (.+) \| (.+) \| (\S+) % \|$", page, flags=re.M)
    assert shown == [
        (str(row.figure), row.study, row.name, size(row.paper_bytes), size(row.planned_bytes),
         f"{100 * row.deviation:+.1f}".replace("-", "−"))
        for row in rows
    ]  # fmt: skip


def test_every_assumption_says_where_it_comes_from() -> None:
    assert list(SOURCES) == list(asdict(Assumptions()))
    assert sources(replace(Assumptions(), rank=8)) == SOURCES | {"rank": "given"}


def far_off(**changes: object) -> dict[tuple[str, str], int]:
    """(study, bar) → deviation in per cent, where it is more than it may be."""
    found = compared(replace(Assumptions(), **changes))  # pyright: ignore[reportArgumentType]
    return {(row.study, row.name): round(100 * row.deviation) for row in found if abs(row.deviation) > NEAR}


def test_what_the_sources_say_of_other_choices() -> None:
    assert far_off(adapter="merged") == {("medical", "DeepFusion"): -18}
    assert far_off(unquantised=()) == {("medical", "DeepFusion"): -28}
    assert far_off(states="bfloat16") == {("medical", "FedJETS"): 21}
    assert far_off(experts=6) == {}
