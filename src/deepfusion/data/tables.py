"""Raw rows of JSONL files, plain text and `datasets`, each with the place it came from."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from deepfusion.config import TextSource
from deepfusion.errors import InputError, as_text, read_file

PARAGRAPH_BYTES = 1000


def read_table(source: TextSource) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield each raw row of a source with its origin ("file, line n").

    Raises:
        InputError: the file is missing, empty or not UTF-8, or a line is no JSON object.
    """
    if source.dataset is not None:
        yield from _dataset(source)
        return
    path = Path(str(source.path))
    if path.suffix not in (".jsonl", ".txt"):
        raise InputError(
            f"{path}: text is read from .jsonl and .txt files only (others: `dataset: json`, csv, parquet)"
        )
    lines = _lines(path)
    yield from _paragraphs(path, lines) if path.suffix == ".txt" else _objects(path, lines)


def _lines(path: Path) -> Iterator[tuple[str, str]]:
    content = read_file(path)
    if not content.strip():
        raise InputError(f"{path} is empty")
    for number, line in enumerate(content.splitlines(), 1):
        origin = f"{path}, line {number}"
        yield origin, as_text(line, origin).strip()


def _objects(path: Path, lines: Iterable[tuple[str, str]]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for number, (origin, line) in enumerate(lines, 1):
        if not line:
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise InputError(f"{origin} is not JSON: {error.msg} (column {error.colno})") from None
        if not isinstance(row, dict):
            raise InputError(f"{origin} is not a JSON object: {line[:40]}")
        yield origin, {"id": f"{path.stem}-{number}", **row}


def _paragraphs(path: Path, lines: Iterable[tuple[str, str]]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Paragraphs, merged while they are together no longer than `PARAGRAPH_BYTES`; one alone may be longer."""
    pieces: list[tuple[str, str]] = []  # the origin and text of each paragraph
    fresh = True
    for origin, line in lines:
        if line and fresh:
            pieces.append((origin, line))
        elif line:
            pieces[-1] = (pieces[-1][0], f"{pieces[-1][1]}\n{line}")
        fresh = not line
    merged: list[tuple[str, str]] = []
    for origin, text in pieces:
        together = f"{merged[-1][1]}\n\n{text}" if merged else text
        if merged and len(together.encode()) <= PARAGRAPH_BYTES:
            merged[-1] = (merged[-1][0], together)
        else:
            merged.append((origin, text))
    for number, (origin, text) in enumerate(merged):
        yield origin, {"id": f"{path.stem}-{number}", "question": None, "answer": text}


def _dataset(source: TextSource) -> Iterator[tuple[str, Mapping[str, Any]]]:
    import datasets  # slow to import, and most recipes do without
    from datasets.exceptions import DatasetsError

    name = str(source.dataset)
    try:
        table = datasets.load_dataset(name, **source.arguments)
    except (OSError, ValueError, DatasetsError) as error:
        raise InputError(f"dataset {name} cannot be loaded: {' '.join(str(error).split())}") from error
    if isinstance(table, dict):
        if len(table) > 1:
            raise InputError(f"dataset {name} has the parts {', '.join(map(str, table))}: set `arguments.split`")
        (table,) = table.values()
    if not len(table):
        raise InputError(f"dataset {name} is empty")
    for number, row in enumerate(table, 1):
        yield f"dataset {name}, row {number}", {"id": f"{Path(name).name}-{number}", **row}
