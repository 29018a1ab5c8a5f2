"""A tiny OpenAI-like ASGI app: counts to three, streamed or not, and keeps what it was asked."""

from __future__ import annotations

import json
from typing import Any

from lacre.asgi import EXTENSION


class ChatApp:
    def __init__(self) -> None:
        self.scopes: list[dict[str, Any]] = []
        self.bodies: list[bytes] = []

    async def __call__(self, scope, receive, send) -> None:  # type: ignore[no-untyped-def]
        body = (await receive())["body"]
        self.scopes.append(scope)
        self.bodies.append(body)
        asked = json.loads(body) if body else {}
        used = scope["extensions"][EXTENSION].usage
        if not asked.get("messages"):
            error = {"message": "messages: must not be empty", "type": "invalid_request_error", "param": "messages"}
            return await reply(send, 400, {"error": {**error, "code": None}})
        used.prompt_tokens, used.cached_tokens, used.completion_tokens, used.model_digest = 7, 2, 3, "sha256:77"
        usage = {"prompt_tokens": 7, "completion_tokens": 3, "prompt_tokens_details": {"cached_tokens": 2}}
        if asked.get("stream"):
            wanted = asked.get("stream_options", {}).get("include_usage")
            return await self.stream(send, usage if wanted else None)
        choice = {"index": 0, "message": {"role": "assistant", "content": "one two three"}, "finish_reason": "stop"}
        await reply(send, 200, {"id": "c1", "model": asked["model"], "choices": [choice], "usage": usage})

    async def stream(self, send, usage: dict[str, Any] | None) -> None:  # type: ignore[no-untyped-def]
        headers = [(b"content-type", b"text/event-stream")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        events: list[dict[str, Any]] = [
            {"choices": [{"index": 0, "delta": {"content": word}}]} for word in ("one ", "two ", "three")
        ]
        if usage is not None:
            events.append({"choices": [], "usage": usage})
        for event in events:
            await send({"type": "http.response.body", "body": f"data: {json.dumps(event)}\n\n".encode(), "more_body": True})
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})


async def reply(send, status: int, body: object) -> None:  # type: ignore[no-untyped-def]
    headers = [(b"content-type", b"application/json")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": json.dumps(body).encode()})
