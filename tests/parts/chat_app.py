"""A tiny OpenAI-like ASGI app: counts to three, streamed or not, and keeps what it was asked."""

from __future__ import annotations

import json
from typing import Any


class ChatApp:
    def __init__(self) -> None:
        self.scopes: list[dict[str, Any]] = []
        self.bodies: list[bytes] = []

    async def __call__(self, scope, receive, send) -> None:  # type: ignore[no-untyped-def]
        body = (await receive())["body"]
        self.scopes.append(scope)
        self.bodies.append(body)
        asked = json.loads(body) if body else {}
        if not asked.get("messages"):
            error = {
                "message": "messages: must not be empty",
                "type": "invalid_request_error",
                "param": "messages",
                "code": None,
            }
            return await reply(send, 400, {"error": error})
        if asked.get("stream"):
            return await self.stream(send)
        choice = {"index": 0, "message": {"role": "assistant", "content": "one two three"}, "finish_reason": "stop"}
        usage = {"prompt_tokens": 7, "completion_tokens": 3, "prompt_tokens_details": {"cached_tokens": 2}}
        await reply(send, 200, {"id": "c1", "model": asked["model"], "choices": [choice], "usage": usage})

    async def stream(self, send) -> None:  # type: ignore[no-untyped-def]
        headers = [(b"content-type", b"text/event-stream")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        for word in ("one ", "two ", "three"):
            event = {"choices": [{"index": 0, "delta": {"content": word}}]}
            await send({"type": "http.response.body", "body": f"data: {json.dumps(event)}\n\n".encode(), "more_body": True})
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})


async def reply(send, status: int, body: object) -> None:  # type: ignore[no-untyped-def]
    headers = [(b"content-type", b"application/json")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": json.dumps(body).encode()})
