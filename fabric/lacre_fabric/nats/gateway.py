"""The gateway's side of the fabric, over NATS.

Rules:
- A request is published once. If it may already be in one queue, it goes into no other (see `regions`). If a worker may have
  taken it without a queue, it goes into none (see `affinity`).
- The main connection receives only from NATS itself: acks, JetStream's answers, advisories.
- Each pool has its own connection, which receives everything that its workers send (see `nats.pool`).
- A third connection, the lobby, receives presence and so discovers new pools. Losing it delays only that discovery.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, suppress
from functools import partial
from typing import Final, Self

import nats.errors
import nats.js.errors
from nats.js.api import Header

from lacre.errors import InvalidMessage, MessageTooLarge, NewerFormat
from lacre.jose.claims import Members
from lacre.jose.formats import Format
from lacre.runtime import tasks
from lacre_fabric.nats import orders, subjects
from lacre_fabric.nats.acks import DENIED, Ack
from lacre_fabric.nats.affinity import MAX_OFFERED, in_turn
from lacre_fabric.nats.connection import API_TIMEOUT, Connection
from lacre_fabric.nats.pool import KEEP, PoolSide, Waiting, read_presence
from lacre_fabric.nats.regions import Sent, in_order
from lacre_fabric.nats.revocations import RevocationReader, revoke
from lacre_fabric.nats.roles import MAX_DELIVERIES, Credential
from lacre_fabric.nats.servers import Servers
from lacre_fabric.work.contract import (
    LEADERLESS,
    QUEUE_LIMIT,
    Backlog,
    Capacity,
    FabricUnavailable,
    NoQueue,
    NoWorkers,
    QueueFull,
    SeenWorker,
    Work,
    WorkerLost,
)
from lacre_fabric.work.frames import TAKEN, Frame, FrameKind
from lacre_fabric.work.gateway_stream import Inbound
from lacre_fabric.work.model_counts import ModelCounts
from lacre_fabric.work.presence import MAX_BYTES
from lacre_fabric.work.revocations import Revocation, StoreMark
from lacre_fabric.work.settlement_keys import SETTLE

WORK: Final = Format("work", "worker")
# The message's headers, besides JetStream's own.
GRANT: Final = "Grant"
REQUEST: Final = "Request"
GATEWAY: Final = "Gateway"
NO_QUEUE: Final = 0.25  # seconds between tries
LOOK_LIMIT: Final = 5.0  # seconds that a lookup of unstarted requests waits for the main connection
MAX_POOLS: Final = 1024  # that presence may name: NATS lets a worker name only its own
_OF_QUEUES: Final = (Header.MSG_ID.value, Header.MSG_TTL.value)  # headers for JetStream
_NO_POOL: Final = "-"  # no pool has this name
_STATUS_LINE: Final = 64  # bytes of `NATS/1.0` and the empty line, with a margin
_OFFER_DENIED: Final = 'publish to "offer.'  # of what NATS says, in the client's lower case


def _give_up(acked: asyncio.Future[Ack | None]) -> None:
    if not acked.done():
        acked.set_result(None)


class NatsGateway:
    """A `GatewayFabric`. Use `connect`."""

    def __init__(
        self,
        connection: Connection,
        lobby: Connection,
        gateway_id: str,
        open_pool: Callable[[str], Awaitable[Connection]],
        region: str = subjects.DEFAULT_REGION,
    ) -> None:
        """lobby: receives the presence of undiscovered pools. open_pool: opens a pool's connection."""
        self.connection = connection
        self._lobby = lobby
        self._open_pool = open_pool
        self._region = region
        self._id = gateway_id
        self._revocations = RevocationReader(connection)
        self._sides: dict[str, PoolSide] = {}  # by pool
        self._by_sequence: dict[tuple[str, int], Inbound] = {}
        self._acks_at = f"{subjects.inbox(connection.credential.name)}.work."
        self._acks: dict[str, asyncio.Future[Ack | None]] = {}  # of requests being published, by request id
        self._sending: dict[str, str] = {}  # the subjects of work that is being sent, by request id
        self._may_offer = True  # False: NATS servers with the permissions of an older version
        self._order_keys = orders.OrderKeys(connection.credential.password)
        self._sent = Sent()
        connection.on_reconnect = self._returned
        connection.on_denied = self._on_denied

    @classmethod
    async def connect(
        cls, servers: Servers | str, credential: Credential, gateway_id: str, region: str = subjects.DEFAULT_REGION
    ) -> Self:
        """Raises FabricUnavailable or SettingsError."""
        servers = Servers.of(servers)
        trust = servers.trust()  # one for all connections, so that the log tells of each change once

        async def open_pool(pool: str) -> Connection:
            return await Connection.open(servers, credential, keep=KEEP, purpose=f"pool {pool}", trust=trust)

        async with AsyncExitStack() as stack:
            connection = await Connection.open(servers, credential, trust=trust)
            stack.push_async_callback(connection.close)
            lobby = await Connection.open(servers, credential, keep=MAX_BYTES, purpose="presence", trust=trust)
            stack.push_async_callback(lobby.close)
            gateway = cls(connection, lobby, gateway_id, open_pool, region)
            async with connection.mapped(confirmed=True):
                await connection.client.subscribe_directly(f"{gateway._acks_at}*", gateway._on_ack)
                await connection.client.subscribe_directly(MAX_DELIVERIES, gateway._on_max_deliveries)
            async with lobby.mapped(confirmed=True):
                await lobby.client.subscribe_directly("presence.>", gateway._on_presence)
                # Test the credential now, with a pool that does not exist. Otherwise each pool's connection would fail because
                # the credential may not receive this gateway's replies.
                await lobby.client.subscribe(subjects.replies(gateway_id, _NO_POOL))
            stack.pop_all()
        return gateway

    @property
    def connected(self) -> bool:
        """Whether messages flow: to NATS itself, and to at least one pool if there are pools.

        A flood of one pool does not affect the others: `dispatch` reports which pool is unreachable.
        """
        tried = [side for side in self._sides.values() if side.tried]
        return self.connection.connected and (not tried or any(side.connected for side in tried))

    def away(self) -> frozenset[str]:
        return frozenset(pool for pool, side in self._sides.items() if side.tried and not side.connected)

    def workers(self, pool: str, model: str) -> int:
        side = self._sides.get(pool)
        return 0 if side is None else sum(model in present.models for present in side.roster.live().values())

    def capacity(self) -> Mapping[tuple[str, str], Capacity]:
        return {(pool, region): at for pool, side in self._sides.items() for region, at in side.roster.capacity().items()}

    def counts(self) -> Mapping[tuple[str, str, str], ModelCounts]:
        return {(pool, *at): counts for pool, side in self._sides.items() for at, counts in side.roster.counts().items()}

    def seen(self) -> Mapping[tuple[str, str, str], SeenWorker]:
        return {(pool, *at): said.seen for pool, side in self._sides.items() for at, said in side.roster.live().items()}

    async def backlog(self, pool: str, region: str, models: Sequence[str] = ()) -> Backlog:
        stream, every = subjects.work_stream(pool, region), subjects.works(pool, region) if models else None
        async with self.connection.mapped():
            try:
                state = (await self.connection.jetstream.stream_info(stream, subjects_filter=every)).state
            except nats.js.errors.NotFoundError as exc:
                raise NoQueue(f"pool {pool} has no queue: run `lacre keys tend`") from exc
        waiting = state.subjects or {}
        return Backlog(state.messages, {model: waiting.get(subjects.work(pool, region, model), 0) for model in models})

    def _side(self, pool: str) -> PoolSide:
        """The gateway's state for the pool. Raises FabricUnavailable if there are too many pools."""
        side = self._sides.get(pool)
        if side is None:
            if len(self._sides) >= MAX_POOLS:
                raise FabricUnavailable(f"more than {MAX_POOLS} pools")
            side = PoolSide(pool, self._id, partial(self._open_pool, pool), self._tell_soon, partial(self._gone, pool))
            self._sides[pool] = side
        return side

    def _regions(self, side: PoolSide, work: Work) -> list[str]:
        """The regions for this work, best first; empty if no worker serves the model."""
        free = side.roster.free(work.model)
        if len(free) < 2:
            return list(free)
        now = time.monotonic()
        return in_order(self._region, {at: slots - self._sent.count(work.pool, at, now) for at, slots in free.items()})

    async def dispatch(self, work: Work, *, queue_limit: float = QUEUE_LIMIT) -> NatsDispatch:
        if not self.connection.connected:
            raise FabricUnavailable("not connected to NATS")
        side = self._side(work.pool)
        await side.connect()
        regions = await self._await_presence(side, work)
        headers = {
            Header.MSG_ID.value: work.digest.hex(),
            Header.MSG_TTL.value: str(math.ceil(queue_limit) + 1),
            GRANT: work.grant,
            REQUEST: work.request_id,
            GATEWAY: self._id,
            orders.KEY: self._order_keys.of(work.pool, work.request_id).hex(),
        }
        if work.settlement:
            headers[SETTLE] = work.settlement
        _check_size(work, headers, self.connection.client.max_payload)
        waiting = side.add(work.request_id, queue_limit)
        try:
            region, sequence = regions[0], None
            if not await self._offered(side, region, work, headers, waiting):
                region, sequence = await self._queued(side, regions, work, headers, min(queue_limit, LEADERLESS))
        except BaseException:
            side.waiting.pop(work.request_id).inbound.drop()
            raise
        if sequence is not None:
            self._by_sequence[subjects.work_stream(work.pool, region), sequence] = waiting.inbound
        side.placed(waiting, region, sequence)
        return NatsDispatch(self, side, work, waiting)

    async def order(self, pool: str, region: str, node: str, order: str) -> None:
        denials = self.connection.denials
        try:
            await self.connection.client.publish(subjects.order(pool, region, node), order.encode())
        except nats.errors.Error as exc:
            raise self.connection.unavailable(exc, denials) from exc

    async def revoke(self, revocation: Revocation) -> None:
        await revoke(self.connection, revocation)

    async def revoked(self) -> list[Revocation]:
        return await self._revocations.read()

    @property
    def store_mark(self) -> StoreMark:
        return self._revocations.mark

    async def close(self) -> None:
        for side in self._sides.values():
            for waiting in side.waiting.values():
                waiting.inbound.fail(FabricUnavailable("the gateway is closing"))
        await tasks.together(*(side.close() for side in self._sides.values()), self._lobby.close(), self.connection.close())

    def _returned(self) -> None:
        """Runs after each reconnection. Sequences may restart from 1, and acks and advisories may be lost."""
        self._by_sequence.clear()
        self._may_offer = True
        for side in self._sides.values():
            side.look_soon()

    async def _gone(self, pool: str, region: str, sequences: list[int]) -> frozenset[int]:
        """See `nats.pool.Gone`."""
        try:
            async with asyncio.timeout(LOOK_LIMIT):
                await self.connection.wait_connected()
        except TimeoutError as exc:
            raise FabricUnavailable("not connected to NATS") from exc
        return await self.connection.missing(subjects.work_stream(pool, region), sequences)

    async def _await_presence(self, side: PoolSide, work: Work) -> list[str]:
        """The regions with live workers. It waits until `settled_at` for the first presence; silence after that means no
        worker.
        """
        while not (regions := self._regions(side, work)):
            side.presence_came.clear()
            try:
                async with asyncio.timeout(side.settled_at - time.monotonic()):
                    await side.presence_came.wait()
            except TimeoutError:
                raise NoWorkers("no live worker of the pool serves the model") from None
        return regions

    async def _offered(self, side: PoolSide, region: str, work: Work, headers: Mapping[str, str], waiting: Waiting) -> bool:
        """Whether the worker that has the conversation took the work. False: it is with no worker.

        Raises WorkerLost if that is unknown: the worker may have taken the work and died.
        """
        if work.affinity is None or len(work.sealed) > MAX_OFFERED or not self._may_offer:
            return False
        plain = {name: value for name, value in headers.items() if name not in _OF_QUEUES}
        free = side.shunned.without(region, side.roster.offered(work.model, region))
        for node in in_turn(work.affinity, free, side.unanswered):
            waiting.offered = asyncio.get_running_loop().create_future()
            subject = subjects.offer(work.pool, region, node, work.model)
            side.unanswered[node] += 1
            try:
                ack = await self._sent_to(subject, work, plain, waiting.offered)
            finally:
                side.unanswered -= Counter((node,))
            if waiting.offered.done():
                side.shunned.answered(region, node)
                return waiting.offered.result() == TAKEN
            if ack is DENIED:
                return False
            if ack is None or not ack.nobody:
                side.shunned.add(region, node)
                raise WorkerLost("a worker did not answer the offer of a request")
            side.roster.silenced(region, node)
        return False

    async def _queued(
        self, side: PoolSide, regions: list[str], work: Work, headers: dict[str, str], patience: float
    ) -> tuple[str, int | None]:
        """Publishes as `_publish_in_one` does. If no queue has a leader now, it retries for `patience` seconds."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + patience
        while True:
            try:
                return await self._publish_in_one(regions, work, headers)
            except NoQueue:
                if loop.time() + NO_QUEUE >= deadline:
                    raise
                await asyncio.sleep(NO_QUEUE)
                if not (regions := self._regions(side, work)):
                    raise

    async def _publish_in_one(self, regions: list[str], work: Work, headers: dict[str, str]) -> tuple[str, int | None]:
        """Publishes to the first queue that accepts; returns the region and the result of `_publish`.

        A missing ack proves nothing: the work may be in that queue, so no other is tried.
        """
        for number, region in enumerate(regions, 1):
            self._sent.add(work.pool, region, work.request_id, time.monotonic())
            try:
                return region, await self._publish(region, work, headers)
            except BaseException as exc:
                self._sent.forget(work.pool, region, work.request_id)
                if number == len(regions) or not isinstance(exc, QueueFull | NoQueue):
                    raise
        raise NoWorkers("no live worker of the pool serves the model")

    async def _publish(self, region: str, work: Work, headers: dict[str, str]) -> int | None:
        """The message's sequence in its stream; None if no ack came. The gateway must not publish it again then.

        Raises NoQueue if the work is certainly in no queue.
        """
        ack = await self._sent_to(subjects.work(work.pool, region, work.model), work, headers)
        # without one it may have arrived: wait for frames, and let the queue limit decide
        return None if ack is None else ack.sequence()

    async def _sent_to(
        self, subject: str, work: Work, headers: Mapping[str, str], answer: asyncio.Future[bytes] | None = None
    ) -> Ack | None:
        """What NATS says about the message; None if it says nothing. Raises FabricUnavailable.

        answer: of the worker that the message offers work to. It ends the waiting too, and a denied offer is `DENIED`.
        """
        denials, loop = self.connection.denials, asyncio.get_running_loop()
        acked: asyncio.Future[Ack | None] = loop.create_future()
        self._acks[work.request_id], self._sending[work.request_id] = acked, subject
        patience = loop.call_later(API_TIMEOUT, _give_up, acked)
        if answer is not None:
            answer.add_done_callback(lambda _: _give_up(acked))
        try:
            reply = f"{self._acks_at}{work.request_id}"
            await self.connection.client.publish_directly(subject, work.sealed, reply=reply, headers=headers)
            ack = await acked
        except nats.errors.Error as exc:
            raise self.connection.unavailable(exc, denials) from exc
        finally:
            patience.cancel()
            del self._acks[work.request_id], self._sending[work.request_id]
        if ack is DENIED and answer is None:
            raise self.connection.unavailable(TimeoutError(), denials)
        return ack

    def _on_ack(self, subject: str, block: bytes, payload: bytes) -> bool:
        acked = self._acks.get(subject.removeprefix(self._acks_at))
        if acked is None or acked.done():
            return False
        acked.set_result(Ack(block, payload))
        return True

    def _on_denied(self, text: str) -> None:
        if _OFFER_DENIED in text:
            self._may_offer = False
        for request_id, subject in self._sending.items():  # another message's denial says nothing about these
            if f'"{subject.lower()}"' in text and not (acked := self._acks[request_id]).done():
                acked.set_result(DENIED)

    def _on_presence(self, subject: str, block: bytes, payload: bytes) -> bool:
        """Presence on the lobby. If the pool has its own connection, this adds nothing."""
        try:
            heard = read_presence(subject, block, payload)
        except NewerFormat:
            return False  # the pool's own connection reports it, once there is work for the pool
        if heard is None:
            return False  # checked before it costs a connection: another gateway can make JetStream send its answers here
        try:
            side = self._side(heard.pool)
        except FabricUnavailable:
            return False
        if side.connected:
            return False
        side.connect_soon()
        return side.hear(heard.region, heard.node, heard.said)

    def _on_max_deliveries(self, _subject: str, _block: bytes, payload: bytes) -> bool:
        try:
            said = Members.parse(payload, "the advisory")
            inbound = self._by_sequence.get((said.text("stream"), said.count("stream_seq")))
        except InvalidMessage:
            return False
        if inbound is None or inbound.started:
            return False
        inbound.fail(WorkerLost("every delivery of the request failed"))
        return True

    def _tell_soon(self, subject: str, payload: bytes) -> None:
        tasks.detach("word to a worker", self.tell(subject, payload))

    async def tell(self, subject: str, payload: bytes = b"") -> None:
        """Sends an authenticated order to a worker. While NATS is down it is not sent: credit and expiry end what must end."""
        _, pool, request_id = subject.split(".")
        proof = orders.proof(self._order_keys.of(pool, request_id), payload or orders.CANCEL)
        with suppress(nats.errors.Error):
            await self.connection.client.publish_directly(subject, payload, headers={orders.PROOF: proof})

    def forget(self, side: PoolSide, request_id: str) -> int | None:
        """Forgets the request. Returns its message's sequence if that is still valid."""
        waiting = side.waiting.pop(request_id, None)
        if waiting is None:
            return None
        waiting.inbound.drop()
        if waiting.region is None:
            return None
        self._sent.forget(side.pool, waiting.region, request_id)
        sequence, stream = waiting.sequence, subjects.work_stream(side.pool, waiting.region)
        if sequence is None or self._by_sequence.pop((stream, sequence), None) is not waiting.inbound:
            return None
        return sequence


