"""The files and folders that a recipe names: whether they are there, and what stands for them in a step's key."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, cast

from deepfusion.artifacts import file_digest
from deepfusion.config import Recipe, tree
from deepfusion.errors import InputError

DIGITS = 16  # of a digest, in hex: no two files of one name will ever share as many by accident


def by_content(recipe: Recipe) -> Recipe:
    """The recipe with each path replaced by its base name and its content's digest.

    Equal for copies of the same files wherever they lie, and different once a file has changed. Local files among a
    dataset's `data_files` count; addresses and patterns are left to `datasets`.

    Raises:
        InputError: something is not there; names it and its key.
    """
    fields = recipe.model_dump(mode="json")
    for where, node, key in tree.paths(fields):
        node[key] = _file(where, Path(node[key])) if where.startswith("data.") else _folder(where, Path(node[key]))
    for source in fields["data"]["source"].get("sources", ()):
        if "data_files" in source["arguments"]:
            source["arguments"]["data_files"] = _local_files(source["arguments"]["data_files"])
    return Recipe.model_validate(fields)


def _file(where: str, path: Path) -> str:
    if not path.is_file():
        what = "is a folder, not a file" if path.is_dir() else "does not exist"
        raise InputError(f"{where}: {path} {what}: set it, as with --set {where}=FILE")
    return f"{path.name}@sha256:{file_digest(path)[:DIGITS]}"


def _folder(where: str, path: Path) -> str:
    if not path.is_dir():
        what = "is not a folder" if path.exists() else "does not exist"
        raise InputError(f"{where}: {path} {what}: set it, as with --set {where}=FOLDER")
    listing = "\n".join(f"{file.name} {file_digest(file)}" for file in sorted(path.iterdir()) if file.is_file())
    return f"{path.name}@sha256:{hashlib.sha256(listing.encode()).hexdigest()[:DIGITS]}"


def _local_files(tree: Any) -> Any:
    """A tree of file names, with stand-ins for those that are there."""
    if isinstance(tree, str):
        return _file("data_files", Path(tree)) if Path(tree).is_file() else tree
    if isinstance(tree, dict):
        return {key: _local_files(value) for key, value in cast("dict[str, Any]", tree).items()}
    return [_local_files(value) for value in cast("list[Any]", tree)] if isinstance(tree, list) else tree
