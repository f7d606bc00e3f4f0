"""Studies: comparisons that are worth a file, which says the recipe, its variants, the seeds and the systems."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any, cast

from pydantic import Field, ValidationError, field_validator

from deepfusion.comparison.grid import Variant, key_of, seeds, setting_of, variants
from deepfusion.config import Reference, Section
from deepfusion.config.faults import explain
from deepfusion.config.tree import override, read, resolve_paths
from deepfusion.errors import InputError


class StudyFile(Section):
    """A comparison."""

    about: str = ""
    """What is to be found out, for people."""
    recipe: str
    """A recipe file, relative to the study's folder, or the name of an embedded recipe."""
    seeds: str = "3"
    """How many, from the recipe's own on; or which, as in 3,4,5. A number or a list will do."""
    systems: tuple[Reference, ...] | None = None
    """What to compare with, as `evaluate.references`; none: what the recipe names."""
    set: dict[str, Any] = Field(default={})
    """Key of the recipe, as in `distill.budget_tokens` → value, in all runs."""
    variants: dict[str, dict[str, Any]] = Field(default={})
    """Name → keys and values of one variant."""
    vary: dict[str, tuple[Any, ...]] = Field(default={})
    """Key → values: one variant for each, crossed with `variants` and with each other."""

    @field_validator("seeds", mode="before")
    @classmethod
    def _in_words(cls, given: Any) -> str:
        text = "".join(f"{seed}," for seed in cast("list[Any]", given)) if isinstance(given, list) else str(given)
        seeds(text)
        return text

    @field_validator("variants", mode="before")
    @classmethod
    def _names(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        return {str(name): {} if keys is None else keys for name, keys in cast("dict[Any, Any]", given).items()}

    @property
    def settings(self) -> list[str]:
        """What is set in all runs, as `key=value`."""
        wanted = {} if self.systems is None else {"evaluate.references": self.systems}
        return [setting_of(key, value) for key, value in {**self.set, **wanted}.items()]

    def grid(self, more: list[str]) -> list[Variant]:
        """All variants, crossed with further values (`key=[value, value]`), which stand in place of the file's own.

        Raises:
            InputError: see `grid.variants`.
        """
        said = {key_of(setting) for setting in more}
        own = [setting_of(key, values) for key, values in self.vary.items() if key not in said]
        return variants([*own, *more], self.variants)


def names() -> list[str]:
    """Of the embedded studies."""
    return sorted(path.stem for path in _embedded())


def find(name: str) -> StudyFile | None:
    """The study in a file, or the embedded one of this name; none if it is neither: then it may be a recipe.

    Raises:
        InputError: it is a study, and something is wrong with it; names file and field.
    """
    path = Path(name)
    if path.suffix in (".yaml", ".yml"):
        if not path.is_file():
            return None  # of which whoever reads recipes complains
        tree = read(path)
        if "recipe" not in tree:
            return None
        beside = path.parent / str(tree["recipe"])
        if beside.is_file():
            tree["recipe"] = str(beside)
        return _placed(_parsed(tree, name), path.parent)
    found = {path.stem: path for path in _embedded()}
    return _parsed(read(found[name]), name) if name in found else None


def _parsed(tree: dict[str, Any], origin: str) -> StudyFile:
    try:
        return StudyFile.model_validate(tree)
    except ValidationError as error:
        raise InputError(f"{origin}: {explain(error, StudyFile)}") from None


def _placed(study: StudyFile, folder: Path) -> StudyFile:
    """The study with the paths among its values made absolute; relative ones count from its own folder."""

    def placed(key: str, value: Any) -> Any:
        node: Any = {}
        override(node, setting_of(key, value))
        resolve_paths(node, folder)
        for part in key.split("."):
            node = node[part]
        return node

    def all_of(values: Mapping[str, Any]) -> dict[str, Any]:
        return {key: placed(key, value) for key, value in values.items()}

    changed = {
        "set": all_of(study.set),
        "variants": {name: all_of(values) for name, values in study.variants.items()},
        "vary": {key: tuple(placed(key, value) for value in values) for key, values in study.vary.items()},
    }
    return study.model_copy(update=changed)


def _embedded() -> Iterator[Path]:
    return (path for path in map(Path, map(str, (files("deepfusion") / "studies").iterdir())) if path.suffix == ".yaml")
