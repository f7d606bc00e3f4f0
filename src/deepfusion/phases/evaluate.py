"""Evaluate: how likely a model finds the right answers (Eq. 3 of arXiv 2602.14301), and which options it would choose.

An answer's tokens are those that end after the prompt's last byte, so a token that straddles the two counts with the
answer; the end token is not scored, which lets tokenizers and plain option lists compare.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from deepfusion.alignment import encode, start_id, vocabulary_bytes
from deepfusion.artifacts import Checkpoint, Corpus, Proxy, Scores, Upload, Work
from deepfusion.checkpoints import open_model, open_tokenizer
from deepfusion.config import EvaluatePhase, Runtime
from deepfusion.data.documents import Question, ScoredQuestion, read_jsonl, write_jsonl
from deepfusion.errors import InputError
from deepfusion.families import context_length
from deepfusion.precision import usable
from deepfusion.progress import Ticker
from deepfusion.routing import RoutingTally, expert_difference, experts_of, recorded, routers, without_experts
from deepfusion.scoring import Observer, Piece, Score, score
from deepfusion.store import link_tree

ROWS = "rows.jsonl"


def evaluate(
    model: Checkpoint | Upload | Proxy | Path,
    corpus: Corpus | Path,
    config: EvaluatePhase,
    *,
    system: str,
    item: str | None,
    into: Path,
    runtime: Runtime,
    routing: bool = False,
    known: Scores | None = None,
) -> Scores:
    """Score a checkpoint on a corpus's test questions, or on those of a JSONL file.

    Writes `rows.jsonl`, one `ScoredQuestion` a line in the file's order. A question longer than the model's context
    loses the beginning of its prompt. With `routing` (MoE only) `Scores.routing` holds `RoutingTally.summary` over the
    tokens that the model reads (start, prompt, answer without its last), `removal` (per student's expert or experts and
    domain, how nats per answer token and token accuracy change when no token can reach them; empty without
    `config.removal`) and `expert_difference`.
    With `known`, the scores of the same weights on the same text under another name, nothing is computed.

    Raises:
        InputError: names the question that has no answer or whose answer is longer than the context; or there is none.
    """
    if known is not None:
        link_tree(known.folder, into)
        return Scores(folder=into, system=system, item=item, routing=known.routing).sealed()
    path = corpus.test if isinstance(corpus, Corpus) else corpus
    folder = (
        model.model if isinstance(model, Upload | Proxy) else model.folder if isinstance(model, Checkpoint) else model
    )
    questions = list(read_jsonl(path, Question))
    if not questions:
        raise InputError(f"{path} holds no question to evaluate on")
    network: Any = open_model(folder, usable(config.dtype, runtime.accelerator, into))
    network.to(runtime.accelerator)
    tokenizer = open_tokenizer(folder)
    table, start = vocabulary_bytes(tokenizer), start_id(tokenizer)
    context = context_length(network.config)

    def piece(question: Question, answer: str) -> Piece:
        ids, ends = encode(tokenizer, question.prompt + answer, table)
        return cut(question, ids, ends, context)

    answers = [piece(question, question.answer) for question in questions]
    others = {
        (i, option): piece(question, option)
        for i, question in enumerate(questions)
        for option in question.options or ()
        if option != question.answer
    }
    passes = 1 + (_removable(network, config) if routing else 0)
    total = sum(len(p.ids) for p in answers) * passes + sum(len(p.ids) for p in others.values())
    ticker = Ticker(into, total)

    def run(pieces: Sequence[Piece], observe: Observer | None = None) -> list[Score]:
        return score(network, pieces, start, config.batch_tokens, ticker.advance, observe)

    chosen = dict(zip(others, run(list(others.values())), strict=True))
    scores, facts = _examine(network, questions, answers, run, config) if routing else (run(answers), None)
    rows = [
        row(question, piece, score, [chosen.get((i, option), score) for option in question.options or ()])
        for i, (question, piece, score) in enumerate(zip(questions, answers, scores, strict=True))
    ]
    write_jsonl(into / ROWS, rows)
    return Scores(folder=into, system=system, item=item, routing=facts, work=Work(tokens=total)).sealed()


def _examine(
    network: nn.Module,
    questions: Sequence[Question],
    answers: Sequence[Piece],
    run: Callable[..., list[Score]],
    config: EvaluatePhase,
) -> tuple[list[Score], dict[str, Any]]:
    """Score the answers while watching the routers, then, if wanted, once more without each expert."""
    moe = experts_of(network)
    names = sorted({question.domain for question in questions})
    domains = [names.index(question.domain) for question in questions]
    tally = RoutingTally(len(routers(network)), names, moe.count)
    with recorded(network) as routed:

        def observe(batch: list[int], real: Tensor) -> None:
            tally.add(routed, torch.where(real, torch.tensor([domains[i] for i in batch])[:, None], -1).flatten())
            routed.clear()

        scores = run(answers, observe)
    removed: list[dict[str, Any]] = []
    for cluster in range(_removable(network, config)):
        # Nor the spare ones: they are no substitute, but would beat students whose logits are negative.
        with without_experts(network, [*moe.of(cluster), *moe.spare]):
            removed += changes(questions, scores, run(answers), cluster)
    facts = {**tally.summary(), "clusters": moe.clusters, "removal": removed}
    return scores, {**facts, "expert_difference": expert_difference(network)}


def _removable(network: nn.Module, config: EvaluatePhase) -> int:
    """Clusters without whose experts a MoE is tried."""
    clusters = experts_of(network).clusters
    return clusters if config.removal and clusters > 1 else 0


# ── text to tokens and scores to rows ─────────────────────────────────────────────────────────────────────────────────


def cut(question: Question, ids: Sequence[int], ends: Sequence[int], context: int | None) -> Piece:
    """Keep what fits into the context of a tokenised question or option: all of the answer, and the end of the prompt.

    Raises:
        InputError: the answer is empty or alone longer than the context.
    """
    boundary = len(question.prompt.encode())
    first = sum(end <= boundary for end in ends)
    if first == len(ids):
        raise InputError(f"test question {question.id!r} has an empty answer: there is nothing to score")
    if context is not None and len(ids) - first > context:
        by = "data.source.max_answer_bytes" if question.prompt else "shorter paragraphs"
        raise InputError(
            f"the answer of test question {question.id!r} has {len(ids) - first} tokens but the model's context is "
            f"{context}: shorten it ({by}) or leave it out"
        )
    drop = max(0, len(ids) - context) if context is not None else 0
    begin = ends[drop - 1] if drop else 0
    return Piece(tuple(ids[drop:]), first - drop, max(0, ends[first - 1] - begin) if first > drop else 0)


def row(question: Question, piece: Piece, score: Score, options: Sequence[Score]) -> ScoredQuestion:
    """One line of `rows.jsonl`; the choice is the option with the highest log-likelihood per byte of its text."""
    choice = None
    if question.options:
        per_byte = [s.answer_nats / len(o.encode()) for s, o in zip(options, question.options, strict=True)]
        choice = per_byte.index(min(per_byte))
    return ScoredQuestion(
        id=question.id,
        domain=question.domain,
        private=question.private,
        prompt_nats=score.prompt_nats,
        prompt_bytes=piece.prompt_bytes,
        answer_nats=score.answer_nats,
        answer_tokens=score.answer_tokens,
        answer_bytes=len(question.answer.encode()),
        correct_tokens=score.correct_tokens,
        choice=choice,
        answer_idx=question.answer_idx,
    )


def changes(
    questions: Sequence[Question], before: Sequence[Score], after: Sequence[Score], expert: int
) -> list[dict[str, Any]]:
    """Per domain, and over all, how nats per answer token and token accuracy change from `before` to `after`."""
    results: list[dict[str, Any]] = []
    for domain in ("all", *sorted({question.domain for question in questions})):
        part = [i for i, question in enumerate(questions) if domain in ("all", question.domain)]
        tokens = sum(before[i].answer_tokens for i in part)
        nats = sum(after[i].answer_nats - before[i].answer_nats for i in part)
        correct = sum(after[i].correct_tokens - before[i].correct_tokens for i in part)
        facts = {"nats_per_token": nats / tokens, "token_accuracy": correct / tokens, "count": len(part)}
        results.append({"expert": expert, "domain": domain, **facts})
    return results
