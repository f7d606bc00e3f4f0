"""What the cost of a model depends on, read off its config."""

from __future__ import annotations

from dataclasses import dataclass, field

from transformers import PreTrainedConfig

from deepfusion.checkpoints import parameters
from deepfusion.families import experts, family, skeleton


@dataclass(frozen=True)
class Shape:
    """What the cost of a model depends on."""

    config: PreTrainedConfig = field(compare=False)
    parameters: int
    active: int  # matrix parameters that a token passes through
    inner: int  # in the matrices of a dense model's layers, which four bits can hold
    features: float  # numbers that training keeps of each token for the backward pass
    cached: int  # numbers that writing keeps of each token
    vocabulary: int

    @classmethod
    def of(cls, config: PreTrainedConfig) -> Shape:
        """The shape of a model with this config."""
        kind, model = family(config.model_type), skeleton(config)
        chosen = experts(config).chosen
        features = 4.0 * config.hidden_size * config.num_hidden_layers  # norms, and the sums between blocks
        inner = 0
        for name, tensor in model.state_dict().items():
            if tensor.ndim > 1 and kind.role(name) in ("attention", "ffn", "shared"):  # what goes in, what comes out
                features += sum(tensor.shape[-2:]) * (chosen if tensor.ndim == 3 else 1)
            if tensor.ndim == 2 and kind.role(name) in ("attention", "ffn", "shared"):
                inner += tensor.numel()
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        cached = 2 * config.num_hidden_layers * heads * width
        active = kind.matrix_parameters(config)
        return cls(config, parameters(model), active, inner, features, cached, int(config.vocab_size))
