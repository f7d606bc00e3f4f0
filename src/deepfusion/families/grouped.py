"""Experts in mixed precision: autocast passes over grouped matrix products, which then run in the weights' float32.

That takes twice the time of everything else together (pytorch issue 174763; transformers casts the other way). So the
implementation that transformers takes by default gets its weights in autocast's precision, as linear layers get theirs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, grouped_mm_experts_forward

NAME = "grouped_mm"
ALIGNED = 8  # numbers of two bytes: torch's grouped product wants rows of whole 16 bytes; others stay as they are


class _Lowered:
    """An experts module whose weights are read in a given precision."""

    def __init__(self, experts: nn.Module, dtype: torch.dtype) -> None:
        self._experts, self._dtype = experts, dtype

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._experts, name)
        return value.to(self._dtype) if isinstance(value, nn.Parameter) else value


def experts_forward(self: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """What `grouped_mm` of transformers does, with autocast's precision where autocast is on.

    Args:
        self: the experts of one layer.
        hidden_states: `[tokens, width]`.
        top_k_index: `[tokens, k]`, experts of each token.
        top_k_weights: `[tokens, k]`, what each counts.
    """
    kind = hidden_states.device.type
    experts: Any = self
    if torch.is_autocast_enabled(kind) and all(matrix.shape[-1] % ALIGNED == 0 for matrix in self.parameters()):
        experts = _Lowered(self, torch.get_autocast_dtype(kind))
    return grouped_mm_experts_forward(experts, hidden_states, top_k_index, top_k_weights)


def heed_autocast() -> None:
    """Let experts run so, unless another implementation is asked for; DeepSeek v1's have no other than `eager`."""
    ALL_EXPERTS_FUNCTIONS.register(NAME, experts_forward)
