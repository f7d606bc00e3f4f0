from typing import get_args

import pytest

from deepfusion.config import Across
from deepfusion.data.coverage import Coverage, coverage
from deepfusion.data.tokens import Tokenizer
from kinds import byte_level, llama_style, unigram


def test_coverage_by_hand() -> None:
    """`the dog`: of the unigram's two words the byte-level tokenizer, with no merges of them, begins two."""
    teacher, student = Tokenizer(unigram()), Tokenizer(byte_level())
    ids, ends = student.encode("the dog")
    others, their_ends = teacher.encode("the dog")
    assert [teacher.table[token] for token in others] == [b" the", b" dog"]
    shared = coverage(teacher, student, ["the dog"])
    assert shared is not None
    assert shared.chunks == len(set(ends) & set(their_ends)) / len(ids)
    assert shared.starts == 1 / len(ids)  # ` dog`: before `the` one has a space that is not there
    assert shared.known == sum(teacher.table[token] in student.table for token in others) / 2


def test_who_is_like_oneself_is_heard_whole() -> None:
    for make in (byte_level, lambda: unigram("never")):  # without a space that is not in the text
        one = Tokenizer(make())
        assert coverage(one, one, ["ab the dog", "½ два"]) == Coverage(1, 1, 1, len(one.table))
    shared = coverage(Tokenizer(llama_style()), Tokenizer(llama_style()), ["ab the dog"])
    assert shared is not None
    assert shared.known == 1


def test_nothing_in_common() -> None:
    one = Tokenizer(byte_level())
    assert coverage(one, one, []) is None
    assert coverage(one, one, [""]) is None
    assert isinstance(coverage(one, one, ["", "x"]), Coverage)


@pytest.mark.parametrize(
    ("shared", "how"),
    [
        (Coverage(chunks=0.9, starts=0.9, known=0.2, vocabulary=512), "span_likelihood"),
        (Coverage(chunks=0.3, starts=0.5, known=0.8, vocabulary=512), "projected_kl"),
        (Coverage(chunks=0.3, starts=0.5, known=0.2, vocabulary=512), "span_likelihood"),  # little either way
        (Coverage(chunks=0.9, starts=0.9, known=0.9, vocabulary=512), "span_likelihood"),
        (Coverage(chunks=0.9, starts=0.9, known=0.9, vocabulary=49_152), "projected_kl"),
        (Coverage(chunks=0.9, starts=0.9, known=0.2, vocabulary=49_152), "span_likelihood"),  # foreign tokens
    ],
)
def test_auto_is_what_says_more(shared: Coverage, how: Across) -> None:
    assert shared.chosen("auto") == how
    for asked in get_args(Across):
        if asked != "auto":
            assert shared.chosen(asked) == asked
