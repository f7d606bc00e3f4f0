"""What every objective answers: the loss of a batch, given what the student made of it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor, nn


@dataclass(frozen=True)
class Predictions:
    """What a student says comes next, its head not yet applied: all logits at once can be more than memory holds."""

    states: Tensor  # [batch, tokens, width], what enters the head
    head: Callable[[Tensor], Tensor]  # [..., width] → logits [..., vocab]
    vocab: int

    @classmethod
    def of(cls, logits: Tensor) -> Predictions:
        """Logits that are there already, `[batch, tokens, vocab]`."""
        return cls(logits, lambda rows: rows, logits.shape[-1])


class Objective(nn.Module, ABC):
    """What a student is trained on. Its parameters, if any, are trained beside the student and thrown away after."""

    needs_hidden_states: bool = False
    """Whether `forward` must be given the student's hidden states."""

    @abstractmethod
    def forward(
        self, batch: Mapping[str, Tensor], predictions: Predictions, hidden_states: tuple[Tensor, ...] | None = None
    ) -> dict[str, Tensor]:
        """Loss terms of a batch by name, each a scalar; `loss` is the one to minimise.

        Args:
            batch: labels, weights and the teachers' fields, as each objective says.
            predictions: the student's.
            hidden_states: the student's, `[batch, tokens, width]` each: embeddings, then after each layer.
        """
