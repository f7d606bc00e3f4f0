"""What comes next, told apart as far as two vocabularies allow: how a teacher's probabilities are heard by a student.

Tokens are compared by the bytes that they stand for, never by name or number: `Ġthe`, `▁the` and ` the` are one token.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Int
from rapidfuzz import process
from rapidfuzz.distance import Levenshtein

from deepfusion.config import Across
from deepfusion.data.tokens import Tokenizer

ANCHOR = "\n"  # a character after which tokenizers begin a new token


@dataclass(frozen=True)
class Outcomes:
    """Every token belongs to one outcome, or to the rest; an outcome's probability is the sum over its tokens: under
    the teacher over the teacher's, under the student over the student's.
    """

    teacher: Int[np.ndarray, " teacher_vocabulary"]  # the outcome of each of the teacher's tokens; -1 the rest
    student: Int[np.ndarray, " student_vocabulary"]  # the outcome of each of the student's tokens; -1 the rest

    @cached_property
    def _order(self) -> np.ndarray:
        return np.argsort(self.student, kind="stable")

    @cached_property
    def _sorted(self) -> np.ndarray:
        return self.student[self._order]

    def members(self, outcomes: Int[np.ndarray, " n"]) -> tuple[Int[np.ndarray, " m"], Int[np.ndarray, " m"]]:
        """The student's tokens of the outcomes, and for each of them which of the n outcomes it belongs to."""
        first = np.searchsorted(self._sorted, outcomes, side="left")
        count = np.searchsorted(self._sorted, outcomes, side="right") - first
        of = np.repeat(np.arange(len(outcomes)), count)
        nth = np.arange(len(of)) - np.repeat(np.cumsum(count) - count, count)
        return self._order[first[of] + nth], of


def outcomes(across: Across, teacher: Tokenizer, student: Tokenizer, heard: Collection[int]) -> Outcomes:
    """As the objective wants them; `heard` are the teacher's tokens that occur: all others count to the rest."""
    return _KINDS[across](teacher, student, heard)


def projected(teacher: Tokenizer, student: Tokenizer, heard: Collection[int]) -> Outcomes:
    """The finest outcomes under which each vocabulary can be carried into the other (P-KL of arXiv 2605.21699).

    A token that the other vocabulary has too is an outcome. Any other token counts to the outcome of the token with
    which the other tokenizer begins its bytes: who says `Eldermere` says `El` first, if that is how the other spells
    it. Two models that agree on text agree on every outcome. The paper learns the sparse map W from the student's
    tokens to the teacher's; of all maps between tokens that begin alike, KL(teacher ‖ Wᵀ student) is smallest for the
    one that follows the teacher within each outcome, which leaves the divergence over outcomes and nothing to learn.
    """
    ours, theirs = _by_bytes(student), _by_bytes(teacher)
    of_teacher: dict[bytes, int] = {}
    of_student: dict[bytes, int] = {}

    def outcome_of_teacher(piece: bytes) -> int:
        if piece in ours:
            return ours[piece]
        if piece not in of_teacher:
            begins = first_token(piece, student, ours)
            of_teacher[piece] = outcome_of_student(begins) if begins else -1
        return of_teacher[piece]

    def outcome_of_student(piece: bytes) -> int:
        if piece in theirs:
            return ours[piece]
        if piece not in of_student:
            begins = first_token(piece, teacher, theirs)
            of_student[piece] = outcome_of_teacher(begins) if begins else -1
        return of_student[piece]

    given = np.full(len(teacher.table), -1, np.int64)
    for index in heard:
        if piece := teacher.table[index]:
            given[index] = outcome_of_teacher(piece)
    mine = [outcome_of_student(piece) if piece else -1 for piece in student.table]
    return _with_ends(teacher, student, given, mine, student.end)


def carried(teacher: Tokenizer, student: Tokenizer, heard: Collection[int]) -> Outcomes:
    """Outcomes are the teacher's tokens, to which the student's are carried, and not the other way.

    A student's token counts to the same token of the teacher's, or to the one with which the teacher begins its bytes
    (its best entry in W, by which H-KL of arXiv 2605.21699 widens the set of shared tokens). Teacher's tokens that
    nothing is carried to are the rest.
    """
    theirs = _by_bytes(teacher)
    mine: list[int] = []
    for piece in student.table:
        begins = piece if piece in theirs else first_token(piece, teacher, theirs) if piece else None
        mine.append(theirs[begins] if begins else -1)
    reached = set(mine)
    given = np.full(len(teacher.table), -1, np.int64)
    for index in heard:
        piece = teacher.table[index]
        given[index] = theirs[piece] if piece and theirs[piece] in reached else -1
    return _with_ends(teacher, student, given, mine, teacher.end)


def mined(teacher: Tokenizer, student: Tokenizer, heard: Collection[int]) -> Outcomes:
    """Each of the teacher's tokens counts to the student's token at the least edit distance (FedMKT, arXiv 2406.02224).

    Distances are between bytes; of several tokens as near, the first in the order of bytes is taken.
    """
    ours = _by_bytes(student)
    pieces = sorted(ours)
    wanted = sorted({piece for index in heard if (piece := teacher.table[index]) and piece not in ours})
    near = {piece: piece for piece in ours}
    for piece in wanted:
        found = process.extractOne(piece, pieces, scorer=Levenshtein.distance, processor=None)
        near[piece] = pieces[found[2]]
    given = np.full(len(teacher.table), -1, np.int64)
    for index in heard:
        if piece := teacher.table[index]:
            given[index] = ours[near[piece]]
    mine = [ours[piece] if piece else -1 for piece in student.table]
    return _with_ends(teacher, student, given, mine, student.end)


_KINDS: dict[Across, Callable[[Tokenizer, Tokenizer, Collection[int]], Outcomes]] = {
    "projected_kl": projected,
    "hybrid_kl": carried,
    "mined": mined,
}


def _with_ends(teacher: Tokenizer, student: Tokenizer, given: np.ndarray, mine: Sequence[int], end: int) -> Outcomes:
    """The outcomes, with `end` for the end of the text; other special tokens are among the rest."""
    made = Outcomes(given, np.array(mine, np.int64))
    made.teacher[teacher.end] = made.student[student.end] = end
    return made


def _by_bytes(tokenizer: Tokenizer) -> dict[bytes, int]:
    """Bytes → a token that stands for them: of several, the one that text is spelt with, not a byte's own token."""
    found: dict[bytes, int] = {}
    for index, piece in enumerate(tokenizer.table):
        if piece and (piece not in found or _is_fallback(tokenizer, found[piece])):
            found[piece] = index
    return found


def _is_fallback(tokenizer: Tokenizer, index: int) -> bool:
    return len(tokenizer.table[index]) == 1 and str(tokenizer.raw.convert_ids_to_tokens(index)).startswith("<0x")


def first_token(piece: bytes, tokenizer: Tokenizer, known: Collection[bytes]) -> bytes | None:
    """The token with which a tokenizer begins some bytes in the middle of a text; none if it cannot spell them.

    Of bytes that are no text by themselves (parts of a character) it is the longest token that they begin with.
    """
    try:
        ids, ends = tokenizer.encode(ANCHOR + piece.decode())
        start = len(ends) - ends[::-1].index(len(ANCHOR))  # the first token after the anchor's last
        return tokenizer.table[ids[start]] or None
    except (ValueError, IndexError):  # no text, not spelt, or spelt across the anchor
        return next((piece[:size] for size in range(len(piece), 0, -1) if piece[:size] in known), None)
