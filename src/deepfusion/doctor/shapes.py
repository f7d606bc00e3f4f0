"""What the cost of a model depends on, read off its config."""

from __future__ import annotations

from dataclasses import dataclass, field

from transformers import PreTrainedConfig

from deepfusion.checkpoints import parameters
from deepfusion.families import family, skeleton


@dataclass(frozen=True)
class Shape:
    """What the cost of a model depends on."""

    config: PreTrainedConfig = field(compare=False)
    parameters: int
    active: int  # matrix parameters that a token passes through
    features: float  # numbers that training keeps of each token for the backward pass
    cached: int  # numbers that writing keeps of each token
    vocabulary: int

    @classmethod
    def of(cls, config: PreTrainedConfig) -> Shape:
        """The shape of a model with this config."""
        kind, model = family(config.model_type), skeleton(config)
        share = getattr(config, "num_experts_per_tok", 1)
        features = 4.0 * config.hidden_size * config.num_hidden_layers  # norms, and the sums between blocks
        for name, tensor in model.state_dict().items():
            if tensor.ndim > 1 and kind.role(name) in ("attention", "ffn"):  # what goes in, and what comes out
                features += sum(tensor.shape[-2:]) * (share if tensor.ndim == 3 else 1)
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        cached = 2 * config.num_hidden_layers * heads * width
        return cls(config, parameters(model), kind.matrix_parameters(config), features, cached, int(config.vocab_size))
