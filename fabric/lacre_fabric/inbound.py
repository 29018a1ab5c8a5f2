"""The frames of one request as they reach a gateway: ordered, checked, bounded, and with a clock on them. No transport here.

Rules:
- The first attempt that sends a frame is the one, for it has claimed the request or refuses it: another's frames are dropped.
- Its frames count from 0 without a gap. A worker that falls silent for `LOST_AFTER` is lost.
- What is not read yet is bounded by the worker's credit; more than that is a worker out of hand, and ends this request only.
- What is no frame at all says nothing about an attempt: it is dropped, and where it stood in for a frame, a gap tells.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Mapping
from typing import Final

from lacre.errors import InvalidMessage
from lacre_fabric.frames import Frame, Kind
from lacre_fabric.work import CREDIT, LOST_AFTER, FabricError, FrameGap, QueueTimeout, WorkerLost

# Frames of few bytes each must not pile up either. A sealed record has a length, a tag and a byte at least: 18 bytes, and no
# honest worker gets so many of them out of its credit.
MAX_PENDING_FRAMES: Final = 16 * 1024
# Each of a worker's receipts says more than the one before: more than one is kept only in case the last does not verify.
KEPT_RECEIPTS: Final = 4
MAX_RECEIPT: Final = 4096  # bytes; ours have some 500


class Inbound:
    """queue_limit: seconds until the first frame must have come."""

    def __init__(self, queue_limit: float) -> None:
        self._queue_limit = queue_limit
        self._frames: asyncio.Queue[Frame | FabricError] = asyncio.Queue()
        self._pending_bytes = 0
        self._bound: str | None = None
        self._next = 0
        self._over = False
        self._receipts: deque[bytes] = deque(maxlen=KEPT_RECEIPTS)
        self.started = asyncio.Event()

    @property
    def receipts(self) -> tuple[bytes, ...]:
        return tuple(self._receipts)

    @property
    def receipt(self) -> bytes | None:
        return self._receipts[-1] if self._receipts else None

    def receive(self, headers: Mapping[str, str], payload: bytes) -> None:
        """Takes what came off the wire, in the order in which it came."""
        try:
            frame = Frame.parse(headers, payload)
        except InvalidMessage:
            return
        self.put(frame)

    def put(self, frame: Frame) -> None:
        if self._over or (self._bound is not None and frame.attempt != self._bound):
            return
        if self._bound is None:
            self._bound = frame.attempt
            self.started.set()
        if frame.sequence != self._next:
            return self.fail(FrameGap("a frame of the answer is missing"))
        self._next += 1
        self._pending_bytes += len(frame.payload)
        if self._pending_bytes > 2 * CREDIT or self._frames.qsize() >= MAX_PENDING_FRAMES:
            return self.fail(FrameGap("the worker sent more than its credit allows"))
        if frame.kind in (Kind.USAGE, Kind.BEAT) and 0 < len(frame.payload) <= MAX_RECEIPT:
            self._receipts.append(frame.payload)
        self._frames.put_nowait(frame)
        return None

    def fail(self, error: FabricError) -> None:
        """Ends the frames with an error, after those that came before it."""
        if not self._over:
            self._over = True
            self._frames.put_nowait(error)

    async def frames(self) -> AsyncGenerator[Frame, None]:
        """DATA frames, then one USAGE or ERROR. Raises QueueTimeout, WorkerLost, FrameGap or what `fail` was given."""
        begun = False
        while True:
            try:
                async with asyncio.timeout(LOST_AFTER if begun else self._queue_limit):
                    frame = await self._frames.get()
            except TimeoutError as exc:
                self._over = True
                if not begun:
                    raise QueueTimeout("no worker took the request within its queue limit") from exc
                raise WorkerLost("the worker fell silent in mid-answer") from exc
            if isinstance(frame, FabricError):
                raise frame
            begun = True
            self._pending_bytes -= len(frame.payload)
            if frame.kind is Kind.BEAT:
                continue
            yield frame
            if frame.kind in (Kind.USAGE, Kind.ERROR):
                self._over = True
                return
