"""Passes events from an engine's thread to the event loops that wait for them.

Rules:
- Only the thread of its event loop uses a stream, and only the engine's thread uses the outbox. Between them there is one
  callback per loop and step (`call_soon_threadsafe`), however many sequences the step advanced.
- The engine survives a closed loop, which takes no more events.
- A stream holds at most `max_tokens` events of its task, which admission bounded.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator

from lacre_backend.engine.protocol import EngineError, Event, Finish


class TaskEvents(AsyncIterator[Event]):
    """The events of one task, iterated by one consumer in the loop that submitted it."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.abandoned = False  # set by the engine's thread once the loop is closed: nothing will read the stream
        self._events: deque[Event | EngineError] = deque()
        self._waiter: asyncio.Future[None] | None = None
        self._ended = False

    def put(self, event: Event | EngineError) -> None:
        """Adds an event. Call it in the loop's thread."""
        self._events.append(event)
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def __anext__(self) -> Event:
        if self._ended:
            raise StopAsyncIteration
        while not self._events:
            self._waiter = self.loop.create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        event = self._events.popleft()
        self._ended = isinstance(event, Finish | EngineError)
        if isinstance(event, EngineError):
            raise event
        return event


class Outbox:
    """Collects the events of one step and wakes each loop once."""

    def __init__(self) -> None:
        self._batches: dict[asyncio.AbstractEventLoop, list[tuple[TaskEvents, Event | EngineError]]] = {}

    def post(self, stream: TaskEvents, event: Event | EngineError) -> None:
        self._batches.setdefault(stream.loop, []).append((stream, event))

    def flush(self) -> None:
        for loop, batch in self._batches.items():
            try:
                loop.call_soon_threadsafe(_deliver, batch)
            except RuntimeError:  # asyncio's error for a closed loop
                for stream, _ in batch:
                    stream.abandoned = True
        self._batches = {}


def _deliver(batch: list[tuple[TaskEvents, Event | EngineError]]) -> None:
    for stream, event in batch:
        stream.put(event)
