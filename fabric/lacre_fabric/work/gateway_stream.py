"""The frames of one request as a gateway receives them: in order, checked, bounded and timed. No transport here.

Rules:
- The first attempt to send a frame wins: it has claimed or rejected the request. Frames of other attempts are dropped.
- Frame numbers count from 0 without a gap. A worker is lost after `LOST_AFTER` seconds of silence, unless this process stood
  still.
- The worker's credit bounds the unread bytes. A worker that sends more ends this request only.
- A client that leaves still pays for the tokens made. The gateway waits up to `PARTING` for the stopped worker's last receipt.
- The gateway renews credit once the reader has taken `RENEW_AFTER` bytes, and at the latest with the worker's next beat.
"""

from __future__ import annotations

import asyncio
from collections import deque
from contextlib import suppress
from typing import Final

from lacre_fabric.work.contract import (
    ACK_WAIT,
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

# Bounds frames of few bytes. A sealed record takes at least 18 bytes: a length, a tag and one byte. An honest worker cannot fit
# this many into its credit.
MAX_PENDING_FRAMES: Final = 16 * 1024
# bytes, of a credit of 256 KiB: a worker has the rest to spend while the renewal travels
RENEW_AFTER: Final = CREDIT // 8
# A worker's receipts are cumulative. The gateway keeps several in case the last one does not verify.
KEPT_RECEIPTS: Final = 4
MAX_RECEIPT: Final = 4096  # bytes; ours take about 500
# Seconds. A timer this late means that the process stood still: frames may be waiting in its sockets.
STOOD_STILL: Final = 0.25
CATCH_UP: Final = 1.5  # seconds to read those frames and receive the next beat
PARTING: Final = 1.0  # seconds that a withdrawn worker has to send its last receipt
_WITH_RECEIPT: Final = frozenset({FrameKind.USAGE, FrameKind.BEAT, FrameKind.STOPPED})


class Inbound:
    """The gateway's end of one answer. queue_limit: seconds until the first frame is due. Create and use it on one event
    loop.
    """

    def __init__(self, queue_limit: float) -> None:
        self._loop = asyncio.get_running_loop()
        self._frames: deque[Frame] = deque()
        self._error: FabricError | None = None
        self._arrived: asyncio.Future[None] | None = None
        self._pending_bytes = 0
        self._bound: str | None = None
        self._held = False
        self._next = 0
        self._over = False
        self._beats = 0  # beats in a row; the reader never sees them
        self._consumed = self._told = 0
        self.receipts: tuple[Frame, ...] = ()
        # One timer. It is rescheduled when it fires, not with a frame.
        self._silent_at = self._loop.time() + queue_limit
        self._watch = self._watching()
        self._ended = False  # no more frames will come, or none that count
        self._parted: asyncio.Event | None = None  # made once somebody waits for the end

    @property
    def started(self) -> bool:
        """Whether a worker has sent a frame."""
        return self._bound is not None

    @property
    def receipt(self) -> bytes | None:
        return self.receipts[-1].payload if self.receipts else None

    @property
    def ready(self) -> bool:
        """Whether the next frame is already here."""
        return bool(self._frames)

    def put(self, frame: Frame) -> bool:
        """Takes a frame, in the order of arrival. Returns whether the frame was of use."""
        if self._over or (self._bound is not None and frame.attempt != self._bound):
            return False
        self._silent_at = self._loop.time() + LOST_AFTER
        if self._bound is None:
            self._bound = frame.attempt
        if frame.sequence != self._next:
            self.fail(FrameMissing("a frame of the answer is missing"))
            return False
        self._next += 1
        kind = frame.kind
        if kind in _WITH_RECEIPT and 0 < len(frame.payload) <= MAX_RECEIPT:
            self.receipts = (*self.receipts[1 - KEPT_RECEIPTS :], frame)
        if kind is FrameKind.STOPPED:
            self.fail(ReaderStalled("the worker stopped because its credit was not renewed in time"))
            return True
        if kind is FrameKind.BEAT:
            self._beats += 1
        else:
            self._beats = 0
            self._pending_bytes += len(frame.payload)
        if self._pending_bytes > 2 * CREDIT or len(self._frames) + self._beats >= MAX_PENDING_FRAMES:
            self.fail(FrameGap("the worker sent more than its credit allows"))
            return False
        if kind is not FrameKind.BEAT:
            self._frames.append(frame)
            self._wake()
            if kind is not FrameKind.DATA:
                self._end()
        return True

    def hold(self) -> None:
        """A worker that has not begun says that it has the work. Such a worker says so again within `ACK_WAIT`, or begins."""
        if self._bound is None and not self._over:
            self._held, self._silent_at = True, self._loop.time() + ACK_WAIT
            self._watch.cancel()
            self._watch = self._watching()

    def fail(self, error: FabricError) -> None:
        """Ends the stream with an error, after the frames that arrived before it."""
        if not self._over:
            self._over, self._error = True, error
            self._watch.cancel()
            self._wake()
            self._end()

    def drop(self) -> None:
        """Discards the stream without an error and cancels its timer. For a request that was never queued or is over."""
        self._over = True
        self._watch.cancel()

    async def parting(self) -> None:
        """Waits for the last receipt of a worker that was told to stop. Returns at once if no worker has begun."""
        if self.started and not self._ended:
            self._parted = self._parted or asyncio.Event()
            with suppress(TimeoutError):
                async with asyncio.timeout(PARTING):
                    await self._parted.wait()

    def consumed(self, size: int) -> int | None:
        """The reader took `size` more bytes. Returns the total if the worker is due a renewal."""
        self._consumed += size
        return self.renewal() if self._consumed - self._told >= RENEW_AFTER else None

    def renewal(self) -> int | None:
        """The total that the reader took; None if the worker knows it already."""
        if self._told == self._consumed:
            return None
        self._told = self._consumed
        return self._told

    async def next(self) -> Frame:
        """The next DATA frame, then one USAGE or ERROR. Raises QueueTimeout, WorkerLost, FrameGap or the error given to `fail`.

        One reader at a time.
        """
        while not self._frames:
            if self._over:
                raise self._taken()
            self._arrived = self._loop.create_future()
            await self._arrived
        frame = self._frames.popleft()
        self._pending_bytes -= len(frame.payload)
        if frame.kind is not FrameKind.DATA:
            self._over = True
            self._watch.cancel()
        return frame

    def more(self, most: int) -> list[bytes]:
        """The payloads of the DATA frames that are here, until they have `most` bytes. As `next`, without waiting."""
        found: list[bytes] = []
        size = 0
        while self._frames and size < most and self._frames[0].kind is FrameKind.DATA:
            payload = self._frames.popleft().payload
            found.append(payload)
            size += len(payload)
        self._pending_bytes -= size
        return found

    def _taken(self) -> FabricError:
        """The error that the stream ended with. It is not kept: its traceback will have the frame that reads here."""
        error, self._error = self._error, None
        return error or WorkerLost("the answer was read to its end")

    def _watching(self) -> asyncio.TimerHandle:
        """The timer for the next look. It is due before any frame's silence would be, so no frame needs a new one."""
        # kept here, because uvloop's handle cannot tell once the time has passed
        self._due = min(self._silent_at, self._loop.time() + LOST_AFTER)
        return self._loop.call_at(self._due, self._look)

    def _end(self) -> None:
        self._ended = True
        if self._parted is not None:
            self._parted.set()

    def _wake(self) -> None:
        if self._arrived is not None and not self._arrived.done():
            self._arrived.set_result(None)

    def _look(self) -> None:
        """Fails the stream if the worker has been silent too long. If this process stood still, it first reads what arrived."""
        now = self._loop.time()
        if now - self._due > STOOD_STILL:
            self._silent_at = max(self._silent_at, now + CATCH_UP)
        if now < self._silent_at:
            self._watch = self._watching()
        elif self._bound is None and not self._held:
            self.fail(QueueTimeout("no worker took the request within its queue limit"))
        else:
            where = "before its answer" if self._bound is None else "in the middle of an answer"
            self.fail(WorkerLost(f"the worker fell silent {where}"))
