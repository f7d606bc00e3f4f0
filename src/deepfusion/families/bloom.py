"""BLOOM: ALiBi instead of positions, computed from a two-dimensional mask, so a row holds one document."""

from typing import Any

from deepfusion.config import MadeModel
from deepfusion.families.family import Family


def _fields(made: MadeModel) -> dict[str, Any]:
    if made.ffn != 4 * made.hidden:
        raise ValueError(f"a made bloom has an ffn of 4 × hidden: set ffn to {4 * made.hidden}, not {made.ffn}")
    return {
        "hidden_size": made.hidden,
        "n_layer": made.layers,
        "n_head": made.heads,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
    }


BLOOM = Family(
    model_type="bloom",
    layers="transformer.h",
    roles=(
        (r"layernorm\b|\bln_f\b", "norm"),
        (r"\bword_embeddings\b", "embedding"),
        (r"\bself_attention\b", "attention"),
        (r"\bmlp\b", "ffn"),
        (r"\blm_head\b", "head"),
    ),
    fields=_fields,
    packs=False,
)
