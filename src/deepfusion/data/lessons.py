"""From documents to lessons: one tokenised document each, together with what its teacher says about it.

A lesson that does not fit the row is an error (an answer is never cut), except for plain text, which becomes several.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from deepfusion import alignment
from deepfusion.config import Training
from deepfusion.data.coverage import SPANS
from deepfusion.data.documents import Document
from deepfusion.data.hearing import Heard
from deepfusion.data.tokens import Tokenizer, chunk_spans, common_starts, spelt
from deepfusion.signals import Signal

MAX_GAIN = 5.0  # nats: a token that the ancestor thought impossible must not drown all others


@dataclass(frozen=True)
class Lesson:
    """One tokenised document of n tokens, start and end included, and its teacher's word on it (if any)."""

    ids: np.ndarray  # [n] int64
    weights: np.ndarray  # [n] float32, cross-entropy weight of predicting token i; 0 for the start token
    gain: np.ndarray | None = None  # [n] float32, nats of token i that its writer learned in private (`Signal.gain`)
    topk_ids: np.ndarray | None = None  # [n, k] int64: teacher of the same tokenizer
    topk_logprobs: np.ndarray | None = None  # [n, k] float32
    chunk: np.ndarray | None = None  # [n] int64, chunk that token i belongs to, or -1: teacher of another tokenizer
    chunk_logprobs: np.ndarray | None = None  # [c] float32
    places: np.ndarray | None = None  # [r] int64, tokens before which both begin one: teacher of another tokenizer
    outcome_logprobs: np.ndarray | None = None  # [r, k] float32, what the teacher thinks comes there (-inf padding)
    members: np.ndarray | None = None  # [m, 3] int64: (place, outcome, student's token of that outcome); none: ranks
    pool: np.ndarray | None = None  # [m, 2] int64, (token, patch) pairs
    features: np.ndarray | None = None  # [J, P, W] float16
    lineage: str = ""  # of the teacher that the features come from
    cluster: int = -1  # the cluster that knows this document

    def __len__(self) -> int:
        return len(self.ids)


def lessons(
    documents: Iterable[Document],
    tokenizer: Tokenizer,
    training: Training,
    context: int | None = None,
    *,
    cluster: int = -1,
) -> list[Lesson]:
    """Tokenise documents for plain training; `context` is the model's own, where it has one.

    Raises:
        ValueError: an answer is longer than the context; names the document.
    """
    limit = min(training.context, context or training.context)
    return [
        replace(lesson, cluster=cluster)
        for document in documents
        for lesson in _plain(document, tokenizer, training.answer_weight, limit)
    ]


def _plain(document: Document, tokenizer: Tokenizer, answer_weight: float, limit: int) -> list[Lesson]:
    ids, ends = tokenizer.encode(document.text)
    answer_from = len(document.prompt.encode())
    is_answer = [end > answer_from for end in ends]
    room = limit - 2
    if not document.prompt:
        pieces = [ids[at : at + room] for at in range(0, len(ids), room)]
        return [_lesson(piece, [answer_weight] * len(piece), tokenizer, answer_weight) for piece in pieces]
    if sum(is_answer) > room:
        raise ValueError(
            f"the answer of document {document.id!r} takes {sum(is_answer)} tokens and the context holds {room}: "
            "raise the phase's training.context (as in device.training.context), or set data.source.max_answer_bytes "
            "to leave such rows out; `deepfusion doctor` finds them all"
        )
    ids, is_answer = ids[-room:], is_answer[-room:]  # a long prompt loses its beginning, never the answer its end
    return [_lesson(ids, [answer_weight if a else 1.0 for a in is_answer], tokenizer, answer_weight)]


def _lesson(ids: Sequence[int], weights: Sequence[float], tokenizer: Tokenizer, end_weight: float) -> Lesson:
    return Lesson(
        ids=np.array([tokenizer.start, *ids, tokenizer.end], np.int64),
        weights=np.array([0.0, *weights, end_weight], np.float32),
    )


def taught(
    document: Document,
    signal: Signal,
    teacher: Heard,
    tokenizer: Tokenizer,
    training: Training,
    *,
    vocabulary: int | None = None,
    cluster: int = -1,
    patches: int = 0,
) -> Lesson | None:
    """A document with its teacher's signal, in the student's tokens; None when it does not fit the student.

    With equal tokenizers the teacher's own tokens are kept, so every position has its distribution. Otherwise the
    document is tokenised anew, and the teacher speaks through the likelihood of the chunks that both tokenizations
    share, or through its probabilities of what comes where both begin a token.

    Args:
        document: as it was written or asked about.
        signal: what the teacher said of it.
        teacher: who said it, and how it is heard.
        tokenizer: the student's.
        training: the longest lesson, and the weight of an answer.
        vocabulary: size of the student's head, in which models with one tokenizer can differ; none: the tokenizer's.
            What a teacher kept beyond it joins the rest of the teacher's distribution.
        cluster: the cluster that knows the document.
        patches: patches of features to take along; 0: none.
    """
    same = teacher.across is None
    vocabulary = min(vocabulary or len(tokenizer.table), len(tokenizer.table))
    if same:
        ids, ends = signal.ids.astype(np.int64), signal.ends
    else:
        ids, ends = spelt(document.text, tokenizer)
    if len(ids) > training.context or ids.max() >= vocabulary:
        return None
    answer_from = len(document.prompt.encode())
    weights = np.where(ends > answer_from, training.answer_weight, 1.0).astype(np.float32)
    weights[0] = 0.0
    extra: dict[str, Any] = {"gain": _gain_at(ends, signal, same)}
    if same:
        known = signal.topk_ids < vocabulary
        extra["topk_ids"] = np.where(known, signal.topk_ids, 0).astype(np.int64)
        extra["topk_logprobs"] = np.where(known, signal.topk_logprobs, -np.inf).astype(np.float32)
    elif teacher.across == SPANS:
        chunk, chunk_logprobs = _chunks(ends, signal)
        extra["chunk"], extra["chunk_logprobs"] = chunk, chunk_logprobs
    else:
        extra |= _told(ids, ends, signal, teacher, tokenizer, vocabulary)
    if patches and signal.features is not None:
        total = len(document.text.encode())
        pairs = alignment.patch_membership([int(e) for e in ends[1:-1]], total, patches)
        extra["pool"] = np.array([(token + 1, patch) for token, patch in pairs], np.int64).reshape(-1, 2)
        extra["features"], extra["lineage"] = signal.features, teacher.signals.lineage
    return Lesson(ids=ids, weights=weights, cluster=cluster, **extra)


