"""Joins the event streams of several requests into one answer. Bytes in, bytes out; no seal and no network here.

Rules:
- Events are delivered up to the newest one with a mark (`lacre.exchange.resume_marks`). Later events wait until the stream has
  ended whole: they say that the answer is over, or another worker repeats them.
- At a seam, waiting events are dropped. Events after it get the first stream's id and time, the role is not repeated, and
  the usage is the sum over all requests, in the words of each API.
- Marks, and the comments that pad records, are removed: they are not for the application.
- A stream without marks is delivered byte for byte.
"""

from __future__ import annotations

import json
from typing import Any, Final

from lacre.errors import InvalidMessage, MessageTooLarge
from lacre.exchange.event_blocks import DONE, MAX_EVENT, EventBlocks, data_of, field
from lacre.exchange.first_choice import FirstChoice, choices_of
from lacre.exchange.resume_marks import Mark
from lacre.exchange.stream_state import StreamState
from lacre.runtime.json_objects import object_in

_ANSWER: Final = ("id", "created")  # all events of one answer have these in common

_FAILURES: Final = frozenset({"server_error", "api_error", "overloaded_error"})  # OpenAI's, and two of Anthropic's
Counts = tuple[int, int, int]  # tokens: of the prompt, of its cached part, of the answer


class Splice:
    """marked: whether the first stream carries marks.

    tokens: ids of the answer's tokens, as far as marks told them. said: by the first choice, as far as it was delivered. open:
    whether the answer could be resumed from here. failed: whether the stream's last event says that it failed.
    """

    def __init__(self, *, marked: bool) -> None:
        self._marked = marked
        self._blocks = EventBlocks()
        self._held: list[tuple[bytes, dict[str, Any]]] = []
        self.said = FirstChoice()
        self._first: dict[str, Any] = {}  # the answer's own members, from its first event
        self._mark: Mark | None = None  # the newest mark of this request
        self._spent: list[Counts] = []
        self._seams = 0
        self._offset = self._shift = 0  # characters: of the text in logprobs so far, and of the text before the last seam
        self.tokens: list[int] = []
        self.open = marked
        self.failed = False

    @classmethod
    def after(cls, state: StreamState) -> Splice:
        """Joins the rest of an answer to the part that another process received."""
        splice = cls(marked=True)
        splice.tokens, splice.said, splice._first = list(state.tokens), FirstChoice(state.said), dict(state.head)
        splice._seams, splice._spent = 1, [(0, 0, 0)]
        return splice

    @property
    def head(self) -> dict[str, Any]:
        """The members that all events of the answer share, as far as it has begun."""
        return dict(self._first)

    def feed(self, data: bytes) -> bytes:
        """The bytes that may be delivered now. Raises InvalidMessage or MessageTooLarge."""
        out = b"".join(map(self._event, self._blocks.feed(data)))
        if len(self._blocks.pending) > MAX_EVENT:
            if self._marked:
                raise MessageTooLarge(f"the answer has an event of over {MAX_EVENT} bytes")
            self._blocks.pending.clear()
        return out if self._marked else data

    def end(self) -> bytes:
        """The stream has ended whole: returns the events that waited."""
        held, self._held = self._held, []
        for _, chunk in held:
            self._note(chunk)
        return b"".join(event for event, _ in held)

    def seam(self) -> Counts:
        """The stream broke off, and another continues it. Returns the tokens that the request took, as far as it told."""
        spent = (0, 0, 0) if self._mark is None else (self._mark.prompt, self._mark.cached, self._mark.count)
        self._blocks, self._held, self._mark, self.failed = EventBlocks(), [], None, False
        if self.tokens:
            self._seams += 1
            self._spent.append(spent)
            self._shift = self._offset
        return spent

    def _event(self, lines: list[bytes]) -> bytes:
        """One event, or the bytes between two."""
        data = data_of(lines)
        if not data:
            return b""
        chunk = _object(data)
        ids = field(lines, b"id")
        if not self._marked:
            self._note(chunk)
            return b""
        if self._seams and chunk:
            if not ids and _says_the_role(chunk):
                return b""
            data = json.dumps(self._joined(chunk), separators=(",", ":"), ensure_ascii=False).encode()
            lines = [*(line for line in lines if line.startswith(b"event:")), b"data: " + data]
        event = b"".join(line + b"\n" for line in lines if not line.startswith(b"id:")) + b"\n"
        if ids:
            return self._marked_event(ids[-1], chunk, event)
        self.failed = self.failed or _is_failure(chunk)
        self._held.append((event, chunk))
        return b"" if self.open else self.end()

    def _marked_event(self, mark: bytes, chunk: dict[str, Any], event: bytes) -> bytes:
        if not mark:
            self.open = False  # the worker says that no other worker could resume from here
        else:
            self._mark = self._next(Mark.parse(mark.decode("utf-8", "replace")))
            self.tokens += self._mark.tokens
        if not self._first:
            self._first = {name: chunk[name] for name in _ANSWER if name in chunk}
        self._held.append((event, chunk))
        return self.end()

    def _next(self, mark: Mark) -> Mark:
        before = 0 if self._mark is None else self._mark.count
        if mark.count != before + len(mark.tokens):
            raise InvalidMessage("a resume mark in the answer does not follow from the one before it")
        return mark

    def _note(self, chunk: dict[str, Any]) -> None:
        """Keeps what the first choice says, and where its text ends by the count of its logprobs."""
        self.said.add(chunk)
        for choice in choices_of(chunk):
            offsets = _offsets(choice)
            if offsets and isinstance(offsets[-1], int):
                self._offset = offsets[-1] + len(choice["logprobs"]["tokens"][-1])

    def _joined(self, chunk: dict[str, Any]) -> dict[str, Any]:
        """An event of a later stream, rewritten as one of this answer."""
        joined = {**chunk, **{name: value for name, value in self._first.items() if name in chunk}}
        if isinstance(usage := chunk.get("usage"), dict):
            joined["usage"] = _sum(usage, self._spent)
        response = chunk.get("response")  # of `/v1/responses`
        if isinstance(response, dict) and isinstance(usage := response.get("usage"), dict):
            joined["response"] = {**response, "usage": _sum(usage, self._spent)}
        for choice in choices_of(joined):
            if offsets := _offsets(choice):
                choice["logprobs"]["text_offset"] = [offset + self._shift for offset in offsets]
        return joined


