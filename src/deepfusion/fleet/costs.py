"""What one model takes: bytes of what a device sends, and memory to train it."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedConfig

from deepfusion.adapters import sites
from deepfusion.config import LoRA
from deepfusion.doctor.memory import LOSSES
from deepfusion.doctor.shapes import Shape
from deepfusion.families import experts, family, skeleton
from deepfusion.fleet.assumptions import BYTES, Assumptions
from deepfusion.objectives.logits import BLOCK

FLOAT32 = 4
ADAPTED = 4 * FLOAT32  # bytes of an adapter's weight, its gradient, and two averages of these


@dataclass(frozen=True)
class Model:
    """What a model's costs depend on."""

    name: str
    shape: Shape
    matrices: int  # weights of the matrices of layers, experts included
    routers: int  # weights that score experts
    adapter: int  # weights of an adapter of rank 1

    @classmethod
    def of(cls, name: str, config: PreTrainedConfig) -> Model:
        """A model of this config.

        Raises:
            ValueError: no model has such a config.
        """
        kind = family(config.model_type)
        try:
            model = skeleton(config)
        except Exception as error:  # the fields come from elsewhere, and any of them can be impossible
            raise ValueError(f"the config of {name} describes no model: {' '.join(str(error).split())}") from error
        sizes = [(kind.role(at), tensor.ndim, tensor.numel()) for at, tensor in model.state_dict().items()]
        matrices = sum(size for role, axes, size in sizes if role in ("attention", "ffn", "shared") and axes > 1)
        routers = sum(size for role, _, size in sizes if role == "router")
        sited = [] if kind.routes else sites(model, LoRA()).values()
        adapter = sum(site.inputs + site.outputs for site in sited)
        return cls(name, Shape.of(config), matrices, routers, adapter)

    @property
    def model_type(self) -> str:
        """What transformers calls its architecture."""
        return self.shape.config.model_type

    @property
    def experts(self) -> int:
        """How many it has to choose from, or students they were cut from; 1: it is dense."""
        return experts(self.shape.config).clusters


def trained(model: Model, of: Assumptions) -> int:
    """Weights that training changes."""
    return model.shape.parameters if of.method == "full" else of.rank * model.adapter


def upload(model: Model, of: Assumptions) -> float:
    """Bytes of what is sent of a trained model. Its embedding of at most 64 bytes and its tokenizer are left out."""
    adapter = FLOAT32 * trained(model, of) if of.method != "full" else 0
    if of.adapter == "alone":
        return adapter
    sent = of.bits(model.model_type, of.upload)
    weights = _weights(model, BYTES[sent], FLOAT32 if sent == "float32" else BYTES["bfloat16"])
    return weights + (adapter if of.adapter == "beside" else 0)


def memory(model: Model, of: Assumptions) -> float:
    """Bytes that training takes of an accelerator.

    As the doctor counts it (`doctor.memory.peak`), but for what is fixed: weights, gradients and states, what layers
    keep for the backward pass, and the loss, which is worked out in blocks: logits of all tokens never exist at once.
    """
    shape, number = model.shape, BYTES[of.dtype]
    if of.method == "full":
        held = shape.parameters * (2 * number + 2 * BYTES[of.states])
    else:
        four = of.method == "qlora" and of.bits(model.model_type, "nf4") == "nf4"
        held = _weights(model, BYTES["nf4"] if four else number, number) + ADAPTED * trained(model, of)
    kept = of.batch_tokens * shape.features * number
    logits = LOSSES * FLOAT32 * min(of.batch_tokens * shape.vocabulary, BLOCK)
    return held + kept + logits + 1e9 * of.fixed_gb


def _weights(model: Model, matrix: float, other: float) -> float:
    """Bytes of all weights, with so many for each of a layer's matrices and for each other."""
    return model.matrices * matrix + (model.shape.parameters - model.matrices) * other
