"""DeepSeek-MoE, v1 (deepseek-moe-16b): a dense first layer, then routed experts beside two that all tokens use.

Importing this module makes transformers' Auto classes know the type (see `deepseek_model`).
"""

from typing import Any

from transformers import PreTrainedConfig

from deepfusion.config.targets import COMMON_SHARDS
from deepfusion.families import deepseek_model
from deepfusion.families.family import Family
from deepfusion.families.target import ROLES, MoE, not_made
from deepfusion.layouts import Layout

deepseek_model.register()
DEEPSEEK = Family("deepseek", "model.layers", ROLES, not_made("deepseek"))


def _fields(dense: PreTrainedConfig, layout: Layout) -> dict[str, Any]:
    if dense.head_dim not in (None, dense.hidden_size // dense.num_attention_heads):
        raise ValueError(f"the base model sets head_dim to {dense.head_dim}, which a deepseek cannot carry")
    return {
        "intermediate_size": dense.intermediate_size,  # of the first layer
        "moe_intermediate_size": layout.width,
        "n_routed_experts": layout.experts,
        "n_shared_experts": layout.common or 1,
        "num_experts_per_tok": layout.chosen,
        "norm_topk_prob": layout.renormalised,
        "first_k_dense_replace": 1,
    }


DEEPSEEK_TARGET = MoE(
    model_type="deepseek",
    architecture="DeepseekForCausalLM",
    fields=_fields,
    handles=("intermediate_size", "head_dim"),
    shared="shared_experts",
    common=COMMON_SHARDS["deepseek"],
    dense_layers=1,
    native=False,
)
