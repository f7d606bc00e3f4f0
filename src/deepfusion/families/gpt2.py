"""GPT-2: learned positions, one matrix for query, key and value."""

from deepfusion.families.family import Family

GPT2 = Family(
    model_type="gpt2",
    layers="transformer.h",
    roles=(
        (r"\bln_(1|2|f)\b", "norm"),
        (r"\bw[tp]e\b", "embedding"),
        (r"\battn\b", "attention"),
        (r"\bmlp\b", "ffn"),
        (r"\blm_head\b", "head"),
    ),
    fields=lambda made: {
        "n_embd": made.hidden,
        "n_inner": made.ffn,
        "n_layer": made.layers,
        "n_head": made.heads,
        "n_positions": made.context,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
        "summary_first_dropout": 0.0,
    },
)
