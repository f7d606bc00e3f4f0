"""Codecs: what a device sends, in fewer bytes, and what the server makes of it.

A packed upload is one file: safetensors, compressed with Zstandard. Config and tokenizer do not travel, for the server
has the ancestor, which the file names by the digest of its weights. With the ancestor and the codec, every byte of the
file's header is known before it arrives. So nothing in it is trusted or interpreted: it is as it must be, to the byte,
or the upload is refused, and no file can become larger than it must.

    name                  a vector, or a matrix in float32 or bfloat16
    name:q, name:s        a matrix in integers, and its scales (`quantisation`)
    name:a…, name:b…      the two factors of a matrix's change, each as a matrix

A matrix that is narrower than a run of numbers with one scale is packed turned, so that its runs are long.
"""

from __future__ import annotations

import json
import math
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, Self

import torch
import zstandard
from torch import Tensor

from deepfusion import adapters, quantisation
from deepfusion.artifacts import Packing
from deepfusion.checkpoints import named_as, trained_shapes, write_descendant
from deepfusion.config import Codec, LoRA
from deepfusion.config.device import RUN
from deepfusion.weights import WEIGHTS, Part, Shape, Stored, blocks, digest, header, stored, stored_in, write

FILE = "weights.safetensors.zst"
LEVEL = 9  # of compression: above, numbers that look random take more time and no fewer bytes
_WINDOW = 2**23  # bytes that unpacking may look back
_CHUNK = 2**20
_LARGEST = float(torch.finfo(torch.float16).max)  # no sound weight, or change of one, is larger
_FLOATS = {"float32": torch.float32, "bfloat16": torch.bfloat16}
Read = Callable[[slice | None], Tensor]
"""Rows of a tensor (None: of a scalar), in float32."""
Make = Callable[[], Iterable[Tensor]]
"""A tensor, block by block."""


# ── one tensor ────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Form:
    """How one tensor travels: all that follows from its shape and the codec."""

    name: str
    shape: tuple[int, ...]
    numbers: Literal["float32", "bfloat16", "int8", "nf4"]
    turned: bool = False
    rank: int | None = None

    @classmethod
    def of(cls, name: str, shape: tuple[int, ...], codec: Codec) -> Self:
        """Norms and biases are float32: they are few, and much depends on them."""
        if len(shape) < 2:
            return cls(name, shape, "float32")
        if len(shape) > 2:
            return cls(name, shape, codec.numbers)
        rows, columns = shape
        if codec.rank and codec.rank * (rows + columns) < rows * columns:
            return cls(name, shape, codec.numbers, rank=codec.rank)
        return cls(name, shape, codec.numbers, turned=columns < min(RUN, rows))

    def pieces(self) -> dict[str, tuple[int, ...]]:
        """Name → shape of the tensors of numbers that it becomes."""
        if self.rank:
            return {f"{self.name}:a": (self.rank, self.shape[1]), f"{self.name}:b": (self.rank, self.shape[0])}
        return {self.name: self.shape[::-1] if self.turned else self.shape}

    def layout(self) -> dict[str, Shape]:
        """Name → dtype and shape of each tensor in the file."""
        found: dict[str, Shape] = {}
        for piece, (*rows, count) in ((piece, shape) for piece, shape in self.pieces().items() if shape):
            if self.numbers in ("float32", "bfloat16"):
                found[piece] = (_FLOATS[self.numbers], (*rows, count))
            else:
                dtype = torch.int8 if self.numbers == "int8" else torch.uint8
                found[f"{piece}:q"] = (dtype, (*rows, quantisation.width(count, self.numbers)))
                found[f"{piece}:s"] = (torch.bfloat16, (*rows, quantisation.runs(count)))
        return found or {self.name: (torch.float32, ())}

    def parts(self, read: Read) -> list[Part]:
        """The tensors in the file, still to be made; factors are made at once, and are small."""
        made: dict[str, Make]
        if self.rank:
            shape = (self.shape[0], self.shape[1])
            pair = quantisation.factors(lambda: map(read, blocks(self.shape)), shape, self.rank)
            made = {piece: partial(iter, [factor]) for piece, factor in zip(self.pieces(), pair, strict=True)}
        elif self.turned:
            made = {self.name: lambda: [read(slice(None)).T.contiguous()]}
        else:
            made = {self.name: lambda: map(read, blocks(self.shape))}
        return [
            Part(name, dtype, shape, partial(self._encoded, made[name.removesuffix(":q").removesuffix(":s")], name))
            for name, (dtype, shape) in self.layout().items()
        ]

    def _encoded(self, make: Make, name: str) -> Iterator[Tensor]:
        for block in make():
            if self.numbers in ("float32", "bfloat16"):
                yield block.to(_FLOATS[self.numbers])
            else:
                yield quantisation.quantise(block, self.numbers)[name.endswith(":s")]

    def values(self, held: Mapping[str, Stored]) -> Iterator[Tensor]:
        """The tensor again in float32, block by block, from those in the file."""
        (first, shape), *others = self.pieces().items()
        if self.rank:
            a, b = self._decoded(held, first, shape), self._decoded(held, *others[0])
            for rows in blocks(self.shape):
                yield b[:, rows].T @ a
        elif self.turned:
            whole = self._decoded(held, first, shape).T
            for rows in blocks(self.shape):
                yield whole[rows]
        else:
            for rows in blocks(self.shape):
                yield self._decoded(held, first, shape, rows)

    def _decoded(
        self, held: Mapping[str, Stored], piece: str, shape: tuple[int, ...], rows: slice | None = None
    ) -> Tensor:
        if self.numbers in ("float32", "bfloat16"):
            return held[piece].read(rows).float()
        integers, scales = held[f"{piece}:q"].read(rows), held[f"{piece}:s"].read(rows)
        return quantisation.dequantise(integers, scales, shape[-1], self.numbers)

    def check(self, held: Mapping[str, Stored]) -> None:
        """Read what decides how large the tensor's values can be.

        Raises:
            ValueError: it is not finite, or beyond all measure.
        """
        largest = [
            max((_largest(block, name) for block in held[name].through()), default=0.0)
            for name, (dtype, _) in self.layout().items()
            if dtype.is_floating_point
        ]
        if (self.rank or 1) * math.prod(largest) > _LARGEST:
            raise ValueError(f"tensor {self.name} may hold more than {_LARGEST:g}: its training diverged")


