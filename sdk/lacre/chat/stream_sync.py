# Generated from stream_async.py by tools/unasync.py: do not edit.
"""A streamed chat answer: iterate over its text or its events; after its end it has a usage and a receipt."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from types import GeneratorType, TracebackType
from typing import Self, cast

from lacre.chat.choices import StreamEvent, TextDelta
from lacre.chat.reply import Reply
from lacre.chat.stream import LEAVE_TO_THREAD, Deltas, StreamedAnswer
from lacre.errors import UsageError


class ChatStream(StreamedAnswer, Iterator[str]):
    """The pieces of an answer's text. Iterating sends the request; `close` gives up the rest.

    Iterating yields the first choice's text, and keeps everything else: `tool_calls`, `choices`. `events` yields all of it
    live.
    """

    def __init__(self, events: Generator[StreamEvent], deltas: Deltas) -> None:
        self._events = events
        self._deltas = deltas

    def __next__(self) -> str:
        for event in self.events():
            if isinstance(event, TextDelta) and event.choice == 0 and event.text:
                return event.text
        raise StopIteration

    def events(self) -> Iterator[StreamEvent]:
        """The remaining events of all choices: text, calls, reasoning, refusals, ends."""
        if cast("GeneratorType[StreamEvent]", self._events).gi_running:
            raise UsageError("another thread reads this answer: give it to one thread at a time")
        return self._events

    def reply(self) -> Reply:
        """The whole answer: reads the rest first. Raises what iterating raises; UsageError after it was given up."""
        for _ in self.events():
            pass
        return self._deltas.reply()

    def close(self) -> None:
        if cast("GeneratorType[StreamEvent]", self._events).gi_running:
            raise UsageError(LEAVE_TO_THREAD)
        self._deltas.left = True
        self._events.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _type: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None) -> None:
        self.close()
