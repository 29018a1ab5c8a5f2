"""One piece of work at a worker, over NATS: its claim, its frames, and the orders that its gateway sends about it.

Rules:
- Work comes from the pool's queue (a message to ack), or a gateway offered it to this worker (`offers`; no message).
- Until its first frame, a worker keeps telling that it has the work: to NATS by in-progress acks, or to the gateway that
  offered it.
- Work that loses its claim is a copy of another request, so the gateway is told. It ends silently if the claim's owner is
  unknown, and if it is a redelivery, because its first worker may still answer. A queue with a new leader may have forgotten
  that it delivered work before. So the word about queued work comes later: by then the first worker has sent a frame, and the
  gateway listens to that one alone.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Final, Protocol

import nats.errors
import nats.js.errors
import structlog
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription
from nats.js.api import Header

from lacre import problems
from lacre.errors import ProtocolError
from lacre.runtime import tasks
from lacre.wire.header import SealedHeader
from lacre_fabric.nats import orders, protocol, subjects
from lacre_fabric.nats.connection import Connection
from lacre_fabric.nats.handing_back import deliveries, hand_back
from lacre_fabric.nats.kv import CONFLICTS
from lacre_fabric.work.contract import Cancelled, FabricUnavailable, Work
from lacre_fabric.work.frames import DECLINED, TAKEN, Frame, FrameKind
from lacre_fabric.work.worker_stream import Outbound

IN_PROGRESS: Final = 2.0  # seconds between signs of unacked work; well within `ACK_WAIT`
COPY_AFTER: Final = 2.0  # seconds until a gateway is told that queued work is a copy; a worker sends a frame once it claimed
MAX_CREDIT_DIGITS: Final = 12  # of the byte count that a reader took: more than any answer has

log = structlog.get_logger("lacre.fabric")


class _Worker(Protocol):
    connection: Connection
    claims_of: str


class NatsDelivery:
    """A `Delivery`. message: of the queue; None if a gateway offered the work to this worker."""

    def __init__(self, worker: _Worker, message: Msg | None, work: Work, reply: str, order_key: bytes | None) -> None:
        self._worker = worker
        self._message = message
        self._reply = reply
        self._order_key = order_key
        self._unproven = False
        self._doubtful = False  # a claim may be this attempt's, though no answer confirmed it
        self._out = Outbound(self._publish)
        self._subscriptions: list[Subscription] = []
        self._progress: asyncio.Task[object] | None = None
        self._settled = False
        self.work = work
        self.attempt = self._out.attempt
        self.cancelled = self._out.cancelled
        self.again = message is not None and deliveries(message) > 1

    async def start(self) -> None:
        """Hears the orders about it. Queued work is taken with this."""
        client = self._worker.connection.client
        pool, request_id = self.work.pool, self.work.request_id
        self._subscriptions = [
            await client.subscribe_directly(subjects.cancel(pool, request_id), self._on_cancel),
            await client.subscribe_directly(subjects.credit(pool, request_id), self._on_credit),
        ]
        if self._message is not None:
            self.take()

    def take(self) -> None:
        """From now on this worker tells that it has the work, and must begin it: an offer is no longer declined."""
        self._progress = tasks.detach("signs of work", self._in_progress())

    async def claim(self) -> bool:
        """Claims by creating a key: the first creator gets the request. If the create timed out it may still have happened, so
        the key is read back.

        Raises FabricUnavailable if the result is unknown. It is safe to call again.
        """
        mine, connection = self.attempt.encode(), self._worker.connection
        subject, denials = subjects.claim(self._worker.claims_of, self.work.digest.hex()), connection.denials
        try:
            first = {Header.EXPECTED_LAST_SUBJECT_SEQUENCE.value: "0"}
            await connection.jetstream.publish(subject, mine, headers=first)
        except nats.errors.Error as failed:
            lost = isinstance(failed, nats.js.errors.APIError) and failed.err_code in CONFLICTS
            if lost and not self._doubtful:
                return False
            self._doubtful = True  # this create, or an earlier one, may have succeeded
            if connection.denials == denials:
                with suppress(nats.errors.Error):
                    if (
                        held := await connection.newest(f"KV_{subjects.claims_bucket(self._worker.claims_of)}", subject)
                    ) is not None:
                        self._doubtful = held == mine
                        return held == mine
            raise connection.unavailable(failed, denials) from failed
        return True

    async def send(self, kind: FrameKind, payload: bytes, mac: bytes = b"") -> None:
        await self._out.send(kind, payload, mac)
        await self._settle()

    async def stop(self, receipt: bytes, mac: bytes = b"") -> None:
        await self._out.stop(receipt, mac)

    async def reject(self, problem_type: str) -> None:
        await self.send(FrameKind.ERROR, problem_type.encode())
        await self.drop()

    async def drop(self) -> None:
        if self._out.silent and not (self._settled or self.again or self._doubtful):
            if self._message is None:
                await self._tell_copy(0.0)
            elif not self.cancelled.is_set():
                tasks.detach("word of a copy", self._tell_copy(COPY_AFTER))
        await self._settle()
        subscriptions, self._subscriptions = self._subscriptions, []
        for subscription in subscriptions:
            with suppress(nats.errors.Error):
                await subscription.unsubscribe()

    async def _tell_copy(self, delay: float) -> None:
        await asyncio.sleep(delay)
        with suppress(Cancelled, FabricUnavailable):
            await self._out.send(FrameKind.ERROR, problems.REPLAYED.type.encode())

    async def hand_back(self) -> bool:
        """Returns work that never started to its queue, or declines an offer. False: it is still here."""
        worker = self._worker
        if self._message is None:
            if self._progress is not None:  # the gateway was told that it is taken
                return False
            with suppress(FabricUnavailable):  # the gateway then takes the worker for lost
                await self._tell(DECLINED)
        elif not await hand_back(worker.connection, worker.claims_of, self.work.digest, self._message):
            return False
        self._leave()
        await self.drop()
        return True

    async def _settle(self) -> None:
        """Acks once. The ack removes the work from the queue: after a later failure the client must resume."""
        if not self._settled:
            self._leave()
            if self._message is not None:
                with suppress(nats.errors.Error):
                    await self._message.ack()

    def _leave(self) -> None:
        """Stops the signs of work. Unless the work is acked now, NATS delivers it again."""
        self._settled = True
        if self._progress is not None:
            self._progress.cancel()

    async def _in_progress(self) -> None:
        while True:
            with suppress(nats.errors.Error, FabricUnavailable):
                if self._message is None:
                    await self._tell(TAKEN)
            await asyncio.sleep(IN_PROGRESS)
            with suppress(nats.errors.Error):
                if self._message is not None:
                    await self._message.in_progress()

    async def _tell(self, said: bytes) -> None:
        """Tells the gateway what becomes of its offer. It is no frame of the answer, and has no number of its own."""
        await self._publish(Frame(self.attempt, 0, FrameKind.OFFER, said))

    async def _publish(self, frame: Frame) -> None:
        try:
            await self._worker.connection.client.publish(self._reply, frame.payload, headers=frame.headers())
        except nats.errors.Error as exc:
            raise FabricUnavailable("the connection to NATS is gone") from exc

    def _on_cancel(self, _subject: str, block: bytes, _payload: bytes) -> bool:
        if not self._proven(block, orders.CANCEL):
            return False
        self._out.cancel()
        return True

    def _on_credit(self, _subject: str, block: bytes, payload: bytes) -> bool:
        if not payload.isdigit() or len(payload) > MAX_CREDIT_DIGITS or not self._proven(block, payload):
            return False
        self._out.renew(int(payload))
        return True

    def _proven(self, block: bytes, order: bytes) -> bool:
        """Whether the order carries a valid proof. block: headers, as on the wire. Raises InvalidMessage."""
        given = protocol.fields(block, status=False).get(orders.PROOF, "") if block else ""
        if orders.proven(self._order_key, order, given):
            return True
        if not self._unproven:  # log once, however many come
            self._unproven = True
            log.warning("order.unproven", pool=self.work.pool, remedy="check who has the pool's credentials: one may be stolen")
        return False


def digest_of(sealed: bytes) -> bytes:
    """The digest of `hdr ‖ enc`; empty if the bytes are not a sealed request. The worker then reports that to the gateway."""
    try:
        return SealedHeader.parse(sealed).digest
    except ProtocolError:
        return b""
