"""Weights on disk: safetensors files, read and written block by block so that no model need be in memory whole.

Headers are read and checked by the safetensors library. Data is read from the file rather than mapped into memory,
where what was looked at once would stay; and it is written by a few lines of our own, because the library's `save_file`
wants all tensors of a file at once. A file written here has the bytes that `save_file` would have written.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from deepfusion.files import once, write_whole

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD_BYTES = 2**30
BLOCK = 2**18  # elements that are worked on at a time: in float32 they fit into a core's cache, four times as fast
MOST_HEADER = 2**24  # bytes of a file's header, or of an index of files: a hundred thousand tensors
MOST_NAME = 1000  # characters of a tensor's name
AHEAD = 8  # blocks that wait to be written
Shape = tuple[torch.dtype, tuple[int, ...]]
METADATA = {"format": "pt"}  # of a file of weights

_DTYPES = {  # in the order that the library lays them out in a file
    "I64": torch.int64,
    "F64": torch.float64,
    "F32": torch.float32,
    "I32": torch.int32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}
_ORDER = {dtype: place for place, dtype in enumerate(_DTYPES.values())}


# ── reading ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Stored:
    """A tensor on disk."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int  # its first byte in the file

    def read(self, rows: slice | None = None) -> Tensor:
        """The tensor, or `rows` of it (first to last, step 1), in memory of its own.

        Raises:
            ValueError: the file has become shorter since its header was read.
        """
        shape, start = self.shape, self.start
        if rows is not None:
            first, last, _ = rows.indices(self.shape[0])
            shape = (last - first, *self.shape[1:])
            start += first * math.prod(self.shape[1:]) * self.dtype.itemsize
        tensor = torch.empty(shape, dtype=self.dtype)
        left = _bytes(tensor)
        with self.file.open("rb", buffering=0) as stream:
            stream.seek(start)
            while left:
                count = stream.readinto(left)
                if not count:
                    raise ValueError(f"{self.file} is shorter than its header says")
                left = left[count:]
        return tensor

    @property
    def place(self) -> tuple[int, int, int]:
        """Where its bytes are on the machine: equal for hard links of one file."""
        status = self.file.stat()
        return status.st_dev, status.st_ino, self.start

    def through(self, rows: slice = slice(None)) -> Iterator[Tensor]:
        """Its rows, or some of them, block by block."""
        for block in blocks(self.shape, rows):
            yield self.read(block)


