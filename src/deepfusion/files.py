"""Small files of text: written whole, and JSON from elsewhere read with care."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

Pairs = list[tuple[str, Any]]


def write_whole(path: Path, text: str) -> None:
    """Write a file so that whoever is killed meanwhile leaves the old one, or the new one, or none."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def read_object(path: Path, *, strict: bool = False) -> dict[str, Any]:
    """A JSON object that others wrote; `strict`: none in it may have a key twice.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not JSON, of no use to Python, or no object; names the file.
    """
    pairs: Callable[[Pairs], dict[str, Any]] | None = partial(once, path) if strict else None
    try:
        fields: Any = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=pairs)
    except (ValueError, RecursionError) as error:  # also of a number with thousands of digits
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(fields, dict):
        raise ValueError(f"{path} is not a JSON object")
    return fields


def once(file: Path, pairs: Pairs) -> dict[str, Any]:
    """A JSON object none of whose keys comes twice, for `object_pairs_hook`.

    Of two, Python reads the last, and libraries in other languages the first, or both.
    """
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{file}: {next(n for n in names if names.count(n) > 1)[:200]!r} stands in it twice")
    return found
