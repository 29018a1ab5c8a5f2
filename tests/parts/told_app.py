"""An ASGI app behind the seal that answers as a test tells it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from lacre.asgi import EXTENSION, Call, Receive, Scope, Send

JSON = [(b"content-type", b"application/json")]
STREAM = [(b"content-type", b"text/event-stream")]


class App:
    """Answers with what it was asked, or as it is told; keeps the calls that it got."""

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self.scopes: list[Scope] = []
        self.left = asyncio.Event()
        self.answer: Callable[[Receive, Send, Call], Awaitable[None]] = self.echo

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        call: Call = scope["extensions"][EXTENSION]
        self.calls.append(call)
        self.scopes.append(scope)
        call.usage.model_digest = "sha256:" + "7" * 64
        await self.answer(receive, send, call)

    async def echo(self, receive: Receive, send: Send, call: Call) -> None:
        body = (await receive())["body"]
        call.usage.prompt_tokens, call.usage.cached_tokens, call.usage.completion_tokens = 11, 4, 3
        await send({"type": "http.response.start", "status": 200, "headers": JSON})
        await send({"type": "http.response.body", "body": body})

    async def slowly(self, receive: Receive, send: Send, call: Call) -> None:
        """Two events, and then nothing until it is told to leave."""
        await receive()
        await send({"type": "http.response.start", "status": 200, "headers": STREAM})
        for number in (1, 2):
            call.usage.completion_tokens = number
            await send({"type": "http.response.body", "body": b"data: x\n\n", "more_body": True})
        try:
            await receive()
        finally:
            self.left.set()
