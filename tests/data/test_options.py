from hypothesis import given
from hypothesis import strategies as st

from deepfusion.config import MadeOptions
from deepfusion.data.corpora import Row
from deepfusion.data.options import with_options


def row(number: int, answer: str, **fields: object) -> Row:
    return Row(
        **{
            "origin": "x", "id": str(number), "domain": "law", "split": "test", "prompt": "what?\n", "answer": answer,
            "group": str(number), "private": True,
        } | fields
    )  # fmt: skip


@given(
    answers=st.lists(st.text(min_size=1, max_size=9), min_size=1, max_size=30),
    count=st.integers(2, 5),
    questions=st.integers(1, 40),
)
def test_the_answer_is_one_of_them(answers: list[str], count: int, questions: int) -> None:
    rows = [row(number, answer) for number, answer in enumerate(answers)]
    made = with_options(rows, MadeOptions(count=count, questions=questions), seed=3)
    assert [(r.id, r.answer) for r in made] == [(r.id, r.answer) for r in rows]
    asked = [r for r in made if r.options is not None]
    assert len(asked) == (min(questions, len(rows)) if len(set(answers)) >= count else 0)
    for r in asked:
        assert r.options is not None
        assert r.answer_idx is not None
        assert len(set(r.options)) == len(r.options) == count
        assert r.options[r.answer_idx] == r.answer
        assert set(r.options) <= set(answers)


def test_wrong_options_are_of_the_domain_and_of_like_length() -> None:
    rows = [row(n, "a" * (n + 1)) for n in range(40)] + [row(100 + n, "b" * (n + 1), domain="food") for n in range(40)]
    made = with_options(rows, MadeOptions(count=3, questions=40), seed=0)
    assert made == with_options(rows, MadeOptions(count=3, questions=40), seed=0)
    for r in made:
        assert r.options is not None
        assert {option[0] for option in r.options} == {r.answer[0]}
        assert max(abs(len(option) - len(r.answer)) for option in r.options) <= 8
    assert len({r.answer_idx for r in made}) == 3


def test_private_questions_come_first_and_what_has_options_keeps_them() -> None:
    rows = [
        *(row(n, str(n), private=n % 2 == 0) for n in range(10)),
        row(10, "x", options=("x", "y"), answer_idx=0),
        row(11, "text", prompt=""),
    ]
    made = with_options(rows, MadeOptions(count=4, questions=5), seed=0)
    assert [r.id for r in made if r.options is not None] == ["0", "2", "4", "6", "8", "10"]
    assert made[10:] == tuple(rows[10:])
