import asyncio
from typing import Any

import pytest

from deepfusion.federation.gate import Gate, admits


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
