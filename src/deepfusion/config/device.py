"""How a device trains, and what it sends."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from deepfusion.config.models import Training
from deepfusion.config.section import Section

RUN = 64  # numbers of a row that share a scale, where they are sent as integers


class LoRA(Section):
    """Low-rank adapters (arXiv 2106.09685): W + alpha / rank · B·A, of which B and A alone are trained."""

    rank: int = Field(default=8, ge=1)
    """Rows of A and columns of B."""
    alpha: float = Field(default=16.0, gt=0)
    """The adapter counts alpha / rank times."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Share of A's inputs that is left out at random in training."""
    targets: tuple[Literal["attention", "ffn"], ...] = Field(default=("attention", "ffn"), min_length=1)
    """The parts of each layer of which every matrix gets an adapter."""


class Codec(Section):
    """How an upload is packed: matrices in fewer bits, the whole compressed with Zstandard."""

    numbers: Literal["float32", "bfloat16", "int8", "nf4"] = "int8"
    """What matrices are sent in. int8, nf4: 64 numbers of a row share a scale in bfloat16; a number is a multiple of
    1/127 of it, or one of the sixteen levels of NF4 (arXiv 2305.14314). Vectors are always float32."""
    delta: bool = False
    """Send what training has changed in the ancestor, which the server has too, instead of the weights themselves."""
    rank: int | None = Field(default=None, ge=1)
    """With `delta`: a matrix's change as the product of two matrices of this rank, the nearest there is, where that is
    smaller."""

    @model_validator(mode="after")
    def _a_change_to_factor(self) -> Self:
        if self.rank is not None and not self.delta:
            raise ValueError("rank is that of a change: set delta: true, or leave rank out")
        return self

    @property
    def label(self) -> str:
        """The codec in a few words, such as `int8 delta rank 8`; different codecs have different labels."""
        return self.numbers + " delta" * self.delta + (f" rank {self.rank}" if self.rank else "")

    @property
    def bytes_per_number(self) -> float:
        """What a number of a matrix takes before compression, and without `rank`."""
        return {"float32": 4, "bfloat16": 2, "int8": 1 + 2 / RUN, "nf4": 1 / 2 + 2 / RUN}[self.numbers]


class DevicePhase(Section):
    """Training on each device, and what it uploads."""

    method: Literal["full", "lora", "qlora"] = "full"
    """full: all weights are trained; lora: low-rank adapters beside frozen weights; qlora: the same beside weights
    kept in four bits (NF4, arXiv 2305.14314), which needs bitsandbytes."""
    lora: LoRA = LoRA()
    upload: Literal["merged", "adapter"] = "merged"
    """merged: the whole trained model; adapter: its adapter alone, which the server adds to the ancestor that it has
    itself (with lora and qlora)."""
    # Left out of keys and records where there is none, so that runs without are those that they were before it existed.
    codec: Codec | None = Field(default=None, exclude_if=lambda codec: codec is None)
    """How that is packed; none: sent as it is, with config and tokenizer."""
    epochs: float = Field(default=30, gt=0)
    """Passes over the device's private text."""
    replay: float = Field(default=0.25, ge=0)
    """Public tokens mixed in per private token, so that a device does not forget how to write."""
    training: Training = Training()
    encoder: str = "hashing"
    """`hashing` (stateless, scikit-learn), or the folder of a sentence encoder such as MiniLM."""
    embedding_bytes: int = Field(default=64, ge=8, le=64)
    """Size of e_n: a shared seeded projection to this many int8 numbers."""

    @model_validator(mode="after")
    def _an_adapter_to_send(self) -> Self:
        if self.upload == "adapter" and self.method == "full":
            raise ValueError("upload: adapter needs method: lora or qlora, for full training has no adapter to send")
        if self.upload == "adapter" and self.codec is not None and self.codec.delta:
            raise ValueError("codec.delta is what changed in the ancestor, which an adapter is already: leave it out")
        return self

    @property
    def sends(self) -> Literal["model", "adapter", "packed"]:
        """What leaves a device: the name of the folder that holds it."""
        if self.codec is not None:
            return "packed"
        return "adapter" if self.upload == "adapter" else "model"
