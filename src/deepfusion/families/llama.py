"""Llama (TinyLlama, SmolLM2) and its kin: Mistral, Qwen2, Qwen3, OLMo, OLMo2, Gemma 2 and the text models of Gemma 3.

They name their tensors alike and differ in biases, in norms, in sliding windows and in soft caps on scores and logits.
"""

from typing import Any

from deepfusion.config import MadeModel
from deepfusion.families.family import Family, Role

ROLES: tuple[tuple[str, Role], ...] = (
    (r"norm\b", "norm"),
    (r"\bembed_tokens\b", "embedding"),
    (r"\bself_attn\b", "attention"),
    (r"\bmlp\b", "ffn"),
    (r"\blm_head\b", "head"),
)


def llama_fields(made: MadeModel) -> dict[str, Any]:
    """Config fields that the whole kin shares."""
    return {
        "hidden_size": made.hidden,
        "intermediate_size": made.ffn,
        "num_hidden_layers": made.layers,
        "num_attention_heads": made.heads,
        "num_key_value_heads": made.heads,
        "max_position_embeddings": made.context,
        "attention_dropout": 0.0,
    }


def _qwen3_fields(made: MadeModel) -> dict[str, Any]:
    return {**llama_fields(made), "head_dim": made.hidden // made.heads}


def _gemma_fields(made: MadeModel) -> dict[str, Any]:
    width = made.hidden // made.heads
    return {
        **llama_fields(made),
        "head_dim": width,
        "query_pre_attn_scalar": width,
        "sliding_window": max(made.context, 512),
    }


LLAMA = Family("llama", "model.layers", ROLES, llama_fields)
MISTRAL = Family("mistral", "model.layers", ROLES, llama_fields, windows="all_layers")
QWEN2 = Family("qwen2", "model.layers", ROLES, llama_fields, windows="by_layer")
QWEN3 = Family("qwen3", "model.layers", ROLES, _qwen3_fields, windows="by_layer")
OLMO = Family("olmo", "model.layers", ROLES, llama_fields)  # its norms have no weights
OLMO2 = Family("olmo2", "model.layers", ROLES, llama_fields)
GEMMA2 = Family("gemma2", "model.layers", ROLES, _gemma_fields, windows="by_layer")
GEMMA3 = Family("gemma3_text", "model.layers", ROLES, _gemma_fields, windows="by_layer")
