"""Judge: an LLM grades what a model writes in answer to test questions, from 0 to 100 (Fig. 9 of arXiv 2602.14301)."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

from deepfusion.artifacts import Checkpoint, Corpus, Judgements
from deepfusion.checkpoints import open_model, open_tokenizer
from deepfusion.config import JudgePhase, Runtime
from deepfusion.data.documents import Judged, Question, read_jsonl, write_jsonl
from deepfusion.data.tokens import Tokenizer
from deepfusion.errors import InputError
from deepfusion.judging import Asked, check, request
from deepfusion.precision import usable
from deepfusion.progress import Ticker
from deepfusion.writing import write

ROWS = "judged.jsonl"
AT_ONCE = 16  # answers written at a time
MOST_UNGRADED = 0.5  # share of answers above which a mean over the others would say nothing


def judge(
    model: Checkpoint,
    corpus: Corpus,
    config: JudgePhase,
    *,
    system: str,
    dtype: str,
    cache: Path,
    into: Path,
    runtime: Runtime,
) -> Judgements:
    """Have a checkpoint answer, greedily, a share of a corpus's test questions, and the answers graded.

    Writes `judged.jsonl`, one `Judged` a line: question, both answers, the judge's reply and its score.

    Args:
        model: who answers.
        corpus: whose test questions.
        config: who grades, and how it is asked.
        system: what the model is called in the results.
        dtype: in which the model answers.
        cache: a folder in which replies are kept by what was asked; made if need be, shared by steps that run at once.
        into: an empty folder.
        runtime: where the model runs.

    Raises:
        InputError: no question has a prompt; the judge cannot be asked (see `check`), does not answer, refuses, or
            gives no number for more than half of the answers.
    """
    check(config)
    questions = chosen(list(read_jsonl(corpus.test, Question)), config.questions)
    if not questions:
        raise InputError("judge: no test question has a prompt, so there is nothing to answer: leave judge out")
    network: Any = open_model(model.folder, usable(dtype, runtime.accelerator, into))
    network.to(runtime.accelerator)
    tokenizer = Tokenizer(open_tokenizer(model.folder))
    ticker = Ticker(into, 2 * len(questions), "answers")
    answers: list[str] = []
    for begin in range(0, len(questions), AT_ONCE):
        prompts = [question.prompt for question in questions[begin : begin + AT_ONCE]]
        generator = torch.Generator(runtime.accelerator)
        written = write(
            network, tokenizer, prompts, max_new_tokens=config.max_new_tokens, temperature=0, top_k=1,
            generator=generator,
        )  # fmt: skip
        answers += [one.text[len(prompt) :].strip() for prompt, one in zip(prompts, written, strict=True)]
        ticker.advance(len(prompts))
    asked = Asked(config, cache)
    counting = threading.Lock()

    def grade(pair: tuple[Question, str]) -> Judged:
        question, answer = pair
        reply, score = asked.graded(request(config, question, answer))
        with counting:
            ticker.advance(1)
        return Judged(
            id=question.id, domain=question.domain, private=question.private, prompt=question.prompt,
            reference=question.answer, answer=answer, reply=reply, score=score,
        )  # fmt: skip

    with ThreadPoolExecutor(config.parallel) as pool:
        rows = list(pool.map(grade, zip(questions, answers, strict=True)))
    ungraded = sum(row.score is None for row in rows)
    if ungraded > MOST_UNGRADED * len(rows):
        example = next(row.reply for row in rows if row.score is None)
        raise InputError(
            f"judge: {config.model} gave no number from 0 to 100 for {ungraded} of {len(rows)} answers, but for "
            f"instance {example[:80]!r}: change judge.prompt, or ask another judge"
        )
    write_jsonl(into / ROWS, rows)
    return Judgements(folder=into, system=system, judge=config.model, ungraded=ungraded).sealed()


def chosen(questions: Sequence[Question], most: int) -> list[Question]:
    """Of those with a prompt at most so many of each domain, at even distances, in their order."""
    by_domain: dict[str, list[int]] = {}
    for number, question in enumerate(questions):
        if question.prompt.strip():
            by_domain.setdefault(question.domain, []).append(number)
    kept = sorted(
        numbers[int(place)]
        for numbers in by_domain.values()
        for place in np.linspace(0, len(numbers), min(most, len(numbers)), endpoint=False)
    )
    return [questions[number] for number in kept]