def _check_size(work: Work, headers: dict[str, str], limit: int) -> None:
    """Refuses a message that is too large. The server would close the whole connection over it. It counts headers; nats-py does
    not.
    """
    size = len(work.sealed) + sum(map(len, headers)) + sum(map(len, headers.values())) + len(": \r\n") * len(headers)
    if size + _STATUS_LINE > limit:
        raise MessageTooLarge("the sealed request and its grant exceed the fabric's message limit")


class NatsDispatch:
    """A `Dispatch`."""

    def __init__(self, gateway: NatsGateway, side: PoolSide, work: Work, waiting: Waiting) -> None:
        self._gateway = gateway
        self._side = side
        # not the work itself: it has megabytes, and the answer takes long
        self._pool, self._request_id = work.pool, work.request_id
        self._waiting = waiting
        self._inbound = waiting.inbound

    @property
    def receipt(self) -> bytes | None:
        return self._inbound.receipt

    @property
    def receipts(self) -> tuple[Frame, ...]:
        return self._inbound.receipts

    async def next(self) -> Frame:
        frame = await self._inbound.next()
        if frame.kind in (FrameKind.USAGE, FrameKind.ERROR):
            self._gateway.forget(self._side, self._request_id)
        return frame

    @property
    def ready(self) -> bool:
        return self._inbound.ready

    def more(self, most: int) -> list[bytes]:
        return self._inbound.more(most)

    async def consumed(self, size: int) -> None:
        total = self._inbound.consumed(size)
        if total is not None:
            await self._gateway.tell(subjects.credit(self._pool, self._request_id), str(total).encode())

    async def cancel(self) -> None:
        if self._request_id not in self._side.waiting:
            return
        gateway = self._gateway
        try:
            await gateway.tell(subjects.cancel(self._pool, self._request_id))
            if gateway.connection.connected and self._side.connected:
                await self._inbound.parting()
        finally:
            sequence = gateway.forget(self._side, self._request_id)
        if sequence is not None and not self._inbound.started and gateway.connection.connected:
            with suppress(nats.errors.Error):  # deleted already, or it will expire
                stream = subjects.work_stream(self._pool, self._waiting.region or "")
                await gateway.connection.jetstream.delete_msg(stream, sequence)
