"""Phi (1, 1.5, 2) and Phi-3: rotary positions in part of a head; Phi has biases, Phi-3 fuses its matrices."""

from typing import Any

from deepfusion.config import MadeModel
from deepfusion.families.family import Family
from deepfusion.families.llama import ROLES, llama_fields

ROTARY = 0.5  # share of a head's dimensions that turn, as in Phi-1 and Phi-1.5


def _phi_fields(made: MadeModel) -> dict[str, Any]:
    return {
        **llama_fields(made),
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": ROTARY},
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
    }


def _phi3_fields(made: MadeModel) -> dict[str, Any]:
    return {
        **llama_fields(made),
        "original_max_position_embeddings": made.context,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
    }


PHI = Family("phi", "model.layers", ROLES, _phi_fields)
PHI3 = Family("phi3", "model.layers", ROLES, _phi3_fields, windows="all_layers")
