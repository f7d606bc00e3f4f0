"""Model types that deepfusion knows."""

from __future__ import annotations

from pathlib import Path

from deepfusion.families.bloom import BLOOM
from deepfusion.families.deepseek import DEEPSEEK, DEEPSEEK_TARGET
from deepfusion.families.family import Family
from deepfusion.families.flex_olmo import FLEX_OLMO, FLEX_OLMO_TARGET
from deepfusion.families.gpt2 import GPT2
from deepfusion.families.gpt_neox import GPT_NEOX
from deepfusion.families.llama import GEMMA2, GEMMA3, LLAMA, MISTRAL, OLMO, OLMO2, QWEN2, QWEN3
from deepfusion.families.mixtral import MIXTRAL, MIXTRAL_TARGET
from deepfusion.families.opt import OPT
from deepfusion.families.phi import PHI, PHI3
from deepfusion.families.qwen2_moe import QWEN2_MOE, QWEN2_MOE_TARGET
from deepfusion.families.qwen3_moe import QWEN3_MOE, QWEN3_MOE_TARGET
from deepfusion.families.target import MoE

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
    "qwen2_moe": QWEN2_MOE,
    "qwen3_moe": QWEN3_MOE,
    "flex_olmo": FLEX_OLMO,
    "deepseek": DEEPSEEK,
}

TARGETS: dict[str, MoE] = {
    "mixtral": MIXTRAL_TARGET,
    "qwen2_moe": QWEN2_MOE_TARGET,
    "qwen3_moe": QWEN3_MOE_TARGET,
    "flex_olmo": FLEX_OLMO_TARGET,
    "deepseek": DEEPSEEK_TARGET,
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
    known = ", ".join(name for name in FAMILIES if name not in TARGETS)  # an MoE is what a run makes
    raise ValueError(f"model type {model_type!r}{where} is not supported: choose from {known}")
