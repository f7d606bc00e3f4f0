"""Options for test questions that have none: the answer among answers to other questions of its domain."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from random import Random

from deepfusion.config import MadeOptions
from deepfusion.data.corpora import Row

NEAREST = 4  # wrong options are drawn from this many times as many answers of nearest length


def with_options(test: Sequence[Row], config: MadeOptions, seed: int) -> tuple[Row, ...]:
    """The same rows in the same order, of which some have options now.

    In each domain at most `config.questions` of the rows with a prompt and without options get them, those of private
    groups first. Wrong options are other such rows' answers, all different, and of nearly the answer's length, so that
    length alone tells little; a row whose domain has too few of them stays as it is.
    """
    open_rows: dict[str, list[Row]] = defaultdict(list)
    for row in test:
        if row.options is None and row.prompt:
            open_rows[row.domain].append(row)
    made: dict[str, Row] = {}
    for domain, rows in open_rows.items():
        answers = sorted({row.answer for row in rows}, key=lambda answer: (len(answer.encode()), answer))
        if len(answers) < config.count:
            continue
        chosen = Random(f"{seed}-options-{domain}").sample(rows, len(rows))
        for row in sorted(chosen, key=lambda row: not row.private)[: config.questions]:
            made[row.id] = _with(row, answers, config.count, Random(f"{seed}-options-{row.id}"))
    return tuple(made.get(row.id, row) for row in test)


def _with(row: Row, answers: Sequence[str], count: int, random: Random) -> Row:
    length = len(row.answer.encode())
    others = sorted(
        (answer for answer in answers if answer != row.answer), key=lambda answer: abs(len(answer.encode()) - length)
    )
    options = [row.answer, *random.sample(others[: NEAREST * (count - 1)], count - 1)]
    random.shuffle(options)
    return replace(row, options=tuple(options), answer_idx=options.index(row.answer))
