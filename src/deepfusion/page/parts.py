"""What the page is made of: sections, tables, and how their cells are written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from deepfusion.metrics import gap_closed

LISTED = 12


@dataclass(frozen=True)
class Table:
    """Cells as text; all but the first `texts` columns are numbers."""

    heads: Sequence[str]
    rows: Sequence[Sequence[str]]
    texts: int = 1
    groups: Sequence[tuple[str, int]] = ()  # a row of heads above: (label, columns)
    headings: Mapping[int, str] = field(default_factory=dict)  # row → a line of text above it
    strong: frozenset[int] = frozenset()  # rows that stand out
    best: frozenset[tuple[int, int]] = frozenset()  # (row, column)
    sure: frozenset[tuple[int, int]] = frozenset()  # (row, column) of which something is significant
    caption: str = ""


@dataclass(frozen=True)
class Section:
    """A heading and what stands below it, in this order."""

    anchor: str
    title: str
    text: Sequence[str] = ()
    notice: str = ""
    figures: Sequence[str] = ()
    tables: Sequence[Table] = ()
    items: Sequence[str] = ()
    code: str = ""


def percent(share: float, digits: int = 1) -> str:
    """A share as a number of per cent, without its sign: .123 → '12.3'."""
    return f"{100 * share:.{digits}f}"


def value(number: float | None) -> str:
    """A metric's value, as the terminal and the model card write it."""
    return "–" if number is None else f"{number:.3f}"


def share_of_gap(number: float | None, base: float | None, ceiling: float | None) -> str:
    """The share of the gap closed, where it is defined."""
    if number is None or base is None or ceiling is None:
        return "–"
    closed = gap_closed(number, base, ceiling)
    return "–" if closed is None else signed(closed, 2).removeprefix("+")


def signed(number: float, digits: int) -> str:
    """A change, with its sign unless it rounds to nothing."""
    text = f"{number:+.{digits}f}"
    return text.replace("-", "−") if float(text) else text[1:]


def listed(names: Sequence[str]) -> str:
    """Names in a row, of which the first dozen are spelt out."""
    left_out = len(names) - LISTED
    return ", ".join(names[:LISTED]) + (f" and {left_out} more" if left_out > 0 else "")
