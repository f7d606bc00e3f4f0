from math import log

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from deepfusion.losses import (
    IGNORED,
    chunked_losses,
    cross_entropy,
    feature_cosine,
    feature_mse,
    feature_relations,
    kl_divergence,
    outcome_kl,
    rank_difference,
    span_divergence,
    span_likelihood,
    token_logprobs,
    token_terms,
    topk_kl,
)

torch.set_num_threads(1)
INF = float("inf")

# Three words; logs of probabilities are logits.
EVEN = [1 / 3, 1 / 3, 1 / 3]
SURE = [1 / 2, 1 / 4, 1 / 4]


def logs(*rows: list[float]) -> Tensor:
    """One batch row of log-probabilities, shifted so that normalising is the loss's own business."""
    return torch.tensor([rows]).log() + 3.0


# ── cross-entropy ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_cross_entropy_weighs_tokens():
    loss = cross_entropy(logs(SURE, SURE, SURE), torch.tensor([[0, 2, -100]]), torch.tensor([[1.0, 3.0, 7.0]]))
    assert loss.item() == pytest.approx((1 * log(2) + 3 * log(4)) / 4)


def test_cross_entropy_without_weight_is_zero_and_has_a_gradient():
    logits = logs(SURE, SURE).requires_grad_()
    loss = cross_entropy(logits, torch.tensor([[0, -100]]), torch.tensor([[0.0, 1.0]]))
    loss.backward()
    assert loss.item() == 0
    assert logits.grad is not None
    assert logits.grad.eq(0).all()


def test_token_logprobs():
    found = token_logprobs(logs(SURE, SURE, EVEN), torch.tensor([[0, -100, 2]]))
    assert found.tolist() == [pytest.approx([-log(2), 0.0, -log(3)])]


# ── Kullback-Leibler ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_kl_is_forward_and_masked():
    loss = kl_divergence(logs(EVEN, EVEN), logs(SURE, EVEN), torch.tensor([[1.0, 0.0]]))
    assert loss.item() == pytest.approx(0.5 * log(3 / 2) + 2 * 0.25 * log(3 / 4))


def test_kl_at_temperature_two():
    # Square roots of (4, 1, 1) / 6 are (2, 1, 1) / √6: at T = 2 the teacher is (1/2, 1/4, 1/4).
    loss = kl_divergence(logs(EVEN), logs([4 / 6, 1 / 6, 1 / 6]), torch.ones(1, 1), temperature=2.0)
    assert loss.item() == pytest.approx(4 * (0.5 * log(3 / 2) + 2 * 0.25 * log(3 / 4)), rel=1e-5)


def test_topk_kl_adds_the_others_up():
    # Kept: word 1 with 1/4. The rest has 3/4 of the teacher and 2/3 of the student.
    loss = topk_kl(logs(EVEN), torch.tensor([[[1]]]), torch.tensor([[[0.25]]]).log(), torch.ones(1, 1))
    assert loss.item() == pytest.approx(0.25 * log(3 / 4) + 0.75 * log(9 / 8), rel=1e-5)


def test_topk_kl_weighs_positions():
    ids, kept = torch.tensor([[[1], [1]]]), torch.tensor([[[0.25], [0.25]]]).log()
    loss = topk_kl(logs(EVEN, SURE), ids, kept, torch.tensor([[1.0, 3.0]]))
    assert loss.item() == pytest.approx((0.25 * log(3 / 4) + 0.75 * log(9 / 8)) / 4, rel=1e-5)


def test_topk_kl_ignores_padding_whatever_its_id():
    ids = torch.tensor([[[1, 1, 0, 2]]])
    kept = torch.tensor([[[log(0.25), -INF, -INF, -INF]]])
    expected = topk_kl(logs(EVEN), ids[..., :1], kept[..., :1], torch.ones(1, 1))
    assert topk_kl(logs(EVEN), ids, kept, torch.ones(1, 1)).item() == pytest.approx(expected.item())


