"""One-for-all distillation (OFA-KD, arXiv 2310.19444): a student's intermediate states learn to predict too.

At the end of each of J stages an exit branch maps the student's hidden states to what its own head takes, and every
exit, like the head's own input, is held against the teacher's next-token distribution with `losses.adapted_target`.
Where tokenizers differ, that is done over the outcomes that both vocabularies tell apart, as projected KL is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.nn.functional import log_softmax

from deepfusion.config import OFAObjective
from deepfusion.losses import (
    IGNORED,
    adapted_target,
    chunked_losses,
    crossed_outcomes,
    kept_outcomes,
    weighted_mean,
)
from deepfusion.objectives.base import Objective, Predictions
from deepfusion.objectives.logits import BLOCK
from deepfusion.objectives.vaa import stage_ends


class OFA(Objective):
    """CE + β · (OFA of the head + Σ over J exits of OFA).

    Batch fields: those of `Logits` but for chunks, of whose likelihood no exit can be held against. An OFA term is the
    mean over all tokens that are taught, each counted by its weight; with `label_teaches` a label without a teacher's
    distribution stands in for one, with which its term is (2^γ − 1) times the label's cross-entropy.
    """

    needs_hidden_states: bool = True

    def __init__(self, config: OFAObjective, student_width: int, student_layers: int) -> None:
        super().__init__()
        self.config, self.layers = config, student_layers
        self.ends = stage_ends(student_layers, config.stages)
        self.exits = nn.ModuleList(
            nn.Sequential(
                nn.LayerNorm(student_width),
                nn.Linear(student_width, student_width),
                nn.GELU(),
                nn.Linear(student_width, student_width),
            )
            for _ in self.ends
        )

    def forward(
        self, batch: Mapping[str, Tensor], predictions: Predictions, hidden_states: tuple[Tensor, ...] | None = None
    ) -> dict[str, Tensor]:
        """Terms `ce`, `ofa` (of the head and all exits together, before β) and `loss`."""
        if hidden_states is None or len(hidden_states) != self.layers + 1:
            given = "none" if hidden_states is None else str(len(hidden_states))
            raise ValueError(f"OFA needs the {self.layers + 1} hidden states of {self.layers} layers, not {given}")
        labels, weights = batch["labels"], batch["weights"]
        taught = self._taught(batch)
        by_label = (labels != IGNORED) & (taught == 0) & self.config.label_teaches
        weight = taught + weights * by_label
        exits = [branch(hidden_states[end]) for branch, end in zip(self.exits, self.ends, strict=True)]
        ce, ofa = weights.new_zeros(()), weights.new_zeros(())
        for place, states in enumerate((predictions.states, *exits)):
            logprobs, said = self._per_token(batch, states, predictions)
            if place == 0:
                ce = weighted_mean(-logprobs, weights * (labels != IGNORED))
            of_label = -(2**self.config.gamma - 1) * logprobs
            ofa = ofa + weighted_mean(torch.where(by_label, of_label, said), weight)
        return {"ce": ce, "ofa": ofa, "loss": ce + self.config.beta * ofa}

    def _taught(self, batch: Mapping[str, Tensor]) -> Tensor:
        """How much each position's teacher counts, `[B, T]`."""
        weight = torch.zeros_like(batch["weights"])
        if "topk_ids" in batch:
            weight = weight + batch["topk_weight"]
        if "places" in batch:
            weight = weight.flatten().index_put((batch["places"],), batch["outcome_weight"]).view_as(weight)
        return weight

    def _per_token(
        self, batch: Mapping[str, Tensor], states: Tensor, predictions: Predictions
    ) -> tuple[Tensor, Tensor]:
        """Log-probability of each label, and the OFA term of each position's teacher (0 without), `[B, T]` each."""
        flat = {name: batch[name].flatten(0, 1) for name in ("labels", "topk_ids", "topk_logprobs") if name in batch}

        def terms(rows: Tensor, which: slice) -> Tensor:
            labels, logprobs = flat["labels"][which], log_softmax(rows.float(), -1)
            chosen = logprobs.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
            said = torch.zeros_like(chosen)
            if "topk_ids" in flat:
                ids, kept = flat["topk_ids"][which], flat["topk_logprobs"][which]
                student, teacher = kept_outcomes(logprobs, ids, kept)
                is_label = (ids == labels.unsqueeze(-1)) & kept.isfinite()
                is_label = torch.cat([is_label, torch.zeros_like(is_label[..., :1])], -1)
                said = adapted_target(student, teacher, is_label, self.config.gamma)
            if "places" in batch:
                said = said + self._crossed(batch, logprobs, labels, which.start or 0)
            return torch.stack([torch.where(labels == IGNORED, 0.0, chosen), said], -1)

        return _by_token(states, predictions, terms)

    def _crossed(self, batch: Mapping[str, Tensor], logprobs: Tensor, labels: Tensor, first: int) -> Tensor:
        """The terms of teachers with other tokenizers, of the positions from `first` on."""
        result = torch.zeros(len(logprobs), device=logprobs.device)
        inside = (batch["places"] >= first) & (batch["places"] < first + len(logprobs))
        here, teacher = batch["places"][inside] - first, batch["outcome_logprobs"][inside]
        members = batch["members"][inside[batch["members"][:, 0]]].clone()
        members[:, 0] = (inside.cumsum(0) - 1)[members[:, 0]]
        student, said = crossed_outcomes(logprobs[here], teacher, members)
        row, outcome, token = members.unbind(-1)
        mine = token == labels[here][row]
        is_label = torch.zeros_like(said, dtype=torch.bool).index_put((row[mine], outcome[mine]), mine[mine])
        return result.index_put((here,), adapted_target(student, said, is_label, self.config.gamma))


def _by_token(
    states: Tensor, predictions: Predictions, terms: Callable[[Tensor, slice], Tensor]
) -> tuple[Tensor, Tensor]:
    """Two values of every position, of logits that exist in blocks where all would be too many."""
    head, block = predictions.head, max(1, BLOCK // predictions.vocab)
    if states.shape[0] * states.shape[1] <= block:
        values = terms(head(states).flatten(0, 1), slice(None))
    else:
        values = chunked_losses(states.flatten(0, 1), head, block, terms)
    first, second = values.unflatten(0, states.shape[:2]).unbind(-1)
    return first, second
