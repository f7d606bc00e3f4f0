"""What the contract tests of families go through: every model type, and what published checkpoints vary in it."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from deepfusion.checkpoints import open_config, open_model, open_tokenizer, save_model
from deepfusion.families import Family, family
from pico import pico

HEAD, ATTENTION, PLAIN, GATED = 320 * 32, 4 * 32 * 32, 2 * 32 * 64, 3 * 32 * 64
"""Weights of a pico's matrices, by hand: vocabulary 320, hidden 32, FFN 64."""


def matrices(ffn: int = GATED, attention: int = ATTENTION, head: int = HEAD) -> int:
    """Weights of the matrices that a token passes through in a model of two layers."""
    return head + 2 * (attention + ffn)


@dataclass(frozen=True)
class Case:
    """A model type, some of its config's fields, and by hand what deepfusion must make of it."""

    model_type: str
    fields: dict[str, Any] = field(default_factory=dict)
    matrices: int = matrices()
    """What `matrix_parameters` must count."""
    roles: frozenset[str] = frozenset({"embedding", "attention", "ffn", "norm", "head"})
    """The roles that its tensors must have."""

    @property
    def family(self) -> Family:
        return family(self.model_type)

    def write(self, folder: Path, seed: int = 0, **more: Any) -> Path:
        """Write such a pico, with `more` config fields, into `folder` (made if absent) and return `folder`.

        Its weights are large enough for its attention to look at some tokens and away from others.
        """
        config = open_config(pico(self.model_type, folder, seed))
        for name, value in (self.fields | more).items():
            setattr(config, name, value)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(8 if parameter.ndim > 1 else 1)
        model.generation_config.pad_token_id = 0
        save_model(model, open_tokenizer(folder), folder)
        return folder


@dataclass(frozen=True)
class Made:
    """A checkpoint of one case, shared by all tests: not to be changed."""

    name: str
    case: Case
    folder: Path

    @property
    def family(self) -> Family:
        return self.case.family

    @cached_property
    def model(self) -> PreTrainedModel:
        return open_model(self.folder)

    @torch.inference_mode()
    def logits(self, ids: list[int]) -> torch.Tensor:
        """What the model makes of one text, alone."""
        return self.model(torch.tensor([ids])).logits[0]


UNTIED = {"tie_word_embeddings": False}
WINDOW = {"sliding_window": 3}
WINDOWS = WINDOW | {"layer_types": ["sliding_attention", "full_attention"]}
PAIRS = {"num_key_value_heads": 2}
LONG = {  # 64 tokens at first, 128 later
    "original_max_position_embeddings": 64,
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "partial_rotary_factor": 1.0,
        "short_factor": [1.0, 1.1, 1.2, 1.3],
        "long_factor": [2.0, 3.0, 4.0, 5.0],
        "original_max_position_embeddings": 64,
    },
}
TWO_OF_FOUR = matrices(4 * 32 + 2 * GATED)  # experts; and the router
ROUTES, SHARES = Case.roles | {"router"}, Case.roles | {"router", "shared"}

CASES: dict[str, Case] = {
    "gpt2": Case("gpt2", matrices=matrices(PLAIN)),
    "llama": Case("llama"),
    "llama, biases": Case(
        "llama", {"attention_bias": True, "mlp_bias": True, **PAIRS}, matrices(attention=ATTENTION * 3 // 4)
    ),
    "mistral": Case("mistral"),
    "mistral, window": Case("mistral", WINDOW | UNTIED),
    "opt": Case("opt", matrices=matrices(PLAIN)),
    "opt, narrow": Case(  # as OPT 350M
        "opt",
        {"word_embed_proj_dim": 16, "do_layer_norm_before": False},
        matrices(PLAIN, head=320 * 16 + 16 * 32),
    ),
    "bloom": Case("bloom", matrices=matrices(2 * PLAIN)),
    "gpt_neox": Case("gpt_neox", matrices=matrices(PLAIN)),
    "gpt_neox, in turn": Case("gpt_neox", {"use_parallel_residual": False, **UNTIED}, matrices(PLAIN)),
    "qwen2": Case("qwen2"),
    "qwen2, windows": Case("qwen2", {"use_sliding_window": True, **WINDOWS, **UNTIED}),
    "qwen3": Case("qwen3"),
    "qwen3, wide heads": Case("qwen3", {"head_dim": 16}, matrices(attention=2 * ATTENTION)),
    "olmo": Case("olmo", roles=Case.roles - {"norm"}),  # its norms have no weights
    "olmo, clipped": Case("olmo", {"clip_qkv": 0.3, **UNTIED}, roles=Case.roles - {"norm"}),
    "olmo2": Case("olmo2"),
    "gemma2": Case("gemma2"),
    "gemma2, windows": Case("gemma2", {"attn_logit_softcapping": 0.5, **WINDOWS}),
    "gemma3": Case("gemma3_text"),
    "gemma3, windows": Case("gemma3_text", {"final_logit_softcapping": 5.0, **WINDOWS}),
    "phi": Case("phi", matrices=matrices(PLAIN)),
    "phi, normed": Case("phi", {"qk_layernorm": True, **UNTIED}, matrices(PLAIN)),
    "phi3": Case("phi3"),
    "phi3, window": Case("phi3", WINDOW | UNTIED),
    "phi3, long": Case("phi3", LONG | PAIRS, matrices(attention=ATTENTION * 3 // 4)),
    "mixtral": Case("mixtral", matrices=TWO_OF_FOUR, roles=ROUTES),
    "mixtral, window": Case("mixtral", WINDOW | UNTIED, TWO_OF_FOUR, ROUTES),
    "qwen2_moe": Case("qwen2_moe", matrices=TWO_OF_FOUR + 2 * (GATED + 32), roles=SHARES),  # a shared one and its gate
    "qwen2_moe, windows": Case(
        "qwen2_moe", {"use_sliding_window": True, **WINDOWS, **UNTIED}, TWO_OF_FOUR + 2 * (GATED + 32), SHARES
    ),
    "qwen3_moe": Case("qwen3_moe", matrices=TWO_OF_FOUR, roles=ROUTES),
    "qwen3_moe, wide heads": Case(
        "qwen3_moe", {"head_dim": 16, "norm_topk_prob": False}, TWO_OF_FOUR + 2 * ATTENTION, ROUTES
    ),
    "flex_olmo": Case("flex_olmo", matrices=TWO_OF_FOUR, roles=ROUTES),
    "flex_olmo, published": Case("flex_olmo", {"norm_topk_prob": False, **UNTIED}, TWO_OF_FOUR, ROUTES),
    "deepseek": Case("deepseek", matrices=TWO_OF_FOUR - 4 * 32, roles=SHARES),  # dense, then with a shared expert
    "deepseek, published": Case(
        "deepseek", {"norm_topk_prob": False, "n_shared_experts": 2, **UNTIED}, TWO_OF_FOUR - 4 * 32 + GATED, SHARES
    ),
}
