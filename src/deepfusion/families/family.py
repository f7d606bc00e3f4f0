"""What deepfusion asks about a model type: a questionnaire that each file beside this one answers with data."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Bool
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from deepfusion.config import MadeModel

# shared: what an MoE has of FFNs that every token passes (shared experts, and layers without experts).
Role = Literal["embedding", "attention", "ffn", "shared", "norm", "head", "router"]
CLUSTERS = "deepfusion_clusters"
"""Field of an MoE's config: how many students its experts were cut from, where each has several."""


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

    def hidden_states(self, model: PreTrainedModel, ids: Tensor, mask: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """What enters a model's head, and its hidden states: of the embedding, then after each layer, all `[B, T, H]`.

        The last one has been through the final norm and is what enters the head. An OPT with narrow embeddings makes
        that narrower still: its last hidden state is given as it left the last layer.
        """
        left: list[Tensor] = []

        def note(layer: nn.Module, given: Any, gave: Any) -> None:
            left.append(gave)

        hook = self.layer_list(model)[-1].register_forward_hook(note)
        try:
            outputs = model.base_model(input_ids=ids, attention_mask=mask, use_cache=False, output_hidden_states=True)
        finally:
            hook.remove()
        entering, hidden = outputs.last_hidden_state, outputs.hidden_states
        return entering, hidden if entering.shape[-1] == hidden[0].shape[-1] else (*hidden[:-1], left[0])

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
            config: the model's; where its attention is eager (Gemma 2's), masks are float32 and to be added to scores.
            isolation: true where a position (third axis) may look at another (fourth): causal, and of one document.
                Padding must see itself, or its softmax is over nothing.

        Raises:
            ValueError: the family cannot pack.
        """
        if not self.packs:
            raise ValueError(f"{self.model_type} cannot hold several documents in one row")
        window = getattr(config, "sliding_window", None)
        everything = _heeded(config, isolation)
        if self.windows == "none" or not window:  # some types say 0 where there is none
            return everything
        place = torch.arange(isolation.shape[-1], device=isolation.device)
        near = _heeded(config, isolation & (place[:, None] - place[None, :] < window))
        return near if self.windows == "all_layers" else {"full_attention": everything, "sliding_attention": near}

    def matrix_parameters(self, config: PreTrainedConfig) -> int:
        """Weights of the matrices that one token passes through: attention, FFN of the active experts, router, head.

        Embedding look-ups, norms and biases do not count; a head tied to the embedding does.
        """
        moe = experts(config)
        active = moe.chosen / moe.count
        count = 0.0
        for name, tensor in skeleton(config).state_dict().items():
            if tensor.ndim > 1 and self.role(name) in ("attention", "ffn", "shared", "router", "head"):
                count += tensor.numel() * (active if tensor.ndim == 3 else 1)
        return round(count)


def _heeded(config: PreTrainedConfig, mask: Bool[Tensor, "*shape"]) -> Tensor:
    """A mask in the form that a model's attention heeds: eager attention would add true and false as 1 and 0."""
    if getattr(config, "_attn_implementation", None) != "eager":
        return mask
    return torch.where(mask, 0.0, torch.finfo(torch.float32).min)


def context_length(config: PreTrainedConfig) -> int | None:
    """Tokens of the longest text that a model takes; none: any.

    A LongRoPE model (Phi-3's long ones) turns all texts of a batch by other angles once one of them is longer than the
    model was first trained on, and so would disagree with what it has cached of itself. That length is its context
    here.
    """
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") == "longrope":
        return rope["original_max_position_embeddings"]
    return getattr(config, "max_position_embeddings", None)


def head(model: PreTrainedModel) -> Callable[[Tensor], Tensor]:
    """What makes logits of a causal model's last hidden states, soft cap (Gemma's) included."""
    project, cap = model.get_output_embeddings(), getattr(model.config, "final_logit_softcapping", None)
    assert project is not None, "a causal language model has an output head"
    if cap is None:
        return project
    return lambda states: torch.tanh(project(states) / cap) * cap


@dataclass(frozen=True)
class Experts:
    """The routed experts of each MoE layer; a dense model counts as one."""

    count: int
    chosen: int
    """Of them, by each token."""
    clusters: int
    """Students that they were cut from, each of them into as many."""
    common: int
    """Of each student's, the last ones, that stand for what shared experts took over (see `layouts`)."""

    def of(self, cluster: int) -> Sequence[int]:
        """A student's."""
        each = self.count // self.clusters
        return range(cluster * each, (cluster + 1) * each)

    @property
    def spare(self) -> Sequence[int]:
        """Those of all students that no token uses at first."""
        return [expert for cluster in range(self.clusters) for expert in self.of(cluster)[::-1][: self.common]]


def experts(config: PreTrainedConfig) -> Experts:
    """What a config says of routed experts, whatever its type calls them."""
    count = getattr(config, "num_experts", None) or getattr(config, "num_local_experts", None) or 1
    chosen, clusters = getattr(config, "num_experts_per_tok", None) or 1, getattr(config, CLUSTERS, None)
    common = getattr(config, "n_shared_experts", 0) if clusters else 0
    return Experts(count, chosen, clusters or count, common)


def skeleton(config: PreTrainedConfig) -> PreTrainedModel:
    """A model of shapes without weights (on the meta device)."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)
