"""Qwen2-MoE (Qwen1.5-MoE-A2.7B): routed experts beside a shared one that a sigmoid weighs."""

from typing import Any

from transformers import PreTrainedConfig

from deepfusion.families.family import Family
from deepfusion.families.target import ROLES, MoE, not_made
from deepfusion.layouts import Layout

QWEN2_MOE = Family("qwen2_moe", "model.layers", ROLES, not_made("qwen2_moe"), windows="by_layer")


def qwen_fields(dense: PreTrainedConfig, layout: Layout) -> dict[str, Any]:
    """Config fields that Qwen's MoEs share."""
    return {
        "intermediate_size": dense.intermediate_size,  # of layers without experts, of which there are none
        "moe_intermediate_size": layout.width,
        "num_experts": layout.experts,
        "num_experts_per_tok": layout.chosen,
        "norm_topk_prob": layout.renormalised,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }


QWEN2_MOE_TARGET = MoE(
    model_type="qwen2_moe",
    architecture="Qwen2MoeForCausalLM",
    fields=qwen_fields,
    # The two types read the fields of sliding windows differently, but for `layer_types`, which says it all.
    carries=("use_sliding_window", "sliding_window", "max_window_layers", "layer_types"),
    shared="shared_expert",
    shared_gate=True,
)
