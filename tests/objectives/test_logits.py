from math import log

import pytest
import torch
from torch import Tensor

from deepfusion.config import LogitsObjective
from deepfusion.losses import kl_divergence
from deepfusion.objectives import Logits, Predictions, logits

torch.set_num_threads(1)

EVEN = [1 / 3, 1 / 3, 1 / 3]
KL = 0.25 * log(3 / 4) + 0.75 * log(9 / 8)  # the teacher keeps one word with 1/4, the student has 1/3
SPAN = 0.5 * log(0.5 / (1 / 3)) + 0.5 * log(0.5 / (2 / 3))  # 1/2 against 1/3 at τ = 1


def student() -> Tensor:
    return torch.tensor([[EVEN, EVEN, EVEN, EVEN]]).log()


def batch(**fields: Tensor) -> dict[str, Tensor]:
    return {"labels": torch.tensor([[0, 1, 2, -100]]), "weights": torch.ones(1, 4), **fields}


def topk() -> dict[str, Tensor]:
    return {
        "topk_ids": torch.ones(1, 4, 1, dtype=torch.int64),
        "topk_logprobs": torch.tensor([[[0.25], [0.25], [1.0], [1.0]]]).log(),
        "topk_weight": torch.tensor([[1.0, 1.0, 0.0, 0.0]]),
    }


def spans() -> dict[str, Tensor]:
    return {
        "chunk": torch.tensor([[-1, -1, 0, -1]]),
        "chunk_logprobs": torch.tensor([0.5]).log(),
        "chunk_weight": torch.ones(1),
    }


def terms(objective: LogitsObjective, fields: dict[str, Tensor]) -> dict[str, float]:
    return {name: value.item() for name, value in Logits(objective)(fields, Predictions.of(student())).items()}


def test_without_teachers_there_is_only_cross_entropy():
    found = terms(LogitsObjective(label_teaches=False), batch())
    assert found == {"ce": pytest.approx(log(3)), "kl": 0, "span": 0, "loss": pytest.approx(log(3))}


def test_a_label_stands_in_for_a_missing_teacher():
    """Two of three labels have a distribution; the third is its own teacher: KL to a one-hot is its cross-entropy."""
    found = terms(LogitsObjective(beta=3), batch(**topk()))
    assert found["kl"] == pytest.approx((2 * KL + log(3)) / 3, rel=1e-5)
    weights = torch.tensor([[1.0, 1.0, 4.0, 1.0]])
    found = terms(LogitsObjective(beta=3), {**batch(**topk()), "weights": weights})
    assert found["kl"] == pytest.approx((2 * KL + 4 * log(3)) / 6, rel=1e-5)


def test_a_label_of_another_tokenizer_teaches_beside_its_span():
    found = terms(LogitsObjective(beta=3, span_temperature=1), batch(**topk(), **spans()))
    assert found["kl"] == pytest.approx((2 * KL + log(3)) / 3, rel=1e-5)
    assert found["span"] == pytest.approx(SPAN / 3, rel=1e-5)


def test_the_kl_is_a_mean_over_covered_tokens():
    found = terms(LogitsObjective(beta=3, label_teaches=False), batch(**topk()))
    assert found["kl"] == pytest.approx(KL, rel=1e-5)
    assert found["loss"] == pytest.approx(log(3) + 3 * KL, rel=1e-5)


def test_spans_and_distributions_are_mixed_by_token():
    objective = LogitsObjective(beta=3, span_weight=2, span_temperature=1, label_teaches=False)
    found = terms(objective, batch(**topk(), **spans()))
    assert found["kl"] == pytest.approx(2 * KL / 3, rel=1e-5)
    assert found["span"] == pytest.approx(SPAN / 3, rel=1e-5)
    assert found["loss"] == pytest.approx(log(3) + 3 * (2 * KL + 2 * SPAN) / 3, rel=1e-5)


def test_a_chunk_without_weight_covers_nothing():
    fields = {**spans(), "chunk_weight": torch.zeros(1)}
    found = terms(LogitsObjective(beta=3, label_teaches=False), batch(**topk(), **fields))
    assert found["span"] == 0
    assert found["kl"] == pytest.approx(KL, rel=1e-5)


def test_no_divergence_is_computed_without_beta():
    found = terms(LogitsObjective(beta=0), batch(**topk()))
    assert found["kl"] == 0
    assert found["loss"] == found["ce"]


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_a_teacher_kept_whole_is_the_dense_kl(temperature: float):
    torch.manual_seed(0)
    teacher, mine = torch.randn(2, 4, 5), torch.randn(2, 4, 5)
    weight = torch.randint(0, 2, (2, 4)).float()
    kept, ids = teacher.log_softmax(-1).topk(5)
    fields = {"labels": torch.zeros(2, 4, dtype=torch.int64), "weights": torch.ones(2, 4)}
    fields |= {"topk_ids": ids, "topk_logprobs": kept, "topk_weight": weight}
    found = Logits(LogitsObjective(temperature=temperature, label_teaches=False))(fields, Predictions.of(mine))["kl"]
    torch.testing.assert_close(found, kl_divergence(mine, teacher, weight, temperature))


def test_large_batches_are_cut_into_blocks(monkeypatch: pytest.MonkeyPatch):
    torch.manual_seed(0)
    fields, found = batch(**topk(), **spans()), []
    values = torch.randn(1, 4, 3)
    for block in (logits.BLOCK, 6):
        monkeypatch.setattr(logits, "BLOCK", block)
        mine = values.clone().requires_grad_()
        loss = Logits(LogitsObjective())(fields, Predictions.of(mine))["loss"]
        found.append((loss.detach(), torch.autograd.grad(loss, mine)[0]))
    torch.testing.assert_close(*found)
