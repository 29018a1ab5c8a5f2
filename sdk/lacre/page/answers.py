"""One answer for the page: asked sealed, and told line by line as JSON while it arrives.

| line | when |
|---|---|
| `{"t": "text", "d": …}`, `{"t": "thought", "d": …}` | a piece of the answer or of its reasoning, as it is |
| `{"t": "blocks", "from": n, "blocks": […]}` | the rendered answer, from its n-th block on |
| `{"t": "seam", "at": …}` | another worker resumed the answer here, in characters of its text |
| `{"t": "end", …}` | the answer is whole: its usage, cost, receipts and checks |
| `{"t": "fail", "error": …}` | it is not: what happened and what helps |

Rules:
- The last line is `end` or `fail`. A stream without one was cut, and the page says so.
- If the page goes away, the request is given up, and the worker stops.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import aclosing
from typing import Any, Final

from lacre.chat.choices import ReasoningDelta, RefusalDelta, TextDelta
from lacre.chat.stream_async import AsyncChatStream
from lacre.client import AsyncClient
from lacre.errors import LacreError, UsageError
from lacre.exchange.refusal_shapes import explained
from lacre.page.markdown import GrowingAnswer, blocks

REDRAW: Final = 0.06  # seconds between two renderings
# What the page may set of a request, beside the messages and the model.
PARAMETERS: Final = frozenset(
    {"temperature", "top_p", "max_tokens", "seed", "stop", "frequency_penalty", "presence_penalty", "reasoning_effort"}
)


def asked(client: AsyncClient, question: Mapping[str, Any]) -> AsyncChatStream:
    """The stream for a question of the page: `messages`, `model` and `params`. Raises UsageError. Nothing is sent yet."""
    messages, params = question.get("messages"), question.get("params", {})
    if not isinstance(messages, list) or not messages or not isinstance(params, dict):
        raise UsageError("the question needs a list of messages, and an object of parameters")
    if unknown := params.keys() - PARAMETERS:
        raise UsageError(f"the chat page sets no parameter {min(unknown)[:80]!r}: it sets {', '.join(sorted(PARAMETERS))}")
    return client.chat_stream(messages, model=question.get("model") or None, **params)


async def told(stream: AsyncChatStream) -> AsyncIterator[bytes]:
    """The lines of one answer."""
    growing, text, seams, drawn, began = GrowingAnswer(), "", list[int](), 0.0, time.monotonic()
    first: float | None = None
    async with aclosing(stream):
        try:
            async for event in stream.events():
                if len(stream.parts) > len(seams):
                    seams.append(len(text))
                    yield _line("seam", at=len(text))
                first = time.monotonic() if first is None else first
                if isinstance(event, ReasoningDelta) and event.text:
                    yield _line("thought", d=event.text)
                if isinstance(event, TextDelta | RefusalDelta) and event.text:
                    text += event.text
                    yield _line("text", d=event.text)
                    if time.monotonic() - drawn >= REDRAW:
                        start, changed = growing.changed(text, seams)
                        yield _line("blocks", **{"from": start, "blocks": changed})
                        drawn = time.monotonic()
            end = _line("end", **_facts(stream, began, first))
        except LacreError as exc:
            end = _line("fail", **explained(exc))
    if len(stream.parts) > len(seams):  # it was resumed, and nothing came after that
        seams.append(len(text))
        yield _line("seam", at=len(text))
    if text:  # once more and as a whole: while it grew, each finished part was parsed by itself, so a list may be in pieces
        yield _line("blocks", **{"from": 0, "blocks": await asyncio.to_thread(blocks, text, seams)})
    yield end


def _facts(stream: AsyncChatStream, began: float, first: float | None) -> dict[str, Any]:
    facts, usage, checked, ended = stream.facts, stream.usage, stream.verification, time.monotonic()
    assert facts is not None and usage is not None and checked is not None  # noqa: S101 - true of an answer that ended whole
    later = ended - (first or ended)
    return {
        "finish": stream.finish_reason,
        "model": stream.model,
        "usage": {"prompt": usage.prompt, "cached": usage.cached, "completion": usage.completion, "total": usage.total},
        "cost": None if stream.cost is None else str(stream.cost),
        "first": round((first or ended) - began, 3),
        "rate": round((usage.completion - 1) / later, 1) if later > 0 and usage.completion > 1 else None,
        "exchange": {
            "kem": facts.kem, "shape": facts.shape, "sealed_bytes": facts.sealed_request_bytes, "attempts": facts.attempts,
            "lost": facts.lost, "request_id": facts.request_id, "pool": facts.pool,
        },
        "parts": [{"prompt": part.prompt, "cached": part.cached, "completion": part.completion} for part in stream.parts],
        "receipts": [receipt.signed for receipt in stream.receipts],
        "audit": None if stream.audit is None else stream.audit.text(),
        "verification": checked.members(),
    }  # fmt: skip


def _line(kind: str, **members: Any) -> bytes:
    return json.dumps({"t": kind, **members}, separators=(",", ":")).encode() + b"\n"
