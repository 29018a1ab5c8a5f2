"""The events of one answer, out of the streams of several requests. Bytes in, bytes out; no seal and no network here.

Rules:
- Events are handed on up to the newest one with a mark (`lacre.exchange.resume_marks`). What follows it waits until the
  stream has ended whole: it says that the answer is over, or will be said again.
- At a seam what waits is dropped. The events after it carry the id and the time of the first, the role is not said twice, and
  a usage is the sum of all requests'.
- A mark and the comments that fill records up are no concern of the application's: they are left out.
- A stream without marks is handed on byte for byte, as it comes.
"""

from __future__ import annotations

import json
from typing import Any, Final

from lacre.errors import InvalidMessage, MessageTooLarge
from lacre.exchange.event_blocks import DONE, MAX_EVENT, EventBlocks, data_of, field
from lacre.exchange.resume_marks import Mark
from lacre.runtime.json_objects import object_in

_ANSWER: Final = ("id", "created")  # what all events of one answer have in common

Counts = tuple[int, int, int]  # tokens: of the prompt, of it cached, of the answer


class Splice:
    """marked: whether the first stream carries marks.

    tokens: ids of the answer's tokens, as far as marks told them. text: of the first choice, as far as it was handed on.
    open: whether the answer could be gone on with from here. failed: whether the stream's own last word is that it failed.
    """

    def __init__(self, *, marked: bool) -> None:
        self._marked = marked
        self._blocks = EventBlocks()
        self._held: list[bytes] = []
        self._parts: list[str] = []
        self._first: dict[str, Any] = {}  # the answer's own members, out of its first event
        self._mark: Mark | None = None  # the newest of this request
        self._spent: list[Counts] = []
        self._seams = 0
        self._offset = self._shift = 0  # characters: of the text in logprobs so far, and of it before the last seam
        self.tokens: list[int] = []
        self.open = marked
        self.failed = False

    @property
    def text(self) -> str:
        return "".join(self._parts)

    def feed(self, data: bytes) -> bytes:
        """What may be handed on now. Raises InvalidMessage or MessageTooLarge."""
        out = b"".join(map(self._event, self._blocks.feed(data)))
        if len(self._blocks.pending) > MAX_EVENT:
            if self._marked:
                raise MessageTooLarge(f"an event of over {MAX_EVENT} bytes in the answer")
            self._blocks.pending.clear()
        return out if self._marked else data

    def end(self) -> bytes:
        """The stream has ended whole: what waited."""
        held, self._held = b"".join(self._held), []
        return held

    def seam(self) -> Counts:
        """The stream broke off, and another goes on. Returns what the request took, as far as it told."""
        spent = (0, 0, 0) if self._mark is None else (self._mark.prompt, self._mark.cached, self._mark.count)
        self._blocks, self._held, self._mark, self.failed = EventBlocks(), [], None, False
        if self.tokens:
            self._seams += 1
            self._spent.append(spent)
            self._shift = self._offset
        return spent

    def _event(self, lines: list[bytes]) -> bytes:
        """One event, or what stands between two."""
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
            lines = [b"data: " + json.dumps(self._joined(chunk), separators=(",", ":"), ensure_ascii=False).encode()]
        event = b"".join(line + b"\n" for line in lines if not line.startswith(b"id:")) + b"\n"
        if ids:
            return self._marked_event(ids[-1], chunk, event)
        self.failed = self.failed or _is_failure(chunk)
        self._held.append(event)
        return b"" if self.open else self.end()

    def _marked_event(self, mark: bytes, chunk: dict[str, Any], event: bytes) -> bytes:
        if not mark:
            self.open = False  # the worker's word that nobody else could go on from here
        else:
            self._mark = self._next(Mark.parse(mark.decode("utf-8", "replace")))
            self.tokens += self._mark.tokens
        if not self._first:
            self._first = {name: chunk[name] for name in _ANSWER if name in chunk}
        self._note(chunk)
        return self.end() + event

    def _next(self, mark: Mark) -> Mark:
        before = 0 if self._mark is None else self._mark.count
        if mark.count != before + len(mark.tokens):
            raise InvalidMessage("a mark in the answer does not follow from the one before it")
        return mark

    def _note(self, chunk: dict[str, Any]) -> None:
        """The first choice's text, and where it ends by the count of its logprobs."""
        for choice in _choices(chunk):
            if choice.get("index", 0) == 0:
                delta = choice.get("delta")
                said = delta.get("content") if isinstance(delta, dict) else choice.get("text")
                self._parts.append(said if isinstance(said, str) else "")
            offsets = _offsets(choice)
            if offsets and isinstance(offsets[-1], int):
                self._offset = offsets[-1] + len(choice["logprobs"]["tokens"][-1])

    def _joined(self, chunk: dict[str, Any]) -> dict[str, Any]:
        """An event of a later stream, as one of the answer's."""
        joined = {**chunk, **{name: value for name, value in self._first.items() if name in chunk}}
        if isinstance(usage := chunk.get("usage"), dict):
            joined["usage"] = _sum(usage, self._spent)
        for choice in _choices(joined):
            if offsets := _offsets(choice):
                choice["logprobs"]["text_offset"] = [offset + self._shift for offset in offsets]
        return joined


def _object(data: bytes) -> dict[str, Any]:
    """The event's object; an empty one for `[DONE]`, and for what is none."""
    return (object_in(data) if data != DONE else None) or {}


def _choices(chunk: dict[str, Any]) -> list[dict[str, Any]]:
    choices = chunk.get("choices")
    return [choice for choice in choices if isinstance(choice, dict)] if isinstance(choices, list) else []


def _offsets(choice: dict[str, Any]) -> list[int]:
    """Where each token of a text completion's logprobs begins."""
    logprobs = choice.get("logprobs")
    offsets = logprobs.get("text_offset") if isinstance(logprobs, dict) else None
    return offsets if isinstance(offsets, list) else []


def _says_the_role(chunk: dict[str, Any]) -> bool:
    choices = _choices(chunk)
    return bool(choices) and all(isinstance(choice.get("delta"), dict) and "role" in choice["delta"] for choice in choices)


def _is_failure(chunk: dict[str, Any]) -> bool:
    """Whether the worker says that it could not go on, for no fault of the request's."""
    error = chunk.get("error")
    return isinstance(error, dict) and error.get("type") == "server_error"


def _sum(usage: dict[str, Any], spent: list[Counts]) -> dict[str, Any]:
    """OpenAI's `usage` of the last request and those before it."""
    prompt, cached, completion = (sum(column) for column in zip(*spent, strict=True))
    total = dict(usage)
    for name, more in (("prompt_tokens", prompt), ("completion_tokens", completion), ("total_tokens", prompt + completion)):
        if isinstance(total.get(name), int):
            total[name] += more
    if isinstance(details := total.get("prompt_tokens_details"), dict) and isinstance(details.get("cached_tokens"), int):
        total["prompt_tokens_details"] = {**details, "cached_tokens": details["cached_tokens"] + cached}
    return total
