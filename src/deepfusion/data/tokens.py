"""A tokenizer and a text: its tokens, the bytes that each covers, and what it shares with another's tokens."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from transformers import PreTrainedTokenizerFast

from deepfusion import alignment
from deepfusion.checkpoints import tokenizer_fingerprint


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
