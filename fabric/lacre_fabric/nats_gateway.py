"""The gateway's side of the fabric, over NATS.

A request is published once: what may be in a queue is put into no other (see `regions`).
"""

from __future__ import annotations

import asyncio
import json
import math
import time
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing, suppress
from dataclasses import dataclass, field
from typing import Any, Final, Self

import nats.errors
from nats.aio.msg import Msg
from nats.js.api import Header

from lacre import tasks
from lacre.errors import InvalidMessage, MessageTooLarge
from lacre.members import Members
from lacre_fabric import orders, subjects
from lacre_fabric.connection import API_TIMEOUT, Connection
from lacre_fabric.endpoints import Servers
from lacre_fabric.frames import Frame, Kind
from lacre_fabric.inbound import Inbound
from lacre_fabric.nats_revocations import Reader, revoke
from lacre_fabric.presence import Presence, Roster
from lacre_fabric.regions import Sent, in_order
from lacre_fabric.revocations import Revocation
from lacre_fabric.roles import MAX_DELIVERIES, Credential
from lacre_fabric.work import (
    QUEUE_LIMIT,
    SETTLE,
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

# The message's headers, beside JetStream's own.
GRANT: Final = "Grant"
REQUEST: Final = "Request"
GATEWAY: Final = "Gateway"
# Seconds that work may wait until its queue has a leader, of those that it may wait for a worker; one is chosen within nine.
LEADERLESS: Final = 10.0
NO_QUEUE: Final = 0.25  # seconds until it is tried again
MAX_POOLS: Final = 1024  # that presence may name: NATS lets a worker name its own only
MAX_STRAY: Final = 256  # requests that nobody waits for, of which workers are told within `STRAY_EVERY`
STRAY_EVERY: Final = 1.0  # seconds until a worker is told again that nobody waits: a beat comes as often
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
            said = json.loads(self.payload)
            error = said.get("error")
            if error is not None:
                raise _refused(error)
            if said.get("duplicate"):
                raise DuplicateWork("this sealed request was published before")
            return Members(said, "the ack").count("seq")
        except (ValueError, RecursionError, AttributeError, InvalidMessage) as exc:
            raise FabricUnavailable("NATS answered with what is no ack: see that the pool's queue is a JetStream") from exc


def _refused(error: Mapping[str, Any]) -> FabricError:
    if error.get("err_code") == _STORE_FAILED:
        return QueueFull("the pool's queue takes no more")
    return FabricUnavailable(f"NATS refuses: {str(error.get('description', 'it does not say why'))[:_MAX_TEXT]}")


def _give_up(acked: asyncio.Future[_Ack | None]) -> None:
    if not acked.done():
        acked.set_result(None)


class _Stray:
    """The requests for which frames came and nobody waits: each is told to its worker once in a while, and not without end."""

    def __init__(self) -> None:
        self._told: set[tuple[str, str]] = set()
        self._since = 0.0

    def add(self, pool: str, request: str) -> bool:
        """Whether the worker is to be told now."""
        now = time.monotonic()
        if now >= self._since + STRAY_EVERY:
            self._told.clear()
            self._since = now
        if (pool, request) in self._told or len(self._told) >= MAX_STRAY:
            return False
        self._told.add((pool, request))
        return True


class NatsGateway:
    """A `GatewayFabric`. One wildcard subscription takes the replies to all of this process's requests."""

    def __init__(self, connection: Connection, gateway_id: str, region: str = subjects.DEFAULT_REGION) -> None:
        self.connection = connection
        self._region = region
        self._id = gateway_id
        self._revocations = Reader(connection)
        self._inbound: dict[tuple[str, str], Inbound] = {}  # by pool and request: a pool's worker can name no other pool's
        self._by_sequence: dict[tuple[str, int], Inbound] = {}
        self._acks_at = f"{subjects.inbox(connection.credential.name)}.work."
        self._acks: dict[str, asyncio.Future[_Ack | None]] = {}  # of what is being published, by request
        self._order_keys = orders.OrderKeys()
        self._telling: set[asyncio.Task[object]] = set()
        self._rosters: dict[str, Roster] = {}  # by pool
        self._sent = Sent()
        self._presence_came = asyncio.Event()
        self._stray = _Stray()
        self._settled_at = 0.0
        self._begin()
        connection.on_reconnect = self._begin

    @classmethod
    async def connect(
        cls, servers: Servers | str, credential: Credential, gateway_id: str, region: str = subjects.DEFAULT_REGION
    ) -> Self:
        """Raises FabricUnavailable."""
        gateway = cls(await Connection.open(servers, credential), gateway_id, region)
        client = gateway.connection.client
        try:
            async with gateway.connection.mapped(confirmed=True):
                # What waits to be read is bounded by `Inbound`, for each request by its credit: that request alone ends.
                await client.subscribe_directly(subjects.replies(gateway_id), gateway._on_reply)
                await client.subscribe_directly(f"{gateway._acks_at}*", gateway._on_ack)
                await client.subscribe_directly("presence.>", gateway._on_presence)
                await client.subscribe(MAX_DELIVERIES, cb=gateway._on_max_deliveries)
        except BaseException:
            await gateway.connection.close()
            raise
        return gateway

    @property
    def connected(self) -> bool:
        return self.connection.connected

    def workers(self, pool: str, model: str) -> int:
        return sum(model in present.models for present in self._roster(pool).live().values())

    def capacity(self) -> Mapping[tuple[str, str], Capacity]:
        return {(pool, region): at for pool, heard in self._rosters.items() for region, at in heard.capacity().items()}

    async def backlog(self, pool: str, region: str) -> int:
        async with self.connection.mapped():
            return (await self.connection.jetstream.stream_info(subjects.work_stream(pool, region))).state.messages

    def _regions(self, work: Work) -> list[str]:
        """Where the work may go, the best first; empty where nobody is there."""
        free = self._roster(work.pool).free(work.model)
        if len(free) < 2:
            return list(free)
        now = time.monotonic()
        return in_order(self._region, {at: slots - self._sent.count(work.pool, at, now) for at, slots in free.items()})

    def _roster(self, pool: str) -> Roster:
        return self._rosters.get(pool) or Roster()

    async def dispatch(self, work: Work, *, queue_limit: float = QUEUE_LIMIT) -> NatsDispatch:
        if not self.connected:
            raise FabricUnavailable("not connected to NATS")
        regions = await self._await_presence(work)
        headers = {
            Header.MSG_ID.value: work.digest.hex(),
            Header.MSG_TTL.value: str(math.ceil(queue_limit) + 1),
            GRANT: work.grant,
            REQUEST: work.request_id,
            GATEWAY: self._id,
            orders.KEY: self._order_keys.of(work.pool, work.request_id).hex(),
        }
        _check_size(work, headers, self.connection.client.max_payload)
        self._inbound[work.pool, work.request_id] = inbound = Inbound(queue_limit)
        try:
            region, sequence = await self._queued(regions, work, headers, min(queue_limit, LEADERLESS))
        except BaseException:
            del self._inbound[work.pool, work.request_id]
            raise
        if sequence is not None:
            self._by_sequence[subjects.work_stream(work.pool, region), sequence] = inbound
        return NatsDispatch(self, work, region, sequence, inbound)

    async def revoke(self, revocation: Revocation) -> None:
        await revoke(self.connection, revocation)

    async def revoked(self) -> list[Revocation]:
        return await self._revocations.read()

    async def close(self) -> None:
        for inbound in self._inbound.values():
            inbound.fail(FabricUnavailable("the gateway is closing"))
        await self.connection.close()

    def _begin(self) -> None:
        """With each connection: whoever is there has a while to be heard, and sequences may count from 1 again."""
        self._settled_at = time.monotonic() + SETTLE
        self._by_sequence.clear()

    async def _await_presence(self, work: Work) -> list[str]:
        """The regions with live workers. Nobody was heard yet in the first moments of a connection; after that, silence means
        that nobody is there.
        """
        while not (regions := self._regions(work)):
            self._presence_came.clear()
            try:
                async with asyncio.timeout(self._settled_at - time.monotonic()):
                    await self._presence_came.wait()
            except TimeoutError:
                raise NoWorkers("no live worker of the pool serves the model") from None
        return regions

    async def _queued(self, regions: list[str], work: Work, headers: dict[str, str], patience: float) -> tuple[str, int | None]:
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
                if not (regions := self._regions(work)):
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

    def _on_reply(self, subject: str, block: bytes, payload: bytes) -> bool:
        try:
            pool, request_id = subjects.parse_reply(subject)
            frame = Frame.read(block, payload)
        except InvalidMessage:
            return False  # what is no frame says nothing about an attempt; where it stood in for one, a gap tells
        inbound = self._inbound.get((pool, request_id))
        if inbound is None:
            if frame.kind in (Kind.DATA, Kind.BEAT) and self._stray.add(pool, request_id):
                self._tell_soon(subjects.cancel(pool, request_id))  # it runs for nobody
            return False
        inbound.put(frame)
        if frame.kind is Kind.BEAT and (total := inbound.renewal()) is not None:
            self._tell_soon(subjects.credit(pool, request_id), str(total).encode())
        return True

    def _tell_soon(self, subject: str, payload: bytes = b"") -> None:
        telling = tasks.detach("word to a worker", self.tell(subject, payload))
        self._telling.add(telling)
        telling.add_done_callback(self._telling.discard)

    def _on_presence(self, subject: str, block: bytes, payload: bytes) -> bool:
        if block:
            return False  # a worker writes no headers: it is an entry of a bucket, which another node had JetStream send there
        try:
            pool, region, node = subjects.parse_presence(subject)
            said = Presence.parse(payload)
        except InvalidMessage:
            return False  # no sign of life that can be read is none
        if pool not in self._rosters and len(self._rosters) >= MAX_POOLS:
            return False
        heard = self._rosters.setdefault(pool, Roster()).hear(region, node, said)
        self._presence_came.set()
        return heard

    async def _on_max_deliveries(self, message: Msg) -> None:
        try:
            said = Members(json.loads(message.data), "the advisory")
            inbound = self._by_sequence.get((said.text("stream"), said.count("stream_seq")))
        except (ValueError, RecursionError, InvalidMessage):
            return
        if inbound is not None and not inbound.started.is_set():
            inbound.fail(WorkerLost("every delivery of the request came to nothing"))

    async def tell(self, subject: str, payload: bytes = b"") -> None:
        """A proven order to a worker. While NATS is away it is not said: credit and times to live end what must end."""
        _, pool, request_id = subject.split(".")
        proof = orders.proof(self._order_keys.of(pool, request_id), payload or orders.CANCEL)
        with suppress(nats.errors.Error):
            await self.connection.client.publish(subject, payload, headers={orders.PROOF: proof})

    def knows(self, work: Work) -> bool:
        return (work.pool, work.request_id) in self._inbound

    def forget(self, work: Work, region: str, sequence: int | None) -> int | None:
        """The sequence, where that still means the request's message."""
        inbound = self._inbound.pop((work.pool, work.request_id), None)
        self._sent.forget(work.pool, region, work.request_id)
        stream = subjects.work_stream(work.pool, region)
        if sequence is not None and self._by_sequence.pop((stream, sequence), None) is not inbound:
            sequence = None
        return sequence


def _check_size(work: Work, headers: dict[str, str], limit: int) -> None:
    """The server closes the whole connection over a message that is too large, and it counts headers; nats-py does not."""
    size = len(work.sealed) + sum(len(name) + len(value) + len(": \r\n") for name, value in headers.items())
    if size + _STATUS_LINE > limit:
        raise MessageTooLarge("the sealed request and its grant are larger than the fabric takes")


class NatsDispatch:
    """A `Dispatch`."""

    def __init__(self, gateway: NatsGateway, work: Work, region: str, sequence: int | None, inbound: Inbound) -> None:
        self._gateway = gateway
        self._work = work
        self._region = region
        self._sequence = sequence
        self._inbound = inbound

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
                    ended = frame.kind in (Kind.USAGE, Kind.ERROR)
                    yield frame
        finally:
            if ended:
                self._gateway.forget(self._work, self._region, self._sequence)
            else:
                await self.cancel()

    @property
    def ready(self) -> bool:
        return self._inbound.ready

    async def consumed(self, size: int) -> None:
        total = self._inbound.consumed(size)
        if total is not None:
            await self._gateway.tell(subjects.credit(self._work.pool, self._work.request_id), str(total).encode())

    async def cancel(self) -> None:
        if not self._gateway.knows(self._work):
            return
        try:
            await self._gateway.tell(subjects.cancel(self._work.pool, self._work.request_id))
            if self._gateway.connected:
                await self._inbound.parting()
        finally:
            sequence = self._gateway.forget(self._work, self._region, self._sequence)
        if sequence is not None and not self._inbound.started.is_set() and self._gateway.connected:
            with suppress(nats.errors.Error):  # gone already, or it goes by its time to live
                stream = subjects.work_stream(self._work.pool, self._region)
                await self._gateway.connection.jetstream.delete_msg(stream, sequence)
