"""Runs an ASGI app in its own thread, on its own event loop.

The node's loop sends the beats by which a gateway tells a busy worker from a dead one. An app may block its loop: it parses
megabytes, renders templates or compiles grammars. That must delay neither the beats nor the thread that decodes. So only the
app's events cross into the node's loop, and none of its code runs there.

Rules:
- An app is at most `AHEAD` events ahead of the node, so a slow reader of the node slows the app down.
- Cancelling a call here cancels it there.
- The first message of each call, its request, is passed along with the call. Fetching it would take a turn of both threads.
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
AHEAD: Final = 8  # events passed and not yet taken: fewer would wake the other side more often


class Elsewhere:
    """An ASGI app that passes each call to another app in its own thread. `close` it when nothing calls it any longer.

    app: runs in the other thread.
    """

    def __init__(self, app: App, name: str = "app") -> None:
        self._app = app
        self._loop = uvloop.new_event_loop()
        self._closing = False
        self._thread = tasks.thread(name, self._run)

    @property
    def died(self) -> bool:
        """Whether its thread ended unexpectedly. It answers no call any longer."""
        return self._thread.died is not None

    @property
    def stuck(self) -> bool:
        """Always False: callers limit how long they wait for a blocked app."""
        return False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Raises TaskDied if the thread has died."""
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
    """The events of one call, from the app's loop (`there`) to the node's (`here`). Create it in the node's loop."""

    def __init__(self, there: asyncio.AbstractEventLoop, receive: Receive, first: Message) -> None:
        """first: the message that `receive` has already returned."""
        self._here, self._there = asyncio.get_running_loop(), there
        self._receive = receive
        self._first: Message | None = first
        self._messages: deque[Message | None] = deque()
        self._came = asyncio.Event()  # used in the node's loop
        self._ahead = 0  # used in the app's loop
        self._room = asyncio.Event()  # used in the app's loop

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

    # In the app's loop

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
        """Everything passed was taken: starts the count again."""
        self._ahead = 0
        self._room.set()


async def _result(call: concurrent.futures.Future[None]) -> None:
    """Waits for a call. A call that the other thread cancelled has failed; only a cancellation from here is a cancellation."""
    try:
        await asyncio.wrap_future(call)
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            raise
        raise RuntimeError("the app's thread ended during a call") from None


async def _awaited(receive: Receive) -> Message:
    return await receive()