def focused(text: Sequence[Lesson], focus: float) -> list[Lesson]:
    """The lessons with each written token's weight times 1 + focus · gain, in the cross-entropy and in the KL.

    All written tokens together weigh what they did before: focus moves weight from words that anyone could have guessed
    to what devices know, and none away from the public text beside it.
    """
    told = [(lesson.weights, lesson.gain) for lesson in text if lesson.gain is not None]
    heavier = sum(float((weights * (1 + focus * gain)).sum()) for weights, gain in told)
    scale = sum(float(weights.sum()) for weights, _ in told) / heavier if heavier else 1.0
    return [
        lesson
        if lesson.gain is None
        else replace(lesson, weights=(lesson.weights * (1 + focus * lesson.gain) * scale).astype(np.float32))
        for lesson in text
    ]


def _gain_at(ends: np.ndarray, signal: Signal, same: bool) -> np.ndarray | None:
    """Gain of every student token: the teacher's own where tokens are the same, else that of the byte it ends on."""
    if signal.gain is None:
        return None
    # Signals are read from disk: one NaN here would be in the weight of all written text.
    gain = np.clip(np.nan_to_num(signal.gain.astype(np.float32), nan=0.0), 0.0, MAX_GAIN)
    if same:
        return gain
    # A token's last byte belongs to the teacher's first token that ends there or later; the end token to the end token.
    place = np.searchsorted(signal.ends[1:-1], ends[1:-1], side="left") + 1
    return np.concatenate([gain[:1], gain[np.minimum(place, len(gain) - 1)], gain[-1:]])


def _chunks(ends: np.ndarray, signal: Signal) -> tuple[np.ndarray, np.ndarray]:
    """Chunk of every student token (−1 where the teacher has no opinion), and the teacher's log-likelihood of every
    chunk.
    """
    chunk = np.full(len(ends), -1, np.int64)
    logprobs: list[float] = []
    for a_from, a_to, b_from, b_to in chunk_spans(ends, signal.ends):
        likelihood = float(signal.logprobs[b_from:b_to].sum())
        if np.isfinite(likelihood):
            chunk[a_from:a_to] = len(logprobs)
            logprobs.append(likelihood)
    return chunk, np.array(logprobs, np.float32)


def _told(
    ids: np.ndarray, ends: np.ndarray, signal: Signal, teacher: Heard, tokenizer: Tokenizer, vocabulary: int
) -> dict[str, np.ndarray]:
    """What the teacher thinks comes next wherever both tokenizations begin a token, by outcomes or (none) by ranks."""
    assert teacher.table is not None
    here, there = common_starts(ids, ends, tokenizer.table, signal.ids, signal.ends, teacher.table)
    known = teacher.outcomes
    if known is None:
        ranked = -np.sort(-signal.topk_logprobs[there].astype(np.float32), axis=1)
        kept = np.isfinite(ranked).any(1)
        return {"places": here[kept], "outcome_logprobs": ranked[kept]}
    of, logprobs = _grouped(known.teacher[signal.topk_ids[there]], signal.topk_logprobs[there].astype(np.float32))
    kept = np.isfinite(logprobs).any(1)
    of, logprobs = of[kept], logprobs[kept]
    place, slot = np.nonzero(np.isfinite(logprobs))
    tokens, which = known.members(of[place, slot])
    members = np.stack([place[which], slot[which], tokens], 1)[tokens < vocabulary]
    sayable = np.zeros(logprobs.shape, bool)
    sayable[members[:, 0], members[:, 1]] = True
    return {
        "places": here[kept],
        "outcome_logprobs": np.where(sayable, logprobs, -np.inf).astype(np.float32),
        "members": members,
    }


def _grouped(of: np.ndarray, logprobs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows of tokens' outcomes `[r, k]` (-1 the rest) and log-probabilities, as rows of outcomes, each once."""
    of = np.where(np.isfinite(logprobs), of, -1)
    order = np.argsort(of, axis=1, kind="stable")
    of, logprobs = np.take_along_axis(of, order, 1), np.take_along_axis(logprobs, order, 1)
    slot = np.cumsum(np.diff(of, axis=1, prepend=of[:, :1]) != 0, axis=1)
    row = np.broadcast_to(np.arange(len(of))[:, None], of.shape)
    mass, outcome = np.zeros(of.shape, np.float64), np.full(of.shape, -1, np.int64)
    inside = of >= 0
    np.add.at(mass, (row[inside], slot[inside]), np.exp(logprobs[inside], dtype=np.float64))
    outcome[row[inside], slot[inside]] = of[inside]
    with np.errstate(divide="ignore"):
        return outcome, np.log(mass).astype(np.float32)
