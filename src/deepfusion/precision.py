"""Which precision a machine computes in: bfloat16 only where it has instructions for it.

Elsewhere torch takes products in bfloat16 apart: on an AMD EPYC with AVX2 alone they are six times slower than in
float32, and gain nothing but memory. What a recipe wants computed in bfloat16 is then computed in float32. Precision
of weights that are saved is never changed; and like the accelerator, this is no part of a step's key.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from deepfusion.config import Recipe
from deepfusion.labels import joined

Section = dict[str, Any]


def knows_bfloat16(accelerator: str) -> bool:
    """Whether it has instructions for products in bfloat16."""
    if accelerator == "cuda":
        return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    # Of a processor, what torch's own compiler asks.
    return accelerator == "mps" or (
        torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


def usable(dtype: str, accelerator: str) -> torch.dtype:
    """The precision that a recipe asks for, or float32 where there is no bfloat16."""
    return torch.float32 if dtype == "bfloat16" and not knows_bfloat16(accelerator) else getattr(torch, dtype)


def fitted(recipe: Recipe, accelerator: str) -> tuple[Recipe, list[str]]:
    """The recipe with the precisions that its steps will compute in, and the keys that differ."""
    if knows_bfloat16(accelerator):
        return recipe, []
    tree = recipe.model_dump(mode="json")
    changed: list[str] = []
    for key, section, field in _computed(tree, adapts=recipe.device.method != "full"):
        if section[field] == "bfloat16":
            section[field] = "float32"
            changed.append(f"{key}.{field}")
    return Recipe.model_validate(tree), changed


def told(widened: Sequence[str], accelerator: str) -> str:
    """What is to be said of keys that `fitted` changed."""
    return (
        f"this {accelerator} has no instructions for bfloat16: float32 is used for {joined(list(widened))}, which is "
        "faster here and takes more memory"
    )


def _computed(tree: Section, *, adapts: bool) -> Iterator[tuple[str, Section, str]]:
    """(section's key, section, field) of every precision that is computed in, and is not that of what is saved."""
    models = tree["models"]
    sources = {"models.base": models["base"]}
    sources |= {f"models.ancestors.{name}": source for name, source in models["ancestors"].items()}
    for key, source in sources.items():
        if source["make"]:
            yield f"{key}.make.training", source["make"]["training"], "compute"
    for phase in ("device", "distill", "tune"):
        yield f"{phase}.training", tree[phase]["training"], "compute"
    if adapts:  # weights beside an adapter are frozen, and not sent
        yield "device.training", tree["device"]["training"], "dtype"
    for phase in ("transfer", "evaluate"):
        yield phase, tree[phase], "dtype"
