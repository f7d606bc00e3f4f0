"""GPT-NeoX (Pythia): rotary positions, attention and FFN side by side."""

from deepfusion.families.family import Family

GPT_NEOX = Family(
    model_type="gpt_neox",
    layers="gpt_neox.layers",
    roles=(
        (r"layernorm\b|\bfinal_layer_norm\b", "norm"),
        (r"\bembed_in\b", "embedding"),
        (r"\battention\b", "attention"),
        (r"\bmlp\b", "ffn"),
        (r"\b(lm_head|embed_out)\b", "head"),
    ),
    fields=lambda made: {
        "hidden_size": made.hidden,
        "intermediate_size": made.ffn,
        "num_hidden_layers": made.layers,
        "num_attention_heads": made.heads,
        "max_position_embeddings": made.context,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "classifier_dropout": 0.0,
    },
)
