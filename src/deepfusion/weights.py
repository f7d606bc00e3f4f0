"""Weights on disk: safetensors files, read and written tensor by tensor so that no model need be in memory whole."""

from __future__ import annotations

import json
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
Shape = tuple[torch.dtype, tuple[int, ...]]

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def index(folder: Path) -> dict[str, Path]:
    """Tensor name → the safetensors file of `folder` that holds it, sorted by name.

    Raises:
        ValueError: no safetensors, or broken ones.
    """
    if (folder / WEIGHTS).is_file():
        files = [folder / WEIGHTS]
    elif (folder / INDEX).is_file():
        try:
            names = {
                str(name) for name in json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values()
            }
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ValueError(f"{folder / INDEX} is not an index of safetensors files") from None
        if outside := [name for name in names if Path(name).name != name]:
            raise ValueError(f"{folder / INDEX} points outside its folder: {outside[0]}")
        files = [folder / name for name in sorted(names)]
    elif pickles := [p.name for p in sorted(folder.glob("*")) if p.suffix in {".bin", ".pt", ".pth", ".ckpt", ".pkl"}]:
        raise ValueError(f"{folder} holds its weights as pickles only ({pickles[0]}): save them as safetensors")
    else:
        raise ValueError(f"{folder} has no {WEIGHTS}")
    found: dict[str, Path] = {}
    for file in files:
        with _opened(file) as stream:
            found.update(dict.fromkeys(stream.keys(), file))
    return dict(sorted(found.items()))


def shapes(folder: Path) -> dict[str, Shape]:
    """Tensor name → (dtype, shape), read from the headers alone.

    Raises:
        ValueError: no safetensors, broken ones, or a dtype that is not used for weights.
    """
    found: dict[str, Shape] = {}
    for name, file in index(folder).items():
        with _opened(file) as stream:
            part = stream.get_slice(name)
            if part.get_dtype() not in _DTYPES:
                raise ValueError(f"{file}: tensor {name} has dtype {part.get_dtype()}, which is not supported")
            found[name] = (_DTYPES[part.get_dtype()], tuple(part.get_shape()))
    return found


def tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Yield a checkpoint's tensors by name, one in memory at a time."""
    for name, file in index(folder).items():
        yield name, read(file, name)


def read(file: Path, name: str) -> Tensor:
    """One tensor; the file is opened for it alone, so that what was read before can leave memory."""
    with _opened(file) as stream:
        return stream.get_tensor(name)


@contextmanager
def _opened(file: Path) -> Generator[Any]:
    try:
        with safe_open(file, framework="pt") as stream:
            yield stream
    except (SafetensorError, FileNotFoundError) as error:
        raise ValueError(f"{file} is not a readable safetensors file: {error}") from None


def write(folder: Path, named: Iterable[tuple[str, Tensor]], *, shard_bytes: int = 2**30) -> None:
    """Write tensors as they come to one safetensors file, or several with an index; memory holds one shard."""
    shards: list[Path] = []
    places: dict[str, int] = {}
    held: dict[str, Tensor] = {}
    total = 0

    def flush() -> None:
        shards.append(folder / f"model-{len(shards) + 1:05d}.tmp")
        save_file(held, shards[-1], metadata={"format": "pt"})
        held.clear()

    for name, tensor in named:
        if held and sum(t.nbytes for t in held.values()) + tensor.nbytes > shard_bytes:
            flush()
        held[name], places[name] = tensor.contiguous(), len(shards)
        total += tensor.nbytes
    flush()
    names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    if len(shards) == 1:
        shards[0].replace(folder / WEIGHTS)
        return
    for shard, name in zip(shards, names, strict=True):
        shard.replace(folder / name)
    contents = {"metadata": {"total_size": total}, "weight_map": {name: names[i] for name, i in sorted(places.items())}}
    (folder / INDEX).write_text(json.dumps(contents, indent=1, sort_keys=True), encoding="utf-8")
