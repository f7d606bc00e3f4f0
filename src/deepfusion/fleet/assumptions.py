"""How a fleet's devices train, and what they send."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from deepfusion.doctor.memory import FOUR_BITS
from deepfusion.families import family

Method = Literal["full", "lora", "qlora"]
Number = Literal["float32", "bfloat16"]
States = Literal["float32", "bfloat16", "int8"]
Sent = Literal["float32", "bfloat16", "int8", "nf4"]
Adapter = Literal["beside", "merged", "alone"]

BYTES: dict[Sent, float] = {"float32": 4, "bfloat16": 2, "int8": 1, "nf4": FOUR_BITS}
"""Of a weight. int8's scales, one a row, are left out."""


@dataclass(frozen=True)
class Assumptions:
    """What a plan depends on, beside shapes. With the defaults, figures of arXiv 2602.14301 come out (see `paper`).

    Raises:
        ValueError: there is no adapter to send, or a model type is unknown.
    """

    method: Method = "qlora"
    """As `device.method` of a recipe; devices of FedJETS train all weights, whatever this says."""
    rank: int = 64
    """Of an adapter, which every matrix of a layer has, in float32 like its gradients and states."""
    dtype: Number = "bfloat16"
    """Of weights in training, of their gradients, and of what is kept for the backward pass."""
    states: States = "int8"
    """Of the two averages of each gradient that AdamW keeps, where all weights are trained."""
    upload: Sent = "nf4"
    """How matrices of layers travel; with int8 and nf4 all else travels in bfloat16."""
    adapter: Adapter = "beside"
    """Whether a trained adapter travels beside the weights, added to them, or alone."""
    unquantised: tuple[str, ...] = ("gpt2",)
    """Model types whose matrices stay as they are where others' are held or sent in few bits."""
    batch_tokens: int = 1536
    """Tokens that pass through a model at a time."""
    fixed_gb: float = 0.9
    """Memory that is needed whatever is trained: the accelerator's context, kernels, room that goes unused."""
    experts: int = 4
    """That a device of FedJETS has of its MoE; of one cut from students, the students whose experts it has."""
    rounds: int = 1
    """In which FedJETS sends its models down, and up again."""

    def __post_init__(self) -> None:
        if self.adapter == "alone" and self.method == "full":
            raise ValueError("an adapter alone needs the method lora or qlora: full training has no adapter to send")
        for model_type in self.unquantised:
            family(model_type)

    def bits(self, model_type: str, wanted: Sent) -> Sent:
        """What its matrices are really held or sent in."""
        return "bfloat16" if wanted in ("int8", "nf4") and model_type in self.unquantised else wanted
