import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepfusion.data.documents import ScoredQuestion
from deepfusion.metrics import ensemble, gap_closed, mutual_information, summarise


def scored(id: str, **fields: object) -> ScoredQuestion:
    facts = {
        "domain": "law",
        "private": True,
        "prompt_nats": 10.0,
        "prompt_bytes": 10,
        "answer_nats": 2.0,
        "answer_tokens": 4,
        "answer_bytes": 8,
        "correct_tokens": 1,
    }
    return ScoredQuestion.model_validate({"id": id, **facts, **fields})


def value(results, metric: str, domain: str = "all", subset: str = "all") -> float:
    (row,) = (r for r in results if (r.metric, r.domain, r.subset) == (metric, domain, subset))
    return row.value


def test_summaries_weigh_tokens_alike() -> None:
    rows = [
        scored("a", answer_nats=2.0, answer_tokens=4, correct_tokens=1, answer_bytes=8),
        scored("b", domain="food", private=False, answer_nats=1.0, answer_tokens=2, correct_tokens=2, answer_bytes=4),
    ]
    results = summarise(rows, "base", seed=7, item="x")
    assert value(results, "token_log_perplexity") == pytest.approx(3 / 6)
    assert value(results, "token_accuracy") == pytest.approx(3 / 6)
    assert value(results, "answer_nats_per_byte") == pytest.approx(3 / 12)
    assert value(results, "token_accuracy", subset="private_only") == 0.25
    assert value(results, "token_accuracy", domain="food", subset="public") == 1.0
    assert not [r for r in results if r.domain == "food" and r.subset == "private_only"]
    assert not [r for r in results if r.metric == "choice_accuracy"]
    assert {(r.seed, r.item, r.system) for r in results} == {(7, "x", "base")}


def test_choice_accuracy_counts_only_questions_with_options() -> None:
    rows = [scored("a", choice=1, answer_idx=1), scored("b", choice=0, answer_idx=1), scored("c")]
    results = summarise(rows, "base", 0)
    (row,) = (r for r in results if (r.metric, r.domain, r.subset) == ("choice_accuracy", "all", "all"))
    assert (row.value, row.count) == (0.5, 2)


def test_no_rows_is_an_error() -> None:
    with pytest.raises(ValueError, match="base has no scored question"):
        summarise([], "base", 0)


def test_the_member_most_at_home_in_the_prompt_answers() -> None:
    first = [scored("a", prompt_nats=10.0, prompt_bytes=10, correct_tokens=1), scored("b", prompt_nats=1.0)]
    # Fewer bytes were scored: 9 nats in 8 bytes are worse than 10 in 10.
    second = [scored("a", prompt_nats=9.0, prompt_bytes=8, correct_tokens=4), scored("b", prompt_nats=0.5)]
    assert ensemble([first, second]) == [first[0], second[1]]
    assert ensemble([first, first]) == first


def test_members_must_answer_the_same_questions() -> None:
    with pytest.raises(ValueError, match="member 1"):
        ensemble([[scored("a")], [scored("b")]])
    with pytest.raises(ValueError, match="at least one"):
        ensemble([])


def test_gap_closed() -> None:
    assert gap_closed(0.6, 0.2, 1.0) == pytest.approx(0.5)
    assert gap_closed(0.6, 0.2, 0.2) is None


def test_mutual_information_by_hand() -> None:
    assert mutual_information([[1.0, 0.0], [0.0, 1.0]]) == pytest.approx(math.log(2))
    assert mutual_information([[1.0] * 4] * 3) == pytest.approx(0.0, abs=1e-12)
    # p = [[3, 1], [1, 3]] / 8: 2·(3/8)·log(3/2) + 2·(1/8)·log(1/2)
    assert mutual_information([[3.0, 1.0], [1.0, 3.0]]) == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5))
    with pytest.raises(ValueError, match="positive sum"):
        mutual_information([[0.0, 0.0]])


@given(st.lists(st.lists(st.floats(0, 10), min_size=3, max_size=3), min_size=2, max_size=4))
def test_mutual_information_is_bounded_by_both_entropies(weights: list[list[float]]) -> None:
    if sum(map(sum, weights)) < 1e-6:
        return
    information = mutual_information(weights)
    assert 0 <= information <= math.log(min(len(weights), 3)) + 1e-9
