"""Mixtral: the MoE that dense Llama models are assembled into. Its top-k probabilities are renormalised (Eq. 4)."""

from typing import Any

from transformers import LlamaConfig, MixtralConfig, PreTrainedConfig

from deepfusion.config import MadeModel
from deepfusion.families.family import Family
from deepfusion.families.llama import ROLES

# What a Llama config may say that Mixtral says in the same words.
_CARRIED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
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
_WITHOUT_EFFECT = {
    "pretraining_tp",
    "_name_or_path",
    "architectures",
    "is_llama_config",
    "transformers.js_config",
    "transformers_version",
}


def _no_made_mixtral(made: MadeModel) -> dict[str, Any]:
    raise ValueError("a mixtral is assembled from llama models, not made: choose llama as the base model")


MIXTRAL = Family(
    model_type="mixtral",
    layers="model.layers",
    roles=(
        (r"\b(mlp|block_sparse_moe)\.gate\.", "router"),
        (r"\b(mlp|block_sparse_moe)\.experts\.", "ffn"),
        *(entry for entry in ROLES if entry[1] != "ffn"),
    ),
    fields=_no_made_mixtral,
    windows="all_layers",
)


def moe_config(dense: PreTrainedConfig, experts: int, top_k: int) -> MixtralConfig:
    """The config of the MoE whose experts are FFNs of models with the config `dense`.

    Raises:
        ValueError: `dense` is not a Llama config, or sets a field that Mixtral has no counterpart for.
    """
    if not isinstance(dense, LlamaConfig):
        raise ValueError(f"a mixtral is assembled from llama models, not {dense.model_type}: choose a llama base model")
    if not 1 <= top_k <= experts:
        raise ValueError(f"top_k is {top_k} but there are {experts} experts")
    said, usual = dense.to_dict(), LlamaConfig().to_dict()
    for field, value in sorted(said.items()):
        if field not in _CARRIED and field not in _WITHOUT_EFFECT and value and value != usual.get(field):
            raise ValueError(f"the base model sets {field} to {value!r}, which a mixtral cannot carry")
    return MixtralConfig(
        **{field: getattr(dense, field) for field in _CARRIED},
        num_local_experts=experts,
        num_experts_per_tok=top_k,
        sliding_window=None,
        architectures=["MixtralForCausalLM"],
    )
