import asyncio
import gc
import os
import weakref
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from deepfusion.federation.gate import AT_A_TIME, BLOCK, MOST_BYTES, OBJECTS, Gate, Queue, admits


@pytest.mark.parametrize("host", ["127.0.0.1", "127.9.9.9", "::1", "::ffff:127.0.0.1"])
def test_this_machine_may_ask_for_anything(host: str) -> None:
    assert admits("/v1/control/start-run", host)


@pytest.mark.parametrize("host", ["10.0.0.7", "2001:db8::1", "::ffff:10.0.0.7", "localhost", "testclient", ""])
@pytest.mark.parametrize(
    "path", ["/", "/docs", "/v1/control/start-run", "/v1/runtime/x", "/v1/fleet", "/v1/fleets/x", "//v1/fleet/x"]
)
def test_others_may_ask_for_what_is_for_devices_alone(path: str, host: str) -> None:
    assert not admits(path, host)
    assert admits("/v1/fleet/pull-messages", host)


def answered(kind: str, path: str, host: str) -> tuple[list[Any], bool]:
    """What a caller is sent, and whether the application behind the gate has seen the call."""
    sent: list[Any] = []
    reached: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        reached.append(scope["type"])

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        return {"type": "http.request"}

    scope = {"type": kind, "path": path, "client": (host, 4000), "method": "POST", "headers": []}
    asyncio.run(Gate(app)(scope, receive, send))
    return sent, bool(reached)


def test_what_is_refused_reaches_no_app() -> None:
    sent, reached = answered("http", "/v1/control/start-run", "10.0.0.7")
    assert (sent[0]["status"], reached) == (403, False)
    sent, reached = answered("websocket", "/v1/control/log", "10.0.0.7")
    assert (sent, reached) == ([{"type": "websocket.close", "code": 1008}], False)
    assert answered("http", "/v1/fleet/pull-messages", "10.0.0.7") == ([], True)
    assert answered("http", "/v1/control/start-run", "127.0.0.1") == ([], True)
    assert answered("lifespan", "", "") == ([], True)


class Caller:
    """Somebody who sends a body in parts, and is sent an answer."""

    def __init__(self, *parts: bytes, gone: bool = False) -> None:
        self.sent: list[Any] = []
        self.waiting = deque({"type": "http.request", "body": part, "more_body": True} for part in parts)
        if gone:
            self.waiting.append({"type": "http.disconnect"})
        else:
            self.waiting[-1]["more_body"] = False

    async def receive(self) -> Any:
        await asyncio.sleep(0)
        return self.waiting.popleft() if self.waiting else {"type": "http.disconnect"}

    async def send(self, message: Any) -> None:
        await asyncio.sleep(0)
        self.sent.append(message)

    @property
    def body(self) -> bytes:
        return b"".join(message.get("body", b"") for message in self.sent)


class Echo:
    """Answers with what it was sent, turned round; knows how many it had in its hands at a time."""

    def __init__(self) -> None:
        self.here = self.most = self.calls = 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.calls += 1
        self.here += 1
        self.most = max(self.most, self.here)
        body, more = b"", True
        while more:
            message = await receive()
            body, more = body + message["body"], message["more_body"]
        assert (await receive())["type"] == "http.disconnect"
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % len(body))]})
        await send({"type": "http.response.body", "body": body[::-1]})
        self.here -= 1


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    yield
    assert not list(tmp_path.iterdir())  # what objects were kept in


def queued(app: Any, *callers: Caller, path: str = OBJECTS[0]) -> None:
    async def all_at_once() -> None:
        queue = Queue(app)
        await asyncio.gather(*(queue({"type": "http", "path": path}, one.receive, one.send) for one in callers))

    asyncio.run(all_at_once())


@pytest.mark.parametrize("size", [0, 1, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK])
def test_an_object_comes_and_goes_as_it_is(size: int) -> None:
    content = os.urandom(size)
    caller = Caller(content[: size // 3], b"", content[size // 3 :])
    queued(Echo(), caller)
    assert caller.sent[0] == {
        "type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % size)],
    }  # fmt: skip
    assert caller.body == content[::-1]
    assert [message.get("more_body", False) for message in caller.sent[1:]][-1] is False


def test_few_objects_are_handed_on_at_a_time_and_all_else_at_once() -> None:
    callers = [Caller(bytes([number]), bytes([number])) for number in range(20)]
    echo = Echo()
    queued(echo, *callers)
    assert [caller.body for caller in callers] == [bytes([number] * 2) for number in range(20)]
    assert (echo.calls, echo.most) == (20, AT_A_TIME)
    echo = Echo()
    queued(echo, *(Caller(b"a", b"b") for _ in range(20)), path="/v1/fleet/pull-messages")
    assert echo.most == 20


def test_who_is_slow_or_gone_keeps_nobody_waiting() -> None:
    echo = Echo()
    gone = [Caller(b"a", gone=True) for _ in range(3)]
    slow = [Caller(*[b"a"] * 1000) for _ in range(3)]
    quick = Caller(b"a")
    order: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await echo(scope, receive, send)
        order.append("slow" if len(quick.sent) else "first")

    queued(app, *gone, *slow, quick)
    assert order == ["first", "slow", "slow", "slow"]
    assert [caller.sent for caller in gone] == [[], [], []]


def test_nothing_of_an_object_is_left_in_memory() -> None:
    class Cycle:
        """What frees itself only when Python looks for it."""

        def __init__(self) -> None:
            self.own = self

    left: list[weakref.ref[Cycle]] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        assert not [one for one in left if one()]
        left.append(weakref.ref(Cycle()))

    gc.disable()
    try:
        for _ in range(2):
            queued(app, Caller(b"a"))
    finally:
        gc.enable()
    assert len(left) == 2
    assert not [one for one in left if one()]


def test_what_is_larger_than_any_object_is_refused_before_flower_has_it() -> None:
    echo = Echo()
    caller = Caller(*[b"a" * BLOCK] * (MOST_BYTES // BLOCK), b"a", b"never read")
    queued(echo, caller)
    assert caller.sent[0]["status"] == 413
    assert echo.calls == 0
    assert len(caller.waiting) == 1
