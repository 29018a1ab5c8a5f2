"""The gateway's side of the fabric, over NATS.

Rules:
- A request is published once: what may be in a queue is put into no other (see `regions`).
- Over the gateway's main connection comes only what NATS itself says: acks, JetStream's answers, advisories. What workers say
  comes over one connection for each pool (see `nats_pool`). Pools are found by their presence, on a third one, whose loss costs
  nothing but the finding of new pools.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import AsyncExitStack, aclosing, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final, Self

import nats.errors
from nats.js.api import Header

from lacre.errors import InvalidMessage, MessageTooLarge
from lacre.jose.claims import Members
from lacre.runtime import tasks
from lacre.runtime.json_objects import parse_object
from lacre_fabric.nats import orders, subjects
from lacre_fabric.nats.connection import API_TIMEOUT, TOO_MANY_REQUESTS, Connection
from lacre_fabric.nats.pool import KEEP, PoolSide, Waiting, read_presence
from lacre_fabric.nats.regions import Sent, in_order
from lacre_fabric.nats.revocations import RevocationReader, revoke
from lacre_fabric.nats.roles import MAX_DELIVERIES, Credential
from lacre_fabric.nats.servers import Servers
from lacre_fabric.work.contract import (
    QUEUE_LIMIT,
    Capacity,
    DuplicateWork,
    FabricError,
    FabricUnavailable,
    NoQueue,
    NoWorkers,
    QueueFull,
    Work,
    WorkerLost,
)
from lacre_fabric.work.frames import Frame, FrameKind
from lacre_fabric.work.gateway_stream import Inbound
from lacre_fabric.work.presence import MAX_BYTES
from lacre_fabric.work.revocations import Revocation

# The message's headers, beside JetStream's own.
GRANT: Final = "Grant"
REQUEST: Final = "Request"
GATEWAY: Final = "Gateway"
# Seconds that work may wait until its queue has a leader, of those that it may wait for a worker; one is chosen within nine.
LEADERLESS: Final = 10.0
NO_QUEUE: Final = 0.25  # seconds until it is tried again
LOOK_LIMIT: Final = 5.0  # seconds that a look at what has not begun waits for the main connection
MAX_POOLS: Final = 1024  # that presence may name: NATS lets a worker name its own only
_NO_POOL: Final = "-"  # no pool has such a name
_STATUS_LINE: Final = 64  # bytes of NATS/1.0 and the empty line, with room
_NO_RESPONDERS: Final = b"NATS/1.0 503"
_MAX_TEXT: Final = 200  # characters of an error's text, which goes to the log
_STORE_FAILED: Final = 10077  # JSStreamStoreFailedF: the stream's bounds, with `discard: new`


@dataclass(frozen=True, slots=True)
class _Ack:
    """JetStream's word on what was published. block: headers, as on the wire."""

    block: bytes
    payload: bytes = field(repr=False)

    def sequence(self) -> int:
        """Raises DuplicateWork, QueueFull or FabricUnavailable."""
        if self.block.startswith(_NO_RESPONDERS):
            raise NoQueue("the pool has no queue: run `lacre up`, or provision the fabric")
        try:
            said = parse_object(self.payload, "the ack")
            error = said.get("error")
            if error is not None:
                raise _refused(error)
            if said.get("duplicate"):
                raise DuplicateWork("this sealed request was published before")
            return Members(said, "the ack").count("seq")
        except (AttributeError, InvalidMessage) as exc:
            raise FabricUnavailable("NATS answered with what is no ack: see that the pool's queue is a JetStream") from exc


def _refused(error: Mapping[str, Any]) -> FabricError:
    if error.get("err_code") == _STORE_FAILED:
        return QueueFull("the pool's queue takes no more")
    if error.get("err_code") == TOO_MANY_REQUESTS:
        return NoQueue("the pool's queue has too much to write: something floods it")
    return FabricUnavailable(f"NATS refuses: {str(error.get('description', 'it does not say why'))[:_MAX_TEXT]}")


