from math import log

import pytest
import torch
from torch import Tensor

from deepfusion.config import OFAObjective
from deepfusion.losses import adapted_target
from deepfusion.objectives import OFA, Predictions, ofa

torch.set_num_threads(1)

WIDTH, VOCABULARY, LAYERS = 4, 3, 4
EVEN = log(3)  # what every token costs a student that thinks all three alike


def objective(**settings: float | str | bool) -> OFA:
    torch.manual_seed(0)
    return OFA(OFAObjective.model_validate({"stages": 2, "gamma": 1.5, **settings}), WIDTH, LAYERS)


def states(seed: int = 0) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(1, 4, WIDTH, generator=generator) for _ in range(LAYERS + 1))


def indifferent() -> Predictions:
    """A head that thinks all tokens alike, whatever comes in: every exit says the same."""
    return Predictions(torch.zeros(1, 4, WIDTH), lambda rows: rows[..., :1] * torch.zeros(VOCABULARY), VOCABULARY)


def batch(**fields: Tensor) -> dict[str, Tensor]:
    return {"labels": torch.tensor([[0, 1, 2, -100]]), "weights": torch.ones(1, 4), **fields}


def topk(p: float = 0.25) -> dict[str, Tensor]:
    """A teacher that keeps token 1 at two positions, of which the second is the label."""
    return {
        "topk_ids": torch.ones(1, 4, 1, dtype=torch.int64),
        "topk_logprobs": torch.tensor([[[p], [p], [1.0], [1.0]]]).log(),
        "topk_weight": torch.tensor([[1.0, 1.0, 0.0, 0.0]]),
    }


def terms(of: OFA, fields: dict[str, Tensor], predictions: Predictions | None = None) -> dict[str, float]:
    found = of(fields, predictions or indifferent(), states())
    return {name: value.item() for name, value in found.items()}


def test_the_target_by_hand() -> None:
    """Teacher 1/4 and 3/4, student 1/2 and 1/2; the label is the first, or none."""
    student, teacher = torch.tensor([0.5, 0.5]).log(), torch.tensor([0.25, 0.75]).log()
    first, none = torch.tensor([True, False]), torch.tensor([False, False])
    by_hand = ((1.25**1.5 - 1) + 0.75**1.5) * log(2)
    assert adapted_target(student, teacher, first, 1.5).item() == pytest.approx(by_hand)
    assert adapted_target(student, teacher, none, 1.5).item() == pytest.approx((0.25**1.5 + 0.75**1.5) * log(2))
    # With gamma 1 it is the cross-entropy between the two, whatever the label.
    for label in (first, none):
        assert adapted_target(student, teacher, label, 1.0).item() == pytest.approx(log(2))


def test_every_exit_is_held_against_the_teacher() -> None:
    """Token 1, and the other two: 1/3 and 2/3 of the student, 1/4 and 3/4 of the teacher; head and two exits."""
    unlabelled = 0.25**1.5 * log(3) + 0.75**1.5 * log(3 / 2)
    labelled = (1.25**1.5 - 1) * log(3) + 0.75**1.5 * log(3 / 2)
    found = terms(objective(label_teaches=False, beta=2.0), batch(**topk()))
    assert found["ce"] == pytest.approx(EVEN)
    assert found["ofa"] == pytest.approx(3 * (unlabelled + labelled) / 2, rel=1e-5)
    assert found["loss"] == pytest.approx(found["ce"] + 2 * found["ofa"], rel=1e-6)


def test_a_label_stands_in_for_a_missing_teacher() -> None:
    """A teacher that is sure of the label: (2^1.5 - 1) times its cross-entropy."""
    found = terms(objective(), batch())
    assert found["ofa"] == pytest.approx(3 * (2**1.5 - 1) * EVEN, rel=1e-5)
    assert terms(objective(label_teaches=False), batch())["ofa"] == 0


def test_another_tokenizer_is_heard_by_outcomes() -> None:
    """At position 1, whose label is token 1: tokens 1 and 2 have 1/2 of the teacher and 2/3 of the student."""
    fields = {
        "places": torch.tensor([1]),
        "outcome_logprobs": torch.tensor([[0.5]]).log(),
        "outcome_weight": torch.ones(1),
        "members": torch.tensor([[0, 0, 1], [0, 0, 2]]),
    }
    by_hand = (1.5**1.5 - 1) * log(3 / 2) + 0.5**1.5 * log(3)
    assert terms(objective(label_teaches=False), batch(**fields))["ofa"] == pytest.approx(3 * by_hand, rel=1e-5)


def test_blocks_of_tokens_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    head = torch.randn(WIDTH, VOCABULARY, generator=torch.Generator().manual_seed(1))
    predictions = Predictions(states(2)[0], lambda rows: rows @ head, VOCABULARY)
    fields = batch(**topk()) | {
        "places": torch.tensor([2]), "outcome_logprobs": torch.tensor([[0.5]]).log(),
        "outcome_weight": torch.ones(1), "members": torch.tensor([[0, 0, 2]]),
    }  # fmt: skip
    whole = terms(objective(), fields, predictions)
    monkeypatch.setattr(ofa, "BLOCK", VOCABULARY)
    assert terms(objective(), fields, predictions) == pytest.approx(whole, rel=1e-5)


def test_exits_learn_beside_the_student() -> None:
    of, hidden = objective(), tuple(state.requires_grad_() for state in states())
    head = torch.randn(WIDTH, VOCABULARY, generator=torch.Generator().manual_seed(1))
    of(batch(**topk()), Predictions(hidden[-1], lambda rows: rows @ head, VOCABULARY), hidden)["loss"].backward()
    assert [place for place, state in enumerate(hidden) if state.grad is not None] == [2, 4]  # ends of both stages
    assert all(parameter.grad is not None for parameter in of.exits.parameters())


def test_hidden_states_are_needed() -> None:
    with pytest.raises(ValueError, match="OFA needs the 5 hidden states of 4 layers, not none"):
        objective()(batch(), indifferent())


@pytest.mark.parametrize("across", ["auto", "span_likelihood", "uld"])
def test_what_an_exit_cannot_be_held_against_is_refused(across: str) -> None:
    with pytest.raises(ValueError, match="set projected_kl"):
        objective(across=across)