def _largest(block: Tensor, name: str) -> float:
    if not bool(block.isfinite().all()):
        raise ValueError(f"tensor {name} holds NaN or infinity")
    return float(block.abs().max()) if block.numel() else 0.0


# ── one file ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Contents:
    """What a packed upload must hold: whole models or adapters of one ancestor, by one codec."""

    forms: tuple[Form, ...]
    metadata: Mapping[str, str]
    delta: bool = False  # whether what is packed is the change in the ancestor

    @classmethod
    def of(cls, ancestor: Path, codec: Codec, lora: LoRA | None) -> Self:
        """Of an upload that starts from `ancestor`; with `lora` of its adapter, whose settings these are."""
        shapes = trained_shapes(ancestor) if lora is None else adapters.shapes(ancestor, lora)
        holds = "model" if lora is None else "adapter"
        return cls(
            tuple(Form.of(name, shape, codec) for name, shape in shapes.items()),
            {"format": "pt", "holds": holds, "codec": codec.label, "ancestor": digest(ancestor)},
            codec.delta,
        )

    def write(self, reads: Mapping[str, Read], folder: Path) -> None:
        """Write the file as it is before compression: the one file of weights of `folder`."""
        folder.mkdir(parents=True, exist_ok=True)
        parts = [part for form in self.forms for part in form.parts(reads[form.name])]
        write(folder, parts, shard_bytes=sys.maxsize, metadata=self.metadata)

    def inflate(self, packed: Path, folder: Path) -> dict[str, Stored]:
        """Write the file as it was before compression; its tensors, none of whose values has been looked at.

        Raises:
            ValueError: something else is packed than must be, or more, or less.
        """
        file = packed / FILE
        if {path.relative_to(packed).as_posix() for path in packed.rglob("*")} != {FILE} or not file.is_file():
            raise ValueError(f"{packed} must hold the file {FILE}, and nothing else")
        layout = {name: shape for form in self.forms for name, shape in form.layout().items()}
        parts = [Part(name, dtype, shape, tuple) for name, (dtype, shape) in layout.items()]
        head = header(parts, self.metadata)
        left = sum(part.nbytes for part in parts)
        if (size := file.stat().st_size) > (most := _bound(len(head) + left)):
            raise ValueError(f"{file} has {size} bytes, and cannot need more than {most}")
        folder.mkdir(parents=True, exist_ok=True)
        target = folder / WEIGHTS
        unpack = zstandard.ZstdDecompressor(max_window_size=_WINDOW)
        try:
            with (
                file.open("rb") as source,
                unpack.stream_reader(source, read_across_frames=True) as stream,
                target.open("wb") as sink,
            ):
                self._check_header(stream, head, file)
                sink.write(head)
                while left:
                    block = stream.read(min(left, _CHUNK))
                    if not block:
                        raise ValueError(f"{file} ends before its last tensor")
                    left -= sink.write(block)
                if stream.read(1):
                    raise ValueError(f"{file} goes on after its last tensor")
        except zstandard.ZstdError as error:
            raise ValueError(f"{file} is not readable: {error}") from None
        return stored_in(target)

    def _check_header(self, stream: Any, head: bytes, file: Path) -> None:
        """Read the header, and no more than a little beyond what it must be long.

        Raises:
            ValueError: names what is not as it must be.
        """
        length = stream.read(8)
        size = int.from_bytes(length, "little")
        asked = size <= len(head) + _CHUNK
        text = stream.read(size) if asked else b""
        if length + text == head:
            return
        if len(length) < 8 or (asked and len(text) < size):
            raise ValueError(f"{file} ends within its header")
        try:
            fault = self._difference(json.loads(text), json.loads(head[8:]))
        except (ValueError, RecursionError, LookupError, TypeError, AttributeError):  # from elsewhere, of any shape
            fault = " has no header of a packed upload"
        raise ValueError(f"{file}{fault}")

    def _difference(self, found: Any, expected: Any) -> str:
        """The first thing in which a header is not as expected; what it says is cut short, and shown as code."""
        for field, must in self.metadata.items():
            if (said := found["__metadata__"].get(field)) != must:
                return f" is packed for {field} {str(said)[:24]!r}, not {must[:24]!r}"
        for name in sorted({*found, *expected} - {"__metadata__"}):
            if (one := found.get(name)) != (other := expected.get(name)):
                return f": tensor {name[:200]!r} is {_shown(one)} instead of {_shown(other)}"
        return " has a header that is written otherwise"

    def parts(self, held: Mapping[str, Stored], before: Mapping[str, Stored] | None) -> list[Part]:
        """The tensors as they were packed, in float32, still to be made; `before`: the ancestor's, to be added."""
        return [
            Part(form.name, torch.float32, form.shape, partial(_restored, form, held, before)) for form in self.forms
        ]


