"""Model types that deepfusion knows."""

from __future__ import annotations

from pathlib import Path

from deepfusion.families.bloom import BLOOM
from deepfusion.families.family import Family
from deepfusion.families.gpt2 import GPT2
from deepfusion.families.gpt_neox import GPT_NEOX
from deepfusion.families.llama import GEMMA2, GEMMA3, LLAMA, MISTRAL, OLMO, OLMO2, QWEN2, QWEN3
from deepfusion.families.mixtral import MIXTRAL
from deepfusion.families.opt import OPT
from deepfusion.families.phi import PHI, PHI3

FAMILIES: dict[str, Family] = {
    "gpt2": GPT2,
    "llama": LLAMA,
    "mistral": MISTRAL,
    "opt": OPT,
    "bloom": BLOOM,
    "gpt_neox": GPT_NEOX,
    "qwen2": QWEN2,
    "qwen3": QWEN3,
    "olmo": OLMO,
    "olmo2": OLMO2,
    "gemma2": GEMMA2,
    "gemma3_text": GEMMA3,
    "phi": PHI,
    "phi3": PHI3,
    "mixtral": MIXTRAL,
}


def family(model_type: str, folder: Path | None = None) -> Family:
    """The answers of a model type; `folder` is where it was met, for the error message.

    Raises:
        ValueError: an unsupported model type.
    """
    if model_type in FAMILIES:
        return FAMILIES[model_type]
    where = f" (in {folder})" if folder else ""
    if model_type == "gemma3":
        raise ValueError(f"model type 'gemma3'{where} takes images: use its text model alone, of type 'gemma3_text'")
    raise ValueError(f"model type {model_type!r}{where} is not supported: choose from {', '.join(FAMILIES)}")
