"""`flower-superlink` with all doors shut but one: to other machines it serves devices, and nothing else.

Flower 1.41 serves three APIs on one port. Fleet is for devices, and their keys guard it. Control is by whom `flwr run`
starts an app, any app, on the server and on all devices; without an account service, which the free distribution does
not have, nothing guards it, node authentication or not. Runtime is for the server's own processes. So all but Fleet
answers callers on this machine alone: `deepfusion-superlink` takes what `flower-superlink` takes.
"""

from __future__ import annotations

from ipaddress import IPv6Address, ip_address
from typing import Any

from flwr.superlink import main as superlink
from flwr.superlink.cli import flower_superlink
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

FLEET = "/v1/fleet/"
REFUSED = "this server serves devices alone; all else is for callers on its own machine\n"


class Gate:
    """Lets through what is for devices, and callers on this machine."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a call, or hand it on."""
        if scope["type"] == "lifespan" or admits(scope["path"], (scope.get("client") or ("",))[0]):
            await self.app(scope, receive, send)
        elif scope["type"] == "http":
            await PlainTextResponse(REFUSED, status_code=403)(scope, receive, send)
        else:
            await send({"type": "websocket.close", "code": 1008})


def admits(path: str, host: str) -> bool:
    """Whether a caller may ask for a path."""
    return path.startswith(FLEET) or _here(host)


def _here(host: str) -> bool:
    try:
        address = ip_address(host)
    except ValueError:  # no address, such as that of a socket in the file system: not known to be here
        return False
    mapped = address.ipv4_mapped if isinstance(address, IPv6Address) else None
    return (mapped or address).is_loopback


def main() -> None:
    """Run `flower-superlink` behind the gate."""
    make = superlink.create_app

    def gated(*args: Any, **kwargs: Any) -> Any:
        app = make(*args, **kwargs)
        app.add_middleware(Gate)  # the last one added is the first one met
        return app

    superlink.create_app = gated  # where `flower_superlink` looks it up
    flower_superlink()
