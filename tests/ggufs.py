"""Tiny GGUF files, written as llama.cpp's converter writes them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from torch import Tensor

from deepfusion.checkpoints import open_config, open_model, open_tokenizer

Change = Callable[[str, np.ndarray, Any], np.ndarray]


def _interleaved(weights: np.ndarray, heads: int) -> np.ndarray:
    """Rows of each head in llama.cpp's order of rotary pairs: (0, 1, …) beside its other half."""
    pairs = weights.reshape(heads, 2, weights.shape[0] // heads // 2, *weights.shape[1:])
    return pairs.swapaxes(1, 2).reshape(weights.shape)


def _llama(name: str, weights: np.ndarray, config: Any) -> np.ndarray:
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    return next((_interleaved(weights, n) for part, n in heads.items() if f".{part}." in name), weights)


def _gemma(name: str, weights: np.ndarray, config: Any) -> np.ndarray:
    return weights + 1 if name.endswith("norm.weight") else weights


def _gpt2(name: str, weights: np.ndarray, config: Any) -> np.ndarray:
    turned = name.startswith("blk.") and weights.ndim == 2
    return np.ascontiguousarray(weights.T) if turned else weights


def _same(name: str, weights: np.ndarray, config: Any) -> np.ndarray:
    return weights


ARCHES: dict[str, tuple[gguf.MODEL_ARCH, Change]] = {
    "llama": (gguf.MODEL_ARCH.LLAMA, _llama),
    "qwen2": (gguf.MODEL_ARCH.QWEN2, _same),
    "qwen3": (gguf.MODEL_ARCH.QWEN3, _same),
    "gemma2": (gguf.MODEL_ARCH.GEMMA2, _gemma),
    "gemma3_text": (gguf.MODEL_ARCH.GEMMA3, _gemma),
    "gpt2": (gguf.MODEL_ARCH.GPT2, _gpt2),
}


def write_gguf(
    folder: Path,
    file: Path,
    *,
    pre: str = "gpt-2",
    settings: dict[str, Any] | None = None,
    tensors: dict[str, np.ndarray] | None = None,
    architecture: str | None = None,
) -> Path:
    """Write a checkpoint with a byte-level tokenizer as a GGUF file; `settings` and `tensors` are put in besides."""
    config, model, tokenizer = open_config(folder), open_model(folder), open_tokenizer(folder)
    arch, change = ARCHES[config.model_type]
    layers = config.num_hidden_layers
    writer = gguf.GGUFWriter(file, architecture or gguf.MODEL_ARCH_NAMES[arch])
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(getattr(config, "intermediate_size", 4 * config.hidden_size))
    writer.add_head_count(config.num_attention_heads)
    if config.model_type == "gpt2":
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
    else:
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        rope: Any = config.rope_parameters
        writer.add_rope_freq_base((rope.get("full_attention") or rope)["rope_theta"])
        if getattr(config, "head_dim", None):
            writer.add_key_length(config.head_dim)
            writer.add_value_length(config.head_dim)
    if config.model_type.startswith("gemma"):
        writer.add_sliding_window(config.sliding_window)
    if config.model_type == "gemma2":
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    for key, value in (settings or {}).items():
        {str: writer.add_string, float: writer.add_float32, int: writer.add_uint32}[type(value)](key, value)
    tree = json.loads(tokenizer.backend_tokenizer.to_str())
    words = sorted(tree["model"]["vocab"].items(), key=lambda pair: pair[1])
    special = set(tokenizer.all_special_tokens)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list([word for word, _ in words])
    writer.add_token_types([gguf.TokenType.CONTROL if word in special else gguf.TokenType.NORMAL for word, _ in words])
    writer.add_token_merges([" ".join(merge) for merge in tree["model"]["merges"]])
    for kind in ("bos", "eos", "padding", "unknown"):
        writer.add_uint32(f"tokenizer.ggml.{kind}_token_id", tokenizer.convert_tokens_to_ids(tokenizer.eos_token))
    names = gguf.get_tensor_name_map(arch, layers)
    state: dict[str, Tensor] = dict(model.state_dict())
    for name, tensor in state.items():
        if name in model.all_tied_weights_keys:
            continue
        called = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert called, name
        writer.add_tensor(called, change(called, tensor.float().numpy(), config))
    for name, values in (tensors or {}).items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file
