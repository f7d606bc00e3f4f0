"""The recipe's `models` section, and how anything is trained."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from deepfusion.config.section import Section

ModelType = Literal[
    "gpt2",
    "llama",
    "mistral",
    "opt",
    "bloom",
    "gpt_neox",
    "qwen2",
    "qwen3",
    "olmo",
    "olmo2",
    "gemma2",
    "gemma3_text",
    "phi",
    "phi3",
]


class Training(Section):
    """How anything is trained: through transformers' Trainer, AdamW, one pass of warm-up then decay."""

    learning_rate: float = Field(default=3e-3, gt=0)
    """Peak learning rate."""
    schedule: Literal["linear", "cosine", "constant"] = "cosine"
    """Decay after warm-up."""
    warmup: float = Field(default=0.05, ge=0, lt=1)
    """Share of the steps that warm up."""
    weight_decay: float = Field(default=0.0, ge=0)
    """AdamW's weight decay."""
    clip: float = Field(default=1.0, gt=0)
    """Gradient norm limit."""
    context: int = Field(default=128, ge=8)
    """Tokens in one packed row; also the longest document."""
    rows: int = Field(default=16, ge=1)
    """Packed rows in one optimiser step."""
    answer_weight: float = Field(default=1.0, ge=0)
    """Weight of an answer's tokens in the cross-entropy; every other token weighs 1."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of the trained weights; of an adapter's model, that of the frozen ones (float32 where the machine has
    no instructions for bfloat16)."""
    compute: Literal["float32", "bfloat16"] = "float32"
    """Precision of matrix products: bfloat16 leaves float32 weights as they are (autocast) and is several times faster
    on processors and accelerators that have instructions for it; where there are none, float32 is used."""
    gradient_checkpointing: bool = False
    """Work each layer out a second time on the way back instead of keeping what it needs: less memory, about a third
    more time, the same result."""


class MadeModel(Section):
    """A tiny ancestor made on the spot: initialised, then pre-trained on the public text."""

    type: ModelType
    """transformers' model type."""
    hidden: int = Field(default=64, ge=8)
    """Width."""
    ffn: int = Field(default=192, ge=8)
    """Width of the feed-forward layer."""
    layers: int = Field(default=3, ge=1)
    """Number of layers."""
    heads: int = Field(default=4, ge=1)
    """Attention heads."""
    vocab: int = Field(default=512, ge=300)
    """Size of the byte-level BPE tokenizer trained on the public text; equal sizes give equal tokenizers."""
    context: int = Field(default=256, ge=8)
    """Longest sequence the model accepts."""
    tokens: int = Field(default=200_000, ge=0)
    """Tokens of public pre-training."""
    training: Training = Training()

    @model_validator(mode="after")
    def _a_possible_shape(self) -> Self:
        if self.hidden % (2 * self.heads):
            raise ValueError(
                f"hidden {self.hidden} and {self.heads} heads do not fit: each head needs an even number of dimensions,"
                f" so make hidden a multiple of {2 * self.heads}, or change heads"
            )
        if self.type == "phi" and self.hidden % (4 * self.heads):
            raise ValueError(
                f"hidden {self.hidden} and {self.heads} heads do not fit: half of each head's dimensions turn in pairs "
                f"in a phi, so make hidden a multiple of {4 * self.heads}, or change heads"
            )
        if self.type == "bloom" and self.ffn != 4 * self.hidden:
            raise ValueError(f"a made bloom has an ffn of 4 × hidden: set ffn to {4 * self.hidden}, not {self.ffn}")
        return self


class ModelSource(Section):
    """Where a model comes from: a checkpoint folder, or made on the spot."""

    path: str | None = None
    """A Hugging Face checkpoint folder (safetensors), relative to the recipe's folder unless absolute."""
    make: MadeModel | None = None
    """Make a tiny one."""

    @model_validator(mode="after")
    def _one_origin(self) -> Self:
        if (self.path is None) == (self.make is None):
            raise ValueError("give exactly one of `path` and `make`")
        return self


class Models(Section):
    """The base model of the MoE, and the ancestors that devices start from."""

    base: ModelSource
    """The dense model whose copies become experts."""
    ancestors: dict[str, ModelSource] = Field(min_length=1)
    """Name → model; each device starts from one."""
    assign: Literal["round_robin", "random"] = "round_robin"
    """How devices get their ancestor: in turn, shifted by one every round so that devices of one domain differ; or
    drawn at random (the paper)."""