def _bound(size: int) -> int:
    """More than Zstandard makes of anything of that size."""
    return size + size // 128 + 2**12


def _shown(entry: Any) -> str:
    return "not there" if entry is None else f"{str(entry.get('dtype'))[:20]!r} {str(entry.get('shape'))[:80]!r}"


def _restored(form: Form, held: Mapping[str, Stored], before: Mapping[str, Stored] | None) -> Iterator[Tensor]:
    for rows, block in zip(blocks(form.shape), form.values(held), strict=True):
        yield block if before is None else block + before[form.name].read(rows)


# ── one upload ────────────────────────────────────────────────────────────────────────────────────────────────────────


def pack(made: Path, ancestor: Path, codec: Codec, lora: LoRA | None = None, *, into: Path) -> Packing:
    """Pack what a device has made of an ancestor; memory holds a few blocks, and factors or the adapter.

    Args:
        made: the checkpoint's folder, or with `lora` the adapter's.
        ancestor: the checkpoint that it was trained from.
        codec: how.
        lora: the adapter's settings.
        into: the folder that is sent.

    Returns:
        What the server will miss, over all weights of the model.

    Raises:
        ValueError: a value is not finite.
    """
    contents, flat = Contents.of(ancestor, codec, lora), into / ".flat"
    shutil.rmtree(into, ignore_errors=True)
    names = [form.name for form in contents.forms]
    before = named_as(names, ancestor) if lora is None else {}
    trained = named_as(names, made) if lora is None else stored_in(made / adapters.WEIGHTS)
    less = before if codec.delta else {}
    contents.write({name: partial(_read, name, trained[name], less.get(name)) for name in names}, flat)
    with (flat / WEIGHTS).open("rb") as source, (into / FILE).open("wb") as sink:
        size = (flat / WEIGHTS).stat().st_size
        zstandard.ZstdCompressor(level=LEVEL, write_checksum=True).copy_stream(source, sink, size=size)
    if lora is None:
        restored = contents.parts(stored(flat), less or None)
        packing = _missed(codec, restored, _streams(trained), _streams(before))
    else:
        _write_adapter(contents, stored(flat), ancestor, lora, flat)
        whole = {part.name: part.blocks for part in adapters.merged(ancestor, made, lora)}
        packing = _missed(codec, adapters.merged(ancestor, flat, lora), whole, _streams(stored(ancestor)))
    shutil.rmtree(flat)
    return packing


