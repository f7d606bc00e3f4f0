"""Shapes of published models: of each one's config.json, what its costs depend on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from deepfusion.checkpoints import open_config

PUBLISHED: dict[str, dict[str, Any]] = {
    "gpt2": {
        "model_type": "gpt2",
        "vocab_size": 50257,
        "n_embd": 768,
        "n_layer": 12,
        "n_head": 12,
        "n_positions": 1024,
        "tie_word_embeddings": True,
    },
    "gpt2-medium": {
        "model_type": "gpt2",
        "vocab_size": 50257,
        "n_embd": 1024,
        "n_layer": 24,
        "n_head": 16,
        "n_positions": 1024,
        "tie_word_embeddings": True,
    },
    "tinyllama-1.1b": {
        "model_type": "llama",
        "vocab_size": 32000,
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 22,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "tie_word_embeddings": False,
    },
    "olmo-1.2b": {  # OLMo-1B, the first of that name
        "model_type": "olmo",
        "vocab_size": 50304,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 16,
        "tie_word_embeddings": True,
    },
    "bloom-1.1b": {  # bloom-1b1
        "model_type": "bloom",
        "vocab_size": 250880,
        "hidden_size": 1536,
        "n_layer": 24,
        "n_head": 16,
        "tie_word_embeddings": True,
    },
    "qwen1.5-moe-a2.7b": {
        "model_type": "qwen2_moe",
        "vocab_size": 151936,
        "hidden_size": 2048,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "moe_intermediate_size": 1408,
        "shared_expert_intermediate_size": 5632,
        "num_experts": 60,
        "num_experts_per_tok": 4,
        "tie_word_embeddings": False,
    },
    "deepseek-moe-16b": {
        "model_type": "deepseek",
        "vocab_size": 102400,
        "hidden_size": 2048,
        "intermediate_size": 10944,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "moe_intermediate_size": 1408,
        "n_routed_experts": 64,
        "n_shared_experts": 2,
        "num_experts_per_tok": 6,
        "first_k_dense_replace": 1,
        "tie_word_embeddings": False,
    },
}


def known(model: str) -> PreTrainedConfig:
    """The config of a published model, or of a folder that has one.

    Raises:
        ValueError: it is neither, or of a model type that deepfusion does not support.
    """
    if model in PUBLISHED:
        return AutoConfig.for_model(**PUBLISHED[model])
    folder = Path(model)
    if not folder.is_dir():
        raise ValueError(
            f"model {model!r} is neither known by name ({', '.join(PUBLISHED)}) nor a folder: "
            "for another model, give a folder with its config.json"
        )
    return open_config(folder)
