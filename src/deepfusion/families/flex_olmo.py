"""FlexOlmo: the MoE of OLMo 2, which normalises after attention and FFN instead of before."""

from typing import Any

from transformers import PreTrainedConfig

from deepfusion.families.family import Family
from deepfusion.families.target import ROLES, MoE, not_made
from deepfusion.layouts import Layout

FLEX_OLMO = Family("flex_olmo", "model.layers", ROLES, not_made("flex_olmo"))


def _fields(dense: PreTrainedConfig, layout: Layout) -> dict[str, Any]:
    return {
        "intermediate_size": layout.width,
        "num_experts": layout.experts,
        "num_experts_per_tok": layout.chosen,
        "norm_topk_prob": layout.renormalised,
    }


FLEX_OLMO_TARGET = MoE(
    model_type="flex_olmo", architecture="FlexOlmoForCausalLM", fields=_fields, carries=("attention_bias",)
)
