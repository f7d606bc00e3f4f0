"""What the page is made of: sections, tables, and how their cells are written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from deepfusion.metrics import Subset, gap_closed

STAGES = {
    "base": "base model, public text only",
    "device": "devices' own models",
    "device_ensemble": "devices, ensemble",
    "proxy": "proxies",
    "proxy_ensemble": "proxies, ensemble",
    "joint_student": "joint student",
    "branch": "branches",
    "branch_ensemble": "branches, ensemble",
    "merged": "merged MoE, before tuning",
    "deepfusion": "DeepFusion MoE",
}
REFERENCES = {
    "pooled_text": "pooled text, MoE",
    "pooled_text_dense": "pooled text, dense",
    "dense_kd": "dense distillation",
    "fedavg_dense": "FedAvg, dense",
    "fedjets": "FedJETS",
    "fedkmt": "FedKMT",
    "ofa_kd": "OFA-KD",
    "btx": "Branch-Train-MiX",
    "centralized": "centralised, all private text",
}
SUBSETS: dict[Subset, str] = {"private_only": "only devices know", "public": "public", "all": "all questions"}
METRICS = {"token_accuracy": "accuracy, %", "token_log_perplexity": "log-perplexity", "choice_accuracy": "choice, %"}
QUESTIONS: dict[Subset, str] = {"private_only": "questions that only devices can answer", "all": "all test questions"}
LISTED = 12


@dataclass(frozen=True)
class Table:
    """Cells as text; all but the first `texts` columns are numbers."""

    heads: Sequence[str]
    rows: Sequence[Sequence[str]]
    texts: int = 1
    groups: Sequence[tuple[str, int]] = ()  # a row of heads above: (label, columns)
    strong: frozenset[int] = frozenset()  # rows that stand out
    best: frozenset[tuple[int, int]] = frozenset()  # (row, column)
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


def label(system: str) -> str:
    """A system's name for people."""
    return (STAGES | REFERENCES).get(system, system)


def percent(share: float, digits: int = 1) -> str:
    """A share as a number of per cent, without its sign: .123 → '12.3'."""
    return f"{100 * share:.{digits}f}"


def value(number: float | None, metric: str) -> str:
    """A metric's value in its unit."""
    if number is None:
        return "–"
    return f"{number:.3f}" if metric == "token_log_perplexity" else percent(number)


def share_of_gap(number: float | None, base: float | None, ceiling: float | None) -> str:
    """The gap closed in per cent, where it is defined."""
    if number is None or base is None or ceiling is None:
        return "–"
    closed = gap_closed(number, base, ceiling)
    return "–" if closed is None else percent(closed, 0)


def signed(number: float, digits: int) -> str:
    """A change, with its sign unless it rounds to nothing."""
    text = f"{number:+.{digits}f}"
    return text.replace("-", "−") if float(text) else text[1:]


def listed(names: Sequence[str]) -> str:
    """Names in a row, of which the first dozen are spelt out."""
    left_out = len(names) - LISTED
    return ", ".join(names[:LISTED]) + (f" and {left_out} more" if left_out > 0 else "")
