"""From lessons to batches: packed into rows that keep documents apart, in the order of a whole training.

Rows hold several lessons; attention and positions start anew at each, so a packed document's loss is the same as its
loss alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from deepfusion.config import Training
from deepfusion.data.lessons import Lesson

Rows = list[list[int]]  # per row: indices of lessons


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
    pass that ends in mid-batch goes on with the next. With `after`, the batches of the first so many tokens are left
    out: where a training is done in several sittings, each goes on where the last one ended.
    """

    def __init__(
        self,
        taught_lessons: Sequence[Lesson],
        tokens: float,
        training: Training,
        *,
        packs: bool,
        seed: int,
        after: float = 0.0,
    ) -> None:
        if not taught_lessons:
            raise ValueError("there is no text to train on")
        self.lessons = taught_lessons
        lengths = [len(lesson) for lesson in taught_lessons]
        generator = np.random.default_rng(seed)
        self.batches: list[Rows] = []
        self.tokens, passed = 0, 0
        size = training.rows * training.context
        pending: Rows = []
        while passed < after or self.tokens < tokens or not self.batches:
            order = generator.permutation(len(lengths)).tolist()
            for row in pack(lengths, order, training.context, alone=not packs):
                pending.append(row)
                full = len(pending) >= training.rows if packs else sum(lengths[i] for r in pending for i in r) >= size
                if not full:
                    continue
                if passed < after:
                    passed += sum(lengths[i] for r in pending for i in r)
                else:
                    self._close(pending, lengths)
                pending = []
                if self.batches and self.tokens >= tokens:
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
    places, outcome_logprobs, outcome_weight = list[np.ndarray](), list[np.ndarray](), list[np.ndarray]()
    members, told = list[np.ndarray](), 0
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
            if lesson.places is not None and lesson.outcome_logprobs is not None:
                places.append(r * width + at + lesson.places - 1)
                outcome_logprobs.append(lesson.outcome_logprobs)
                outcome_weight.append(lesson.weights[lesson.places])
                if lesson.members is not None:
                    members.append(lesson.members + np.array([told, 0, 0]))
                told += len(lesson.places)
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
    if told:
        batch |= {
            "places": np.concatenate(places),
            "outcome_logprobs": _stacked(outcome_logprobs),
            "outcome_weight": np.concatenate(outcome_weight),
        }
        if members:
            batch["members"] = np.concatenate(members)
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


def _stacked(tables: Sequence[np.ndarray]) -> np.ndarray:
    """Tables of log-probabilities below each other, the narrow ones with outcomes of no probability added."""
    width = max(table.shape[1] for table in tables)
    wide = [np.pad(table, ((0, 0), (0, width - table.shape[1])), constant_values=-np.inf) for table in tables]
    return np.concatenate(wide)


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
