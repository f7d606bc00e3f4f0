"""From scored questions to the numbers that a run is judged by. Pure functions; nothing here opens a model."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Literal, TypeVar

from pydantic import BaseModel, ConfigDict

from deepfusion.data.documents import Judged, ScoredQuestion

Subset = Literal["all", "private_only", "public"]
SUBSETS: tuple[Subset, ...] = ("all", "private_only", "public")
Answered = TypeVar("Answered", ScoredQuestion, Judged)


class ResultRow(BaseModel):
    """One number of `results.json`: how one system did, by one metric, on one part of the test questions."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    system: str
    domain: str  # or "all"
    subset: Subset
    metric: str
    value: float
    count: int  # questions behind the value
    seed: int
    item: str | None = None  # which of several: a device's id, a cluster


def summarise(rows: Iterable[ScoredQuestion], system: str, seed: int, item: str | None = None) -> list[ResultRow]:
    """Every metric over every domain and subset that has questions.

    Metrics: `token_log_perplexity`, nats per answer token (the log of Eq. 3 of arXiv 2602.14301); `token_accuracy`, the
    share of answer tokens chosen greedily; `answer_nats_per_byte`, which compares tokenizers; and, over the questions
    with options alone, `choice_accuracy`. The first three weigh every token (byte) alike, the last every question.

    Raises:
        ValueError: there are no rows.
    """
    rows = list(rows)
    if not rows:
        raise ValueError(f"{system} has no scored question: the test set is empty")
    return _by_part(rows, _metrics, system, seed, item)


def graded(rows: Iterable[Judged], system: str, seed: int) -> list[ResultRow]:
    """`judge_score` over every domain and subset: the mean of the scores, 0 to 100, of the answers that have one."""
    return _by_part([row for row in rows if row.score is not None], _grades, system, seed)


def _by_part(
    rows: Sequence[Answered],
    measure: Callable[[Sequence[Answered]], Iterator[tuple[str, float, int]]],
    system: str,
    seed: int,
    item: str | None = None,
) -> list[ResultRow]:
    return [
        ResultRow(
            system=system, domain=domain, subset=subset, metric=metric, value=value, count=count, seed=seed, item=item
        )
        for domain in ("all", *sorted({row.domain for row in rows}))
        for subset in SUBSETS
        for metric, value, count in measure([row for row in rows if domain in ("all", row.domain) and _in(row, subset)])
    ]


def _grades(rows: Sequence[Judged]) -> Iterator[tuple[str, float, int]]:
    scores = [row.score for row in rows if row.score is not None]
    if scores:
        yield "judge_score", math.fsum(scores) / len(scores), len(scores)


def _in(row: ScoredQuestion | Judged, subset: Subset) -> bool:
    return subset == "all" or row.private == (subset == "private_only")


def _metrics(rows: Sequence[ScoredQuestion]) -> Iterator[tuple[str, float, int]]:
    if not rows:
        return
    nats = math.fsum(row.answer_nats for row in rows)
    tokens = sum(row.answer_tokens for row in rows)
    yield "token_log_perplexity", nats / tokens, len(rows)
    yield "token_accuracy", sum(row.correct_tokens for row in rows) / tokens, len(rows)
    yield "answer_nats_per_byte", nats / sum(row.answer_bytes for row in rows), len(rows)
    chosen = [row for row in rows if row.choice is not None and row.answer_idx is not None]
    if chosen:
        yield "choice_accuracy", sum(row.choice == row.answer_idx for row in chosen) / len(chosen), len(chosen)


def ensemble(members: Sequence[Sequence[ScoredQuestion]]) -> list[ScoredQuestion]:
    """Per question, the row of the member to whom the prompt is most likely per byte: no label, no training.

    Bytes rather than tokens, so that members may have different tokenizers. Equal members, and questions without a
    prompt, go to the first.

    Raises:
        ValueError: there is no member, or they were not asked the same questions in the same order.
    """
    if not members:
        raise ValueError("an ensemble needs at least one member")
    asked = [row.id for row in members[0]]
    for number, rows in enumerate(members):
        if [row.id for row in rows] != asked:
            raise ValueError(f"ensemble member {number} was not asked the same questions as member 0")
    return [min(answers, key=_surprise) for answers in zip(*members, strict=True)]


def _surprise(row: ScoredQuestion) -> float:
    return row.prompt_nats / row.prompt_bytes if row.prompt_bytes else 0.0


def gap_closed(system: float, base: float, centralized: float) -> float | None:
    """Share of the way from the base model to centralised training; None where there is no way to go."""
    return None if centralized == base else (system - base) / (centralized - base)


def mutual_information(joint: Sequence[Sequence[float]]) -> float:
    """I(row; column) in nats of a joint distribution, given up to a positive factor.

    Raises:
        ValueError: a negative entry, or nothing but zeros.
    """
    total = math.fsum(map(math.fsum, joint))
    if any(weight < 0 for row in joint for weight in row) or total <= 0:
        raise ValueError("mutual information needs non-negative weights with a positive sum")
    rows = [math.fsum(row) / total for row in joint]
    columns = [math.fsum(column) / total for column in zip(*joint, strict=True)]
    terms = (
        p * (math.log(p) - math.log(rows[i]) - math.log(columns[j]))
        for i, row in enumerate(joint)
        for j, weight in enumerate(row)
        if (p := weight / total) > 0
    )
    return max(0.0, math.fsum(terms))