def test_topk_kl_of_positions_without_teacher_is_zero():
    logits = logs(EVEN, EVEN).requires_grad_()
    kept = torch.tensor([[[-INF, -INF], [0.0, 0.0]]])  # nothing kept, and a field that was left at zero
    loss = topk_kl(logits, torch.zeros(1, 2, 2, dtype=torch.int64), kept, torch.zeros(1, 2))
    loss.backward()
    assert loss.item() == 0
    assert logits.grad is not None
    assert logits.grad.eq(0).all()


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_topk_kl_of_everything_is_the_dense_kl(temperature: float):
    torch.manual_seed(0)
    student = torch.randn(2, 4, 7, dtype=torch.float64).float().requires_grad_()
    teacher = torch.randn(2, 4, 7)
    weights = torch.rand(2, 4)
    kept, ids = teacher.log_softmax(-1).topk(7)
    sparse = topk_kl(student, ids, kept, weights, temperature)
    dense = kl_divergence(student, teacher, weights, temperature)
    torch.testing.assert_close(sparse, dense)
    torch.testing.assert_close(*(torch.autograd.grad(loss, student)[0] for loss in (sparse, dense)))


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 6), st.sampled_from([0.1, 1.0, 30.0]), st.sampled_from([1.0, 3.0]), st.integers(0, 1000))
def test_topk_kl_is_zero_only_for_the_teacher_itself(k: int, scale: float, temperature: float, seed: int):
    generator = torch.Generator().manual_seed(seed)
    teacher = scale * torch.randn(1, 5, 6, generator=generator)
    kept, ids = teacher.log_softmax(-1).topk(k)
    same = topk_kl(teacher, ids, kept, torch.ones(1, 5), temperature)
    other = scale * torch.randn(1, 5, 6, generator=generator, requires_grad=True)
    loss = topk_kl(other, ids, kept, torch.ones(1, 5), temperature)
    (gradient,) = torch.autograd.grad(loss, other)
    if temperature == 1 or scale <= 1:  # a tempered rest below float32's 1 - p counts for more than its digits
        assert abs(same.item()) < 1e-4
    assert loss.item() > -1e-4
    assert gradient.isfinite().all()


def test_a_student_that_is_sure_still_learns_of_the_rest():
    # The student gives the others e^-40, far below float32's 1 - p; the teacher gives them 1/10.
    logits = torch.tensor([[[40.0, 0.0, 0.0]]], requires_grad=True)
    loss = topk_kl(logits, torch.tensor([[[0]]]), torch.tensor([[[0.9]]]).log(), torch.ones(1, 1))
    loss.backward()
    assert loss.item() == pytest.approx(0.9 * log(0.9) + 0.1 * (log(0.1) + 40 - log(2)), rel=1e-5)
    assert logits.grad is not None
    assert logits.grad.flatten().tolist() == pytest.approx([0.1, -0.05, -0.05])


def test_token_terms_of_bfloat16_logits_are_float32():
    logprobs, divergence = token_terms(
        logs(SURE).bfloat16(), torch.tensor([[0]]), torch.tensor([[[0]]]), torch.tensor([[[0.5]]]).log()
    )
    assert logprobs.dtype == divergence.dtype == torch.float32
    assert logprobs.item() == pytest.approx(-log(2), rel=1e-2)


# ── spans ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_span_divergence_by_hand():
    # Chunk 0 = the first two tokens, q = 1/2 · 1/2; chunk 1 = the last, q = 1/2. τ = 1 leaves likelihoods as they are.
    student = torch.tensor([[log(0.5), log(0.5), log(0.1), log(0.5)]])
    chunk = torch.tensor([[0, 0, -1, 1]])
    found = span_divergence(student, chunk, torch.tensor([0.5, 0.5]).log(), tau=1.0)
    assert found.tolist() == pytest.approx([0.5 * log(2) + 0.5 * log(2 / 3), 0.0], abs=1e-6)
    loss = span_likelihood(student, chunk, torch.tensor([0.5, 0.5]).log(), torch.tensor([1.0, 3.0]), tau=1.0)
    assert loss.item() == pytest.approx((0.5 * log(2) + 0.5 * log(2 / 3)) / 4)


def test_span_divergence_tempers_likelihoods():
    # τ = 2: p = √(1/4) = 1/2, q = √(1/16) = 1/4, times τ.
    found = span_divergence(torch.tensor([[log(1 / 16)]]), torch.tensor([[0]]), torch.tensor([0.25]).log(), tau=2.0)
    assert found.item() == pytest.approx(2 * (0.5 * log(2) + 0.5 * log(2 / 3)))


@pytest.mark.parametrize("tau", [1.0, 10.0, 100.0])
def test_span_divergence_is_finite_at_both_ends(tau: float):
    student = torch.tensor([[0.0, -200.0, -1e-9]], requires_grad=True)
    loss = span_divergence(student, torch.tensor([[0, 1, 2]]), torch.tensor([-200.0, 0.0, -1e-9]), tau)
    (gradient,) = torch.autograd.grad(loss.sum(), student)
    assert loss.isfinite().all()
    assert gradient.isfinite().all()
    assert loss[2].item() == 0


def test_no_chunks():
    loss = span_likelihood(torch.zeros(1, 2), torch.full((1, 2), -1), torch.zeros(0), torch.zeros(0), tau=10.0)
    assert loss.item() == 0


# ── features, blocks ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_feature_mse():
    assert feature_mse(torch.tensor([[1.0, 2.0]]), torch.tensor([[0.0, 4.0]])).item() == pytest.approx(2.5)


def test_feature_cosine():
    found = feature_cosine(torch.tensor([[3.0, 0.0], [0.0, 2.0]]), torch.tensor([[1.0, 1.0], [0.0, 5.0]]))
    assert found.item() == pytest.approx((1 - 2**-0.5) / 2)


