"""A judge for tests: an endpoint on this machine that speaks the protocol and replies what it is told to."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Lock, Thread
from typing import Any

Reply = str | int | None  # what it says; the status that it refuses with; None: JSON that is no completion


class Stub:
    """Where it listens, and what it has been asked: (fields of the request, its key)."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.asked: list[tuple[dict[str, Any], str]] = []
        self.lock = Lock()

    def texts(self) -> list[str]:
        """What was said to it."""
        return [fields["messages"][0]["content"] for fields, _ in self.asked]


@contextmanager
def listening(says: Callable[[str, int], Reply]) -> Iterator[Stub]:
    """`says` replies to a text; its second argument counts the requests that came before."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            fields = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with stub.lock:
                before = len(stub.asked)
                stub.asked.append((fields, self.headers["Authorization"]))
            said = says(fields["messages"][0]["content"], before) if self.path == "/v1/chat/completions" else 404
            body: dict[str, Any] = {"error": {"message": f"refused: {said}"}}
            if said is None:
                body = {"hello": "world"}
            elif isinstance(said, str):
                choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": said}}
                body = {"id": "1", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice]}
            content = json.dumps(body).encode()
            self.send_response(said if isinstance(said, int) else 200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format: str, *args: Any) -> None:
            """Nothing on stderr."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    stub = Stub(f"http://127.0.0.1:{server.server_port}/v1")
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield stub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
