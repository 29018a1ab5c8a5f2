"""The frames of one attempt as a worker sends them: numbered and paid for with credit. No transport here."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Awaitable, Callable

from lacre_fabric.work.contract import CREDIT, CREDIT_TIMEOUT, Cancelled
from lacre_fabric.work.frames import Frame, FrameKind

Publish = Callable[[Frame], Awaitable[None]]


class Outbound:
    """Counts frames and credit. `publish` sends a frame."""

    def __init__(self, publish: Publish) -> None:
        self.attempt = secrets.token_hex(16)
        self.cancelled = asyncio.Event()
        self._publish = publish
        self._sequence = 0
        self._sent = 0
        self._consumed = 0
        self._changed = asyncio.Event()
        self._turn = asyncio.Lock()

    @property
    def silent(self) -> bool:
        """Whether no frame was sent yet."""
        return self._sequence == 0

    async def send(self, kind: FrameKind, payload: bytes, mac: bytes = b"") -> None:
        """mac: of the receipt in it. Raises Cancelled.

        A frame gets its number when it is sent, so a beat can overtake data that waits for credit.
        """
        if kind is FrameKind.DATA:
            await self._pay(len(payload))
        if self.cancelled.is_set():
            raise Cancelled("the gateway withdrew the request, or its reader stalled")
        await self._put(kind, payload, mac)

    async def stop(self, receipt: bytes, mac: bytes = b"") -> None:
        """Sends the last frame of withdrawn work. It needs no credit."""
        await self._put(FrameKind.STOPPED, receipt, mac)

    async def _put(self, kind: FrameKind, payload: bytes, mac: bytes) -> None:
        async with self._turn:
            frame = Frame(self.attempt, self._sequence, kind, payload, mac)
            self._sequence += 1
            await self._publish(frame)

    def renew(self, consumed: int) -> None:
        """The reader took `consumed` bytes in total. Totals make a lost renewal harmless: the next one replaces it."""
        self._consumed = max(self._consumed, min(consumed, self._sent))
        self._changed.set()

    def cancel(self) -> None:
        self.cancelled.set()
        self._changed.set()

    async def _pay(self, size: int) -> None:
        while not self.cancelled.is_set() and self._sent + min(size, CREDIT) > self._consumed + CREDIT:
            self._changed.clear()
            try:
                async with asyncio.timeout(CREDIT_TIMEOUT):
                    await self._changed.wait()
            except TimeoutError:
                self.cancel()
        self._sent += size
