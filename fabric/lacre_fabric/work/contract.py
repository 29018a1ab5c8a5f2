"""The interface between gateways and workers: the gateway sends work, and the worker sends frames back.

`lacre_fabric.nats.gateway` and `lacre_fabric.nats.worker` implement it over NATS.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Protocol

from lacre.errors import LacreError
from lacre.runtime.records import record
from lacre_fabric.work.frames import Frame, FrameKind
from lacre_fabric.work.model_counts import ModelCounts
from lacre_fabric.work.revocations import Revocation, StoreMark

# bytes of data that a worker may send before the gateway renews its credit: core NATS has no back-pressure
CREDIT: Final = 256 * 1024
CREDIT_TIMEOUT: Final = 5.0  # seconds without renewal after which the worker gives up on its reader
BEAT: Final = 1.0  # seconds between a worker's heartbeats, for each request and for its presence
LOST_AFTER: Final = 3.0  # seconds without a frame, after the first one, until a worker counts as lost
PRESENT_FOR: Final = 3.0  # seconds that one presence message stays valid
SETTLE: Final = 1.5  # seconds that a new gateway connection waits for the first presence; NoWorkers must come within 2 s
QUEUE_LIMIT: Final = 30.0  # seconds that work may wait for a worker, by default
# Seconds that work may wait for its queue to have a leader, of its queue limit. NATS elects a leader within nine.
LEADERLESS: Final = 10.0
ACK_WAIT: Final = 5.0  # seconds without an ack or an in-progress ack until NATS delivers the work again
MAX_DELIVER: Final = 2
DUPLICATE_WINDOW: Final = 900.0  # seconds; more than twice the window that a request's date must be in
CLAIM_TTL: Final = 900.0


class FabricError(LacreError):
    """The fabric failed. The gateway maps each subclass to a problem type."""


class DuplicateWork(FabricError):
    """The same sealed request was published before."""


class NoWorkers(FabricError):
    """No live worker of the pool serves the model."""


class QueueFull(FabricError):
    """The pool's queue is full."""


class QueueTimeout(FabricError):
    """No worker took the work within its queue limit. The gateway withdrew it."""


class WorkerLost(FabricError):
    """The worker fell silent, or every delivery of the work failed."""


class ReaderStalled(WorkerLost):
    """The worker stopped and said so: the gateway did not renew its credit in time."""


class FrameGap(FabricError):
    """A frame is missing or out of order, so the answer may be incomplete."""


class FrameMissing(FrameGap):
    """A later frame came instead of the next one: a frame was lost in transit, and its worker was alive after it."""


class FabricUnavailable(FabricError):
    """The gateway or worker cannot reach the NATS server, or the server denies an operation that its role needs."""


class FabricBusy(FabricUnavailable):
    """The stream has too many writes waiting and did not take this one. Try again at once."""


class NoQueue(FabricUnavailable):
    """The pool's queue does not exist, has no leader or has too many writes waiting. It did not take the work."""


class NoMoreWork(FabricUnavailable):
    """The worker leaves, and takes no more work."""


class FabricRefused(FabricUnavailable):
    """The NATS server rejects the credential."""


class FabricUntrusted(FabricUnavailable):
    """A NATS server did not prove its identity. Nothing was sent to it."""


class FabricLost(FabricError):
    """NATS ended the connection for good. Only restarting the process helps."""


class Cancelled(FabricError):
    """The gateway withdrew the request, or did not renew the credit for `CREDIT_TIMEOUT`."""


@record(frozen=True, slots=True)
class Work:
    """A sealed request on its way to a worker.

    grant: a JWS. digest: SHA-256 of `hdr ‖ enc`; two works with the same digest are the same request.
    request_id: 32 hex digits; part of NATS subjects. affinity: equal for requests of one conversation; no worker gets it.
    gateway: its name on the fabric. settlement: a sealed key for MACs of receipts (`settlement_keys`); empty: there is none.
    The grant vouches for neither.
    """

    request_id: str
    pool: str
    model: str
    digest: bytes
    grant: str = field(repr=False)
    sealed: bytes = field(repr=False)
    affinity: bytes | None = field(default=None, repr=False)
    gateway: str = ""
    settlement: str = field(default="", repr=False)


@dataclass(frozen=True, slots=True)
class Capacity:
    """The live workers and slots of a pool in one region, as the latest presence messages report them."""

    workers: int = 0
    busy: int = 0
    free: int = 0


@dataclass(frozen=True, slots=True)
class SeenWorker:
    """What a live worker says of itself. models: those it takes work for now; none: it drains. Tokens are since its start.

    version: of its program; empty if it does not say. drained: whether a gateway ordered it to take no work. hears: whether it
    receives such orders. keys: the fingerprints of its keys (`work.presence`).
    """

    models: tuple[str, ...]
    busy: int
    free: int
    prompt: int = 0
    cached: int = 0
    generated: int = 0
    version: str = ""
    drained: bool = False
    hears: bool = False
    keys: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Backlog:
    """Queued requests of a pool in one region; and of each model that was asked for."""

    requests: int
    models: Mapping[str, int] = field(default_factory=dict)


