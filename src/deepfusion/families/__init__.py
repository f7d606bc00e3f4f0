"""Model types: one small file each, answering the questionnaire of `family.Family`."""

from deepfusion.families.family import Experts, Family, Role, context_length, experts, head, skeleton
from deepfusion.families.grouped import heed_autocast
from deepfusion.families.registry import FAMILIES, TARGETS, family

heed_autocast()  # whoever opens a model comes by here

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