def _give_up(acked: asyncio.Future[_Ack | None]) -> None:
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
        """lobby: for the presence of pools that are not known yet. open_pool: makes a pool's connection."""
        self.connection = connection
        self._lobby = lobby
        self._open_pool = open_pool
        self._region = region
        self._id = gateway_id
        self._revocations = RevocationReader(connection)
        self._sides: dict[str, PoolSide] = {}  # by pool
        self._by_sequence: dict[tuple[str, int], Inbound] = {}
        self._acks_at = f"{subjects.inbox(connection.credential.name)}.work."
        self._acks: dict[str, asyncio.Future[_Ack | None]] = {}  # of what is being published, by request
        self._order_keys = orders.OrderKeys(connection.credential.password)
        self._sent = Sent()
        connection.on_reconnect = self._returned

    @classmethod
    async def connect(
        cls, servers: Servers | str, credential: Credential, gateway_id: str, region: str = subjects.DEFAULT_REGION
    ) -> Self:
        """Raises FabricUnavailable."""

        async def open_pool(pool: str) -> Connection:
            return await Connection.open(servers, credential, keep=KEEP, purpose=f"pool {pool}")

        async with AsyncExitStack() as stack:
            connection = await Connection.open(servers, credential)
            stack.push_async_callback(connection.close)
            lobby = await Connection.open(servers, credential, keep=MAX_BYTES, purpose="presence")
            stack.push_async_callback(lobby.close)
            gateway = cls(connection, lobby, gateway_id, open_pool, region)
            async with connection.mapped(confirmed=True):
                await connection.client.subscribe_directly(f"{gateway._acks_at}*", gateway._on_ack)
                await connection.client.subscribe_directly(MAX_DELIVERIES, gateway._on_max_deliveries)
            async with lobby.mapped(confirmed=True):
                await lobby.client.subscribe_directly("presence.>", gateway._on_presence)
                # Where no pool is: a credential that may not hear this gateway's replies is denied now, and not by each pool.
                await lobby.client.subscribe(subjects.replies(gateway_id, _NO_POOL))
            stack.pop_all()
        return gateway

    @property
    def connected(self) -> bool:
        """Whether messages flow: with NATS itself, and with a pool where there are pools. One pool's flood is not every pool's
        affair: `dispatch` says which pool cannot be asked.
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

    async def backlog(self, pool: str, region: str) -> int:
        async with self.connection.mapped():
            return (await self.connection.jetstream.stream_info(subjects.work_stream(pool, region))).state.messages

    def _side(self, pool: str) -> PoolSide:
        """What this gateway knows of the pool. Raises FabricUnavailable where that is too many pools."""
        side = self._sides.get(pool)
        if side is None:
            if len(self._sides) >= MAX_POOLS:
                raise FabricUnavailable(f"more than {MAX_POOLS} pools")
            side = PoolSide(pool, self._id, partial(self._open_pool, pool), self._tell_soon, partial(self._gone, pool))
            self._sides[pool] = side
        return side

    def _regions(self, side: PoolSide, work: Work) -> list[str]:
        """Where the work may go, the best first; empty where nobody is there."""
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
        _check_size(work, headers, self.connection.client.max_payload)
        waiting = side.add(work.request_id, queue_limit)
        try:
            region, sequence = await self._queued(side, regions, work, headers, min(queue_limit, LEADERLESS))
        except BaseException:
            side.waiting.pop(work.request_id).inbound.drop()
            raise
        if sequence is not None:
            self._by_sequence[subjects.work_stream(work.pool, region), sequence] = waiting.inbound
        side.placed(waiting, region, sequence)
        return NatsDispatch(self, side, work, waiting)

    async def revoke(self, revocation: Revocation) -> None:
        await revoke(self.connection, revocation)

    async def revoked(self) -> list[Revocation]:
        return await self._revocations.read()

    async def close(self) -> None:
        for side in self._sides.values():
            for waiting in side.waiting.values():
                waiting.inbound.fail(FabricUnavailable("the gateway is closing"))
        await tasks.together(*(side.close() for side in self._sides.values()), self._lobby.close(), self.connection.close())

    def _returned(self) -> None:
        """With each new main connection: sequences may count from 1 again, and acks and advisories may be lost."""
        self._by_sequence.clear()
        for side in self._sides.values():
            side.look_soon()

    async def _gone(self, pool: str, region: str, sequences: list[int]) -> frozenset[int]:
        """As `nats_pool.Gone`."""
        try:
            async with asyncio.timeout(LOOK_LIMIT):
                await self.connection.wait_connected()
        except TimeoutError as exc:
            raise FabricUnavailable("not connected to NATS") from exc
        return await self.connection.missing(subjects.work_stream(pool, region), sequences)

    async def _await_presence(self, side: PoolSide, work: Work) -> list[str]:
        """The regions with live workers. Nobody was heard yet in the first moments of a connection; after that, silence means
        that nobody is there.
        """
        while not (regions := self._regions(side, work)):
            side.presence_came.clear()
            try:
                async with asyncio.timeout(side.settled_at - time.monotonic()):
                    await side.presence_came.wait()
            except TimeoutError:
                raise NoWorkers("no live worker of the pool serves the model") from None
        return regions

    async def _queued(
        self, side: PoolSide, regions: list[str], work: Work, headers: dict[str, str], patience: float
    ) -> tuple[str, int | None]:
        """As `_publish_in_one`; where none took it, for no queue has a leader now, it waits `patience` seconds for one."""
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
        """The region, and as for `_publish`. That no ack came proves nothing: the work stays where it may be."""
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
        """The message's sequence in its stream; None where no ack came: then it is never published a second time.

        Raises NoQueue where it certainly is in none.
        """
        denials, loop = self.connection.denials, asyncio.get_running_loop()
        acked: asyncio.Future[_Ack | None] = loop.create_future()
        self._acks[work.request_id] = acked
        patience = loop.call_later(API_TIMEOUT, _give_up, acked)
        try:
            await self.connection.client.publish(
                subjects.work(work.pool, region, work.model),
                work.sealed,
                reply=f"{self._acks_at}{work.request_id}",
                headers=headers,
            )
            ack = await acked
        except nats.errors.Error as exc:
            raise self.connection.unavailable(exc, denials) from exc
        finally:
            patience.cancel()
            del self._acks[work.request_id]
        if ack is not None:
            return ack.sequence()
        if self.connection.denials == denials:
            return None  # it may have arrived: wait for frames, and let the queue limit decide
        raise self.connection.unavailable(TimeoutError(), denials)

    def _on_ack(self, subject: str, block: bytes, payload: bytes) -> bool:
        acked = self._acks.get(subject.removeprefix(self._acks_at))
        if acked is None or acked.done():
            return False
        acked.set_result(_Ack(block, payload))
        return True

    def _on_presence(self, subject: str, block: bytes, payload: bytes) -> bool:
        """On the lobby: of a pool that has a connection of its own, it says nothing new."""
        heard = read_presence(subject, block, payload)
        if heard is None:
            return False  # before it costs a connection: another gateway can have JetStream's answers sent here
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
        if inbound is None or inbound.started.is_set():
            return False
        inbound.fail(WorkerLost("every delivery of the request came to nothing"))
        return True

    def _tell_soon(self, subject: str, payload: bytes) -> None:
        tasks.detach("word to a worker", self.tell(subject, payload))

    async def tell(self, subject: str, payload: bytes = b"") -> None:
        """A proven order to a worker. While NATS is away it is not said: credit and times to live end what must end."""
        _, pool, request_id = subject.split(".")
        proof = orders.proof(self._order_keys.of(pool, request_id), payload or orders.CANCEL)
        with suppress(nats.errors.Error):
            await self.connection.client.publish(subject, payload, headers={orders.PROOF: proof})

    def forget(self, side: PoolSide, request_id: str) -> int | None:
        """The sequence, where that still means the request's message."""
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
    """The server closes the whole connection over a message that is too large, and it counts headers; nats-py does not."""
    size = len(work.sealed) + sum(len(name) + len(value) + len(": \r\n") for name, value in headers.items())
    if size + _STATUS_LINE > limit:
        raise MessageTooLarge("the sealed request and its grant are larger than the fabric takes")


