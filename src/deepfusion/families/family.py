"""What deepfusion asks about a model type: a questionnaire that each file beside this one answers with data."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Bool
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from deepfusion.config import MadeModel

Role = Literal["embedding", "attention", "ffn", "norm", "head", "router"]


@dataclass(frozen=True)
class Family:
    """One transformers model type."""

    model_type: str
    layers: str
    """Dotted path of the module list of layers."""
    roles: tuple[tuple[str, Role], ...]
    """Regular expression → role of the tensors whose name it matches; the first match counts."""
    fields: Callable[[MadeModel], dict[str, Any]]
    """The config fields of a made model, but for vocabulary, special tokens and tied embeddings.

    Raises:
        ValueError: the architecture cannot have such a shape.
    """
    packs: bool = True
    """Whether a row can hold several documents: the model takes a [B, 1, T, T] mask and position ids."""
    windows: Literal["none", "all_layers", "by_layer"] = "none"
    """Which layers attend through a sliding window where the config sets one."""

    @property
    def routes(self) -> bool:
        """Whether a router chooses among experts."""
        return any(role == "router" for _, role in self.roles)

    def role(self, name: str) -> Role:
        """What a tensor is for, by its name in memory or on disk.

        Raises:
            ValueError: the family has no such tensor.
        """
        for pattern, role in self.roles:
            if re.search(pattern, name):
                return role
        raise ValueError(f"a {self.model_type} model has no tensor {name!r}")

    def layer_list(self, model: PreTrainedModel) -> nn.ModuleList:
        """The layers of a model of this family, first to last."""
        layers = model.get_submodule(self.layers)
        assert isinstance(layers, nn.ModuleList)
        return layers

    def config(self, made: MadeModel, vocab_size: int, *, end: int) -> PreTrainedConfig:
        """The config of a made model: no dropout, head tied to embedding, one token `end` that starts and ends text.

        It pads too, but the config must not say so: the embedding of a config's padding token is zero and never learns.

        Raises:
            ValueError: the family cannot have such a shape.
        """
        if made.hidden % (2 * made.heads):
            raise ValueError(
                f"a made {self.model_type} has hidden {made.hidden} and {made.heads} heads: "
                "each head needs an even number of dimensions"
            )
        return AutoConfig.for_model(
            self.model_type,
            vocab_size=vocab_size,
            bos_token_id=end,
            eos_token_id=end,
            pad_token_id=None,
            tie_word_embeddings=True,
            **self.fields(made),
        )

    def attention_masks(
        self, config: PreTrainedConfig, isolation: Bool[Tensor, "rows 1 tokens tokens"]
    ) -> Tensor | dict[str, Tensor]:
        """What `forward(attention_mask=…)` must get so that packed documents do not see each other.

        A four-dimensional mask replaces transformers' own, sliding windows included, so those are cut here. Positions
        of one document must be consecutive in its row.

        Args:
            config: the model's.
            isolation: true where a position (third axis) may look at another (fourth): causal, and of one document.
                Padding must see itself, or its softmax is over nothing.

        Raises:
            ValueError: the family cannot pack.
        """
        if not self.packs:
            raise ValueError(f"{self.model_type} cannot hold several documents in one row")
        window = getattr(config, "sliding_window", None)
        if self.windows == "none" or window is None:
            return isolation
        place = torch.arange(isolation.shape[-1], device=isolation.device)
        near = isolation & (place[:, None] - place[None, :] < window)
        return near if self.windows == "all_layers" else {"full_attention": isolation, "sliding_attention": near}

    def matrix_parameters(self, config: PreTrainedConfig) -> int:
        """Weights of the matrices that one token passes through: attention, FFN of the active experts, router, head.

        Embedding look-ups, norms and biases do not count; a head tied to the embedding does.
        """
        active = getattr(config, "num_experts_per_tok", 1) / getattr(config, "num_local_experts", 1)
        count = 0.0
        for name, tensor in skeleton(config).state_dict().items():
            if tensor.ndim > 1 and self.role(name) in ("attention", "ffn", "router", "head"):
                count += tensor.numel() * (active if tensor.ndim == 3 else 1)
        return round(count)


def head(model: PreTrainedModel) -> Callable[[Tensor], Tensor]:
    """What makes logits of a causal model's last hidden states, soft cap (Gemma's) included."""
    project, cap = model.get_output_embeddings(), getattr(model.config, "final_logit_softcapping", None)
    assert project is not None, "a causal language model has an output head"
    if cap is None:
        return project
    return lambda states: torch.tanh(project(states) / cap) * cap


def skeleton(config: PreTrainedConfig) -> PreTrainedModel:
    """A model of shapes without weights (on the meta device)."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)
