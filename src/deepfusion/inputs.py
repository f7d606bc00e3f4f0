"""The files and folders that a recipe names: whether they are there, and what stands for them in a step's key."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, cast

from deepfusion.artifacts import file_digest
from deepfusion.config import Recipe, tree
from deepfusion.errors import InputError

DIGITS = 16  # of a digest, in hex: no two files of one name will ever share as many by accident


def missing(recipe: Recipe) -> list[tuple[str, str]]:
    """(key, what is wrong there) of every file and folder that the recipe names and that is not there."""
    fields = recipe.model_dump(mode="json")
    return [
        (where, f"{node[key]} {wrong}: set it, as with --set {where}={'FILE' if _is_text(where) else 'FOLDER'}")
        for where, node, key in tree.paths(fields)
        if (wrong := _wrong(where, Path(node[key])))
    ]


def demand(recipe: Recipe, part: str = "") -> None:
    """See that what the recipe names is there, or what it names by keys that begin with `part`.

    Raises:
        InputError: something is not there; names it and its key.
    """
    if faults := [fault for fault in missing(recipe) if fault[0].startswith(part)]:
        raise InputError(": ".join(faults[0]))


def by_content(recipe: Recipe) -> Recipe:
    """The recipe with each path replaced by its base name and its content's digest.

    Equal for copies of the same files wherever they lie, and different once a file has changed. Local files among a
    dataset's `data_files` count; addresses and patterns are left to `datasets`.

    Raises:
        InputError: something is not there; names it and its key.
    """
    demand(recipe)
    fields = recipe.model_dump(mode="json")
    for where, node, key in tree.paths(fields):
        node[key] = _file(Path(node[key])) if _is_text(where) else _folder(Path(node[key]))
    for source in fields["data"]["source"].get("sources", ()):
        if "data_files" in source["arguments"]:
            source["arguments"]["data_files"] = _local_files(source["arguments"]["data_files"])
    return Recipe.model_validate(fields)


def _is_text(where: str) -> bool:
    """Whether a key names a file of text; the others name folders of models."""
    return where.startswith("data.")


def _wrong(where: str, path: Path) -> str | None:
    """What is wrong with what lies there, if anything is."""
    if path.is_file() if _is_text(where) else path.is_dir():
        return None
    if not path.exists():
        return "does not exist"
    return "is a folder, not a file" if _is_text(where) else "is not a folder"


def _file(path: Path) -> str:
    return f"{path.name}@sha256:{file_digest(path)[:DIGITS]}"


def _folder(path: Path) -> str:
    listing = "\n".join(f"{file.name} {file_digest(file)}" for file in sorted(path.iterdir()) if file.is_file())
    return f"{path.name}@sha256:{hashlib.sha256(listing.encode()).hexdigest()[:DIGITS]}"


def _local_files(tree: Any) -> Any:
    """A tree of file names, with stand-ins for those that are there."""
    if isinstance(tree, str):
        return _file(Path(tree)) if Path(tree).is_file() else tree
    if isinstance(tree, dict):
        return {key: _local_files(value) for key, value in cast("dict[str, Any]", tree).items()}
    return [_local_files(value) for value in cast("list[Any]", tree)] if isinstance(tree, list) else tree