class NatsDispatch:
    """A `Dispatch`."""

    def __init__(self, gateway: NatsGateway, side: PoolSide, work: Work, waiting: Waiting) -> None:
        self._gateway = gateway
        self._side = side
        self._pool, self._request_id = work.pool, work.request_id  # and not the work: megabytes, for as long as an answer takes
        self._waiting = waiting
        self._inbound = waiting.inbound

    @property
    def receipt(self) -> bytes | None:
        return self._inbound.receipt

    @property
    def receipts(self) -> tuple[bytes, ...]:
        return self._inbound.receipts

    async def frames(self) -> AsyncGenerator[Frame, None]:
        ended = False
        try:
            async with aclosing(self._inbound.frames()) as frames:
                async for frame in frames:
                    ended = frame.kind in (FrameKind.USAGE, FrameKind.ERROR)
                    yield frame
        finally:
            if ended:
                self._gateway.forget(self._side, self._request_id)
            else:
                await self.cancel()

    @property
    def ready(self) -> bool:
        return self._inbound.ready

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
        if sequence is not None and not self._inbound.started.is_set() and gateway.connection.connected:
            with suppress(nats.errors.Error):  # gone already, or it goes by its time to live
                stream = subjects.work_stream(self._pool, self._waiting.region or "")
                await gateway.connection.jetstream.delete_msg(stream, sequence)
