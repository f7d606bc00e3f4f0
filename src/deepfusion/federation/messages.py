"""What server and device say to each other, as records of Flower.

The server sends a device its *order* (a message of type `train`): the recipe's `device` section, where to start from,
and the public text. The reply announces the upload by its signed manifest and carries it, or the first piece of it.
What is larger than a piece is asked for with `query.piece`; `query.verdict` tells the device what became of it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self, TypeVar

import zstandard
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, no_object_id_recompute
from pydantic import BaseModel, ConfigDict, ValidationError

from deepfusion.config import DevicePhase, MadeModel
from deepfusion.errors import one_line
from deepfusion.federation.manifest import first_fault

ORDER, PIECE, VERDICT = "train", "query.piece", "query.verdict"
MOST_TEXT = 2**32  # bytes of public text that a device unpacks
_WINDOW = 2**23  # bytes that unpacking it may look back
_Kind = TypeVar("_Kind", str, int)


class Order(BaseModel):
    """What a device is to do; its digest is part of the upload's manifest."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    run: str  # the recipe's name
    device: str
    seed: int
    ancestor: str  # its name in the recipe
    lineage: str  # of the ancestor: architecture, shapes, weights and tokenizer
    made: MadeModel | None  # how to make it; none: the device has a copy
    made_seed: int
    phase: DevicePhase
    piece_bytes: int
    texts: dict[str, str]  # name of a file of public text → SHA-256

    @property
    def digest(self) -> str:
        """SHA-256 over everything in it."""
        return hashlib.sha256(json.dumps(self.model_dump(mode="json"), sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Announcement:
    """A device's signed manifest."""

    manifest: bytes
    signature: bytes


@dataclass(frozen=True)
class Piece:
    """Bytes of an upload."""

    of: str  # the digest of its manifest
    offset: int
    content: bytes


def pack(texts: Mapping[str, bytes]) -> dict[str, bytes]:
    """The public text as it travels: once for all orders, in which a fleet's server then holds it once."""
    return {name: zstandard.compress(text) for name, text in texts.items()}


def order(given: Order, packed: dict[str, bytes]) -> RecordDict:
    """An order, and the public text that it is about, as `pack` gives it."""
    record = ConfigRecord({"order": given.model_dump_json()})
    return RecordDict({"order": record, "texts": _arrays(packed)})


def read_order(message: Message) -> tuple[Order, dict[str, bytes]]:
    """The same again.

    Raises:
        ValueError: it is no order, or the text is not what the order says.
    """
    try:
        given = Order.model_validate_json(_field(_config(message, "order"), "order", str))
    except ValidationError as error:
        raise ValueError(f"the order is not one: {first_fault(error)}") from None
    packed, texts = _contents(message, "texts"), dict[str, bytes]()
    for name in sorted(packed.keys() & given.texts):  # what nobody asks for is not unpacked
        try:
            with zstandard.ZstdDecompressor(max_window_size=_WINDOW).stream_reader(packed[name]) as stream:
                texts[name] = stream.read(MOST_TEXT)
        except zstandard.ZstdError as error:
            raise ValueError(f"the public text {name} is not readable: {error}") from None
    if {name: hashlib.sha256(text).hexdigest() for name, text in texts.items()} != given.texts:
        raise ValueError("the public text that came with the order is not the one that it names")
    return given, texts


def reply(announcement: Announcement | None, piece: Piece | None, failed: str = "") -> RecordDict:
    """What a device answers: its manifest and a piece of its upload, or why there is none."""
    fields: dict[str, Any] = {"failed": failed}
    if announcement is not None:
        fields |= {"manifest": announcement.manifest, "signature": announcement.signature}
    if piece is None:
        return RecordDict({"reply": ConfigRecord(fields)})
    fields |= {"of": piece.of, "offset": piece.offset}
    return RecordDict({"reply": ConfigRecord(fields), "piece": _arrays({"piece": piece.content})})


@dataclass(frozen=True)
class Reply:
    """The same again, as far as it is one."""

    failed: str
    announcement: Announcement | None
    piece: Piece | None

    @classmethod
    def read(cls, message: Message) -> Self:
        """What a device answered.

        Raises:
            ValueError: it is no answer of a device of ours.
        """
        fields = _config(message, "reply")
        manifest, signature, of, offset = (fields.get(name) for name in ("manifest", "signature", "of", "offset"))
        announcement = piece = None
        if isinstance(manifest, bytes) and isinstance(signature, bytes):
            announcement = Announcement(manifest, signature)
        if isinstance(of, str) and isinstance(offset, int):
            piece = Piece(of, offset, _contents(message, "piece").get("piece", b""))
        return cls(one_line(_field(fields, "failed", str)), announcement, piece)


def ask(of: str, offset: int, length: int) -> RecordDict:
    """Ask for a piece."""
    return RecordDict({"ask": ConfigRecord({"of": of, "offset": offset, "length": length})})


def read_ask(message: Message) -> tuple[str, int, int]:
    """The same again.

    Raises:
        ValueError: it asks for no bytes of an upload.
    """
    fields = _config(message, "ask")
    of, offset, length = _field(fields, "of", str), _field(fields, "offset", int), _field(fields, "length", int)
    if offset < 0 or length < 0:
        raise ValueError(f"the message asks for {length} bytes from {offset} on")
    return of, offset, length


def verdict(state: str, reason: str) -> RecordDict:
    """Tell what became of an upload."""
    return RecordDict({"verdict": ConfigRecord({"state": state, "reason": reason})})


def read_verdict(message: Message) -> tuple[str, str]:
    """The same again.

    Raises:
        ValueError: it is no verdict.
    """
    fields = _config(message, "verdict")
    return one_line(_field(fields, "state", str)), one_line(_field(fields, "reason", str))


def size(message: Message) -> int:
    """Bytes of a message as Flower carries it: those of each of its objects, of equal ones once."""
    with no_object_id_recompute():
        return sum(len(part.deflate()) for part in get_all_nested_objects(message).values())


def _config(message: Message, name: str) -> ConfigRecord:
    try:
        return message.content.config_records[name]
    except (KeyError, ValueError) as error:
        raise ValueError(f"the message has no {name}") from error


def _field(fields: ConfigRecord, name: str, kind: type[_Kind]) -> _Kind:
    value = fields.get(name)
    if not isinstance(value, kind) or isinstance(value, bool):
        raise ValueError(f"the message has no {name}")
    return value


def _arrays(contents: dict[str, bytes]) -> ArrayRecord:
    """Bytes as arrays, which Flower cuts into chunks that travel, and come again, one by one."""
    made = {
        name: Array(dtype="uint8", shape=(len(content),), stype="bytes", data=content)
        for name, content in contents.items()
    }
    return ArrayRecord(made)


def _contents(message: Message, name: str) -> dict[str, bytes]:
    if name not in message.content.array_records:
        return {}
    return {str(key): array.data for key, array in message.content.array_records[name].items()}
