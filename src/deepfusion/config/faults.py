"""Says in words what is wrong with a recipe: the field, what it was given, and what it takes."""

from __future__ import annotations

import json
import types
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import ValidationError
from pydantic.fields import FieldInfo

from deepfusion.config.section import Section, kind_of, limits_of, sections_in

LONGEST = 60  # characters shown of a wrong value
NAMES = {str: "text", int: "an integer", float: "a number", bool: "true or false", types.NoneType: "none"}


def explain(error: ValidationError, recipe: type[Section]) -> str:
    """One line about all faults, each as `field: must be …, not …`."""
    faults = error.errors()
    # A list with a faulty entry counts as too short besides: what lies deeper is what is wrong.
    above = {fault["loc"][:depth] for fault in faults for depth in range(len(fault["loc"]))}
    return "; ".join(_explain(fault, recipe) for fault in faults if fault["loc"] not in above or len(faults) == 1)


def _explain(fault: Any, recipe: type[Section]) -> str:
    names, annotation, field = _followed(fault["loc"], recipe)
    where = ".".join(names)
    if fault["type"] == "extra_forbidden":
        _, section, _ = _followed(fault["loc"][:-1], recipe)
        return f"unknown key {where!r}: {_meant(names[-1], sections_in(section))}"
    if fault["type"] == "value_error":  # a check of our own
        message = fault["msg"].removeprefix("Value error, ")
        return f"{where}: {message}" if where else message
    allowed = _allowed(annotation, limits_of(field) if field else "")
    if fault["type"].startswith("union_tag"):
        where, allowed = f"{where}.kind", _alternatives([kind_of(section) for section in sections_in(annotation)])
        tag = fault["ctx"].get("tag")
        return f"{where}: must be {allowed}, not {tag!r}" if tag else f"{where}: is missing, and must be {allowed}"
    if fault["type"] == "missing":
        return f"{where}: is missing, and must be {allowed}"
    if fault["type"] == "too_short":
        return f"{where}: must have at least {fault['ctx']['min_length']} entry, not {fault['ctx']['actual_length']}"
    return f"{where}: must be {allowed}, not {_shown(fault['input'])}"


def _followed(loc: Sequence[str | int], recipe: type[Section]) -> tuple[list[str], Any, FieldInfo | None]:
    """Where pydantic's location leads: its names without the kinds of unions, the annotation there, and its field."""
    names: list[str] = []
    annotation: Any = recipe
    field: FieldInfo | None = None
    for part in loc:
        sections = sections_in(annotation)
        kinds = {kind_of(section): section for section in sections} if len(sections) > 1 else {}
        if part in kinds:
            annotation, field = kinds[str(part)], None
            continue
        names.append(str(part))
        if len(sections) == 1 and _mapped(annotation) is None:
            field = sections[0].model_fields.get(str(part))
            annotation = field.annotation if field else Any
        else:
            annotation, field = _mapped(annotation) or Any, None
    return names, annotation, field


def _mapped(annotation: Any) -> Any:
    """What a list or mapping holds; None for anything else."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType, Annotated):
        return next((inner for inner in map(_mapped, arguments) if inner is not None), None)
    if origin is tuple:
        return arguments[0]
    return arguments[1] if isinstance(origin, type) and issubclass(origin, Mapping) else None


def _allowed(annotation: Any, limits: str = "") -> str:
    """An annotation, and the limits of a number, in words that complete "must be …"."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return _alternatives([str(value) for value in arguments])
    if origin is tuple:
        inner = "sections" if sections_in(arguments[0]) else _allowed(arguments[0])
        return f"a list of {inner}, in brackets"
    if sections := sections_in(annotation):
        if _mapped(annotation) is not None:
            return "a mapping of names to sections"
        if len(sections) > 1:
            return f"a section of kind {_alternatives([kind_of(section) for section in sections])}"
        return f"a section with keys of {', '.join(sections[0].model_fields)}"
    if origin in (Union, types.UnionType, Annotated):
        return " or ".join(_allowed(argument, limits) for argument in arguments)
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return "a mapping" if arguments[1] is Any else f"a mapping to {_allowed(arguments[1])}"
    return NAMES.get(annotation, "something else") + (limits if annotation in (int, float) else "")


def _alternatives(values: Sequence[str]) -> str:
    *others, last = values
    return f"{', '.join(others)} or {last}" if others else last


def _meant(key: str, sections: Sequence[type[Section]]) -> str:
    """What an unknown key may have been meant to be."""
    known = [name for section in sections for name in section.model_fields]
    close = get_close_matches(key, known, n=1)
    return f"did you mean {close[0]!r}?" if close else f"there are {', '.join(known)}"


def _shown(value: Any) -> str:
    """A wrong value as a recipe would write it, cut short."""
    if value is None:
        return "none"
    text = repr(value) if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}…"
