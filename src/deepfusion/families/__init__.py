"""Model types: one small file each, answering the questionnaire of `family.Family`."""

from deepfusion.families.family import Family, Role, head, skeleton
from deepfusion.families.registry import FAMILIES, family

__all__ = ["FAMILIES", "Family", "Role", "family", "head", "skeleton"]
