"""The bytes that arrive on a connection, handled in the callback in which they arrive.

The library's stream wakes a task for each chunk of bytes, a turn of the loop later. For an ack or a frame, that costs a gateway
more than reading it.

Rules:
- Chunks are handled in the order of arrival, one at a time. A chunk whose handler wants to wait is finished by a task (`run`).
  Until then later chunks are kept, of at most `AHEAD` bytes and one read; the rest stays in the network.
- A large chunk is handled in pieces of `CHUNK` bytes, with a turn for other connections after each.
- Nothing is handled after `run` has ended: the bytes would belong to a connection that was given up.
- The stream keeps its other work: it tells its writer when to pause, and when the connection is closed.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Final

CHUNK: Final = 32 * 1024  # bytes that are handled in one turn
AHEAD: Final = 2 * CHUNK  # bytes that may wait

# Handles bytes. Returns what it has to wait for before it can go on; None if it handled all of them.
Receive = Callable[[bytes], Callable[[], Awaitable[None]] | None]


class Incoming(asyncio.Protocol):
    """stream: the connection's protocol so far; nothing reads it from now on. Use `run`."""

    def __init__(self, transport: asyncio.Transport, stream: asyncio.Protocol, receive: Receive, *, over: bool) -> None:
        """over: whether the stream has seen its end."""
        self._transport = transport
        self._stream = stream
        self._receive = receive
        self._chunks: deque[bytes] = deque()
        self._size = 0
        self._left: Callable[[], Awaitable[None]] | None = None
        self._failed: Exception | None = None
        self._news: asyncio.Future[None] | None = None
        self._paused = self._given_up = False
        self._over = over

    async def run(self, first: bytes) -> None:
        """Takes the connection from its stream, and returns at its end. Raises what `receive` raises.

        first: the bytes that the stream had already.
        """
        self._transport.set_protocol(self)
        self._keep(first)
        try:
            while await self._step():
                pass
        finally:
            self._given_up = True
            self._chunks.clear()
            if not self._over:
                self._transport.set_protocol(self._stream)

    async def _step(self) -> bool:
        """Does what is due, or waits for it; False at the end."""
        if self._failed is not None:
            raise self._failed
        if self._left is not None:
            await self._left()
            self._left = None
        elif self._chunks:
            chunk = self._chunks.popleft()
            self._size -= len(chunk)
            self._handle(chunk)
            await asyncio.sleep(0)
        elif self._over:
            return False
        else:
            if self._paused and not self._transport.is_closing():
                self._paused = False
                self._transport.resume_reading()
            self._news = asyncio.get_running_loop().create_future()
            await self._news
        return True

    def _handle(self, chunk: bytes) -> None:
        try:
            self._left = self._receive(chunk)
        except Exception as exc:  # noqa: BLE001 - `run` raises it
            self._failed = exc

    def _keep(self, data: bytes) -> None:
        self._chunks += [data[at : at + CHUNK] for at in range(0, len(data), CHUNK)]
        self._size += len(data)
        if self._size >= AHEAD and not self._paused and not self._transport.is_closing():
            self._paused = True
            self._transport.pause_reading()

    def _tell(self) -> None:
        if self._news is not None and not self._news.done():
            self._news.set_result(None)

    # What the transport reports

    def data_received(self, data: bytes) -> None:
        if self._given_up or self._failed is not None:
            return
        if self._left is None and not self._chunks and len(data) <= CHUNK:
            self._handle(data)
            if self._left is None and self._failed is None:
                return
        else:
            self._keep(data)
        self._tell()

    def eof_received(self) -> bool | None:
        self._over = True
        self._tell()
        return self._stream.eof_received()

    def connection_lost(self, exc: Exception | None) -> None:
        self._over = True
        if exc is not None and self._failed is None:
            self._failed = exc
        self._tell()
        self._stream.connection_lost(exc)

    def pause_writing(self) -> None:
        self._stream.pause_writing()

    def resume_writing(self) -> None:
        self._stream.resume_writing()