def _object(data: bytes) -> dict[str, Any]:
    """The event's object; an empty one for `[DONE]`, and for data that is not an object."""
    return (object_in(data) if data != DONE else None) or {}


def _offsets(choice: dict[str, Any]) -> list[int]:
    """Where each token of a text completion's logprobs begins."""
    logprobs = choice.get("logprobs")
    offsets = logprobs.get("text_offset") if isinstance(logprobs, dict) else None
    return offsets if isinstance(offsets, list) else []


def _says_the_role(chunk: dict[str, Any]) -> bool:
    choices = choices_of(chunk)
    return bool(choices) and all(isinstance(choice.get("delta"), dict) and "role" in choice["delta"] for choice in choices)


def _is_failure(chunk: dict[str, Any]) -> bool:
    """Whether the worker says that it could not continue, through no fault of the request."""
    error = chunk.get("error")
    return isinstance(error, dict) and error.get("type") in _FAILURES


def _sum(usage: dict[str, Any], spent: list[Counts]) -> dict[str, Any]:
    """The usage of the last request and those before it. The tokens of the reasoning are those of the whole answer already."""
    prompt, cached, completion = (sum(column) for column in zip(*spent, strict=True))
    anthropic = "cache_read_input_tokens" in usage  # there, `input_tokens` are those that no cache had
    more = {
        "prompt_tokens": prompt,
        "input_tokens": prompt - cached if anthropic else prompt,
        "cache_read_input_tokens": cached,
        "completion_tokens": completion,
        "output_tokens": completion,
        "total_tokens": prompt + completion,
    }
    total = {name: value + more.get(name, 0) if isinstance(value, int) else value for name, value in usage.items()}
    for name in ("prompt_tokens_details", "input_tokens_details"):
        if isinstance(details := total.get(name), dict) and isinstance(details.get("cached_tokens"), int):
            total[name] = {**details, "cached_tokens": details["cached_tokens"] + cached}
    return total
