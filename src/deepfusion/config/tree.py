"""A recipe before it is checked, as a tree of mappings and lists: read from a file, changed by `--set`, paths made
absolute.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, cast

import yaml
from yaml.composer import ComposerError

from deepfusion.errors import InputError, as_text, read_file

Tree = dict[str, Any]
# Where a recipe names files and folders; `*` is any key or place in a list.
PLACES = ("data.source.sources.*.path", "models.base.path", "models.ancestors.*.path", "device.encoder")


def locate(name: str | Path) -> tuple[Path, Path]:
    """The file that a name means, and the folder that its relative paths count from.

    A name is a file's, or that of an embedded recipe. An embedded one is taken for a copy in the folder `recipes` of
    the current directory: where the package happens to be installed means nothing to anyone.

    Raises:
        InputError: it is neither; names the embedded ones.
    """
    path = Path(name)
    if path.is_file() or path.suffix in (".yaml", ".yml") or os.sep in str(name):
        return path, path.parent
    embedded = {file.stem: file for file in map(Path, map(str, (files("deepfusion") / "recipes").iterdir()))}
    if str(name) not in embedded:
        studies = {Path(str(file)).stem for file in (files("deepfusion") / "studies").iterdir()}
        if str(name) in studies:
            raise InputError(f"{str(name)!r} is a study and no recipe: deepfusion compare {name}")
        known = ", ".join(sorted(embedded))
        told = f"recipe {str(name)!r} is neither a file nor an embedded recipe (embedded: {known}"
        raise InputError(f"{told}; studies, for deepfusion compare: {', '.join(sorted(studies))})")
    return embedded[str(name)], Path("recipes")


def read(path: Path, kind: str = "recipe") -> Tree:
    """Read a YAML file; `kind` says what it is to whoever wrote it.

    Raises:
        InputError: there is none, it is no mapping, or a key stands twice in one; names file, line and column.
    """
    text = as_text(read_file(path, kind), str(path))
    try:
        tree = _loaded(text)
    except yaml.YAMLError as error:
        raise InputError(f"{path}, {_place(error, text)} is not YAML: {_problem(error)}") from None
    if not isinstance(tree, dict):
        sections = " of sections (name, data, models, …)" if kind == "recipe" else ""
        raise InputError(f"{path}: a {kind} must be a mapping{sections}")
    return _unshared(tree)


def chosen(name: str | Path, overrides: Sequence[str] = ()) -> Tree:
    """A recipe as it is written down, changed as `override` says, with absolute paths: those of the file count from its
    folder, those of the overrides from the current one.

    Raises:
        InputError: as `locate`, `read` and `override`.
    """
    file, folder = locate(name)
    tree = read(file)
    resolve_paths(tree, folder)
    for setting in overrides:
        override(tree, setting)
    resolve_paths(tree, Path())
    return tree


def override(tree: Tree, setting: str) -> None:
    """Apply one `key.subkey=value`, in place; the value is YAML, and a number in the key is a place in a list.

    Raises:
        InputError: it is no such setting, or the key leads nowhere.
    """
    key, equals, value = setting.partition("=")
    key = key.strip()
    if not equals or not all(key.split(".")):
        raise InputError(f"--set takes key=value, not {setting!r}")
    *parents, last = key.split(".")
    node: Any = tree
    for depth, part in enumerate(parents, 1):
        here = ".".join(parents[:depth])
        if isinstance(node, dict) and node.get(part) is None:
            node[part] = {}
        node = node[_at(node, part, here)]
        if not isinstance(node, dict | list):
            raise InputError(f"--set {key}: {here} is {node!r}, which has no keys")
    try:
        node[_at(node, last, key)] = _loaded(value)
    except yaml.YAMLError as error:
        raise InputError(f"--set {key}: {value!r} is not a YAML value: {_problem(error)}") from None


def resolve_paths(tree: Tree, folder: Path) -> None:
    """Make every path absolute, in place; relative ones count from `folder`."""
    for _, node, key in paths(tree):
        # Not `resolve`: through a symlinked folder, `..` would lead elsewhere than the path says.
        node[key] = os.path.abspath(folder / Path(node[key]).expanduser())  # noqa: PTH100


def paths(tree: Tree) -> Iterator[tuple[str, Any, Any]]:
    """Every path that a recipe names: its dotted key, and the mapping and key that hold it."""
    for place in PLACES:
        for where, node, key in _found(tree, place.split("."), ()):
            if isinstance(node[key], str) and not (key == "encoder" and node[key] == "hashing"):
                yield where, node, key


def _found(node: Any, place: Sequence[str], above: tuple[str, ...]) -> Iterator[tuple[str, Any, Any]]:
    first, *rest = place
    keys: list[Any] = []
    if isinstance(node, dict):
        keys = list(cast("Tree", node)) if first == "*" else [first] if first in node else []
    elif isinstance(node, list) and first == "*":
        keys = list(range(len(cast("list[Any]", node))))
    for key in keys:
        here = (*above, str(key))
        if rest:
            yield from _found(node[key], rest, here)
        else:
            yield ".".join(here), node, key


def _unshared(node: Any) -> Any:
    """A copy in which nothing stands twice: what YAML's `*alias` repeats is changed by `--set` in one place only."""
    if isinstance(node, dict):
        return {key: _unshared(value) for key, value in cast("Tree", node).items()}
    return [_unshared(value) for value in cast("list[Any]", node)] if isinstance(node, list) else node


def _at(node: Any, part: str, here: str) -> Any:
    """The key or index that a part of a dotted key means.

    Raises:
        InputError: a list has no such place.
    """
    if isinstance(node, dict):
        return part
    if not part.isdecimal() or int(part) >= len(node):
        raise InputError(f"--set {here}: the list has {len(node)} entries, counted from 0, and none is {part!r}")
    return int(part)


class _Loader(yaml.SafeLoader):
    """YAML's own rule, which PyYAML does not keep: a key stands once in a mapping."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:  # where what `<<` merges in is not yet there
        node = super().compose_mapping_node(anchor)
        seen: dict[Any, yaml.Node] = {}
        for key, _ in node.value:
            first = seen.setdefault((key.tag, key.value), key) if isinstance(key, yaml.ScalarNode) else key
            if first is not key:
                told = f"key {key.value!r} stands in line {first.start_mark.line + 1} already: keep one of the two"
                raise ComposerError(None, None, told, key.start_mark)
        return node


def _loaded(text: str) -> Any:
    """What YAML stands for.

    Raises:
        yaml.YAMLError: it is none.
    """
    return yaml.load(text, _Loader)


def _place(error: yaml.YAMLError, text: str) -> str:
    """Line and column, counted from 1."""
    if isinstance(error, yaml.MarkedYAMLError) and (mark := error.problem_mark or error.context_mark):
        return f"line {mark.line + 1}, column {mark.column + 1}"
    before = text[: error.position] if isinstance(error, yaml.reader.ReaderError) else ""
    return f"line {before.count(chr(10)) + 1}, column {len(before) - before.rfind(chr(10))}"


def _problem(error: yaml.YAMLError) -> str:
    """What is wrong, without the place."""
    if isinstance(error, yaml.MarkedYAMLError):
        return " ".join(filter(None, (error.context, error.problem)))
    if isinstance(error, yaml.reader.ReaderError):
        return f"{error.reason} (character {error.character!r})"
    return " ".join(str(error).split())
