"""An ASGI app on an event loop of its own, in a thread of its own.

The node's loop sends the beats by which a gateway tells a busy worker from a dead one. What an app does between two awaits
(parsing a body of megabytes, rendering a template, compiling a grammar) must not hold them up, nor may what decodes: only the
app's events cross into the node's loop, and nothing of the app runs there.

Rules:
- An app is at most `AHEAD` events ahead of the node: what slows the node's reader down slows the app down.
- A call that is cancelled here is cancelled there.
- What every app asks for first, its request, goes over with the call: to ask for it would take a turn of both threads.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
from collections import deque
from typing import Final

import uvloop

from lacre.asgi import App, Message, Receive, Scope, Send
from lacre.runtime import tasks

CLOSE_LIMIT: Final = 2 * tasks.END_LIMIT  # seconds: for its calls to end, and for what they left in threads
AHEAD: Final = 8  # events that have crossed and were not taken: each wakes the other side up less often


class Elsewhere:
    """app: what runs in the other thread. It is an ASGI app itself. `close` it when nothing calls it any more."""

    def __init__(self, app: App, name: str = "app") -> None:
        self._app = app
        self._loop = uvloop.new_event_loop()
        self._closing = False
        self._thread = tasks.thread(name, self._run)

    @property
    def died(self) -> bool:
        """Whether its thread ended by itself: no call is answered any more."""
        return self._thread.died is not None

    @property
    def stuck(self) -> bool:
        """What blocks the app's loop is its own affair: whoever waits for it has limits."""
        return False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Raises TaskDied where nothing can answer any more."""
        self._thread.check()
        self._thread.check()
        crossing = _Crossing(self._loop, receive, await receive())
        call = tasks.across(self._called(scope, crossing), self._loop)
        try:
            while (message := await crossing.take()) is not None:
                await send(message)
            await _result(call)
        finally:
            call.cancel()

    async def _called(self, scope: Scope, crossing: _Crossing) -> None:
        try:
            await self._app(scope, crossing.receive, crossing.send)
        finally:
            crossing.end()

    def close(self) -> None:
        self._closing = True
        if self._thread.alive:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(CLOSE_LIMIT)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_forever()
            if not self._closing:
                raise RuntimeError("the app's event loop was stopped, and not by `close`")
        finally:
            self._loop.run_until_complete(tasks.end(*asyncio.all_tasks(self._loop)))
            self._loop.run_until_complete(self._loop.shutdown_asyncgens())
            self._loop.run_until_complete(self._loop.shutdown_default_executor())
            self._loop.close()


class _Crossing:
    """The events of one call, from the app's loop (`there`) to the node's (`here`). Made in the node's."""

    def __init__(self, there: asyncio.AbstractEventLoop, receive: Receive, first: Message) -> None:
        """first: what `receive` gave already."""
        self._here, self._there = asyncio.get_running_loop(), there
        self._receive = receive
        self._first: Message | None = first
        self._messages: deque[Message | None] = deque()
        self._came = asyncio.Event()  # the node's
        self._ahead = 0  # the app's
        self._room = asyncio.Event()  # the app's

    # In the node's loop

    async def take(self) -> Message | None:
        """The app's next event; None at its end."""
        while not self._messages:
            self._came.clear()
            await self._came.wait()
        message = self._messages.popleft()
        if not self._messages and message is not None:
            self._there.call_soon_threadsafe(self._taken)
        return message

    def _put(self, message: Message | None) -> None:
        self._messages.append(message)
        self._came.set()

    # In the app's

    async def send(self, message: Message) -> None:
        self._ahead += 1
        self._here.call_soon_threadsafe(self._put, message)
        while self._ahead >= AHEAD:
            self._room.clear()
            await self._room.wait()

    async def receive(self) -> Message:
        if (first := self._first) is not None:
            self._first = None
            return first
        return await asyncio.wrap_future(tasks.across(_awaited(self._receive), self._here))

    def end(self) -> None:
        self._here.call_soon_threadsafe(self._put, None)

    def _taken(self) -> None:
        """All that had crossed was taken; what crosses now is counted anew."""
        self._ahead = 0
        self._room.set()


async def _result(call: concurrent.futures.Future[None]) -> None:
    """A call that the other thread gave up failed. Only one that was cancelled here is cancelled here."""
    try:
        await asyncio.wrap_future(call)
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            raise
        raise RuntimeError("the app's thread ended during a call") from None


async def _awaited(receive: Receive) -> Message:
    return await receive()
