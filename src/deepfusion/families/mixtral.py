"""Mixtral: the MoE that Llama and Mistral models are assembled into. It always renormalises (Eq. 4)."""

from typing import Any

from transformers import PreTrainedConfig

from deepfusion.families.family import Family
from deepfusion.families.target import ROLES, MoE, not_made
from deepfusion.layouts import Layout

MIXTRAL = Family("mixtral", "model.layers", ROLES, not_made("mixtral"), windows="all_layers")


def _fields(dense: PreTrainedConfig, layout: Layout) -> dict[str, Any]:
    return {
        "intermediate_size": layout.width,
        "sliding_window": getattr(dense, "sliding_window", None),  # a Mistral's, on all layers
        "num_local_experts": layout.experts,
        "num_experts_per_tok": layout.chosen,
    }


MIXTRAL_TARGET = MoE(
    model_type="mixtral",
    architecture="MixtralForCausalLM",
    fields=_fields,
    carries=("head_dim",),
    handles=("intermediate_size", "sliding_window"),
    block="block_sparse_moe",
    parts={"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"},
)
