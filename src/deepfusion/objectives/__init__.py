"""What a student is trained on besides cross-entropy."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from deepfusion.config import LogitsObjective, OFAObjective, VAAObjective
from deepfusion.objectives.base import Objective, Predictions
from deepfusion.objectives.logits import Logits
from deepfusion.objectives.ofa import OFA
from deepfusion.objectives.vaa import VAA

__all__ = ["OBJECTIVES", "OFA", "VAA", "Logits", "Objective", "Predictions", "build_objective"]


def _logits(config: LogitsObjective, width: int, layers: int, teacher_widths: Mapping[str, int]) -> Objective:
    return Logits(config)


def _vaa(config: LogitsObjective, width: int, layers: int, teacher_widths: Mapping[str, int]) -> Objective:
    assert isinstance(config, VAAObjective)
    return VAA(config, width, teacher_widths, layers)


def _ofa(config: LogitsObjective, width: int, layers: int, teacher_widths: Mapping[str, int]) -> Objective:
    assert isinstance(config, OFAObjective)
    return OFA(config, width, layers)


OBJECTIVES: dict[str, Callable[[LogitsObjective, int, int, Mapping[str, int]], Objective]] = {
    "logits": _logits,
    "vaa": _vaa,
    "ofa": _ofa,
}
"""Kind → how an objective of that kind is made for a student of some width and depth, and for its teachers' widths."""


def build_objective(
    config: LogitsObjective, student_width: int, student_layers: int, teacher_widths: Mapping[str, int]
) -> Objective:
    """The objective that a recipe asks for.

    Args:
        config: the recipe's section.
        student_width: width of the student's hidden states.
        student_layers: number of the student's layers.
        teacher_widths: width of the cached features by teacher lineage.
    """
    return OBJECTIVES[config.kind](config, student_width, student_layers, teacher_widths)
