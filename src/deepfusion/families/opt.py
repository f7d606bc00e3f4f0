"""OPT: learned positions, ReLU; small ones may keep narrower embeddings behind a projection."""

from deepfusion.families.family import Family

OPT = Family(
    model_type="opt",
    layers="model.decoder.layers",
    roles=(
        (r"layer_norm\b", "norm"),
        (r"\bembed_(tokens|positions)\b|\bproject_in\b", "embedding"),
        (r"\bself_attn\b", "attention"),
        (r"\bfc[12]\b", "ffn"),
        (r"\blm_head\b|\bproject_out\b", "head"),
    ),
    fields=lambda made: {
        "hidden_size": made.hidden,
        "word_embed_proj_dim": made.hidden,
        "ffn_dim": made.ffn,
        "num_hidden_layers": made.layers,
        "num_attention_heads": made.heads,
        "max_position_embeddings": made.context,
        "dropout": 0.0,
        "attention_dropout": 0.0,
        "layerdrop": 0.0,
    },
)
