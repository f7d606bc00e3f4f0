"""Losses: pure functions of tensors, in float32 whatever the precision of the logits. Nothing here reads a config.

Everything a vocabulary wide is derived from at most one pass over the logits, and `chunked_losses` walks over tokens in
blocks, so that a float32 `[tokens, vocab]` tensor need never exist.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import cosine_similarity, log_softmax, mse_loss, normalize
from torch.utils.checkpoint import checkpoint

IGNORED = -100
"""The label of a position that predicts nothing."""

_NOTHING = -1e30  # log of probability 0: finite, so that 0 · log 0 and its gradient are 0 and not NaN
_CERTAIN = -1e-3  # span log-likelihoods above this count as this: log(1 - p) has no finite value at p = 1


def weighted_mean(values: Float[Tensor, "*shape"], weights: Float[Tensor, "*shape"]) -> Float[Tensor, ""]:
    """Σ w·v / Σ w; 0 where there is no weight at all."""
    total = weights.sum()
    return (values * weights).sum() / torch.where(total > 0, total, 1.0)


def token_logprobs(
    logits: Float[Tensor, "*positions vocab"], labels: Int[Tensor, "*positions"]
) -> Float[Tensor, "*positions"]:
    """Log-probability of each label; 0 where the label is -100."""
    chosen = log_softmax(logits.float(), -1).gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return torch.where(labels == IGNORED, 0.0, chosen)


def cross_entropy(
    logits: Float[Tensor, "batch tokens vocab"],
    labels: Int[Tensor, "batch tokens"],
    weights: Float[Tensor, "batch tokens"],
) -> Float[Tensor, ""]:
    """Σ w·(-log p(label)) / Σ w over the positions that have a label (Eq. 2 of arXiv 2602.14301); 0 without weight."""
    return weighted_mean(-token_logprobs(logits, labels), weights * (labels != IGNORED))


def kl_divergence(
    student_logits: Float[Tensor, "batch tokens vocab"],
    teacher_logits: Float[Tensor, "batch tokens vocab"],
    mask: Float[Tensor, "batch tokens"],
    temperature: float = 1.0,
) -> Float[Tensor, ""]:
    """T² · KL(teacher ‖ student) over the whole vocabulary at temperature T, mean over `mask` (Eq. 10)."""
    student = log_softmax(student_logits.float() / temperature, -1)
    teacher = log_softmax(teacher_logits.float() / temperature, -1)
    divergence = (teacher.exp() * (teacher - student)).sum(-1)
    return temperature**2 * weighted_mean(divergence, mask)


def topk_kl(
    student_logits: Float[Tensor, "batch tokens vocab"],
    topk_ids: Int[Tensor, "batch tokens k"],
    topk_logprobs: Float[Tensor, "batch tokens k"],
    weights: Float[Tensor, "batch tokens"],
    temperature: float = 1.0,
) -> Float[Tensor, ""]:
    """Weighted mean of T² · KL(teacher ‖ student), in which all tokens that the teacher did not keep are one (Eq. 10).

    With the whole vocabulary kept it is the dense KL. `topk_logprobs` are at temperature 1 and not renormalised; -inf
    marks padding, whose id means nothing. The tempering happens after the others were added up to one outcome, so that
    equal distributions have divergence 0 at every temperature.
    """
    labels = torch.full_like(topk_ids[..., 0], IGNORED)
    _, divergence = token_terms(student_logits, labels, topk_ids, topk_logprobs, temperature)
    return weighted_mean(divergence, weights)


def token_terms(
    logits: Float[Tensor, "*positions vocab"],
    labels: Int[Tensor, "*positions"],
    topk_ids: Int[Tensor, "*positions k"],
    topk_logprobs: Float[Tensor, "*positions k"],
    temperature: float = 1.0,
) -> tuple[Float[Tensor, "*positions"], Float[Tensor, "*positions"]]:
    """`token_logprobs` and the summands of `topk_kl`, from one pass over the vocabulary.

    Where nothing is kept of a teacher (all -inf) the second is finite and means nothing: weigh it with 0.
    """
    logprobs = log_softmax(logits.float(), -1)
    student, teacher = kept_outcomes(logprobs, topk_ids, topk_logprobs)
    divergence = outcome_divergence(student, teacher, temperature)
    chosen = logprobs.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return torch.where(labels == IGNORED, 0.0, chosen), divergence


def kept_outcomes(
    logprobs: Float[Tensor, "*positions vocab"],
    topk_ids: Int[Tensor, "*positions k"],
    topk_logprobs: Float[Tensor, "*positions k"],
) -> tuple[Float[Tensor, "*positions outcomes"], Float[Tensor, "*positions outcomes"]]:
    """What student and teacher think of each token that the teacher kept, and last of all others together.

    Args:
        logprobs: the student's, normalised.
        topk_ids: tokens that the teacher kept.
        topk_logprobs: the teacher's; -inf is padding, which counts as impossible for both.
    """
    kept = topk_logprobs.isfinite()
    some_left = kept.sum(-1) < logprobs.shape[-1]
    # Padding points at its position's best token: whatever its id, it must not take another token out of the rest.
    ids = torch.where(kept, topk_ids, topk_ids.gather(-1, topk_logprobs.argmax(-1, keepdim=True)))
    # The rest is added up, not taken as 1 - Σ kept: that difference has no digits left once a student is sure.
    rest = _log(logprobs.exp().scatter(-1, ids, 0.0).sum(-1), some_left)
    student = torch.cat([logprobs.gather(-1, ids).masked_fill(~kept, _NOTHING), rest.unsqueeze(-1)], -1)
    mass = -torch.expm1(topk_logprobs.logsumexp(-1).clamp(max=0))
    rest = _log(mass, some_left & (mass > 0))
    return student, torch.cat([topk_logprobs.masked_fill(~kept, _NOTHING), rest.unsqueeze(-1)], -1)


def outcome_divergence(
    student: Float[Tensor, "*positions outcomes"], teacher: Float[Tensor, "*positions outcomes"], temperature: float
) -> Float[Tensor, "*positions"]:
    """T² · KL(teacher ‖ student) over outcomes, both renormalised at temperature T."""
    student, teacher = log_softmax(student / temperature, -1), log_softmax(teacher / temperature, -1)
    return temperature**2 * (teacher.exp() * (teacher - student)).sum(-1)


def adapted_target(
    student: Float[Tensor, "*positions outcomes"],
    teacher: Float[Tensor, "*positions outcomes"],
    label: Bool[Tensor, "*positions outcomes"],
    gamma: float,
) -> Float[Tensor, "*positions"]:
    """−Σ_c ((p_t(c) + 1[c = y])^γ − 1[c = y]) · log p_s(c): one-for-all distillation (arXiv 2310.19444).

    With γ = 1 it is the cross-entropy between teacher and student; above, the label y weighs more, the surer the
    teacher is of it. An outcome that the teacher thinks impossible counts as nothing.

    Args:
        student: log-probabilities of outcomes.
        teacher: the same.
        label: the outcome that holds the label; none where no outcome does.
        gamma: γ.
    """
    held = label.to(teacher.dtype)
    weight = (teacher.exp() + held) ** gamma - held
    return -(weight * student).sum(-1)


def span_divergence(
    student_logprobs: Float[Tensor, "batch tokens"],
    chunk: Int[Tensor, "batch tokens"],
    chunk_logprobs: Float[Tensor, " chunks"],
    tau: float,
) -> Float[Tensor, " chunks"]:
    """Divergence of each chunk's likelihood, teacher against student, across tokenizers (ALM, arXiv 2503.20083).

    A chunk is a run of tokens between byte boundaries that both tokenizers share; its likelihood under the student is
    the product over its tokens. With p and q the teacher's and the student's likelihood to the power 1/τ, the
    divergence is τ · (p log(p/q) + (1-p) log((1-p)/(1-q))): 0 when equal, and of one size whatever τ.

    Args:
        student_logprobs: log-probability of each label.
        chunk: the chunk that each position's label belongs to; -1 none.
        chunk_logprobs: the teacher's log-likelihood of each chunk.
        tau: τ.
    """
    inside = chunk >= 0
    student = torch.zeros_like(chunk_logprobs).index_add(0, chunk[inside], student_logprobs[inside])
    log_q, log_p = student.clamp(max=_CERTAIN) / tau, chunk_logprobs.clamp(max=_CERTAIN) / tau
    log_not_q, log_not_p = torch.log(-torch.expm1(log_q)), torch.log(-torch.expm1(log_p))
    return tau * (log_p.exp() * (log_p - log_q) - torch.expm1(log_p) * (log_not_p - log_not_q))


def span_likelihood(
    student_logprobs: Float[Tensor, "batch tokens"],
    chunk: Int[Tensor, "batch tokens"],
    chunk_logprobs: Float[Tensor, " chunks"],
    chunk_weight: Float[Tensor, " chunks"],
    tau: float,
) -> Float[Tensor, ""]:
    """Weighted mean of `span_divergence` over chunks."""
    return weighted_mean(span_divergence(student_logprobs, chunk, chunk_logprobs, tau), chunk_weight)


def outcome_kl(
    logprobs: Float[Tensor, "rows vocab"],
    teacher_logprobs: Float[Tensor, "rows k"],
    members: Int[Tensor, "members 3"],
    temperature: float = 1.0,
) -> Float[Tensor, " rows"]:
    """T² · KL(teacher ‖ student) over outcomes that are told apart by two vocabularies, with one more for the rest.

    Args:
        logprobs: the student's, normalised.
        teacher_logprobs: of outcomes, not renormalised; -inf is padding.
        members: (row, outcome, token): the student's tokens of each outcome; a token is in one outcome of its row.
        temperature: T; as in `topk_kl` it is applied to outcomes, not to tokens.
    """
    return outcome_divergence(*crossed_outcomes(logprobs, teacher_logprobs, members), temperature)


def crossed_outcomes(
    logprobs: Float[Tensor, "rows vocab"], teacher_logprobs: Float[Tensor, "rows k"], members: Int[Tensor, "members 3"]
) -> tuple[Float[Tensor, "rows outcomes"], Float[Tensor, "rows outcomes"]]:
    """`kept_outcomes` where an outcome holds several of the student's tokens; arguments as of `outcome_kl`."""
    row, outcome, token = members.unbind(-1)
    kept = teacher_logprobs.isfinite()
    probabilities = logprobs.exp()
    said = torch.zeros_like(teacher_logprobs).index_put((row, outcome), probabilities[row, token], accumulate=True)
    left = probabilities.index_put((row, token), probabilities.new_zeros(())).sum(-1)
    everything = torch.ones_like(left, dtype=torch.bool)
    student = torch.cat([_log(said, kept), _log(left, everything).unsqueeze(-1)], -1)
    mass = -torch.expm1(teacher_logprobs.logsumexp(-1).clamp(max=0))
    return student, torch.cat([teacher_logprobs.masked_fill(~kept, _NOTHING), _log(mass, mass > 0).unsqueeze(-1)], -1)


