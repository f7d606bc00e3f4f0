"""What assembly asks about an MoE model type: a questionnaire that each target's file answers with data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from deepfusion.config import MadeModel
from deepfusion.config.targets import KIN, Target, shared_width, target_of
from deepfusion.families.family import CLUSTERS, Role
from deepfusion.layouts import Layout

# What a dense config may say that its MoE says in the same words.
COMMON = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "use_cache",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "tie_word_embeddings",
    "rope_parameters",
    "attention_dropout",
    "dtype",
)
# What changes no result: pretraining_tp is not read, the others are notes that checkpoints on the hub carry.
WITHOUT_EFFECT = {
    "pretraining_tp",
    "_name_or_path",
    "_model_name_or_path",
    "architectures",
    "is_llama_config",
    "transformers.js_config",
    "transformers_version",
}

# Every target's own tensors; what all models have, its file adds.
ROLES: tuple[tuple[str, Role], ...] = (
    (r"\b(mlp|block_sparse_moe)\.(gate|shared_expert_gate)\.", "router"),
    (r"\b(mlp|block_sparse_moe)\.experts\.", "ffn"),
    (r"norm\b", "norm"),
    (r"\bembed_tokens\b", "embedding"),
    (r"\bself_attn\b", "attention"),
    (r"\bmlp\b", "shared"),
    (r"\blm_head\b", "head"),
)
MATRICES = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class MoE:
    """One transformers MoE that dense models are assembled into. Names are those of published checkpoints."""

    model_type: Target
    architecture: str
    """transformers' class with a language head."""
    fields: Callable[[PreTrainedConfig, Layout], dict[str, Any]]
    """The config fields of the MoE's own, `COMMON` and `carries` apart.

    Raises:
        ValueError: the dense model sets something that the MoE cannot do.
    """
    carries: tuple[str, ...] = ()
    """Config fields, beside `COMMON`, that mean the same in both."""
    handles: tuple[str, ...] = ("intermediate_size",)
    """Config fields of the dense model that `fields` reads."""
    block: str = "mlp"
    """What an MoE layer's FFN is called on disk."""
    parts: dict[str, str] = field(default_factory=lambda: {name: name for name in MATRICES})
    """What an expert's gate, up and down matrices are called on disk."""
    shared: str | None = None
    """What the shared expert, or all of them together, is called on disk; none: there is none."""
    shared_gate: bool = False
    """Whether its output is weighted by a sigmoid of its own, `<shared>_gate`."""
    common: int = 0
    """Shared experts that take over shards of a fine-grained layout."""
    dense_layers: int = 0
    """Layers at the beginning that have an ordinary FFN: the students' mean."""
    native: bool = True
    """Whether transformers has the class; else `import deepfusion.families` provides it."""

    def expert(self, layer: int, expert: int, matrix: str) -> str:
        """The name on disk of an expert's matrix."""
        return f"model.layers.{layer}.{self.block}.experts.{expert}.{self.parts[matrix]}.weight"

    def router(self, layer: int) -> str:
        """The name on disk of a layer's router."""
        return f"model.layers.{layer}.{self.block}.gate.weight"

    def width_of_shared(self, layout: Layout, asked: int | None) -> int:
        """Channels of the shared experts together; 0: there are none.

        Raises:
            ValueError: `asked` is less than an FFN has.
        """
        if self.shared is None:
            return 0
        if layout.common:
            return layout.common * layout.width
        return shared_width(layout.channels, asked)


def moe_config(moe: MoE, dense: PreTrainedConfig, layout: Layout, shared: int | None = None) -> PreTrainedConfig:
    """The config of the MoE whose experts are cut from FFNs of models with the config `dense`.

    `shared` is the width that its shared expert is to have, where that can be chosen.

    Raises:
        ValueError: `dense` is of no kin of the MoE, or sets a field that the MoE has no counterpart for.
    """
    target_of(dense.model_type, moe.model_type)
    carried = (*COMMON, *moe.carries)
    said, usual = dense.to_dict(), type(dense)().to_dict()
    known = {*carried, *moe.handles, *WITHOUT_EFFECT}
    for name, value in sorted(said.items()):
        if name not in known and value and value != usual.get(name):
            raise ValueError(f"the base model sets {name} to {value!r}, which a {moe.model_type} cannot carry")
    if not layout.renormalised and moe.model_type == "mixtral":
        raise ValueError("a mixtral always renormalises: set assemble.renormalise: true, or choose another target")
    own = moe.fields(dense, layout)
    if moe.shared_gate:
        own["shared_expert_intermediate_size"] = moe.width_of_shared(layout, shared)
    if layout.granularity > 1:
        own[CLUSTERS] = layout.clusters
    kept = {name: getattr(dense, name) for name in carried if hasattr(dense, name)}
    return AutoConfig.for_model(moe.model_type, **kept, **own, architectures=[moe.architecture])


def not_made(model_type: Target) -> Callable[[MadeModel], dict[str, Any]]:
    """The `Family.fields` of an MoE."""

    def refuse(made: MadeModel) -> dict[str, Any]:
        bases = " or ".join(KIN[model_type])
        raise ValueError(f"a {model_type} is assembled from {bases} models, not made: choose {bases} as the base model")

    return refuse
