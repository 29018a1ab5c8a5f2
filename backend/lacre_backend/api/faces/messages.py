"""Anthropic's Messages API: a message of content blocks, and the events of a stream of them.

Source: the event grammar that `anthropic` reads. `message_start`, then each block from `content_block_start` to
`content_block_stop`, then `message_delta` with the reason and the usage, then `message_stop`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, Final

import pydantic_core

from lacre.asgi import Usage
from lacre.exchange import refusal_shapes
from lacre_backend.api.errors import RequestRefused
from lacre_backend.api.faces.chat import spoken, thought
from lacre_backend.api.faces.conversation import ConversationFace
from lacre_backend.api.faces.face import Ending, ServerEvent
from lacre_backend.api.faces.messages_request import MessagesRequest, parse_messages
from lacre_backend.api.responses import ResponseInfo
from lacre_backend.api.tools.parts import Argued, Called, Part, Speech, Thought
from lacre_backend.engine.protocol import Token

SIGNATURE: Final = "unsigned"  # of reasoning. Clients send back only blocks that have one; nothing here needs it
_REASONS: Final = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}


class Messages(ConversationFace[MessagesRequest]):
    """`POST /v1/messages`."""

    prompt_param = "messages"
    prefix = "msg_"
    marked = True

    def parse(self, body: bytes) -> MessagesRequest:
        return parse_messages(body)

    def writer(self, request: MessagesRequest, reply: ResponseInfo) -> MessageWriter:
        return MessageWriter(reply)

    def refused(self, refusal: RequestRefused) -> dict[str, Any]:
        return message_error(refusal)


def message_error(refusal: RequestRefused) -> dict[str, Any]:
    """Anthropic's error object. It has no field for the parameter, so the message names it."""
    field = "" if refusal.param is None or refusal.param in str(refusal) else f"{refusal.param}: "
    return refusal_shapes.message_error(refusal.status, f"{field}{refusal}")


def _usage(spent: Usage) -> dict[str, Any]:
    """Here the input tokens are those that no cache had. The three kinds together are the prompt."""
    return {
        "input_tokens": spent.prompt_tokens - spent.cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": spent.cached_tokens,
        "output_tokens": spent.completion_tokens,
        **({"output_tokens_details": {"thinking_tokens": spent.reasoning_tokens}} if spent.reasoning_tokens else {}),
    }


def _reason(ending: Ending) -> dict[str, Any]:
    met = ending.reason == "stop" and ending.stop is not None
    return {
        "stop_reason": "stop_sequence" if met else _REASONS[ending.reason],
        "stop_sequence": ending.stop if met else None,
    }


def _blocks(parts: Sequence[Part]) -> list[dict[str, Any]]:
    """The reasoning first, then the text, then the calls. A call that the limit cut holds what was said of its arguments."""
    text = spoken(parts)
    arguments: dict[int, str] = {}
    for part in parts:
        if isinstance(part, Argued):
            arguments[part.index] = arguments.get(part.index, "") + part.text
    calls = [
        {"type": "tool_use", "id": part.id, "name": part.name, "input": _object(arguments.get(part.index, ""))}
        for part in parts
        if isinstance(part, Called)
    ]
    reasoning = thought(parts)
    thoughts = [{"type": "thinking", "thinking": reasoning, "signature": SIGNATURE}] if reasoning else []
    return [*thoughts, *([{"type": "text", "text": text}] if text or not calls else []), *calls]


def _object(text: str) -> dict[str, Any]:
    try:
        read = pydantic_core.from_json(text or "{}", allow_inf_nan=False, allow_partial="trailing-strings")
    except ValueError:
        return {}
    return read if isinstance(read, dict) else {}


class MessageWriter:
    """One message. Of a stream it keeps the open block."""

    end_mark: ClassVar[bytes] = b""

    def __init__(self, reply: ResponseInfo) -> None:
        self._head = {"id": reply.id, "type": "message", "role": "assistant", "model": reply.model.name}
        self._blocks = 0  # begun so far
        self._open: str | None = None  # the kind of the open block
        self._ending = Ending("stop")

    def choice(self, index: int, parts: Sequence[Part], tokens: Sequence[Token], ending: Ending) -> dict[str, Any]:
        return {"content": _blocks(parts), **_reason(ending)}

    def whole(self, choices: Sequence[dict[str, Any]], spent: Usage) -> dict[str, Any]:
        [choice] = choices
        return {**self._head, **choice, "usage": _usage(spent)}

    def first(self, index: int, spent: Usage) -> Iterator[ServerEvent]:
        message: dict[str, Any] = {
            **self._head,
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            "usage": _usage(spent),
        }
        yield _event("message_start", message=message)

    def piece(self, index: int, part: Part, tokens: Sequence[Token]) -> Iterator[ServerEvent]:
        match part:
            case Speech():
                if self._open != "text":
                    yield from self._begin({"type": "text", "text": ""})
                yield self._delta({"type": "text_delta", "text": part.text})
            case Thought():
                if self._open != "thinking":
                    yield from self._begin({"type": "thinking", "thinking": "", "signature": ""})
                yield self._delta({"type": "thinking_delta", "thinking": part.text})
            case Called():
                yield from self._begin({"type": "tool_use", "id": part.id, "name": part.name, "input": {}})
            case Argued():
                yield self._delta({"type": "input_json_delta", "partial_json": part.text})

    def last(self, index: int, ending: Ending) -> Iterator[ServerEvent]:
        self._ending = ending
        yield from self._close()

    def end(self, spent: Usage) -> Iterator[ServerEvent]:
        yield _event("message_delta", delta=_reason(self._ending), usage=_usage(spent))
        yield _event("message_stop")

    def broken(self, refusal: RequestRefused) -> ServerEvent:
        return ServerEvent(message_error(refusal), "error")

    def _begin(self, block: dict[str, Any]) -> Iterator[ServerEvent]:
        yield from self._close()
        self._open = block["type"]
        self._blocks += 1
        yield _event("content_block_start", index=self._blocks - 1, content_block=block)

    def _delta(self, delta: dict[str, Any]) -> ServerEvent:
        return _event("content_block_delta", index=self._blocks - 1, delta=delta)

    def _close(self) -> Iterator[ServerEvent]:
        if self._open is not None:
            if self._open == "thinking":
                yield self._delta({"type": "signature_delta", "signature": SIGNATURE})
            self._open = None
            yield _event("content_block_stop", index=self._blocks - 1)


def _event(kind: str, **members: Any) -> ServerEvent:
    return ServerEvent({"type": kind, **members}, kind)
