"""What all sections have in common, and how to read off one what it allows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast, get_args

from pydantic import BaseModel, ConfigDict, model_validator
from pydantic.fields import FieldInfo

SIGNS = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}


class Section(BaseModel):
    """A part of a recipe: immutable, and strict about its keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)

    @model_validator(mode="before")
    @classmethod
    def _over_its_defaults(cls, given: Any) -> Any:
        """Whoever sets one key of a section keeps the default of its others, also where it is not the class's own.

        `tune: {training: {rows: 4}}` leaves the learning rate at that of `TunePhase.training`.
        """
        if not isinstance(given, dict):
            return given
        tree = dict(cast("dict[str, Any]", given))
        for name, field in cls.model_fields.items():
            default, value = field.default, tree.get(name)
            if isinstance(default, Section) and isinstance(value, dict):
                tree[name] = {**default.model_dump(exclude_unset=True), **cast("dict[str, Any]", value)}
            elif isinstance(value, bool):
                kinds = {field.annotation, *get_args(field.annotation)}
                if kinds & {int, float} and bool not in kinds:  # of which pydantic makes 1 and 0
                    raise ValueError(f"{name} must be a number, not {str(value).lower()}")
        return tree


def sections_in(annotation: Any) -> list[type[Section]]:
    """Every section named in an annotation, in order."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return [annotation]
    return [section for argument in get_args(annotation) for section in sections_in(argument)]


def kind_of(section: type[Section]) -> str:
    """The `kind` by which a section is told from others that may stand in its place."""
    return str(get_args(section.model_fields["kind"].annotation)[0])


def limits_of(field: FieldInfo) -> str:
    """The bounds of a number, as ` ≥ 1, < 2`; empty without any."""
    bounds = [f"{SIGNS[name]} {bound:g}" for rule in field.metadata for name, bound in _bounds(rule)]
    return " " + ", ".join(bounds) if bounds else ""


def _bounds(rule: Any) -> Iterator[tuple[str, float]]:
    for name in SIGNS:
        if hasattr(rule, name):
            yield name, float(getattr(rule, name))
