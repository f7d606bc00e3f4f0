"""A tokenizer and a text: its tokens, the bytes that each covers, and what it shares with another's tokens."""

from __future__ import annotations

from collections.abc import Sequence
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


def common_starts(
    ids: np.ndarray,
    ends: np.ndarray,
    table: Sequence[bytes],
    others: np.ndarray,
    their_ends: np.ndarray,
    their_table: Sequence[bytes],
) -> tuple[np.ndarray, np.ndarray]:
    """Places of tokens that begin at one byte in two tokenizations of a text, with start and end tokens; `[r]` each.

    Not a first token with a space that is not in the text: the other tokenizer says without it what comes there.

    Args:
        ids: tokens, start and end tokens included.
        ends: the byte at which each ends.
        table: the bytes of the tokenizer's tokens.
        others: the same of the other tokenization, as are `their_ends` and `their_table`.
    """

    def as_written(place: int, ids: np.ndarray, ends: np.ndarray, table: Sequence[bytes]) -> bool:
        return ends[place - 1] > 0 or len(table[ids[place]]) == ends[place]

    # Of tokens that begin at one byte the last: those before it have no width.
    begins = {int(end): place + 1 for place, end in enumerate(their_ends[:-1])}
    pairs = [
        (place, begins[start])
        for place in range(1, len(ends))
        if (start := int(ends[place - 1])) in begins
        and as_written(place, ids, ends, table)
        and as_written(begins[start], others, their_ends, their_table)
    ]
    both = np.array(pairs, np.int64).reshape(-1, 2)
    return both[:, 0], both[:, 1]


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