def rank_difference(
    logprobs: Float[Tensor, "rows vocab"], teacher_logprobs: Float[Tensor, "rows k"]
) -> Float[Tensor, " rows"]:
    """Σ |p - q| over sorted probabilities, whatever tokens they are of (ULD, arXiv 2402.12030).

    Of the teacher only the k greatest are known, in falling order (-inf padding): all beyond are one.
    """
    k = min(teacher_logprobs.shape[-1], logprobs.shape[-1])
    student, teacher = logprobs.topk(k, -1).values.exp(), teacher_logprobs[..., :k].exp()
    return (student - teacher).abs().sum(-1) + (student.sum(-1) - teacher.sum(-1)).abs()


def feature_mse(student: Float[Tensor, "*shape"], teacher: Float[Tensor, "*shape"]) -> Float[Tensor, ""]:
    """Mean squared difference over every element (one stage's summand of Eq. 9)."""
    return mse_loss(student.float(), teacher.float())


def feature_cosine(student: Float[Tensor, "*shape width"], teacher: Float[Tensor, "*shape width"]) -> Float[Tensor, ""]:
    """Mean over vectors of 1 − cosine."""
    return 1 - cosine_similarity(student.float(), teacher.float(), dim=-1).mean()


def feature_relations(
    student: Float[Tensor, "vectors student_width"], teacher: Float[Tensor, "vectors teacher_width"]
) -> Float[Tensor, ""]:
    """How differently two models see which vectors are alike: no projection between their widths is needed.

    The cosines of all pairs of vectors, each model's counted from its own mean vector; mean squared difference between
    the two models' over all pairs (as in similarity-preserving distillation, arXiv 1907.09682). 0 of fewer than two.
    """
    ours, theirs = (normalize(side - side.mean(0), dim=-1) for side in (student.float(), teacher.float()))
    pairs = max(1, len(ours) * (len(ours) - 1))
    return (ours @ ours.T - theirs @ theirs.T).fill_diagonal_(0).square().sum() / pairs


def chunked_losses(
    hidden: Float[Tensor, "tokens width"],
    head: Callable[[Tensor], Tensor],
    block: int,
    fn: Callable[[Tensor, slice], Tensor],
) -> Float[Tensor, "tokens ..."]:
    """`fn(head(hidden), all)` in blocks of tokens, whose logits are thrown away and made again in the backward pass.

    Args:
        hidden: what the head takes.
        head: `[n, width]` → logits `[n, vocab]`.
        block: tokens at a time.
        fn: (logits `[n, vocab]`, which tokens they are) → per-token values `[n, ...]`.
    """

    def values(rows: Tensor, which: slice) -> Tensor:
        return fn(head(rows), which)

    blocks = [slice(start, start + block) for start in range(0, len(hidden), block)]
    return torch.cat([checkpoint(values, hidden[which], which, use_reentrant=False) for which in blocks])


def _log(mass: Tensor, where: Tensor) -> Tensor:
    return torch.where(where, mass.clamp(min=torch.finfo(mass.dtype).tiny).log(), _NOTHING)
