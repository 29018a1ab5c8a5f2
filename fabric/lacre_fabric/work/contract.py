"""What gateways and nodes program against: work goes out, frames come back. `nats_gateway`/`nats_worker` and `memory` do it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass, field
from typing import Final, Protocol

from lacre.errors import LacreError
from lacre_fabric.work.frames import Frame, FrameKind
from lacre_fabric.work.revocations import Revocation

CREDIT: Final = 256 * 1024  # bytes of data that a worker may send before the gateway renews: core NATS has no back-pressure
CREDIT_TIMEOUT: Final = 5.0  # seconds without renewal after which a reader counts as gone
BEAT: Final = 1.0  # seconds between a worker's signs of life, on a request and in presence
LOST_AFTER: Final = 3.0  # seconds without any frame, after the first, until a worker counts as lost
PRESENT_FOR: Final = 3.0  # seconds that one sign of presence counts
SETTLE: Final = 1.5  # seconds that a gateway new to the fabric waits for the first presence: inside the 2 s of a refusal
QUEUE_LIMIT: Final = 30.0  # seconds that work may wait for a worker, by default
ACK_WAIT: Final = 5.0  # seconds until work that nobody acked, nor said to be in progress, is delivered again
MAX_DELIVER: Final = 2
DUPLICATE_WINDOW: Final = 900.0  # seconds: more than twice the date window
CLAIM_TTL: Final = 900.0


class FabricError(LacreError):
    """The fabric could not do it; the gateway turns each kind into a problem type."""


class DuplicateWork(FabricError):
    """The same sealed request was published before."""


class NoWorkers(FabricError):
    """No live worker of the pool serves the model."""


class QueueFull(FabricError):
    """The pool's queue takes no more."""


class QueueTimeout(FabricError):
    """No worker took the work within its queue limit; it was withdrawn."""


class WorkerLost(FabricError):
    """The worker fell silent, or every delivery of the work came to nothing."""


class ReaderStalled(WorkerLost):
    """The worker stopped by itself, for it was told of no reader: it lives, and says so."""


class FrameGap(FabricError):
    """A frame is missing or out of order: what came cannot be trusted to be whole."""


class FrameMissing(FrameGap):
    """A later frame came in place of the next: the one between was lost on its way, and its worker lived after it."""


class FabricUnavailable(FabricError):
    """The message server cannot be reached, or denies what this role needs."""


class FabricBusy(FabricUnavailable):
    """A stream has too much to write now, and did not take this: try again at once."""


class NoQueue(FabricUnavailable):
    """The pool's queue is not there, or has no leader or too much to write now: the work was not taken."""


class FabricRefused(FabricUnavailable):
    """The message server does not take the credential."""


class FabricUntrusted(FabricUnavailable):
    """A message server did not prove that it is the one that was called; nothing was said to it."""


class FabricLost(FabricError):
    """The message server ended the connection for good. Nothing but a new start of the process helps."""


class Cancelled(FabricError):
    """The gateway withdrew the request, or its reader stalled for longer than `CREDIT_TIMEOUT`."""


@dataclass(frozen=True, slots=True)
class Work:
    """A sealed request on its way. grant: a JWS. digest: SHA-256 of `hdr ‖ enc`, what makes it the same work again.
    request_id: 32 hex digits; it stands in subjects.
    """  # fmt: skip

    request_id: str
    pool: str
    model: str
    digest: bytes
    grant: str = field(repr=False)
    sealed: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class Capacity:
    """The live workers of a pool in a region, and their slots, by what their presence said last."""

    workers: int = 0
    busy: int = 0
    free: int = 0


class Dispatch(Protocol):
    """Work that was taken, seen from the gateway."""

    @property
    def receipt(self) -> bytes | None:
        """The payload of the last receipt that came, cumulative or final; unverified."""

    @property
    def receipts(self) -> tuple[bytes, ...]:
        """The last few, the newest last."""

    def frames(self) -> AsyncGenerator[Frame, None]:
        """DATA frames in order, then one USAGE or ERROR. Raises QueueTimeout, WorkerLost, FrameGap or FabricUnavailable."""

    @property
    def ready(self) -> bool:
        """Whether the next frame is here already, so that what is read now can go on together with it."""

    async def consumed(self, size: int) -> None:
        """So many more bytes of data were written to the client: the worker may send as many more."""

    async def cancel(self) -> None:
        """The client is gone, or the answer is over: withdraws the work or stops the worker, and waits a moment for the receipt
        of what that has made. Idempotent.
        """  # fmt: skip


class GatewayFabric(Protocol):
    async def dispatch(self, work: Work, *, queue_limit: float = QUEUE_LIMIT) -> Dispatch:
        """Raises DuplicateWork, NoWorkers (within 2 s), QueueFull or FabricUnavailable."""

    def workers(self, pool: str, model: str) -> int:
        """How many live workers serve the model, by their presence."""

    def capacity(self) -> Mapping[tuple[str, str], Capacity]:
        """Of each pool and region that have live workers."""

    async def backlog(self, pool: str, region: str) -> int:
        """How much work no worker has acked yet. Raises FabricUnavailable."""

    @property
    def connected(self) -> bool:
        """Whether messages flow, with one pool at least."""

    def away(self) -> frozenset[str]:
        """The pools whose answers cannot come now: what is asked of them is refused at once."""

    async def revoke(self, revocation: Revocation) -> None:
        """For every gateway, until its time is over. Raises FabricUnavailable."""

    async def revoked(self) -> list[Revocation]:
        """What was revoked since this was asked last, at first all of it; some may come again. Raises FabricUnavailable."""

    async def close(self) -> None: ...


class Delivery(Protocol):
    """Work that a node pulled. In-progress acks run from the pull until `send`, `reject` or `drop`."""

    work: Work
    attempt: str
    cancelled: asyncio.Event
    again: bool  # it was delivered before, to a worker that said nothing: that one may have been lost by it

    async def claim(self) -> bool:
        """Takes the request for this attempt, in the whole pool. False: another attempt has it; `drop` it silently.

        To be called before the first frame but a rejection. Raises FabricUnavailable where that cannot be told now; it may be
        called again.
        """

    async def send(self, kind: FrameKind, payload: bytes) -> None:
        """Sends a frame; the first one acks the work. Data waits for credit. Raises Cancelled."""

    async def stop(self, receipt: bytes) -> None:
        """After `Cancelled`, where the work was claimed: the last frame says what was used. Raises FabricUnavailable."""

    async def reject(self, problem_type: str) -> None:
        """Ends the work with an error frame; it is not delivered again."""

    async def drop(self) -> None:
        """Ends the work without a word, and stops what `Delivery` runs. Idempotent; also after a good end."""


class WorkerFabric(Protocol):
    async def pull(self) -> Delivery:
        """The next piece of work, once there is one and a slot of its model is free. Raises FabricUnavailable, after which
        another try may do better, or FabricLost.
        """

    def weigh(self, delivery: Delivery, sequences: int | None) -> None:
        """How many sequences a delivery's request is, or is still; it counts as one until then. None: not known yet, and until
        it is, nothing more of its model is pulled. One that was released already is no error.
        """

    def release(self, delivery: Delivery | None = None) -> None:
        """What a delivery took is free again. None: the oldest one that was not released."""

    async def drain(self) -> None:
        """Stops pulling and announcing, for good; what was pulled goes on. Idempotent."""

    async def close(self) -> None: ...
