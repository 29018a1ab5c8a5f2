"""The frames of one request as they reach a gateway: ordered, checked, bounded, and with a clock on them. No transport here.

Rules:
- The first attempt that sends a frame is the one, for it has claimed the request or refuses it: another's frames are dropped.
- Its frames count from 0 without a gap. A worker that is silent for `LOST_AFTER` is lost, unless the reader slept.
- What is not read yet is bounded by the worker's credit; more than that is a worker out of hand, and ends this request only.
- Whoever leaves pays for what was made: a worker that is withdrawn says last what it used, and is waited for, but not for long.
- A worker is told what its reader took when that is worth a message, and at the latest with its own next beat.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator
from contextlib import suppress
from typing import Final

from lacre_fabric.work.contract import (
    CREDIT,
    LOST_AFTER,
    FabricError,
    FrameGap,
    FrameMissing,
    QueueTimeout,
    ReaderStalled,
    WorkerLost,
)
from lacre_fabric.work.frames import Frame, FrameKind

# Frames of few bytes each must not pile up either. A sealed record has a length, a tag and a byte at least: 18 bytes, and no
# honest worker gets so many of them out of its credit.
MAX_PENDING_FRAMES: Final = 16 * 1024
# Of a credit of 256 KiB: until a worker has spent so much more it does not wait for the word.
RENEW_AFTER: Final = CREDIT // 8
# Each of a worker's receipts says more than the one before: more than one is kept only in case the last does not verify.
KEPT_RECEIPTS: Final = 4
MAX_RECEIPT: Final = 4096  # bytes; ours have some 500
# Seconds that a timer comes late where this process was stopped, or starved: then frames wait in its sockets.
STOOD_STILL: Final = 0.25
CATCH_UP: Final = 1.5  # seconds to read them, and to hear the next beat
PARTING: Final = 1.0  # seconds that a worker has to say what it used, once it is withdrawn


class Inbound:
    """queue_limit: seconds until the first frame must have come. Made and used on one event loop."""

    def __init__(self, queue_limit: float) -> None:
        self._loop = asyncio.get_running_loop()
        self._frames: deque[Frame] = deque()
        self._error: FabricError | None = None
        self._arrived: asyncio.Future[None] | None = None
        self._pending_bytes = 0
        self._bound: str | None = None
        self._next = 0
        self._over = False
        self._beats = 0  # in a row; nobody reads them
        self._consumed = self._told = 0
        self._receipts: deque[bytes] = deque(maxlen=KEPT_RECEIPTS)
        # One timer, put off when it comes due and not with each frame.
        self._silent_at = self._loop.time() + queue_limit
        self._watch = self._watching()
        self._ended = asyncio.Event()  # nothing more will come, or nothing that counts
        self.started = asyncio.Event()

    @property
    def receipts(self) -> tuple[bytes, ...]:
        return tuple(self._receipts)

    @property
    def receipt(self) -> bytes | None:
        return self._receipts[-1] if self._receipts else None

    @property
    def ready(self) -> bool:
        """Whether the next frame is here already."""
        return bool(self._frames)

    def put(self, frame: Frame) -> bool:
        """Takes a frame, in the order in which it came off the wire. Whether it was of any use."""
        if self._over or (self._bound is not None and frame.attempt != self._bound):
            return False
        self._silent_at = self._loop.time() + LOST_AFTER
        if self._bound is None:
            self._bind(frame.attempt)
        if frame.sequence != self._next:
            self.fail(FrameMissing("a frame of the answer is missing"))
            return False
        self._next += 1
        if frame.kind in (FrameKind.USAGE, FrameKind.BEAT, FrameKind.STOPPED) and 0 < len(frame.payload) <= MAX_RECEIPT:
            self._receipts.append(frame.payload)
        if frame.kind is FrameKind.STOPPED:
            self.fail(ReaderStalled("the worker stopped, for its reader took nothing for too long"))
            return True
        self._pending_bytes += len(frame.payload) if frame.kind is not FrameKind.BEAT else 0
        self._beats = self._beats + 1 if frame.kind is FrameKind.BEAT else 0
        if self._pending_bytes > 2 * CREDIT or len(self._frames) + self._beats >= MAX_PENDING_FRAMES:
            self.fail(FrameGap("the worker sent more than its credit allows"))
            return False
        if frame.kind is not FrameKind.BEAT:
            self._frames.append(frame)
            self._wake()
            if frame.kind is not FrameKind.DATA:
                self._ended.set()
        return True

    def fail(self, error: FabricError) -> None:
        """Ends the frames with an error, after those that came before it."""
        if not self._over:
            self._over, self._error = True, error
            self._watch.cancel()
            self._wake()
            self._ended.set()

    def drop(self) -> None:
        """Nobody will read it any more: its request was never queued, or is over. No timer of it stays behind."""
        self._over = True
        self._watch.cancel()

    async def parting(self) -> None:
        """What a worker that was told to stop has yet to say; returns at once where none has begun."""
        if self.started.is_set():
            with suppress(TimeoutError):
                async with asyncio.timeout(PARTING):
                    await self._ended.wait()

    def consumed(self, size: int) -> int | None:
        """The reader took so many bytes more: the sum of all that it took, where the worker is to be told now."""
        self._consumed += size
        return self.renewal() if self._consumed - self._told >= RENEW_AFTER else None

    def renewal(self) -> int | None:
        """The sum of all that the reader took, where the worker does not know it yet."""
        if self._told == self._consumed:
            return None
        self._told = self._consumed
        return self._told

    async def frames(self) -> AsyncGenerator[Frame, None]:
        """DATA frames, then one USAGE or ERROR. Raises QueueTimeout, WorkerLost, FrameGap or what `fail` was given."""
        try:
            while True:
                while self._frames:
                    frame = self._frames.popleft()
                    self._pending_bytes -= len(frame.payload)
                    self._over = self._over or frame.kind in (FrameKind.USAGE, FrameKind.ERROR)
                    yield frame
                    if frame.kind in (FrameKind.USAGE, FrameKind.ERROR):
                        return
                if self._error is not None:
                    raise self._error
                self._arrived = self._loop.create_future()
                await self._arrived
        finally:
            self._watch.cancel()

    def _bind(self, attempt: str) -> None:
        self._bound = attempt
        self.started.set()
        self._watch.cancel()
        self._watch = self._watching()

    def _watching(self) -> asyncio.TimerHandle:
        self._due = self._silent_at  # uvloop's handle cannot tell, where the time has come already
        return self._loop.call_at(self._due, self._look)

    def _wake(self) -> None:
        if self._arrived is not None and not self._arrived.done():
            self._arrived.set_result(None)

    def _look(self) -> None:
        """Whether it is silent for too long by now. What a loop that stood still has not read yet is no silence."""
        now = self._loop.time()
        if now - self._due > STOOD_STILL:
            self._silent_at = max(self._silent_at, now + CATCH_UP)
        if now < self._silent_at:
            self._watch = self._watching()
        elif self._bound is None:
            self.fail(QueueTimeout("no worker took the request within its queue limit"))
        else:
            self.fail(WorkerLost("the worker fell silent in mid-answer"))
