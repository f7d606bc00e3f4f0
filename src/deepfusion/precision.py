"""Which precision a machine computes in: bfloat16 only where it has instructions for it.

Elsewhere torch takes products in bfloat16 apart: on an AMD EPYC with AVX2 alone they are six times slower than in
float32, and gain nothing but memory. What a recipe wants computed in bfloat16 is then computed in float32, unless the
weights themselves are to be saved in bfloat16: these stay as they are. Like the accelerator, this is the machine's and
no part of a step's key; a step leaves word of it, which the report tells.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deepfusion.config import Recipe
from deepfusion.labels import joined

if TYPE_CHECKING:
    import torch

NOTE = ".precision"  # hidden: never part of an artifact
COUNTERPARTS = ("avx512_bf16", "amx_bf16", "bf16")  # instructions for such products: of x86, and of Arm
TOLD = (
    "this machine has no instructions for bfloat16: computed in float32, which is faster here, were the steps of {of}"
)
Section = dict[str, Any]


def knows_bfloat16(accelerator: str) -> bool:
    """Whether it has instructions for products in bfloat16, or is taken to have them (mps)."""
    import torch

    if accelerator == "cuda":
        return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    return accelerator == "mps" or any(torch.cpu.get_capabilities().get(name) for name in COUNTERPARTS)


def usable(dtype: str, accelerator: str, into: Path | None = None) -> torch.dtype:
    """The precision that a recipe asks for, or float32 where there is no bfloat16.

    Args:
        dtype: as in the recipe.
        accelerator: what will compute.
        into: the step's folder, in which word is left of what bfloat16 came to; the engine reads it before the step is
            sealed.
    """
    import torch

    if dtype != "bfloat16":
        return getattr(torch, dtype)
    known = knows_bfloat16(accelerator)
    if into is not None:
        (into / NOTE).write_text("bfloat16" if known else "float32", encoding="ascii")
    return torch.bfloat16 if known else torch.float32


def noted(into: Path) -> str | None:
    """What a step computed in that was to be computed in bfloat16; none: nothing was."""
    note = into / NOTE
    return note.read_text(encoding="ascii") if note.exists() else None


def notices(steps: Sequence[tuple[str, str | None]]) -> list[str]:
    """What the report is to say, from (phase, what `noted` says) of every step."""
    widened = dict.fromkeys(phase for phase, precision in steps if precision == "float32")
    told = [TOLD.format(of=joined(list(widened)))] if widened else []
    if len({precision for phase, precision in steps if phase == "evaluate" and precision}) > 1:
        told.append(
            "some systems were evaluated in bfloat16 and some, on another machine, in float32: for differences of a "
            "few thousandths of a nat, delete the run's steps/evaluate and run it again"
        )
    return told


def fitted(recipe: Recipe, accelerator: str) -> tuple[Recipe, list[str], list[str]]:
    """The recipe with the precisions that its steps will compute in, the keys that differ, and those that stay slow."""
    if knows_bfloat16(accelerator):
        return recipe, [], []
    tree = recipe.model_dump(mode="json")
    widened: list[str] = []
    slow: list[str] = []
    for key, section, frozen in _trainings(tree, adapts=recipe.device.adapts):
        if section["dtype"] == "bfloat16" and not frozen:
            slow.append(f"{key}.dtype")
            continue
        for field in ("dtype", "compute"):
            widened += _widened(key, section, field)
    for phase in ("transfer", "evaluate"):
        widened += _widened(phase, tree[phase], "dtype")
    return Recipe.model_validate(tree), widened, slow


def _trainings(tree: Section, *, adapts: bool) -> Iterator[tuple[str, Section, bool]]:
    """(key, section, whether the weights are frozen and not saved) of everything that says how to train."""
    models = tree["models"]
    sources = {"models.base": models["base"]}
    sources |= {f"models.ancestors.{name}": source for name, source in models["ancestors"].items()}
    for key, source in sources.items():
        if source["make"]:
            yield f"{key}.make.training", source["make"]["training"], False
    for phase in ("device", "distill", "tune"):
        yield f"{phase}.training", tree[phase]["training"], adapts and phase == "device"


def _widened(key: str, section: Section, field: str) -> list[str]:
    """Put float32 in place of bfloat16; the key, if there was any."""
    if section[field] != "bfloat16":
        return []
    section[field] = "float32"
    return [f"{key}.{field}"]
