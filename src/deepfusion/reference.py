"""Renders every recipe key, its type, default and meaning: `python -m deepfusion.reference > docs/recipes.md`."""

from __future__ import annotations

import re
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal, Union, cast, get_args, get_origin

from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from deepfusion.config import Recipe, Section
from deepfusion.config.section import kind_of, limits_of, sections_in

INTRODUCTION = """# Recipes

A recipe is one YAML file that decides a run's result: same recipe, same numbers. What only changes the speed (workers,
threads, accelerator) is not in it but on the command line. Unknown keys are refused by name.

A relative path in a recipe counts from the recipe's own folder, one given with `--set` from the current directory. An
embedded recipe that is called by its name alone counts as `recipes/<name>.yaml`. Steps know files by name and content:
runs on copies of the same files are the same run.

    deepfusion run recipes/demo.yaml --set seed=1 --set cluster.k=8
    deepfusion run medical_finance --set data.source.sources.0.path=texts/medicine.jsonl

Every key below has a default unless it says *required*; the defaults are what measured best, see
[Decisions](decisions.md) and the [Log](log.md).
"""


def render() -> str:
    """The whole page."""
    seen: set[type[Section]] = set()
    return INTRODUCTION + "".join(_section("", Recipe, seen))


def _section(path: str, section: type[Section], seen: set[type[Section]]) -> Iterator[str]:
    """A heading, a table of plain keys, then the sections below; a section that occurs twice is explained once."""
    seen.add(section)
    title = f"`{path}`" if path else "The top level"
    yield f"\n## {title} {{: #{_anchor(path)} }}\n\n{_first_paragraph(section)}\n\n"
    yield "| key | type | default | meaning |\n|---|---|---|---|\n"
    for name, field in section.model_fields.items():
        meaning = " ".join((field.description or "").split()) or _inherited_meaning(name, field)
        cells = (f"`{name}`", _type(field.annotation) + limits_of(field), _default(field), meaning)
        yield "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n"
    for name, field in section.model_fields.items():
        for below in sections_in(field.annotation):
            if below not in seen:
                yield from _section(_join(path, name, field, below), below, seen)


def _join(path: str, name: str, field: FieldInfo, below: type[Section]) -> str:
    """The path of a section below; the members of a union are told apart by their kind."""
    here = f"{path}.{name}" if path else name
    kinds = sections_in(field.annotation)
    return f"{here} (kind: {kind_of(below)})" if len(kinds) > 1 else here


def _inherited_meaning(name: str, field: FieldInfo) -> str:
    """What stands where a field has no sentence of its own: that of its section, or nothing (a test refuses that)."""
    sections = sections_in(field.annotation)
    if sections:
        return _first_paragraph(sections[0]) if len(sections) == 1 else "One of several, told apart by its `kind`."
    return "Says which of several this section is." if name == "kind" else ""


def _first_paragraph(section: type[Section]) -> str:
    return " ".join((section.__doc__ or "").split("\n\n")[0].split())


def _anchor(path: str) -> str:
    return re.sub(r"\W+", "-", path).strip("-") or "top"


def _type(annotation: Any) -> str:
    """An annotation in words that a writer of YAML understands."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _type(arguments[0])
    if origin is Literal:
        return ", ".join(f"`{a}`" for a in arguments)
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(_type(a) for a in arguments))
    if origin is tuple:
        return f"list of {_type(arguments[0])}"
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return f"mapping to {_type(arguments[1])}"
    if annotation is typing.Any:
        return "anything"
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return "section"
    names = {str: "text", int: "integer", float: "number", bool: "true or false", types.NoneType: "none"}
    return names[annotation]


def _default(field: FieldInfo) -> str:
    """A default as YAML writes it."""
    if field.is_required():
        return "*required*"
    default = field.get_default(call_default_factory=True, validated_data={})
    assert default is not PydanticUndefined
    return _value(default)


def _value(value: Any) -> str:
    if isinstance(value, Section):
        changed = value.model_dump(exclude_defaults=True)
        return ", ".join(f"{key} {_value(item)}" for key, item in changed.items()) or "its own defaults"
    if value is None:
        return "none"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, tuple | list):
        return ", ".join(_value(item) for item in cast("tuple[Any, ...]", value)) or "empty"
    if isinstance(value, str):
        return "`" + value.replace("\n", "\\n") + "`"
    return f"`{value}`" if value != {} else "empty"


if __name__ == "__main__":
    print(render(), end="")
