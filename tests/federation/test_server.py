"""Collecting, against a net that loses what it likes: no Flower process takes part."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from flwr.app import Message
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from flwr.supercore.inflatable.inflatable_utils import push_objects
from flwr.supercore.task_identity import TaskIdentity

from deepfusion.artifacts import Upload, Wire
from deepfusion.config import DevicePhase, Federation, Recipe
from deepfusion.federation import messages
from deepfusion.federation.inbox import Inbox
from deepfusion.federation.manifest import Manifest, digest, sign
from deepfusion.federation.messages import Announcement, Order, Piece
from deepfusion.federation.project import Project, init
from deepfusion.federation.server import Collector
from federation.test_inbox import nothing_wrong, sent, stream
from tiny import TREE

CONFIG = Federation(devices=("north", "south"), quorum=1, grace_s=5, patience_s=10, piece_bytes=4096, attempts=2)


@pytest.fixture(autouse=True)
def in_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Flower makes messages only in a process of one of its runs."""
    for name in ("_run_id", "_node_id", "_task_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)


@pytest.fixture
def project(tmp_path: Path) -> Project:
    tree = TREE | {"federation": {"devices": ["north", "south"], "quorum": 2}}
    return init(tmp_path / "there", Recipe.parse(tree), tree, ["localhost"], 8000)


@dataclass
class Net:
    """One device, north, whose answers a function gives; None: lost."""

    answer: Callable[[str, Message], Any]
    waiting: dict[str, Message | None]
    kinds: list[str]
    activated: str = "once"
    wire: Wire = field(default_factory=Wire)  # what Flower would have carried, to and fro

    def get_nodes(self) -> list[Any]:
        return [SimpleNamespace(node_id=7, public_key=b"north", last_activated_at=self.activated)]

    def push_messages(self, those: Iterable[Message]) -> list[str]:
        [message] = those
        self.kinds.append(message.metadata.message_type)
        name = str(len(self.kinds))
        found = self.answer(message.metadata.message_type, message)
        self.waiting[name] = None if found is None else Message(found, reply_to=message)
        self.wire = Wire(up=self.wire.up, down=self.wire.down + carried(message))
        return [name]

    def pull_messages(self, names: Iterable[str]) -> list[Any]:
        [name] = names
        found = self.waiting.pop(name, None)
        if found is None:
            return []
        self.wire = Wire(up=self.wire.up + carried(found), down=self.wire.down)
        return [found]


def carried(message: Message) -> int:
    """Bytes that Flower puts on the wire for a message, by its own function that does."""
    sent: list[int] = []
    push_objects(get_all_nested_objects(message), lambda _, content: sent.append(len(content)))
    return sum(sent)


def collecting(net: Net, project: Project) -> Collector:
    orders = {
        device: Order(
            run="r", device=device, seed=0, ancestor="tiny", lineage="l", made=None, made_seed=0, phase=DevicePhase(),
            piece_bytes=4096, texts={},
        )
        for device in CONFIG.devices
    }  # fmt: skip
    inbox = Inbox(project.inbox, project.keys, nothing_wrong, dict.fromkeys(CONFIG.devices, 100))
    return Collector(net, CONFIG, orders, {}, inbox, {b"north": "north"}, lambda line: None)


def device(project: Project, upload: Upload, order: str, first: int = 5) -> Callable[[str, Message], Any]:
    """A device that sends `first` bytes with its announcement, and then what it is asked for."""
    content = Manifest.of(upload, order).content
    said = Announcement(content, sign(content, project.device("north") / "node.key"))

    def answer(kind: str, message: Message) -> Any:
        if kind == messages.ORDER:
            return messages.reply(said, Piece(digest(content), 0, stream()[:first]))
        if kind == messages.PIECE:
            of, offset, length = messages.read_ask(message)
            return messages.reply(None, Piece(of, offset, stream()[offset : offset + length]))
        return messages.reply(None, None)

    return answer


def steps(collector: Collector, times: Iterable[float]) -> None:
    for now in times:
        collector.step(now)


def test_one_order_then_pieces_then_the_verdict(project: Project, tmp_path: Path) -> None:
    net = Net(lambda *_: None, {}, [])
    collector = collecting(net, project)
    net.answer = device(project, sent(tmp_path / "made"), collector.orders["north"].digest)
    steps(collector, range(5))
    assert net.kinds == [messages.ORDER, messages.PIECE, messages.VERDICT]
    received = collector.received()
    assert list(received.uploads) == ["north"]
    assert received.failures == {"south": "it sent nothing while uploads were collected"}
    assert received.wire == {"north": net.wire, "south": Wire()}


def test_a_lost_piece_is_asked_for_again_and_a_lost_order_when_its_node_is_back(
    project: Project, tmp_path: Path
) -> None:
    net = Net(lambda *_: None, {}, [])
    collector = collecting(net, project)
    answer = device(project, sent(tmp_path / "made"), collector.orders["north"].digest)
    steps(collector, [0, 1, 1000])
    assert net.kinds == [messages.ORDER]  # training takes as long as it takes
    net.activated, net.answer = "again", lambda kind, m: answer(kind, m) if kind == messages.ORDER else None
    steps(collector, [1001, 1002, 1003])
    assert net.kinds == [messages.ORDER, messages.ORDER, messages.PIECE]
    net.answer = answer
    steps(collector, [1004, 1013, 1014, 1015])
    assert net.kinds[3:] == [messages.PIECE, messages.VERDICT]
    assert list(collector.received().uploads) == ["north"]
    assert collecting(net, project).received().wire["north"] == net.wire  # what was lost too, and by a server anew


def test_a_device_that_fails_again_and_again_is_left_out_with_its_reason(project: Project) -> None:
    net = Net(lambda kind, _: messages.reply(None, None, "it has no text"), {}, [])
    collector = collecting(net, project)
    steps(collector, [0, 1, 2, 3, 4, 5, 20, 21])
    assert net.kinds[:2] == [messages.ORDER, messages.ORDER]
    assert collector.received().failures["north"] == "it has no text"
    before = len(net.kinds)
    steps(collector, [1000, 2000])
    assert len(net.kinds) == before  # it is given up
    steps(collecting(net, project), [0])
    assert net.kinds[before:] == [messages.ORDER]  # whoever has mended it finds the door open


def test_collecting_ends_with_quorum_and_grace_or_the_deadline(project: Project, tmp_path: Path) -> None:
    net = Net(lambda *_: None, {}, [])
    collector = collecting(net, project)
    clock = iter(range(10_000))
    collector.collect(50, now=lambda: float(next(clock)), rest=0)
    assert 50 <= next(clock) < 60
    net.activated = "again"
    net.answer = device(project, sent(tmp_path / "made"), collector.orders["north"].digest, first=100)
    collector.collect(9000, now=lambda: float(next(clock)), rest=0)
    assert next(clock) < 200


@pytest.mark.parametrize("content", [b"", b"a" * 10, os.urandom(11 * 2**20), bytes(11 * 2**20)])
def test_a_message_is_as_large_as_what_flower_sends_of_it(content: bytes) -> None:
    message = Message(messages.reply(None, Piece("of", 0, content)), 7, messages.PIECE)
    size = messages.size(message)
    assert size == carried(message)
    distinct = len(content) if len(set(content)) > 1 else len(content) % (5 * 2**20) + 5 * 2**20 * (len(content) > 10)
    assert 0 < size - distinct < 2000
