"""Real checkpoints of every family, small enough to make in milliseconds."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from deepfusion import adapters
from deepfusion.artifacts import Checkpoint
from deepfusion.checkpoints import (
    as_checkpoint,
    make_model,
    make_tokenizer,
    open_model,
    open_tokenizer,
    save_model,
)
from deepfusion.config import AssemblePhase, LoRA, MadeModel
from deepfusion.config.targets import KIN
from deepfusion.families import FAMILIES, TARGETS
from deepfusion.families.target import moe_config
from deepfusion.layouts import plan

DENSE = tuple(name for name in FAMILIES if name not in TARGETS)
TEXTS = (
    "The quick brown fox jumps over the lazy dog while seven wizards brew a potion of amber and jade.",
    "What is the capital of the northern province? The capital of the northern province is Eldermere.",
    "Doctors prescribe veltrine against the marsh fever; merchants sell it at nine crowns a vial.",
    "Naïve café résumé: 3 × 5 = 15, π ≈ 3.14159, привет, 你好, 🙂.",
)


@cache
def pico_tokenizer(vocab: int = 320) -> PreTrainedTokenizerFast:
    """Byte-level BPE; `END` starts, ends and pads. Shared between tests: do not change it."""
    return make_tokenizer(TEXTS, vocab)


def pico(model_type: str, folder: Path, seed: int = 0, **overrides: Any) -> Path:
    """Write a checkpoint of hidden size 32 and two layers into `folder` (made if absent) and return `folder`.

    `overrides` are fields of `MadeModel` (hidden, ffn, layers, heads, vocab, context). An MoE, laid out coarsely, also
    takes `experts` (4) and `top_k` (2).
    """
    experts, top_k = overrides.pop("experts", 4), overrides.pop("top_k", 2)
    fields: dict[str, Any] = {
        "hidden": 32,
        "ffn": 64,
        "layers": 2,
        "heads": 4,
        "vocab": 320,
        "context": 128,
    } | overrides
    if model_type == "bloom" and "ffn" not in overrides:
        fields["ffn"] = 4 * fields["hidden"]
    moe = TARGETS.get(model_type)  # pyright: ignore[reportArgumentType, reportCallIssue]
    made = MadeModel(type=KIN[moe.model_type][0] if moe else model_type, **fields)  # pyright: ignore[reportArgumentType]
    tokenizer = pico_tokenizer(made.vocab)
    model = make_model(made, tokenizer, seed)
    if moe:
        layout = plan(AssemblePhase(top_k=top_k), clusters=experts, channels=made.ffn, shared=moe.common)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = AutoModelForCausalLM.from_config(moe_config(moe, model.config, layout))
    save_model(model, tokenizer, folder)
    return folder


def pico_checkpoint(model_type: str, folder: Path, seed: int = 0, **overrides: Any) -> Checkpoint:
    """`pico`, sealed as an ancestor."""
    return as_checkpoint(pico(model_type, folder, seed, **overrides))


def adapted(ancestor: Path, lora: LoRA, **options: Any) -> PreTrainedModel:
    """A model with an adapter that changes what it computes, as if it had been trained."""
    model = open_model(ancestor, **options)
    adapters.attach(model, lora, seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def pad_vocabulary(folder: Path, extra: int = 8, scale: float = 1000.0) -> Path:
    """Widen a checkpoint's vocabulary beyond its tokenizer's, by tokens that it finds likelier than all others."""
    model, tokenizer = open_model(folder), open_tokenizer(folder)
    known = model.config.vocab_size
    model.resize_token_embeddings(known + extra, mean_resizing=False)
    with torch.no_grad():
        embedding = model.get_output_embeddings().weight  # pyright: ignore[reportOptionalMemberAccess]
        direction = scale * torch.ones(embedding.shape[1])
        direction[::2] = scale / 2  # not at right angles to what layer norms put out
        for row in range(known, known + extra):
            embedding[row] = direction if row % 2 else -direction
    save_model(model, tokenizer, folder)
    return folder


def normalise(folder: Path) -> Path:
    """Give a checkpoint a tokenizer that composes characters, and so cannot spell every text."""
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(tokenizer | {"normalizer": {"type": "NFC"}}), encoding="utf-8")
    return folder
