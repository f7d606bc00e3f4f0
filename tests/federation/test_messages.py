"""What is read of a message is what it should be, or the message is refused in a line."""

from __future__ import annotations

import hashlib
from types import SimpleNamespace
from typing import Any

import pytest
import zstandard
from flwr.app import Array, ConfigRecord, RecordDict

from deepfusion.config import DevicePhase
from deepfusion.federation import messages
from deepfusion.federation.messages import Order, Reply, read_ask, read_order, read_verdict

GIVEN = Order(
    run="r", device="north", seed=1, ancestor="tiny", lineage="l", made=None, made_seed=1, phase=DevicePhase(),
    piece_bytes=4096, texts={"public.jsonl": hashlib.sha256(b"text").hexdigest()},
)  # fmt: skip


def message(content: RecordDict) -> Any:
    return SimpleNamespace(content=content)


def array(data: bytes) -> Array:
    return Array(dtype="uint8", shape=(len(data),), stype="bytes", data=data)


def test_an_order_comes_as_it_was_sent() -> None:
    assert read_order(message(messages.order(GIVEN, messages.pack({"public.jsonl": b"text"})))) == (
        GIVEN,
        {"public.jsonl": b"text"},
    )


def test_text_that_the_order_does_not_name_is_not_unpacked() -> None:
    content = messages.order(GIVEN, messages.pack({"public.jsonl": b"text"}))
    content.array_records["texts"]["more"] = array(b"no Zstandard")
    assert read_order(message(content))[1] == {"public.jsonl": b"text"}


@pytest.mark.parametrize(
    ("packed", "words"),
    [
        (b"no Zstandard", "the public text public.jsonl is not readable"),
        (zstandard.compress(b"another"), "is not the one that it names"),
    ],
)
def test_text_that_is_not_the_orders_is_refused(packed: bytes, words: str) -> None:
    content = messages.order(GIVEN, {})
    content.array_records["texts"]["public.jsonl"] = array(packed)
    with pytest.raises(ValueError, match=words):
        read_order(message(content))


@pytest.mark.parametrize(
    ("name", "fields", "read"),
    [
        ("order", {}, read_order),
        ("order", {"order": 5}, read_order),
        ("order", {"order": "{}"}, read_order),
        ("order", {"order": GIVEN.model_dump_json().replace('"epochs"', '"\\u0000"')}, read_order),
        ("ask", {"of": "a", "offset": 1}, read_ask),
        ("ask", {"of": "a", "offset": "1", "length": 2}, read_ask),
        ("ask", {"of": "a", "offset": -1, "length": 2}, read_ask),
        ("ask", {"of": ["a"], "offset": 1, "length": 2}, read_ask),
        ("verdict", {"state": "accepted"}, read_verdict),
        ("verdict", {"state": 1, "reason": ""}, read_verdict),
        ("reply", {}, Reply.read),
        ("reply", {"failed": ["x"]}, Reply.read),
    ],
)
def test_what_is_no_such_message_is_refused(name: str, fields: dict[str, Any], read: Any) -> None:
    with pytest.raises(ValueError, match=r".") as told:
        read(message(RecordDict({name: ConfigRecord(fields)})))
    assert str(told.value).isprintable()
    with pytest.raises(ValueError, match=f"the message has no {name}"):
        read(message(RecordDict({})))


def test_what_a_device_says_is_shown_in_a_line() -> None:
    reply = Reply.read(message(messages.reply(None, None, "it broke\n\x1b[2J" + "x" * 5000)))
    assert reply.failed.startswith("it broke �[2Jxxx")
    assert len(reply.failed) == 1000
    assert reply.failed.isprintable()