def blocks(shape: tuple[int, ...], rows: slice = slice(None)) -> Iterator[slice | None]:
    """What of a tensor's `rows` to work on one after another, about `BLOCK` elements at a time; of a scalar, all."""
    if not shape:
        yield None
        return
    first, last, _ = rows.indices(shape[0])
    width = math.prod(shape[1:])
    step = max(1, BLOCK // width if width else shape[0])  # without elements, any number of rows is one block
    for start in range(first, last, step) or (first,):
        yield slice(start, min(start + step, last))


def index(folder: Path) -> dict[str, Path]:
    """Tensor name → the safetensors file of `folder` that holds it, sorted by name.

    Raises:
        ValueError: no safetensors, or broken ones.
    """
    if (folder / WEIGHTS).is_file():
        files = [folder / WEIGHTS]
    elif (folder / INDEX).is_file():
        if (size := (folder / INDEX).stat().st_size) > MOST_HEADER:
            raise ValueError(f"{folder / INDEX} has {size} bytes, and may have {MOST_HEADER}")
        try:
            names = {
                str(name) for name in json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values()
            }
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
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
            for name in stream.keys():  # noqa: SIM118 (no mapping)
                if name in found:
                    raise ValueError(f"{folder}: tensor {name} is in {found[name].name} and again in {file.name}")
                found[name] = file
    return dict(sorted(found.items()))


def stored(folder: Path) -> dict[str, Stored]:
    """Tensor name → where it is and what it looks like, sorted by name, read from the headers alone.

    Raises:
        ValueError: no safetensors, broken ones, or a dtype that is not used for weights.
    """
    places = index(folder)
    held = {file: stored_in(file) for file in set(places.values())}
    return {name: held[file][name] for name, file in places.items()}


def stored_in(file: Path) -> dict[str, Stored]:
    """The same of one safetensors file, whatever its name.

    Raises:
        ValueError: it is none, is broken, or has a dtype that is not used for weights.
    """
    with _opened(file):
        header = _header(file)
    found: dict[str, Stored] = {}
    for name, entry in sorted(header.items()):
        if entry["dtype"] not in _DTYPES:
            raise ValueError(f"{file}: tensor {name} has dtype {entry['dtype']}, which is not supported")
        found[name] = Stored(file, _DTYPES[entry["dtype"]], tuple(entry["shape"]), entry["start"])
    return found


def shapes(folder: Path) -> dict[str, Shape]:
    """Tensor name → (dtype, shape); otherwise as `stored`."""
    return {name: (one.dtype, one.shape) for name, one in stored(folder).items()}


def digest(folder: Path) -> str:
    """SHA-256 of a checkpoint's tensors, in hex: of the one file that `write` would put them all into.

    So it says nothing of the files that they are in: a checkpoint cut into shards has the digest of the same one whole.

    Raises:
        ValueError: as `stored`.
    """
    held = stored(folder)
    shard = _laid_out([Part(name, one.dtype, one.shape, one.read) for name, one in held.items()])
    sha = hashlib.sha256(_head(shard, METADATA))
    for part in shard:
        for block in held[part.name].through():
            sha.update(_bytes(block))
    return sha.hexdigest()


def distance(held: Mapping[str, Stored], before: Mapping[str, Stored]) -> tuple[float, float]:
    """L2 norms over all tensors, block by block: of what changed since `before`, and of what was there before."""
    changed = whole = 0.0
    for name, one in held.items():
        for here, there in zip(one.through(), before[name].through(), strict=True):
            changed += float(torch.linalg.vector_norm(here.double() - there.double())) ** 2
            whole += float(torch.linalg.vector_norm(there.double())) ** 2
    return math.sqrt(changed), math.sqrt(whole)


def tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Yield a checkpoint's tensors by name, one in memory at a time."""
    for name, one in stored(folder).items():
        yield name, one.read()


def header_length(file: Path) -> int:
    """Bytes that a file says its header has."""
    with file.open("rb") as stream:
        return int.from_bytes(stream.read(8), "little")


def _header(file: Path) -> dict[str, Any]:
    """What a file that the library has found sound says of each tensor, and where the tensor's bytes `start`."""
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        entries: dict[str, Any] = json.loads(stream.read(length), object_pairs_hook=partial(once, file))
    entries.pop("__metadata__", None)
    return {name: entry | {"start": 8 + length + entry["data_offsets"][0]} for name, entry in entries.items()}


@contextmanager
def _opened(file: Path) -> Generator[Any]:
    try:
        if (length := header_length(file)) > MOST_HEADER:
            raise ValueError(f"{file} has a header of {length} bytes, and may have {MOST_HEADER}")
        with safe_open(file, framework="pt") as stream:
            if long := next((name for name in stream.keys() if len(name) > MOST_NAME), ""):  # noqa: SIM118 (no mapping)
                raise ValueError(f"{file} has a tensor whose name has {len(long)} characters: {long[:40]!r}…")
            yield stream
    except (SafetensorError, FileNotFoundError) as error:
        raise ValueError(f"{file} is not a readable safetensors file: {error}") from None


def _bytes(tensor: Tensor) -> memoryview:
    """A contiguous tensor's own memory."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data


# ── writing ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Part:
    """A tensor still to be made: what it will look like is known before any of its values."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    make: Callable[[], Tensor | Iterable[Tensor]]
    """Gives the tensor; or blocks of its rows, first to last, so that a large one need not be in memory whole."""

    @classmethod
    def of(cls, name: str, tensor: Tensor) -> Self:
        """A tensor that is there already."""
        return cls(name, tensor.dtype, tuple(tensor.shape), lambda: tensor)

    @property
    def nbytes(self) -> int:
        """Its size on disk."""
        return math.prod(self.shape) * self.dtype.itemsize

    def blocks(self) -> Iterator[Tensor]:
        """Make it.

        Raises:
            ValueError: what is made has not the announced dtype or shape.
        """
        made = self.make()
        if isinstance(made, Tensor) and made.shape != self.shape:
            raise ValueError(f"{self.name} was made with shape {tuple(made.shape)} instead of {self.shape}")
        count = 0
        for block in [made] if isinstance(made, Tensor) else made:
            if block.dtype != self.dtype or (self.shape and block.shape[1:] != self.shape[1:]):
                rows = f"rows {tuple(block.shape)} of {block.dtype}"
                raise ValueError(f"{self.name} was made of {rows}, but is to be {self.shape} of {self.dtype}")
            count += block.nbytes
            yield block
        if count != self.nbytes:
            raise ValueError(f"{self.name} was made with {count} bytes instead of {self.nbytes}")


def write(
    folder: Path,
    parts: Iterable[Part],
    *,
    shard_bytes: int = SHARD_BYTES,
    metadata: Mapping[str, str] = METADATA,
    resume: bool = False,
) -> None:
    """Write the weights of a checkpoint: one safetensors file, or several and an index, in place of those it has.

    Which file holds what is settled by the parts' shapes alone. They are then made one at a time, in the order of the
    files, and go straight to disk. A file gets its name when it is whole.

    Args:
        folder: of the checkpoint.
        parts: each name once.
        shard_bytes: of tensors in a file; a larger tensor has one for itself.
        metadata: what the header of each file says beside its tensors.
        resume: keep the files that an interrupted call with the same parts has finished, and make nothing of what is in
            them. The caller vouches that the parts are the same: only names, dtypes and shapes are compared.

    Raises:
        ValueError: a part is not made as announced, or two have one name.
    """
    parts = list(parts)
    if twice := len(parts) - len({part.name for part in parts}):
        raise ValueError(f"{folder}: {twice} tensors have a name that another has")
    shards = _planned(parts, shard_bytes)
    several = [f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors" for number in range(len(shards))]
    files = dict(zip(several if len(shards) > 1 else [WEIGHTS], shards, strict=True))
    for path in folder.glob("model*.safetensors*"):
        if not (resume and path.name in files and _is_whole(path, files[path.name], metadata)):
            path.unlink()
    for name, shard in files.items():
        if not (folder / name).exists():
            _write_file(folder / name, shard, metadata)
    if len(files) > 1:
        places = {part.name: name for name, shard in files.items() for part in shard}
        total = sum(part.nbytes for part in parts)
        contents = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
        write_whole(folder / INDEX, json.dumps(contents, indent=1, sort_keys=True))


def header(parts: Iterable[Part], metadata: Mapping[str, str] = METADATA) -> bytes:
    """All of the one file that `write` would put parts into that comes before the tensors."""
    return _head(_laid_out(list(parts)), metadata)


def _planned(parts: list[Part], shard_bytes: int) -> list[list[Part]]:
    """Parts by file: files are filled in the order given, and laid out by dtype and name as the library does."""
    shards: list[list[Part]] = [[]]
    held = 0
    for part in parts:
        if shards[-1] and held + part.nbytes > shard_bytes:
            shards.append([])
            held = 0
        shards[-1].append(part)
        held += part.nbytes
    return [_laid_out(shard) for shard in shards]


def _laid_out(parts: list[Part]) -> list[Part]:
    return sorted(parts, key=lambda part: (_ORDER[part.dtype], part.name))


def _head(shard: list[Part], metadata: Mapping[str, str]) -> bytes:
    """The header's length in eight bytes, and JSON padded to eight."""
    entries: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for part in shard:
        start, end = end, end + part.nbytes
        entries[part.name] = {"dtype": _CODES[part.dtype], "shape": part.shape, "data_offsets": [start, end]}
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _is_whole(path: Path, shard: list[Part], metadata: Mapping[str, str]) -> bool:
    head = _head(shard, metadata)
    with path.open("rb") as stream:
        return path.stat().st_size == len(head) + sum(part.nbytes for part in shard) and stream.read(len(head)) == head


def _write_file(path: Path, shard: list[Part], metadata: Mapping[str, str]) -> None:
    temporary = path.with_name(path.name + ".tmp")
    # Writing is as much work as making: a thread writes some blocks while the next ones are read and computed.
    with temporary.open("wb") as stream, ThreadPoolExecutor(1) as writer:
        stream.write(_head(shard, metadata))
        waiting: deque[Future[int]] = deque()
        for part in shard:
            for block in part.blocks():
                waiting.append(writer.submit(stream.write, _bytes(block.contiguous())))
                if len(waiting) > AHEAD:
                    waiting.popleft().result()
        for written in waiting:
            written.result()
    temporary.replace(path)
