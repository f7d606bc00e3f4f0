"""CE + β·KL (Eq. 11 of arXiv 2602.14301 with α = 0); where tokenizers differ, span likelihood stands in for KL."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from deepfusion.config import LogitsObjective
from deepfusion.losses import (
    IGNORED,
    chunked_losses,
    outcome_kl,
    rank_difference,
    span_divergence,
    token_logprobs,
    token_terms,
    weighted_mean,
)
from deepfusion.objectives.base import Objective, Predictions

BLOCK = 1 << 25
"""Logits that exist at one time (128 MiB in float32); of larger batches they are made in blocks of tokens, and made
again in the backward pass."""


class Logits(Objective):
    """Learning from labels and from teachers' next-token distributions.

    Batch fields, all aligned at the predicting position:
        labels, weights `[B, T]`: the next token (-100 none) and its weight in the cross-entropy.
        topk_ids, topk_logprobs `[B, T, k]`, topk_weight `[B, T]`: what was kept of the teacher's distribution, where
            the tokenizers are equal (weight 0: no teacher here; logprob -inf: padding). k = V is the dense KL.
        chunk `[B, T]`, chunk_logprobs, chunk_weight `[C]`: the chunk of each label (-1 none) and the teacher's
            log-likelihood of each chunk, where the tokenizers differ (weight 0: chunk left out).
        places `[R]`, outcome_logprobs `[R, k]`, outcome_weight `[R]`, members `[M, 3]`: where the tokenizers differ
            too, predicting positions (of all B · T) at which both begin a token, the teacher's log-probabilities of
            outcomes there (-inf: padding), and (which of the R, outcome, token): the student's tokens of each. Without
            members the outcomes are ranks: the probabilities in falling order.

    Any group of teacher fields may be missing. With `label_teaches` every label without a teacher's distribution
    stands in for one (the KL to a one-hot teacher is the label's cross-entropy), so that β weighs all text alike. KL
    and span likelihood are mixed by token: both are summed and divided by the number of all tokens that are taught
    (each counted by its weight, a chunk's tokens by the chunk's); what is said of outcomes counts as KL. With β = 0
    there is only CE, and `kl` is given as 0.
    """

    def __init__(self, config: LogitsObjective) -> None:
        super().__init__()
        self.config = config

    def forward(
        self, batch: Mapping[str, Tensor], predictions: Predictions, hidden_states: tuple[Tensor, ...] | None = None
    ) -> dict[str, Tensor]:
        """Terms `ce`, `kl`, `span` (before β and `span_weight`) and `loss`."""
        labels, weights = batch["labels"], batch["weights"]
        logprobs, divergence, crossed = self._per_token(batch, predictions)
        ce = weighted_mean(-logprobs, weights * (labels != IGNORED))

        kl, span, covered = logprobs.new_zeros(3)
        by_label = (labels != IGNORED) & self.config.label_teaches & (self.config.beta > 0)
        if "topk_ids" in batch:
            kl = (divergence * batch["topk_weight"]).sum()
            covered = covered + batch["topk_weight"].sum()
            by_label = by_label & (batch["topk_weight"] == 0)
        if "places" in batch and self.config.beta > 0:
            weight = torch.zeros_like(weights).flatten()
            weight[batch["places"]] = batch["outcome_weight"]
            weight = weight.view_as(weights)
            kl, covered = kl + (crossed * weight).sum(), covered + weight.sum()
            by_label = by_label & (weight == 0)
        kl = kl - (logprobs * weights * by_label).sum()
        covered = covered + (weights * by_label).sum()
        if "chunk" in batch:
            chunk, weight = batch["chunk"], batch["chunk_weight"]
            spans = span_divergence(logprobs, chunk, batch["chunk_logprobs"], self.config.span_temperature)
            span = (spans * weight).sum()
            covered = covered + (weight[chunk.clamp(min=0)] * ((chunk >= 0) & ~by_label)).sum()
        covered = torch.where(covered > 0, covered, 1.0)
        kl, span = kl / covered, span / covered
        loss = ce + self.config.beta * (kl + self.config.span_weight * span)
        return {"ce": ce, "kl": kl, "span": span, "loss": loss}

    def _per_token(self, batch: Mapping[str, Tensor], predictions: Predictions) -> tuple[Tensor, Tensor, Tensor]:
        """Log-probability of each label, KL to each position's teacher, and to one of another tokenizer (0 without
        teacher fields), `[B, T]` each.
        """
        flat = {name: batch[name].flatten(0, 1) for name in ("labels", "topk_ids", "topk_logprobs") if name in batch}

        def terms(rows: Tensor, which: slice) -> Tensor:
            labels = flat["labels"][which]
            crossed = self._crossed(batch, rows, which.start or 0)
            if "topk_ids" not in flat or self.config.beta == 0:
                logprobs = token_logprobs(rows, labels)
                return torch.stack([logprobs, torch.zeros_like(logprobs), crossed], -1)
            ids, kept = flat["topk_ids"][which], flat["topk_logprobs"][which]
            return torch.stack([*token_terms(rows, labels, ids, kept, self.config.temperature), crossed], -1)

        states, head, block = predictions.states, predictions.head, max(1, BLOCK // predictions.vocab)
        if states.shape[0] * states.shape[1] <= block:
            values = terms(head(states).flatten(0, 1), slice(None))
        else:
            values = chunked_losses(states.flatten(0, 1), head, block, terms)
        logprobs, divergence, crossed = values.unflatten(0, states.shape[:2]).unbind(-1)
        return logprobs, divergence, crossed

    def _crossed(self, batch: Mapping[str, Tensor], rows: Tensor, first: int) -> Tensor:
        """Of the positions from `first` on, whose logits are given, the divergence from what is said of outcomes."""
        result = torch.zeros(len(rows), device=rows.device)
        if "places" not in batch or self.config.beta == 0:
            return result
        inside = (batch["places"] >= first) & (batch["places"] < first + len(rows))
        here, teacher = batch["places"][inside] - first, batch["outcome_logprobs"][inside]
        logprobs = torch.log_softmax(rows[here].float(), -1)
        if "members" in batch:
            members = batch["members"][inside[batch["members"][:, 0]]].clone()
            members[:, 0] = (inside.cumsum(0) - 1)[members[:, 0]]
            difference = outcome_kl(logprobs, teacher, members, self.config.temperature)
        else:
            difference = rank_difference(logprobs, teacher)
        return result.index_put((here,), difference)
