"""OpenAI's Responses API: a response of items, and the events of a stream of them.

Source: the event grammar that `openai` reads. `response.created` and `response.in_progress`; each item from
`response.output_item.added` to `response.output_item.done`, with its parts between; then `response.completed`, or
`response.incomplete` if the limit ended it. Every event has the next `sequence_number`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Final

from lacre.asgi import Usage
from lacre_backend.api.errors import RequestRefused
from lacre_backend.api.faces.chat import token_logprob
from lacre_backend.api.faces.conversation import ConversationFace
from lacre_backend.api.faces.face import Ending, ServerEvent
from lacre_backend.api.faces.responses_request import ResponsesRequest, custom_input, parse_responses
from lacre_backend.api.responses import ResponseInfo
from lacre_backend.api.tools.parts import Argued, Called, Part, Speech, Thought
from lacre_backend.engine.protocol import Token

_KINDS: Final = {Thought: "rs", Speech: "msg", Called: "fc", Argued: "fc"}  # how the ids of items begin


class Responses(ConversationFace[ResponsesRequest]):
    """`POST /v1/responses`."""

    prompt_param = "input"
    prefix = "resp_"
    marked = True

    def parse(self, body: bytes) -> ResponsesRequest:
        return parse_responses(body)

    def writer(self, request: ResponsesRequest, reply: ResponseInfo) -> ResponseWriter:
        return ResponseWriter(request, reply)

    def counted(self, tokens: int) -> dict[str, Any]:
        return {"object": "response.input_tokens", **super().counted(tokens)}


def _usage(spent: Usage) -> dict[str, Any]:
    return {
        "input_tokens": spent.prompt_tokens,
        "input_tokens_details": {"cached_tokens": spent.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": spent.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": spent.reasoning_tokens},
        "total_tokens": spent.prompt_tokens + spent.completion_tokens,
    }


def _output_text(text: str, logprobs: Sequence[Any] = ()) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": list(logprobs)}


def _reasoning_text(text: str) -> dict[str, Any]:
    return {"type": "reasoning_text", "text": text}


@dataclass(slots=True)
class _Item:
    """One item of the answer. said: its text, or its arguments. part: what opened it."""

    index: int
    part: Thought | Speech | Called
    id: str
    said: str = field(default="", repr=False)
    logprobs: list[Any] = field(default_factory=list, repr=False)


class ResponseWriter:
    """One response. Of a stream it keeps the items so far."""

    end_mark: ClassVar[bytes] = b""

    def __init__(self, request: ResponsesRequest, reply: ResponseInfo) -> None:
        self._names = request.names
        self._number = itertools.count()
        self._items: list[_Item] = []
        self._ending = Ending("stop")
        self._id = reply.id
        self._head = {
            "id": reply.id,
            "object": "response",
            "created_at": reply.created,
            "model": reply.model.name,
            "error": None,
            "parallel_tool_calls": request.parallel_tool_calls,
            "previous_response_id": None,
            "background": False,
            "store": False,
            "service_tier": "default",
            "temperature": request.temperature,
            "top_p": request.top_p,
            "top_logprobs": request.top_logprobs or 0,
            "truncation": "disabled",
            "max_output_tokens": request.max_tokens,
            "instructions": request.told["instructions"],
            "metadata": request.told["metadata"] or {},
            "tools": request.told["tools"] or [],
            "tool_choice": request.told["tool_choice"] or "auto",
            "text": {"format": {"type": "text"}, **(request.told["text"] or {})},
            "reasoning": {"effort": None, "summary": None, **(request.told["reasoning"] or {})},
        }

    def choice(self, index: int, parts: Sequence[Part], tokens: Sequence[Token], ending: Ending) -> None:
        for i, part in enumerate(parts):
            self._take(part, tokens if i == 0 else ())
        self._ending = ending

    def whole(self, choices: Sequence[None], spent: Usage) -> dict[str, Any]:
        return self._response(spent)

    def first(self, index: int, spent: Usage) -> Iterator[ServerEvent]:
        begun = {**self._head, "status": "in_progress", "output": [], "incomplete_details": None, "usage": None}
        yield self._event("response.created", response=begun)
        yield self._event("response.in_progress", response=begun)

    def piece(self, index: int, part: Part, tokens: Sequence[Token]) -> Iterator[ServerEvent]:
        before = self._items[-1] if self._items else None
        item, added = self._take(part, tokens)
        if item is not before:
            if before is not None:
                yield from self._done(before)
            yield from self._added(item)
        if not added:
            return
        at = {"item_id": item.id, "output_index": item.index}
        if isinstance(item.part, Speech):
            logprobs = [token_logprob(token) for token in tokens]
            yield self._event("response.output_text.delta", **at, content_index=0, delta=added, logprobs=logprobs)
        elif isinstance(item.part, Thought):
            yield self._event("response.reasoning_text.delta", **at, content_index=0, delta=added)
        elif item.part.name not in self._names.custom:  # a custom tool's text is known when its JSON is whole
            yield self._event("response.function_call_arguments.delta", **at, delta=added)

    def last(self, index: int, ending: Ending) -> Iterator[ServerEvent]:
        self._ending = ending
        if self._items:
            yield from self._done(self._items[-1])

    def end(self, spent: Usage) -> Iterator[ServerEvent]:
        response = self._response(spent)
        yield self._event(f"response.{response['status']}", response=response)

    def broken(self, refusal: RequestRefused) -> ServerEvent:
        """Clients look for `error`; the API's own event has its members at the top."""
        error = refusal.body()["error"]
        told = {name: error[name] for name in ("code", "message", "param")}
        return self._event("error", **told, error=error)

    def _take(self, part: Part, tokens: Sequence[Token]) -> tuple[_Item, str]:
        """The item of a part, and what the part adds to it."""
        last = self._items[-1] if self._items else None
        added = "" if isinstance(part, Called) else part.text
        kind = _KINDS[type(part)]
        if isinstance(part, Called) or last is None or kind != _KINDS[type(last.part)]:
            opening = Called(part.index, "", "") if isinstance(part, Argued) else part
            last = _Item(len(self._items), opening, f"{kind}_{self._id.partition('_')[2]}_{len(self._items)}")
            self._items.append(last)
        last.said += added
        last.logprobs += [token_logprob(token) for token in tokens if isinstance(part, Speech)]
        return last, added

    def _added(self, item: _Item) -> Iterator[ServerEvent]:
        yield self._event("response.output_item.added", output_index=item.index, item=self._written(item, "in_progress", ""))
        if not isinstance(item.part, Called):
            at = {"item_id": item.id, "output_index": item.index, "content_index": 0}
            part = _output_text("") if isinstance(item.part, Speech) else _reasoning_text("")
            yield self._event("response.content_part.added", **at, part=part)

    def _done(self, item: _Item) -> Iterator[ServerEvent]:
        at = {"item_id": item.id, "output_index": item.index}
        if isinstance(item.part, Speech):
            whole = _output_text(item.said, item.logprobs)
            yield self._event("response.output_text.done", **at, content_index=0, text=item.said, logprobs=item.logprobs)
            yield self._event("response.content_part.done", **at, content_index=0, part=whole)
        elif isinstance(item.part, Thought):
            yield self._event("response.reasoning_text.done", **at, content_index=0, text=item.said)
            yield self._event("response.content_part.done", **at, content_index=0, part=_reasoning_text(item.said))
        elif item.part.name in self._names.custom:
            text = custom_input(item.said)
            yield self._event("response.custom_tool_call_input.delta", **at, delta=text)
            yield self._event("response.custom_tool_call_input.done", **at, input=text)
        else:
            named = self._names.of(item.part.name)["name"]
            yield self._event("response.function_call_arguments.done", **at, name=named, arguments=item.said)
        yield self._event(
            "response.output_item.done", output_index=item.index, item=self._written(item, self._status(item), item.said)
        )

    def _status(self, item: _Item) -> str:
        cut = self._ending.reason == "length" and item is self._items[-1]
        return "incomplete" if cut else "completed"

    def _written(self, item: _Item, status: str, said: str) -> dict[str, Any]:
        if isinstance(item.part, Speech):
            content = [_output_text(said, item.logprobs)] if status != "in_progress" else []
            return {"type": "message", "id": item.id, "status": status, "role": "assistant", "content": content}
        if isinstance(item.part, Thought):
            thoughts = [_reasoning_text(said)] if status != "in_progress" else []
            return {"type": "reasoning", "id": item.id, "status": status, "summary": [], "content": thoughts}
        named = {"id": item.id, "call_id": item.part.id, **self._names.of(item.part.name)}
        if item.part.name in self._names.custom:
            return {"type": "custom_tool_call", "status": status, **named, "input": custom_input(said) if said else ""}
        return {"type": "function_call", "status": status, **named, "arguments": said}

    def _response(self, spent: Usage) -> dict[str, Any]:
        cut = self._ending.reason == "length"
        return {
            **self._head,
            "status": "incomplete" if cut else "completed",
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "output": [self._written(item, self._status(item), item.said) for item in self._items],
            "usage": _usage(spent),
        }

    def _event(self, kind: str, **members: Any) -> ServerEvent:
        return ServerEvent({"type": kind, "sequence_number": next(self._number), **members}, kind)
