"""Passes events from an engine's thread to the event loops, or to the process, that wait for them.

Rules:
- Only the thread of its event loop uses a `TaskEvents`, and only the engine's thread uses the outbox. Between them there is one
  call of a road per step, however many sequences the step advanced.
- The engine survives a closed loop, which takes no more events.
- A stream holds at most `max_tokens` events of its task, which admission bounded.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Hashable, Sequence
from dataclasses import dataclass
from typing import Protocol

from lacre.errors import LacreError
from lacre_backend.engine.protocol import Event, Finish


class TaskStream(Protocol):
    """Where the events of one task go. abandoned: nothing will read it, so its task may end."""

    abandoned: bool

    @property
    def road(self) -> Road: ...


class Road(Hashable, Protocol):
    """Carries events away from an engine's thread. Streams with equal roads share a batch."""

    def deliver(self, batch: Sequence[Delivered]) -> None:
        """Any thread may call it. It never raises."""
        ...


Delivered = tuple[TaskStream, Event | LacreError]


@dataclass(frozen=True, slots=True)
class LoopRoad:
    """To streams that are read in an event loop."""

    loop: asyncio.AbstractEventLoop

    def deliver(self, batch: Sequence[Delivered]) -> None:
        try:
            self.loop.call_soon_threadsafe(_put_all, batch)
        except RuntimeError:  # asyncio's error for a closed loop
            for stream, _ in batch:
                stream.abandoned = True


class TaskEvents(AsyncIterator[Event]):
    """The events of one task, iterated by one consumer in the loop that submitted it."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.road = LoopRoad(loop)
        self.abandoned = False  # set by the engine's thread once the loop is closed: nothing will read the stream
        self._events: deque[Event | LacreError] = deque()
        self._waiter: asyncio.Future[None] | None = None
        self._ended = False

    @classmethod
    def here(cls) -> TaskEvents:
        """For the running event loop."""
        return cls(asyncio.get_running_loop())

    def put(self, event: Event | LacreError) -> None:
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
        self._ended = isinstance(event, Finish | LacreError)
        if isinstance(event, LacreError):
            raise event
        return event


class Outbox:
    """Collects the events of one step and calls each road once."""

    def __init__(self) -> None:
        self._batches: dict[Road, list[Delivered]] = {}

    def post(self, stream: TaskStream, event: Event | LacreError) -> None:
        self._batches.setdefault(stream.road, []).append((stream, event))

    def flush(self) -> None:
        for road, batch in self._batches.items():
            road.deliver(batch)
        self._batches = {}


def _put_all(batch: Sequence[Delivered]) -> None:
    for stream, event in batch:
        if isinstance(stream, TaskEvents):  # no other stream has this road
            stream.put(event)
