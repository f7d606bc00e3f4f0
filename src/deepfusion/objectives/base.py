"""What every objective answers: the loss of a batch, given what the student made of it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping

from torch import Tensor, nn


class Objective(nn.Module, ABC):
    """What a student is trained on. Its parameters, if any, are trained beside the student and thrown away after."""

    needs_hidden_states: bool = False
    """Whether `forward` must be given the student's hidden states."""

    @abstractmethod
    def forward(
        self, batch: Mapping[str, Tensor], logits: Tensor, hidden_states: tuple[Tensor, ...] | None = None
    ) -> dict[str, Tensor]:
        """Loss terms of a batch by name, each a scalar; `loss` is the one to minimise.

        Args:
            batch: labels, weights and the teachers' fields, as each objective says.
            logits: the student's, `[batch, tokens, vocab]`.
            hidden_states: the student's, `[batch, tokens, width]` each: embeddings, then after each layer.
        """
