import itertools
from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepfusion.config import Across
from deepfusion.data.outcomes import Outcomes, carried, first_token, mined, outcomes, projected
from deepfusion.data.tokens import Tokenizer, common_starts, spelt
from kinds import KINDS, text

PAIRS = sorted(itertools.permutations(KINDS, 2))
tokenizer = cache(lambda kind: Tokenizer(KINDS[kind]()))


@cache
def known(kind: Across, teacher: str, student: str) -> Outcomes:
    return outcomes(kind, tokenizer(teacher), tokenizer(student), range(len(tokenizer(teacher).table)))


def of_bytes(kind: str) -> dict[bytes, list[int]]:
    found: dict[bytes, list[int]] = {}
    for index, piece in enumerate(tokenizer(kind).table):
        if piece:
            found.setdefault(piece, []).append(index)
    return found


# ── where both begin a token ──────────────────────────────────────────────────────────────────────────────────────────


@settings(deadline=None)
@given(st.sampled_from(PAIRS), text)
def test_both_begin_a_token_there(pair: tuple[str, str], words: str) -> None:
    """Whatever the scripts: the places are in order, of equal bytes, and all that there are."""
    one, other = (tokenizer(kind) for kind in pair)
    (ids, ends), (others, their_ends) = spelt(words, one), spelt(words, other)
    here, there = common_starts(ids, ends, one.table, others, their_ends, other.table)
    assert ends[here - 1].tolist() == their_ends[there - 1].tolist()
    assert (np.diff(here) > 0).all()
    assert (np.diff(there) >= 0).all()
    wanted = set(ends[:-1].tolist()) & set(their_ends[:-1].tolist())
    assert wanted - {0} <= set(ends[here - 1].tolist()) <= wanted
    if words:
        assert (here[-1], there[-1]) == (len(ids) - 1, len(others) - 1)  # what ends a text begins where it is over
    backwards = common_starts(others, their_ends, other.table, ids, ends, one.table)
    assert set(ends[here - 1].tolist()) == set(their_ends[backwards[0] - 1].tolist())


def test_a_space_that_is_not_in_the_text_is_no_beginning() -> None:
    plain, dummy = tokenizer("byte-level"), tokenizer("unigram")
    (ids, ends), (others, their_ends) = spelt("the dog", plain), spelt("the dog", dummy)
    assert dummy.table[others[1]] == b" the"
    here, _ = common_starts(ids, ends, plain.table, others, their_ends, dummy.table)
    assert ends[here - 1].tolist() == [3, 7]


# ── outcomes ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("teacher", "student"), PAIRS)
def test_who_says_a_word_says_its_first_piece(teacher: str, student: str) -> None:
    """A token counts to the outcome of the one with which the other tokenizer begins its bytes."""
    found, theirs, ours = known("projected_kl", teacher, student), of_bytes(teacher), of_bytes(student)
    for piece, indices in theirs.items():
        begins = piece if piece in ours else first_token(piece, tokenizer(student), ours)
        if begins is not None:
            assert {found.teacher[i] for i in indices} == {found.student[i] for i in ours[begins]}
    for piece, indices in ours.items():
        begins = piece if piece in theirs else first_token(piece, tokenizer(teacher), theirs)
        if begins is not None:
            assert {found.student[i] for i in indices} == {found.teacher[i] for i in theirs[begins]}
    assert found.teacher[tokenizer(teacher).end] == found.student[tokenizer(student).end] == tokenizer(student).end


@pytest.mark.parametrize(("teacher", "student"), PAIRS)
def test_shared_tokens_stay_apart_where_teachers_tokens_are_the_outcomes(teacher: str, student: str) -> None:
    found, theirs, ours = known("hybrid_kl", teacher, student), of_bytes(teacher), of_bytes(student)
    shared = sorted(set(theirs) & set(ours))
    assert len({found.student[ours[piece][0]] for piece in shared}) == len(shared)
    for piece in shared:
        assert {found.student[i] for i in ours[piece]} == {found.teacher[i] for i in theirs[piece]}
    reached = {-1, *found.student.tolist()}
    assert all(outcome in reached for outcome in found.teacher.tolist())


@given(st.lists(st.integers(-1, 6), min_size=1, max_size=40), st.lists(st.integers(0, 6), max_size=8, unique=True))
def test_members_are_all_tokens_of_an_outcome(student: list[int], asked: list[int]) -> None:
    made = Outcomes(np.array([], np.int64), np.array(student, np.int64))
    tokens, of = made.members(np.array(asked, np.int64))
    found = [(int(which), int(token)) for token, which in zip(tokens, of, strict=True)]
    assert found == [(n, t) for n, outcome in enumerate(asked) for t, mine in enumerate(student) if mine == outcome]


def test_the_nearest_token_by_edits() -> None:
    """Of ` the` nothing is as near as `the`; what the student has is its own; the rest was not heard."""
    teacher, student = tokenizer("unigram"), tokenizer("byte-level")
    piece = teacher.table.index(b" the")
    found = mined(teacher, student, [piece, teacher.table.index(b"the")])
    chosen = student.table[found.teacher[piece]]
    nearest = min(edits(b" the", other) for other in set(student.table) - {b""})
    assert edits(b" the", chosen) == nearest
    assert (found.teacher >= 0).sum() == 3  # and the end
    assert projected(teacher, student, [piece]).teacher[piece] >= 0
    assert (carried(teacher, student, []).teacher >= 0).sum() == 1


def edits(one: bytes, other: bytes) -> int:
    """Levenshtein's distance, row by row."""
    row = list(range(len(other) + 1))
    for i, a in enumerate(one, 1):
        row, above = [i], row
        for j, b in enumerate(other, 1):
            row.append(min(above[j] + 1, row[j - 1] + 1, above[j - 1] + (a != b)))
    return row[-1]