def test_feature_relations_by_hand():
    # Around their means: -1, 1, 0 and 2, -1, -1; so the cosines of the pairs 12, 13, 23 are -1, 0, 0 and -1, -1, 1.
    student, teacher = torch.tensor([[4.0], [6.0], [5.0]]), torch.tensor([[3.0], [0.0], [0.0]])
    assert feature_relations(student, teacher).item() == pytest.approx((0 + 1 + 1) / 3)
    assert feature_relations(student[:1], teacher[:1]).item() == 0


def test_feature_relations_know_no_place_size_turn_or_width():
    torch.manual_seed(0)
    features = torch.randn(6, 4)
    turn = torch.linalg.qr(torch.randn(7, 7)).Q[:4]
    assert feature_relations(features, 5 * features @ turn + 2).item() == pytest.approx(0, abs=1e-10)
    assert feature_relations(features, torch.randn(6, 4)).item() > 0.1


def test_feature_relations_of_equal_vectors_have_a_gradient():
    features = torch.ones(3, 2, requires_grad=True)
    feature_relations(features, torch.eye(3)).backward()
    assert features.grad is not None
    assert features.grad.isfinite().all()


@pytest.mark.parametrize("block", [1, 4, 10, 50])
def test_chunked_losses_equal_unchunked_with_gradients(block: int):
    torch.manual_seed(0)
    head = nn.Linear(3, 5)
    hidden = torch.randn(10, 3, requires_grad=True)
    labels, ids = torch.randint(0, 5, (10,)), torch.tensor([[1, 2]]).repeat(10, 1)
    kept = torch.tensor([[0.5, 0.2]]).log().repeat(10, 1)

    def fn(logits: Tensor, which: slice) -> Tensor:
        return torch.stack(token_terms(logits, labels[which], ids[which], kept[which]), -1)

    whole, blocks = fn(head(hidden), slice(None)), chunked_losses(hidden, head, block, fn)
    torch.testing.assert_close(blocks, whole)
    inputs = [hidden, head.weight, head.bias]
    scale = torch.randn(10, 2)
    for found, expected in zip(
        *(torch.autograd.grad((values * scale).sum(), inputs) for values in (blocks, whole)), strict=True
    ):
        torch.testing.assert_close(found, expected)


# ── across vocabularies ───────────────────────────────────────────────────────────────────────────────────────────────


@given(st.integers(0, 99), st.integers(2, 9), st.sampled_from([1.0, 2.0, 0.7]))
def test_outcomes_of_one_token_each_are_the_kept_tokens(seed: int, vocabulary: int, temperature: float) -> None:
    torch.manual_seed(seed)
    k = 1 + seed % (vocabulary - 1)
    logits = torch.randn(3, vocabulary)
    kept = torch.log_softmax(torch.randn(3, vocabulary), -1).topk(k, -1)
    members = torch.tensor([[r, n, int(kept.indices[r, n])] for r in range(3) for n in range(k)])
    found = outcome_kl(torch.log_softmax(logits, -1), kept.values, members, temperature)
    _, wanted = token_terms(logits, torch.full((3,), IGNORED), kept.indices, kept.values, temperature)
    torch.testing.assert_close(found, wanted)


def test_outcomes_by_hand() -> None:
    """Student .5 .2 .2 .1; outcomes {0} and {1, 2}, the rest {3}; teacher .25, .5 and so .25."""
    logprobs = torch.tensor([[0.5, 0.2, 0.2, 0.1]]).log().requires_grad_()
    teacher = torch.tensor([[0.25, 0.5, 0.0]]).log()
    members = torch.tensor([[0, 0, 0], [0, 1, 1], [0, 1, 2]])
    found = outcome_kl(logprobs, teacher, members)
    wanted = 0.25 * log(0.25 / 0.5) + 0.5 * log(0.5 / 0.4) + 0.25 * log(0.25 / 0.1)
    assert float(found.detach()) == pytest.approx(wanted, rel=1e-5)
    found.sum().backward()
    assert torch.isfinite(logprobs.grad).all()
    same = outcome_kl(
        logprobs.detach(), torch.tensor([[0.5, 0.4]]).log(), torch.tensor([[0, 0, 0], [0, 1, 1], [0, 1, 2]])
    )
    assert float(same) == pytest.approx(0, abs=1e-6)


def test_ranks_by_hand() -> None:
    """Sorted, the student is .5 .3 .2, of the teacher .6 .3 and .1 more are known."""
    logprobs = torch.tensor([[0.2, 0.5, 0.3]]).log()
    assert float(rank_difference(logprobs, torch.tensor([[0.6, 0.3]]).log())) == pytest.approx(0.1 + 0 + 0.1)
    assert float(rank_difference(logprobs, torch.tensor([[0.5, 0.3, 0.2, 0.0]]).log())) == pytest.approx(0, abs=1e-6)
