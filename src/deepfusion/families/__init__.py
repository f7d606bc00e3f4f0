"""Model types: one small file each, answering the questionnaire of `family.Family`."""

from deepfusion.families.family import Experts, Family, Role, context_length, experts, head, skeleton
from deepfusion.families.registry import FAMILIES, TARGETS, family

__all__ = [
    "FAMILIES",
    "TARGETS",
    "Experts",
    "Family",
    "Role",
    "context_length",
    "experts",
    "family",
    "head",
    "skeleton",
]
