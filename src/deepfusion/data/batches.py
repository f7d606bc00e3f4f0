"""From documents to batches: tokenised lessons, packed into rows that keep documents apart.

A *lesson* is one tokenised document together with what its teacher says about it. Rows hold several lessons;
attention and positions start anew at each, so a packed document's loss is the same as its loss alone. A lesson that
does not fit the row is an error (an answer is never cut), except for plain text, which becomes several lessons.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerFast

from deepfusion import alignment
from deepfusion.checkpoints import tokenizer_fingerprint
from deepfusion.config import Training
from deepfusion.data.documents import Document
from deepfusion.signals import Signal, Signals

MAX_GAIN = 5.0  # nats: a token that the ancestor thought impossible must not drown all others
Rows = list[list[int]]  # per row: indices of lessons


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
    pool: np.ndarray | None = None  # [m, 2] int64, (token, patch) pairs
    features: np.ndarray | None = None  # [J, P, W] float16
    lineage: str = ""  # of the teacher that the features come from
    cluster: int = -1  # the cluster that knows this document

    def __len__(self) -> int:
        return len(self.ids)


@dataclass
class Tokenizer:
    """A tokenizer with what lessons need to know of it, worked out once."""

    raw: PreTrainedTokenizerFast
    table: list[bytes] = field(init=False)
    start: int = field(init=False)
    end: int = field(init=False)
    fingerprint: str = field(init=False)

    def __post_init__(self) -> None:
        self.table = alignment.vocabulary_bytes(self.raw)
        self.start, self.end = alignment.start_id(self.raw), alignment.end_id(self.raw)
        self.fingerprint = tokenizer_fingerprint(self.raw)

    def encode(self, text: str) -> tuple[list[int], list[int]]:
        """Token ids and the byte at which each ends, without start and end tokens."""
        return alignment.encode(self.raw, text, self.table)


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
            "to leave such rows out"
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
    teacher: Signals,
    tokenizer: Tokenizer,
    training: Training,
    *,
    vocabulary: int | None = None,
    cluster: int = -1,
    patches: int = 0,
) -> Lesson | None:
    """A document with its teacher's signal, in the student's tokens; None when it does not fit the student.

    With equal tokenizers the teacher's own tokens are kept, so every position has its distribution. Otherwise the
    document is tokenised anew and the teacher speaks through the likelihood of the chunks that both tokenizations
    share.

    Args:
        document: as it was written or asked about.
        signal: what the teacher said of it.
        teacher: whose tokenizer and lineage that is.
        tokenizer: the student's.
        training: the longest lesson, and the weight of an answer.
        vocabulary: size of the student's head, in which models with one tokenizer can differ; none: the tokenizer's.
            What a teacher kept beyond it joins the rest of the teacher's distribution.
        cluster: the cluster that knows the document.
        patches: patches of features to take along; 0: none.
    """
    same = teacher.tokenizer == tokenizer.fingerprint
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
    else:
        chunk, chunk_logprobs = _chunks(ends, signal)
        extra["chunk"], extra["chunk_logprobs"] = chunk, chunk_logprobs
    if patches and signal.features is not None:
        total = len(document.text.encode())
        pairs = alignment.patch_membership([int(e) for e in ends[1:-1]], total, patches)
        extra["pool"] = np.array([(token + 1, patch) for token, patch in pairs], np.int64).reshape(-1, 2)
        extra["features"], extra["lineage"] = signal.features, teacher.lineage
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


def spelt(text: str, tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray]:
    """A text's tokens `[n]` int64 with start and end tokens, and the byte at which each ends, `[n]` int32."""
    inner, ends = tokenizer.encode(text)
    ids = np.array([tokenizer.start, *inner, tokenizer.end], np.int64)
    return ids, np.array([0, *ends, ends[-1] if ends else 0], np.int32)


def chunk_spans(ends: np.ndarray, teacher_ends: np.ndarray) -> list[tuple[int, int, int, int]]:
    """(from, to, teacher's from, teacher's to) of every chunk: tokens of two tokenizations that cover the same bytes.

    The end token is a chunk of its own; the start token is in none.

    Args:
        ends: the byte at which each student token ends, with start and end tokens.
        teacher_ends: the same of the teacher's tokens.
    """
    groups = alignment.chunks([int(e) for e in ends[1:-1]], [int(e) for e in teacher_ends[1:-1]])
    spans = [(1 + a, 1 + b, 1 + c, 1 + d) for a, b, c, d in groups]
    return [*spans, (len(ends) - 1, len(ends), len(teacher_ends) - 1, len(teacher_ends))]


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


def pack(lengths: Sequence[int], order: Sequence[int], context: int, alone: bool = False) -> Rows:
    """Fill rows of at most `context` tokens with documents in the given order; `alone` gives each its own row."""
    rows: Rows = []
    room = 0
    for index in order:
        if rows and not alone and lengths[index] <= room:
            rows[-1].append(index)
            room -= lengths[index]
        else:
            rows.append([index])
            room = context - lengths[index]
    return rows


