"""Whether a checkpoint from elsewhere is what training makes of another.

What a stranger wrote beside the weights is held against the ancestor's own files, word for word, before a library makes
anything of it: a number in it can be how many layers, labels or tokens are made, and a name which file is opened.
"""

from __future__ import annotations

import json
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from transformers import GenerationConfig, PreTrainedConfig

from deepfusion.artifacts import MANIFEST, RECORD, file_digest
from deepfusion.checkpoints import (
    NOT_ARCHITECTURE,
    named_as,
    norm,
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


@dataclass(frozen=True)
class Ancestor:
    """A checkpoint that others are held against. What follows from it alone is worked out once: a tokenizer with many
    tokens takes seconds to open, and as long again to save.
    """

    folder: Path

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """`trained_shapes`."""
        return trained_shapes(self.folder)

    @cached_property
    def norm(self) -> float:
        """L2 norm of the weights that training changes."""
        return norm(self.folder)

    def validate(self, folder: Path) -> None:
        """Make sure that a folder from elsewhere is what training makes of this: `checkpoints.validate`, and of its
        config, shapes and tokenizer, without a file that this has not. What may be read is as long as this one's own.

        Raises:
            ValueError: names the file, field or tensor, or says that it is the tokenizer, that differs.
        """
        beside = {name: path for path in sorted(folder.rglob("*")) if (name := _beside_weights(path, folder))}
        for name, path in beside.items():
            self._check_size(name, path)
        if CONFIG in beside:
            _check_file(beside[CONFIG], [read_object(self.folder / CONFIG), _fields_of(open_config(self.folder))])
        if GENERATION in beside:
            _check_generation(folder)
        words = {name: path for name, path in beside.items() if name not in (CONFIG, GENERATION)}
        unlike = [name for name, path in words.items() if file_digest(path) != self._again.get(name, ("", 0))[0]]
        if unlike:
            self._check_words(unlike, folder)
        self._check_headers(folder)
        validate(folder)
        said, known = (_architecture(open_config(one)) for one in (folder, self.folder))
        for field in sorted({*said, *known}):
            _check_field(folder / CONFIG, field, said.get(field), [known.get(field)])
        self._check_shapes(folder)
        # What is, to the byte, what saving this one's tokenizer writes need not be opened to be known as it.
        if (unlike or words.keys() != self._again.keys() - {GENERATION}) and (
            tokenizer_fingerprint(open_tokenizer(folder)) != self._tokenizer
        ):
            raise ValueError(f"{folder}: its tokenizer is not its ancestor's")

    @cached_property
    def _tokenizer(self) -> str:
        return tokenizer_fingerprint(open_tokenizer(self.folder))

    @contextmanager
    def _saved_again(self) -> Generator[Path]:
        """Tokenizer and generation config as they are saved of a model that was opened from this one."""
        with TemporaryDirectory() as made:
            again = Path(made)
            save_tokenizer(open_tokenizer(self.folder), again)
            # Whatever the ancestor has, saving a model writes one.
            (again / GENERATION).write_text("{}", encoding="utf-8")
            yield again

    @cached_property
    def _again(self) -> dict[str, tuple[str, int]]:
        """Name → digest and bytes of these files."""
        with self._saved_again() as again:
            return {path.name: (file_digest(path), path.stat().st_size) for path in again.iterdir()}

    def _check_size(self, name: str, path: Path) -> None:
        own = self.folder / name
        sizes = [own.stat().st_size] if own.is_file() else []
        sizes += [self._again[name][1]] if name in self._again else []
        if not sizes or name in (RECORD, MANIFEST):
            raise ValueError(f"{path} is no part of a checkpoint of its ancestor")
        if (size := path.stat().st_size) > (most := _LONGER * max(sizes) + _SLACK):
            raise ValueError(f"{path} has {size} bytes, and cannot need more than {most} for what its ancestor's says")

    def _check_words(self, names: Sequence[str], folder: Path) -> None:
        """Hold the files of a tokenizer, none of which is as it is saved again, against those of their names."""
        own = {name for name in names if (self.folder / name).is_file()}
        changed = [name for name in names if name not in own or not _same(folder / name, self.folder / name)]
        if not changed:
            return
        with self._saved_again() as again:
            for name in changed:
                path = folder / name
                if path.suffix != ".json":
                    raise ValueError(f"{path} is not its ancestor's")
                _check_file(path, [read_object(one / name) for one in (self.folder, again) if (one / name).is_file()])

    def _check_headers(self, folder: Path) -> None:
        """Of many files, each may have a header that fits in memory, and all of them not."""
        here, there = (sum(map(header_length, one.glob("*.safetensors"))) for one in (folder, self.folder))
        if here > (most := _LONGER * there + _SLACK):
            raise ValueError(f"{folder}: its files have headers of {here} bytes, and cannot need more than {most}")

    def _check_shapes(self, folder: Path) -> None:
        held, found = stored(folder), named_as(self.shapes, folder)
        for name, shape in self.shapes.items():
            if name in found and found[name].shape != shape:
                raise ValueError(
                    f"{folder}: tensor {name} has shape {found[name].shape}, and its ancestor's is {shape}"
                )
        if more := len(held) - len(self.shapes):
            raise ValueError(f"{folder} has {abs(more)} tensors {'more' if more > 0 else 'fewer'} than its ancestor")


def _beside_weights(path: Path, folder: Path) -> str:
    """The name of a file of a checkpoint; empty for weights, their index, and folders."""
    name = path.relative_to(folder).as_posix()
    weights = name == INDEX or (path.suffix == ".safetensors" and "/" not in name)
    return "" if path.is_dir() or weights else name


def _same(one: Path, other: Path) -> bool:
    return file_digest(one) == file_digest(other)


def _check_file(path: Path, known: Sequence[Mapping[str, Any]]) -> None:
    """Hold every field of a JSON object against those of its name."""
    for field, value in sorted(read_object(path, strict=True).items()):
        if field not in _IDLE.get(path.name, ()):
            _check_field(path, field, value, [one.get(field) for one in known])


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
