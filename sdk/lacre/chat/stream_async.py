"""A streamed chat answer: iterate over its text or its events; after its end it has a usage and a receipt."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from types import AsyncGeneratorType, TracebackType
from typing import Self, cast

from lacre.chat.choices import StreamEvent, TextDelta
from lacre.chat.reply import Reply
from lacre.chat.stream import CANCEL_TASK, Deltas, StreamedAnswer
from lacre.errors import UsageError


class AsyncChatStream(StreamedAnswer, AsyncIterator[str]):
    """The pieces of an answer's text. Iterating sends the request; `aclose` gives up the rest.

    Iterating yields the first choice's text, and keeps everything else: `tool_calls`, `choices`. `events` yields all of it
    live.
    """

    def __init__(self, events: AsyncGenerator[StreamEvent], deltas: Deltas) -> None:
        self._events = events
        self._deltas = deltas

    async def __anext__(self) -> str:
        async for event in self.events():
            if isinstance(event, TextDelta) and event.choice == 0 and event.text:
                return event.text
        raise StopAsyncIteration

    def events(self) -> AsyncIterator[StreamEvent]:
        """The remaining events of all choices: text, calls, reasoning, refusals, ends."""
        if cast("AsyncGeneratorType[StreamEvent]", self._events).ag_running:
            raise UsageError("another task reads this answer: give it to one task at a time")
        return self._events

    async def reply(self) -> Reply:
        """The whole answer: reads the rest first. Raises what iterating raises; UsageError after it was given up."""
        async for _ in self.events():
            pass
        return self._deltas.reply()

    async def aclose(self) -> None:
        if cast("AsyncGeneratorType[StreamEvent]", self._events).ag_running:
            raise UsageError(CANCEL_TASK)
        self._deltas.left = True
        await self._events.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, _type: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        await self.aclose()
