"""Model types: one small file each, answering the questionnaire of `family.Family`."""

from deepfusion.families.family import Family, Role, context_length, head, skeleton
from deepfusion.families.registry import FAMILIES, family

__all__ = ["FAMILIES", "Family", "Role", "context_length", "family", "head", "skeleton"]
