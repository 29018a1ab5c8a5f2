"""Calls of an ASGI app as a server makes them, without one between: each message is seen as it is sent."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Sequence
from typing import Any

from lacre.asgi import EXTENSION, App, Call

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
# For the echo: said once, spread over time; "é" spans two of its tokens.
MESSAGE = "Olá, mar é azul."


def chat(content: Any = MESSAGE, **fields: Any) -> dict[str, Any]:
    return {"model": "echo", "messages": [{"role": "user", "content": content}], **fields}


class Reply:
    """What an app answered: every body message apart, with the time at which it was sent."""

    def __init__(self) -> None:
        self.status = 0
        self.headers: dict[str, str] = {}
        self.pieces: list[tuple[float, bytes]] = []
        self.complete = False

    @property
    def body(self) -> bytes:
        return b"".join(piece for _, piece in self.pieces)

    def json(self) -> Any:
        assert self.headers["content-type"] == "application/json"
        return json.loads(self.body)

    def error(self, status: int) -> dict[str, Any]:
        assert self.status == status, self.body
        error = self.json()["error"]
        assert error.keys() == {"message", "type", "param", "code"}
        assert error["message"]
        return error  # type: ignore[no-any-return]

    def events(self) -> list[Any]:
        """The documents of an event stream that ended well."""
        assert self.status == 200, self.body
        assert self.headers["content-type"].startswith("text/event-stream")
        assert all(piece.startswith(b"data: ") and piece.endswith(b"\n\n") for _, piece in self.pieces)
        lines = [piece[len(b"data: ") : -2] for _, piece in self.pieces]
        assert lines.pop() == b"[DONE]"
        return [json.loads(line) for line in lines]

    def message(self) -> dict[str, Any]:
        """The message of the only choice, or what a stream of it adds up to."""
        if self.headers["content-type"].startswith("text/event-stream"):
            deltas = [event["choices"][0]["delta"] for event in self.events()]
            return {"content": "".join(delta.get("content", "") for delta in deltas)}
        [choice] = self.json()["choices"]
        return choice["message"]  # type: ignore[no-any-return]


async def post(
    app: App,
    path: str,
    body: Any,
    *,
    method: str = "POST",
    call: Call | None = None,
    leave_after: int | None = None,
    leaving: asyncio.Event | None = None,
    headers: Sequence[tuple[bytes, bytes]] = (),
) -> Reply:
    """leave_after: disconnect once that many body messages came; leaving: disconnect when it is set."""
    reply = Reply()
    left = leaving or asyncio.Event()
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    incoming = [{"type": "http.request", "body": content, "more_body": False}]

    async def receive() -> Any:
        if incoming:
            return incoming.pop()
        await left.wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        if message["type"] == "http.response.start":
            reply.status = message["status"]
            reply.headers = {k.decode(): v.decode() for k, v in message["headers"]}
            return
        assert not reply.complete
        if message["body"]:
            reply.pieces.append((time.monotonic(), message["body"]))
        reply.complete = not message.get("more_body", False)
        if leave_after is not None and len(reply.pieces) >= leave_after:
            left.set()

    scope = {
        "type": "http", "asgi": {"version": "3.0", "spec_version": "2.5"}, "http_version": "1.1",
        "method": method, "scheme": "https", "path": path, "raw_path": path.encode(), "query_string": b"", "root_path": "",
        "headers": [(b"content-type", b"application/json"), *headers], "client": None, "server": ("lacre.invalid", None),
        "extensions": {} if call is None else {EXTENSION: call},
    }  # fmt: skip
    await app(scope, receive, send)
    return reply
