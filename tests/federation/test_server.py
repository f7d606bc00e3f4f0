"""Collecting, against a net that loses what it likes: no Flower process takes part."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from io import StringIO
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
from deepfusion.errors import InputError
from deepfusion.federation import messages, server
from deepfusion.federation.inbox import Inbox
from deepfusion.federation.manifest import Manifest, digest, sign
from deepfusion.federation.messages import Announcement, Order, Piece
from deepfusion.federation.news import Standing, waited_for
from deepfusion.federation.project import Project, init
from deepfusion.federation.server import Collector, in_words
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
    tree = TREE | {"federation": {"devices": ["north", "south"], "quorum": 2}, "evaluate": {"references": []}}
    return init(tmp_path / "there", Recipe.parse(tree), tree, ["localhost"], 8000)


@dataclass
class Net:
    """One device, north, whose answers a function gives; None: lost."""

    answer: Callable[[str, Message], Any]
    waiting: dict[str, Message | None]
    kinds: list[str]
    activated: str = "once"
    nodes: list[bytes] = field(default_factory=lambda: [b"north"])
    wire: Wire = field(default_factory=Wire)  # what Flower would have carried, to and fro

    def get_nodes(self) -> list[Any]:
        return [SimpleNamespace(node_id=7, public_key=key, last_activated_at=self.activated) for key in self.nodes]

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


def test_an_upload_that_was_whole_when_the_server_was_killed_is_decided_by_the_next(
    project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = Net(lambda *_: None, {}, [])
    collector = collecting(net, project)
    net.answer = device(project, sent(tmp_path / "made"), collector.orders["north"].digest)

    def killed(device: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(collector.inbox, "settle", killed)
    with pytest.raises(KeyboardInterrupt):
        steps(collector, range(5))
    again = collecting(Net(lambda *_: None, {}, []), project)
    again.net.nodes.clear()  # type: ignore[attr-defined]
    clock = iter(range(10))
    again.collect(5, now=lambda: float(next(clock)), rest=0)
    assert list(again.received().uploads) == ["north"]


def test_a_device_whose_answers_are_all_lost_is_asked_ever_later_and_given_up(project: Project, tmp_path: Path) -> None:
    said: list[str] = []
    net = Net(lambda *_: None, {}, [])
    collector = collecting(net, project)
    collector.say = said.append
    forged = "gone\ndeepfusion: error: \x1b[2Jall is lost"

    class Broken(Net):
        def pull_messages(self, names: Iterable[str]) -> list[Any]:
            error = SimpleNamespace(reason=forged)
            return [SimpleNamespace(has_error=lambda: True, error=error)] if super().pull_messages(names) else []

    broken = Broken(device(project, sent(tmp_path / "made"), collector.orders["north"].digest), {}, [])
    collector.net = broken
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(messages, "size", lambda message: 1)
        steps(collector, range(20))
    assert broken.kinds == [messages.ORDER] * CONFIG.attempts
    assert said[0] == "north: lost on the way (gone deepfusion: error: �[2Jall is lost)"
    assert collector.talks["north"].given_up


def test_what_comes_between_begins_the_count_of_losses_anew(project: Project, tmp_path: Path) -> None:
    net = Net(lambda *_: None, {}, [])
    collector = collecting(net, project)
    net.answer = device(project, sent(tmp_path / "made"), collector.orders["north"].digest)
    collector.talks["north"].losses = CONFIG.attempts - 1
    steps(collector, range(2))
    assert collector.talks["north"].losses == 0


def test_a_device_never_connected_then_trains_sends_is_gone_and_accepted(project: Project, tmp_path: Path) -> None:
    net = Net(lambda *_: None, {}, [])
    collector = collecting(net, project)
    here, net.nodes = net.nodes, []

    def stands(now: int) -> tuple[str, ...]:
        collector.step(now)
        return tuple(f"{one.state} {one.share}".strip() for one in collector.standing().values())

    assert stands(0) == ("never connected", "never connected")
    net.nodes = here
    assert stands(1) == ("training", "never connected")
    net.activated = "again"
    whole = device(project, sent(tmp_path / "made"), collector.orders["north"].digest)
    net.answer = lambda kind, message: whole(kind, message) if kind == messages.ORDER else None
    collector.step(2)
    assert stands(3) == ("sending 42%", "never connected")
    net.nodes = []
    assert stands(4) == ("gone 42%", "never connected")
    net.nodes, net.answer = here, whole
    collector.step(20)
    assert stands(21) == ("accepted", "never connected")


def test_a_device_that_has_said_what_is_wrong_is_to_mend_until_it_is_asked_again(project: Project) -> None:
    net = Net(lambda *_: messages.reply(None, None, "private.jsonl does not exist"), {}, [])
    collector = collecting(net, project)
    states: list[str] = []
    for now in range(4):
        collector.step(now)
        states.append(collector.standing()["north"].state)
    assert states == ["training", "to mend", "to mend", "training"]  # two seconds later
    assert waited_for(collector.standing() | {"north": Standing("to mend")}, 9, quorum=False).endswith(
        "; to mend: north; never connected: south"
    )


def test_collecting_says_whom_it_waits_for(project: Project) -> None:
    said: list[str] = []
    collector = collecting(Net(lambda *_: None, {}, []), project)
    collector.say = said.append
    clock = iter(range(10_000))
    collector.collect(50, now=lambda: float(next(clock)), rest=0)
    assert said[0].startswith("waiting for 2 of 2 devices, ")
    assert said[0].endswith(" s until the deadline; training: north; never connected: south")
    assert len(said) == 1


def test_a_mistake_of_the_users_is_told_without_a_traceback_and_last(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    handlers: list[Callable[[], None]] = []
    monkeypatch.setattr(server, "add_exit_handler", handlers.append)
    flower = logging.getLogger("flwr")
    written = StringIO()
    handler = logging.StreamHandler(written)
    flower.addHandler(handler)
    try:
        with pytest.raises(InputError) as told:
            server.main(None, SimpleNamespace(run_config={}))  # type: ignore[arg-type]
        flower.error("ServerApp raised an exception", exc_info=told.value)
        try:
            raise RuntimeError("ours")
        except RuntimeError as error:
            flower.error("ServerApp raised an exception", exc_info=error)
    finally:
        flower.removeHandler(handler)
        flower.removeFilter(server.without_traceback)
    lines = written.getvalue().splitlines()
    assert lines[:3] == [
        "ServerApp raised an exception",
        "ServerApp raised an exception",
        "Traceback (most recent call last):",
    ]
    [last] = handlers
    last()
    assert capsys.readouterr().out == f"deepfusion: error: recipe {tmp_path / 'recipe.yaml'} does not exist\n"


def test_what_a_run_found_is_told_in_words() -> None:
    told = in_words(
        {"token_log_perplexity": 0.1, "token_accuracy": 0.98765, "base_token_accuracy": 0.02, "gap_closed": 1}
    )
    assert told == "token accuracy 0.988, log-perplexity 0.100, the base's token accuracy 0.020"
    assert "nothing" in in_words({})


def test_a_full_net_is_left_alone_until_the_next_step(project: Project) -> None:
    class Full(Net):
        def get_nodes(self) -> list[Any]:
            return [*super().get_nodes(), SimpleNamespace(node_id=8, public_key=b"south", last_activated_at="once")]

        def push_messages(self, those: Iterable[Message]) -> list[str]:
            super().push_messages(those)
            return []

    net = Full(lambda *_: None, {}, [])
    collector = collecting(net, project)
    collector.devices_of = {b"north": "north", b"south": "south"}
    steps(collector, [0, 1])
    assert net.kinds == [messages.ORDER, messages.ORDER]  # one each step, and not one for each device
    assert [talk.sent for talk in collector.talks.values()] == [None, None]


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