class Dispatch(Protocol):
    """Dispatched work, as the gateway sees it."""

    @property
    def receipt(self) -> bytes | None:
        """The payload of the latest receipt, cumulative or final. Not verified."""

    @property
    def receipts(self) -> tuple[Frame, ...]:
        """The last few frames that carry receipts, newest last. Not verified."""

    async def next(self) -> Frame:
        """The next DATA frame in order, then one USAGE or ERROR; not to be called after that.

        A reader that ends before it got the last frame calls `cancel`. Raises QueueTimeout, WorkerLost, FrameGap or
        FabricUnavailable.
        """

    @property
    def ready(self) -> bool:
        """Whether the next frame is already here, so that the reader can forward both together."""

    def more(self, most: int) -> list[bytes]:
        """The payloads of the DATA frames that are here already, in order, until they have `most` bytes. Waits for nothing."""

    async def consumed(self, size: int) -> None:
        """Reports that `size` more bytes were written to the client. The worker may send as many more."""

    async def cancel(self) -> None:
        """Withdraws the work or stops the worker, then waits a moment for its last receipt. Idempotent.

        The gateway calls it when the client disconnects and when the answer is over.
        """


class GatewayFabric(Protocol):
    async def dispatch(self, work: Work, *, queue_limit: float = QUEUE_LIMIT) -> Dispatch:
        """Raises DuplicateWork, NoWorkers (within 2 s), QueueFull or FabricUnavailable."""

    def workers(self, pool: str, model: str) -> int:
        """The number of live workers that serve the model, by their presence."""

    def capacity(self) -> Mapping[tuple[str, str], Capacity]:
        """By pool and region, for those that have live workers."""

    def counts(self) -> Mapping[tuple[str, str, str], ModelCounts]:
        """The workers' own counts, by pool, region and model."""

    def seen(self) -> Mapping[tuple[str, str, str], SeenWorker]:
        """The live workers, by pool, region and node."""

    async def backlog(self, pool: str, region: str, models: Sequence[str] = ()) -> Backlog:
        """The queued requests that no worker has acked yet. models: those to count one by one.

        Raises NoQueue or FabricUnavailable.
        """

    @property
    def connected(self) -> bool:
        """Whether the gateway is connected to NATS, and to at least one pool if there are any."""

    def away(self) -> frozenset[str]:
        """The pools whose answers cannot arrive now. `dispatch` refuses work for them at once."""

    async def order(self, pool: str, region: str, node: str, order: str) -> None:
        """Sends a signed order (`work.drain_orders`) to one worker. Its presence shows whether it obeyed.

        Raises FabricUnavailable.
        """

    async def revoke(self, revocation: Revocation) -> None:
        """Publishes a revocation to every gateway. It holds until it expires. Raises FabricUnavailable."""

    async def revoked(self) -> list[Revocation]:
        """The revocations since the last call; the first call returns all. Some may repeat. Raises FabricUnavailable."""

    @property
    def store_mark(self) -> StoreMark:
        """What the provisioner says of the fabric's stores, as of the last `revoked`."""

    async def close(self) -> None: ...


class Delivery(Protocol):
    """Work that a worker pulled. It sends in-progress acks from the pull until `send`, `reject` or `drop`."""

    work: Work
    attempt: str
    cancelled: asyncio.Event
    again: bool  # it was delivered before, to a worker that never answered; the request may have crashed that worker

    async def claim(self) -> bool:
        """Claims the request for this attempt, across the whole pool. False: another attempt has it, so `drop` this one.

        Call it before the first frame, except before a rejection. It may be called again.
        Raises FabricUnavailable if the result is unknown.
        """

    async def send(self, kind: FrameKind, payload: bytes, mac: bytes = b"") -> None:
        """Sends a frame; the first one acks the work. DATA waits for credit. mac: of the receipt in it, as in `Frame`.

        Raises Cancelled.
        """

    async def stop(self, receipt: bytes, mac: bytes = b"") -> None:
        """After `Cancelled`, sends the last frame of claimed work, with its receipt. Raises FabricUnavailable."""

    async def reject(self, problem_type: str) -> None:
        """Ends the work with an error frame. It is not delivered again."""

    async def drop(self) -> None:
        """Ends the work without a frame, and stops its background tasks. Idempotent; safe after a normal end."""


class WorkerFabric(Protocol):
    async def pull(self) -> Delivery:
        """The next piece of work, as soon as there is some and its model has a free slot.

        Raises FabricUnavailable if a later call may succeed, NoMoreWork or FabricLost if not.
        """

    def weigh(self, delivery: Delivery, sequences: int | None) -> None:
        """Sets how many sequences the delivery's request occupies now; until the first call it counts as one.

        None: not known yet, so the worker pulls nothing more for its model. Does nothing if the delivery was released.
        """

    def release(self, delivery: Delivery | None = None) -> None:
        """Frees the delivery's slots. None: the oldest delivery that still holds some."""

    async def drain(self) -> None:
        """Stops pulling and announcing for good. Work in progress continues. Idempotent."""

    async def close(self) -> None: ...
