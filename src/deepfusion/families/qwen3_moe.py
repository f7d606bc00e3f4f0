"""Qwen3-MoE: fine-grained experts without a shared one; attention with normalised queries and keys, as in Qwen3."""

from typing import Any

from transformers import PreTrainedConfig

from deepfusion.families.family import Family
from deepfusion.families.qwen2_moe import qwen_fields
from deepfusion.families.target import ROLES, MoE, not_made
from deepfusion.layouts import Layout

QWEN3_MOE = Family("qwen3_moe", "model.layers", ROLES, not_made("qwen3_moe"))


def _fields(dense: PreTrainedConfig, layout: Layout) -> dict[str, Any]:
    if dense.use_sliding_window:
        raise ValueError("the base model has layers with sliding windows, which a qwen3_moe cannot carry")
    return qwen_fields(dense, layout)


QWEN3_MOE_TARGET = MoE(
    model_type="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    fields=_fields,
    carries=("head_dim", "attention_bias"),
    handles=("intermediate_size", "use_sliding_window", "sliding_window", "max_window_layers", "layer_types"),
)