def check(packed: Path, contents: Contents, ancestor: Path, lora: LoRA | None, *, scratch: Path) -> float:
    """Make sure that a folder from elsewhere is an upload as it was asked for.

    Args:
        packed: the folder. No link in it must lead out of it.
        contents: what it must hold.
        ancestor: the checkpoint that it was trained from.
        lora: the adapter's settings, if it is one.
        scratch: a folder for what is unpacked on the way; it is removed.

    Returns:
        The L2 norm of what it changes in the ancestor's weights.

    Raises:
        ValueError: says what is wrong, and where: with the file, the header, a tensor, or the adapter.
    """
    try:
        held = contents.inflate(packed, scratch)
        for form in contents.forms:
            try:
                form.check(held)
            except ValueError as error:
                raise ValueError(f"{packed / FILE}: {error}") from None
        if lora is not None:
            _write_adapter(contents, held, ancestor, lora, scratch / "adapter")
            adapters.validate(scratch / "adapter", ancestor, lora)
            return adapters.change(scratch / "adapter", lora)
        before = {} if contents.delta else _streams(named_as([form.name for form in contents.forms], ancestor))
        squares = 0.0
        for form in contents.forms:
            if form.name not in before:
                squares += sum(map(_square, form.values(held)))
                continue
            for now, then in zip(form.values(held), before[form.name](), strict=True):
                squares += _square(now - then.float())
        return math.sqrt(squares)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def unpack(
    packed: Path,
    ancestor: Path,
    codec: Codec,
    lora: LoRA | None = None,
    *,
    into: Path,
    scratch: Path,
    resume: bool = False,
) -> None:
    """Write the checkpoint that a packed upload stands for, in float32; memory holds a few blocks, or the adapter.

    Args:
        packed: as `check` passes it.
        ancestor: the checkpoint that it was trained from.
        codec: how it was packed.
        lora: the adapter's settings, if it is one.
        into: where the checkpoint goes.
        scratch: a folder for what is unpacked on the way; it is removed.
        resume: keep what an interrupted call with the same arguments has finished.
    """
    contents = Contents.of(ancestor, codec, lora)
    held = contents.inflate(packed, scratch)
    if lora is None:
        before = named_as([form.name for form in contents.forms], ancestor) if codec.delta else None
        write_descendant(ancestor, contents.parts(held, before), into=into, resume=resume)
    else:
        _write_adapter(contents, held, ancestor, lora, scratch / "adapter")
        adapters.merge(ancestor, scratch / "adapter", lora, into=into, resume=resume)
    shutil.rmtree(scratch)


def _write_adapter(contents: Contents, held: Mapping[str, Stored], ancestor: Path, lora: LoRA, folder: Path) -> None:
    tensors = {part.name: torch.cat(list(part.blocks())) for part in contents.parts(held, None)}
    adapters.write(tensors, ancestor, lora, folder)


def _read(name: str, one: Stored, before: Stored | None, rows: slice | None) -> Tensor:
    values = one.read(rows).float()
    if not bool(values.isfinite().all()):
        raise ValueError(f"tensor {name} holds NaN or infinity: its training diverged")
    return values if before is None else values - before.read(rows).float()


def _streams(held: Mapping[str, Stored]) -> dict[str, Make]:
    return {name: one.through for name, one in held.items()}


def _missed(codec: Codec, restored: Iterable[Part], trained: Mapping[str, Make], before: Mapping[str, Make]) -> Packing:
    """L2 distances over all tensors, which come in equal blocks."""
    missed = whole = changed = 0.0
    for part in restored:
        for here, there, first in zip(part.blocks(), trained[part.name](), before[part.name](), strict=True):
            missed += _square(here.float() - there.float())
            whole += _square(there.float())
            changed += _square(there.float() - first.float())
    return Packing(codec=codec.label, error=_ratio(missed, whole), lost=_ratio(missed, changed))


def _square(block: Tensor) -> float:
    return float(torch.linalg.vector_norm(block)) ** 2


def _ratio(part: float, whole: float) -> float:
    return math.sqrt(part / whole) if whole else 0.0
