"""`flower-superlink` with all doors shut but one, and of a size that does not grow with the devices that send.

Flower 1.41 serves three APIs on one port. Fleet is for devices, and their keys guard it. Control is by whom `flwr run`
starts an app, any app, on the server and on all devices; without an account service, which the free distribution does
not have, nothing guards it, node authentication or not. Runtime is for the server's own processes. So all but Fleet
answers callers on this machine alone: `deepfusion-superlink` takes what `flower-superlink` takes.

Uploads come as objects of 5 MiB, two of each device at a time, and Flower holds several copies of each until it is in
the database. So objects are kept in a file until their turn comes, and few have it at a time: a slow device keeps no
other from sending, and a hundred take no more memory than one.
"""

from __future__ import annotations

import asyncio
import gc
import os
import sys
from functools import partial
from ipaddress import IPv6Address, ip_address
from tempfile import TemporaryFile
from typing import IO, Any

import uvicorn
from flwr.supercore import constant, sql_mixin
from flwr.superlink import main as superlink
from flwr.superlink.cli import flower_superlink
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

FLEET = "/v1/fleet/"
OBJECTS = (f"{FLEET}push-object", f"{FLEET}pull-object")
REFUSED = "this server serves devices alone; all else is for callers on its own machine\n"
MOST_BYTES = 2**24  # of an object and what is said of it
AT_A_TIME = 2  # objects that Flower has in its hands
BLOCK = 2**16  # bytes
# Seconds that whoever is being answered still has when the server is stopped. Without a limit it waits for its own app,
# which asks for answers until it misses the server, a minute later.
STOPPING = 3
# glibc otherwise gives each of Flower's forty threads a heap of its own, and keeps what objects took there.
ALLOCATOR = {"MALLOC_ARENA_MAX": "2", "MALLOC_MMAP_THRESHOLD_": str(2**20), "MALLOC_TRIM_THRESHOLD_": str(2**20)}
# Of each of the database's connections, of which there is one a thread: 64 MB and 256 MB in Flower.
DATABASE = {"cache_size": "-2000", "mmap_size": "0"}


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


class Queue:
    """Keeps objects in files while they come and go, and hands on few at a time."""

    def __init__(self, app: ASGIApp) -> None:
        self.app, self.turns = app, asyncio.Semaphore(AT_A_TIME)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Hand on a call once all of it is here, and its answer once that is whole."""
        if scope["type"] != "http" or scope["path"] not in OBJECTS:
            await self.app(scope, receive, send)
            return
        with TemporaryFile(dir=".") as asked, TemporaryFile(dir=".") as answer:  # /tmp is memory on some machines
            try:
                if not await _gather(receive, asked):
                    return
            except ValueError as fault:
                await PlainTextResponse(f"{fault}\n", status_code=413)(scope, receive, send)
                return
            start: list[Message] = []

            async def keep(message: Message) -> None:
                if message["type"] == "http.response.body":
                    answer.write(message.get("body", b""))
                else:
                    start.append(message)

            async with self.turns:
                await self.app(scope, _replay(asked, receive), keep)
                gc.collect()  # what Flower made of the object refers to itself, and would lie there for dozens more
            for message in start:
                await send(message)
            answer.seek(0)
            while block := answer.read(BLOCK):
                await send({"type": "http.response.body", "body": block, "more_body": True})
            await send({"type": "http.response.body", "body": b""})


async def _gather(receive: Receive, into: IO[bytes]) -> bool:
    """Write a call's body to a file; whether it has all come before the caller was gone.

    Raises:
        ValueError: it is larger than any object.
    """
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return False
        size += into.write(message.get("body", b""))
        if size > MOST_BYTES:
            raise ValueError(f"an object may have {MOST_BYTES} bytes")
        if not message.get("more_body", False):
            into.seek(0)
            return True


def _replay(body: IO[bytes], receive: Receive) -> Receive:
    """What gives a body once more, and then what comes after it."""
    whole = False

    async def again() -> Message:
        nonlocal whole
        if whole:
            return await receive()
        block = body.read(BLOCK)
        whole = len(block) < BLOCK
        return {"type": "http.request", "body": block, "more_body": not whole}

    return again


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
    if not ALLOCATOR.keys() <= os.environ.keys():  # it reads them when a process starts
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], ALLOCATOR | os.environ)
    pragmas = tuple((name, DATABASE.get(name, value)) for name, value in constant.SQLITE_PRAGMAS)
    sql_mixin.SQLITE_PRAGMAS = pragmas  # pyright: ignore[reportPrivateImportUsage] (where it is looked up)
    make = superlink.create_app

    def gated(*args: Any, **kwargs: Any) -> Any:
        app = make(*args, **kwargs)
        gc.freeze()  # so that collecting after each object looks at little else
        app.add_middleware(Queue)
        app.add_middleware(Gate)  # the last one added is the first one met
        return app

    uvicorn.run = partial(uvicorn.run, timeout_graceful_shutdown=STOPPING)
    superlink.create_app = gated  # where `flower_superlink` looks it up
    flower_superlink()