class Schedule(Dataset[list[list[Lesson]]]):
    """Every batch of one training, in order: reshuffled passes over the lessons until `tokens` are reached.

    One item is one optimiser step's batch, so that rows of any shape make batches of about `rows * context` tokens. A
    pass that ends in mid-batch goes on with the next.
    """

    def __init__(
        self, taught_lessons: Sequence[Lesson], tokens: float, training: Training, *, packs: bool, seed: int
    ) -> None:
        if not taught_lessons:
            raise ValueError("there is no text to train on")
        self.lessons = taught_lessons
        lengths = [len(lesson) for lesson in taught_lessons]
        generator = np.random.default_rng(seed)
        self.batches: list[Rows] = []
        self.tokens = 0
        size = training.rows * training.context
        pending: Rows = []
        while self.tokens < tokens or not self.batches:
            order = generator.permutation(len(lengths)).tolist()
            for row in pack(lengths, order, training.context, alone=not packs):
                pending.append(row)
                full = len(pending) >= training.rows if packs else sum(lengths[i] for r in pending for i in r) >= size
                if full:
                    self._close(pending, lengths)
                    pending = []
                    if self.tokens >= tokens:
                        break

    def _close(self, rows: Rows, lengths: Sequence[int]) -> None:
        self.batches.append(rows)
        self.tokens += sum(lengths[i] for row in rows for i in row)

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> list[list[Lesson]]:
        return [[self.lessons[i] for i in row] for row in self.batches[index]]


def collate(items: Sequence[list[list[Lesson]]]) -> dict[str, Tensor]:
    """Tensors of one batch of rows; fields that a teacher aligns move to the predicting position, like labels."""
    rows = [row for item in items for row in item]
    width = max(sum(len(lesson) for lesson in row) for row in rows)
    shape = (len(rows), width)
    flat = [lesson for row in rows for lesson in row]
    depth = max((lesson.topk_ids.shape[1] for lesson in flat if lesson.topk_ids is not None), default=0)
    input_ids, position_ids = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    document, labels = np.full(shape, -1, np.int64), np.full(shape, -100, np.int64)
    weights, cluster = np.zeros(shape, np.float32), np.full(shape, -1, np.int64)
    topk_ids = np.zeros((*shape, depth), np.int64)
    topk_logprobs = np.full((*shape, depth), -np.inf, np.float32)
    topk_weight = np.zeros(shape, np.float32)
    chunk, chunk_logprobs = np.full(shape, -1, np.int64), list[np.ndarray]()
    chunk_weights = list[np.ndarray]()
    pool_token, pool_slot = list[np.ndarray](), list[np.ndarray]()
    features: dict[str, list[tuple[int, np.ndarray]]] = {}
    chunks = number = pooled = 0
    for r, row in enumerate(rows):
        at = 0
        for lesson in row:
            n = len(lesson)
            here, predicting = slice(at, at + n), slice(at, at + n - 1)
            input_ids[r, here], position_ids[r, here] = lesson.ids, np.arange(n)
            document[r, here], cluster[r, here] = number, lesson.cluster
            labels[r, predicting], weights[r, predicting] = lesson.ids[1:], lesson.weights[1:]
            if lesson.topk_ids is not None and lesson.topk_logprobs is not None:
                k = lesson.topk_ids.shape[1]
                topk_ids[r, predicting, :k], topk_logprobs[r, predicting, :k] = (
                    lesson.topk_ids[1:],
                    lesson.topk_logprobs[1:],
                )
                topk_weight[r, predicting] = lesson.weights[1:] * np.isfinite(lesson.topk_logprobs[1:]).any(1)
            if lesson.chunk is not None and lesson.chunk_logprobs is not None:
                shifted = lesson.chunk[1:]
                chunk[r, predicting] = np.where(shifted >= 0, shifted + chunks, -1)
                chunk_logprobs.append(lesson.chunk_logprobs)
                chunk_weights.append(_chunk_weights(lesson))
                chunks += len(lesson.chunk_logprobs)
            if lesson.pool is not None and lesson.features is not None:
                patches = lesson.features.shape[1]
                pool_token.append(r * width + at + lesson.pool[:, 0])
                pool_slot.append(pooled * patches + lesson.pool[:, 1])
                features.setdefault(lesson.lineage, []).append((pooled, lesson.features))
                pooled += 1
            at += n
            number += 1
    batch = {
        "input_ids": input_ids,
        "position_ids": position_ids,
        "document": document,
        "labels": labels,
        "weights": weights,
        "cluster": cluster,
    }
    if depth:
        batch |= {"topk_ids": topk_ids, "topk_logprobs": topk_logprobs, "topk_weight": topk_weight}
    if chunks:
        batch |= {
            "chunk": chunk,
            "chunk_logprobs": np.concatenate(chunk_logprobs),
            "chunk_weight": np.concatenate(chunk_weights),
        }
    if pooled:
        batch |= {
            "pool_token": np.concatenate(pool_token),
            "pool_slot": np.concatenate(pool_slot),
            "patch_documents": np.arange(pooled),
        }
        for lineage, pairs in features.items():
            batch[f"features:{lineage}"] = np.stack([f for _, f in pairs]).astype(np.float32)
            batch[f"features_document:{lineage}"] = np.array([d for d, _ in pairs], np.int64)
    return {name: torch.from_numpy(array) for name, array in batch.items()}


def _chunk_weights(lesson: Lesson) -> np.ndarray:
    """Weight of each chunk: its heaviest token's."""
    assert lesson.chunk is not None
    assert lesson.chunk_logprobs is not None
    weights = np.zeros(len(lesson.chunk_logprobs), np.float32)
    inside = lesson.chunk >= 0
    np.maximum.at(weights, lesson.chunk[inside], lesson.weights[inside])
    return weights


def isolation_mask(document: Tensor) -> Tensor:
    """`[B, T]` document numbers → `[B, 1, T, T]` bool: attend within one's own document and not ahead."""
    length = document.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=document.device).tril()
    return ((document[:, :, None] == document[:, None, :]) & causal)[:, None]
