"""Whether a checkpoint from elsewhere is what training makes of another.

What a stranger wrote beside the weights is held against the ancestor's own files, word for word, before a library makes
anything of it: a number in it can be how many layers, labels or tokens are made, and a name which file is opened.
"""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from transformers import GenerationConfig, PreTrainedConfig

from deepfusion.artifacts import MANIFEST, RECORD
from deepfusion.checkpoints import (
    NOT_ARCHITECTURE,
    named_as,
    open_config,
    open_tokenizer,
    quiet,
    save_tokenizer,
    tokenizer_fingerprint,
    trained_shapes,
    validate,
)
from deepfusion.errors import one_line
from deepfusion.files import read_object
from deepfusion.weights import INDEX, header_length, stored

CONFIG, GENERATION = "config.json", "generation_config.json"
# Fields that say how a file was made or opened, and change nothing: by the file's name.
_IDLE = {
    CONFIG: NOT_ARCHITECTURE,
    "tokenizer.json": {"padding", "truncation"},
    "tokenizer_config.json": {"is_local", "local_files_only", "name_or_path", "transformers_version"},
}
_LONGER = 4  # times as long as the ancestor's a file may be, for it may be indented otherwise,
_SLACK = 2**16  # and bytes besides


def validate_descendant(folder: Path, ancestor: Path) -> None:
    """Make sure that a folder from elsewhere is what training makes of an ancestor: `validate`, and of its config,
    shapes and tokenizer, without a file that the ancestor has not. What may be read is as long as the ancestor's own.

    Raises:
        ValueError: names the file, field or tensor, or says that it is the tokenizer, that differs.
    """
    with TemporaryDirectory() as again:
        _saved_again(ancestor, Path(again))
        _check_beside_weights(folder, [ancestor, Path(again)], _fields_of(open_config(ancestor)))
    _check_headers(folder, ancestor)
    validate(folder)
    said, known = (_architecture(open_config(one)) for one in (folder, ancestor))
    for field in sorted({*said, *known}):
        _check_field(folder / CONFIG, field, said.get(field), [known.get(field)])
    _check_shapes(folder, ancestor)
    if tokenizer_fingerprint(open_tokenizer(folder)) != tokenizer_fingerprint(open_tokenizer(ancestor)):
        raise ValueError(f"{folder}: its tokenizer is not its ancestor's")


def _check_shapes(folder: Path, ancestor: Path) -> None:
    expected, held = trained_shapes(ancestor), stored(folder)
    found = named_as(expected, folder)
    for name, shape in expected.items():
        if name in found and found[name].shape != shape:
            raise ValueError(f"{folder}: tensor {name} has shape {found[name].shape}, and its ancestor's is {shape}")
    if more := len(held) - len(expected):
        raise ValueError(f"{folder} has {abs(more)} tensors {'more' if more > 0 else 'fewer'} than its ancestor")


def _saved_again(ancestor: Path, into: Path) -> None:
    """Tokenizer and generation config as they are saved of a model that was opened from the ancestor."""
    save_tokenizer(open_tokenizer(ancestor), into)
    (into / GENERATION).write_text("{}", encoding="utf-8")  # whatever the ancestor has, saving a model writes one


def _check_beside_weights(folder: Path, known: list[Path], config: dict[str, Any]) -> None:
    """Hold every file but weights against those of its name.

    Raises:
        ValueError: names the file, or a field of it, that is not as in any of them.
    """
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_dir() or name == INDEX or (path.suffix == ".safetensors" and "/" not in name):
            continue
        others = [one / name for one in known if (one / name).is_file()]
        if not others or name in (RECORD, MANIFEST):
            raise ValueError(f"{path} is no part of a checkpoint of its ancestor")
        if (size := path.stat().st_size) > (most := _LONGER * max(one.stat().st_size for one in others) + _SLACK):
            raise ValueError(f"{path} has {size} bytes, and cannot need more than {most} for what its ancestor's says")
        if name == GENERATION:
            _check_generation(folder)
        elif path.suffix == ".json":
            theirs = [read_object(one) for one in others] + ([config] if name == CONFIG else [])
            for field, value in sorted(read_object(path, strict=True).items()):
                if field not in _IDLE.get(name, ()):
                    _check_field(path, field, value, [one.get(field) for one in theirs])
        elif path.read_bytes() not in [one.read_bytes() for one in others]:
            raise ValueError(f"{path} is not its ancestor's")


def _check_headers(folder: Path, ancestor: Path) -> None:
    """Of many files, each may have a header that fits in memory, and all of them not."""
    here, there = (sum(map(header_length, one.glob("*.safetensors"))) for one in (folder, ancestor))
    if here > (most := _LONGER * there + _SLACK):
        raise ValueError(f"{folder}: its files have headers of {here} bytes, and cannot need more than {most}")


def _check_field(path: Path, field: str, value: Any, known: list[Any]) -> None:
    if value in known:
        return
    here, there = (one_line(str(one), 100) for one in (value, known[-1]))
    said = "is not its ancestor's" if here == there else f"is {here}, and its ancestor's is {there}"
    raise ValueError(f"{path}: {one_line(field, 100)} {said}")


def _check_generation(folder: Path) -> None:
    """It changes nothing that we do, but stands in the way of opening the model if it cannot be read."""
    try:
        with quiet():
            GenerationConfig.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # transformers raises many kinds of error over fields from elsewhere
        raise ValueError(f"{folder / GENERATION} is not valid: {one_line(str(error))}") from None


def _architecture(config: PreTrainedConfig) -> dict[str, Any]:
    """What of a config says which function its weights stand for."""
    elsewhere = NOT_ARCHITECTURE | set(GenerationConfig().to_dict())  # saving a model moves those of generation
    return {field: value for field, value in config.to_dict().items() if field not in elsewhere}


def _fields_of(config: PreTrainedConfig) -> dict[str, Any]:
    """A config as JSON has it: with lists for tuples, and keys of text."""
    return json.loads(json.dumps(config.to_dict(), default=str))
