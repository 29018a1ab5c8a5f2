"""The gateway's side of the fabric, over NATS."""

from __future__ import annotations

import asyncio
import json
import math
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Final, Self

import nats.errors
import nats.js.errors
from nats.aio.msg import Msg
from nats.js.api import Header

from lacre.errors import MessageTooLarge
from lacre_fabric import subjects
from lacre_fabric.connection import API_TIMEOUT, Connection, headers_of
from lacre_fabric.frames import KIND, Frame, Kind
from lacre_fabric.inbound import Inbound, parse_or_fail
from lacre_fabric.roles import Credential
from lacre_fabric.work import (
    PRESENT_FOR,
    QUEUE_LIMIT,
    SETTLE,
    DuplicateWork,
    FabricUnavailable,
    NoWorkers,
    QueueFull,
    Work,
    WorkerLost,
)

# The message's headers, beside JetStream's own.
GRANT: Final = "Grant"
REQUEST: Final = "Request"
GATEWAY: Final = "Gateway"
ADVISORIES: Final = "$JS.EVENT.ADVISORY.CONSUMER.MAX_DELIVERIES.>"
_STATUS_LINE: Final = 64  # bytes of NATS/1.0 and the empty line, with room
_STORE_FAILED: Final = 10077  # JSStreamStoreFailedF: the stream's bounds, with `discard: new`


@dataclass(frozen=True, slots=True)
class _Presence:
    models: frozenset[str]
    busy: int
    free: int
    until: float  # on the monotonic clock


class NatsGateway:
    """A `GatewayFabric`. One wildcard subscription takes the replies to all of this process's requests."""

    def __init__(self, connection: Connection, gateway_id: str) -> None:
        self.connection = connection
        self._id = gateway_id
        self._inbound: dict[str, Inbound] = {}
        self._by_sequence: dict[tuple[str, int], str] = {}
        self._present: dict[tuple[str, str], _Presence] = {}
        self._presence_came = asyncio.Event()
        self._settled_at = time.monotonic() + SETTLE

    @classmethod
    async def connect(cls, url: str, credential: Credential, gateway_id: str) -> Self:
        """Raises FabricUnavailable."""
        gateway = cls(await Connection.open(url, credential), gateway_id)
        client = gateway.connection.client
        async with gateway.connection.mapped():
            # No limit of the client's own: `Inbound` bounds each request by its credit, and ends that request alone.
            await client.subscribe(
                subjects.replies(gateway_id), cb=gateway._on_reply, pending_msgs_limit=0, pending_bytes_limit=0
            )
            await client.subscribe("presence.>", cb=gateway._on_presence)
            await client.subscribe(ADVISORIES, cb=gateway._on_max_deliveries)
            await client.flush()
        return gateway

    @property
    def connected(self) -> bool:
        return self.connection.connected

    def workers(self, pool: str, model: str) -> int:
        now = time.monotonic()
        return sum(present.until > now and model in present.models for (at, _), present in self._present.items() if at == pool)

    async def dispatch(self, work: Work, *, queue_limit: float = QUEUE_LIMIT) -> NatsDispatch:
        if not self.connected:
            raise FabricUnavailable("not connected to NATS")
        await self._await_presence(work)
        headers = {
            Header.MSG_ID.value: work.digest.hex(),
            Header.MSG_TTL.value: str(math.ceil(queue_limit) + 1),
            GRANT: work.grant,
            REQUEST: work.request_id,
            GATEWAY: self._id,
        }
        _check_size(work, headers, self.connection.client.max_payload)
        self._inbound[work.request_id] = inbound = Inbound(queue_limit)
        try:
            sequence = await self._publish(work, headers)
        except BaseException:
            del self._inbound[work.request_id]
            raise
        if sequence is not None:
            self._by_sequence[subjects.work_stream(work.pool), sequence] = work.request_id
        return NatsDispatch(self, work, sequence, inbound)

    async def close(self) -> None:
        for inbound in self._inbound.values():
            inbound.fail(FabricUnavailable("the gateway is closing"))
        await self.connection.close()

    async def _await_presence(self, work: Work) -> None:
        """Nobody has been heard yet in a gateway's first moments; after that, silence means that nobody is there."""
        while not self.workers(work.pool, work.model):
            self._presence_came.clear()
            try:
                async with asyncio.timeout(self._settled_at - time.monotonic()):
                    await self._presence_came.wait()
            except TimeoutError:
                raise NoWorkers("no live worker of the pool serves the model") from None

    async def _publish(self, work: Work, headers: dict[str, str]) -> int | None:
        """The message's sequence in its stream; None where no ack came. It is never published a second time."""
        js = self.connection.jetstream
        try:
            ack = await js.publish(subjects.work(work.pool, work.model), work.sealed, headers=headers, timeout=API_TIMEOUT)
        except nats.js.errors.APIError as exc:
            if exc.err_code == _STORE_FAILED:
                raise QueueFull("the pool's queue takes no more") from exc
            raise FabricUnavailable("the pool's queue is out of order") from exc
        except TimeoutError as exc:
            if self.connection.denied:
                raise FabricUnavailable(f"NATS denies the gateway this: {self.connection.denied}") from exc
            return None  # it may have arrived: wait for frames, and let the queue limit decide
        except nats.errors.Error as exc:
            raise FabricUnavailable("the pool has no queue: run `lacre up`, or provision the fabric") from exc
        if ack.duplicate:
            raise DuplicateWork("this sealed request was published before")
        return ack.seq

    async def _on_reply(self, message: Msg) -> None:
        _, pool, _, request_id = message.subject.split(".")
        inbound = self._inbound.get(request_id)
        if inbound is not None:
            parse_or_fail(inbound, headers_of(message), message.data)
        elif headers_of(message).get(KIND) in (Kind.DATA, Kind.BEAT):
            await self.connection.client.publish(subjects.cancel(pool, request_id))  # it runs for nobody

    async def _on_presence(self, message: Msg) -> None:
        try:
            _, pool, node = message.subject.split(".")
            said = json.loads(message.data)
            models, busy, free = frozenset(map(str, said["models"])), int(said["busy"]), int(said["free"])
        except (ValueError, KeyError, TypeError):
            return  # no sign of life that can be read is none
        self._present[pool, node] = _Presence(models, busy, free, time.monotonic() + PRESENT_FOR)
        self._presence_came.set()

    async def _on_max_deliveries(self, message: Msg) -> None:
        try:
            said = json.loads(message.data)
            stream, sequence = str(said["stream"]), int(said["stream_seq"])
        except (ValueError, KeyError, TypeError):
            return
        request_id = self._by_sequence.get((stream, sequence))
        if request_id is not None and request_id in self._inbound and not self._inbound[request_id].started.is_set():
            self._inbound[request_id].fail(WorkerLost("every delivery of the request came to nothing"))

    def forget(self, work: Work, sequence: int | None) -> bool:
        """Whether the request was still known."""
        if sequence is not None:
            self._by_sequence.pop((subjects.work_stream(work.pool), sequence), None)
        return self._inbound.pop(work.request_id, None) is not None


def _check_size(work: Work, headers: dict[str, str], limit: int) -> None:
    """The server closes the whole connection over a message that is too large, and it counts headers; nats-py does not."""
    size = len(work.sealed) + sum(len(name) + len(value) + len(": \r\n") for name, value in headers.items())
    if size + _STATUS_LINE > limit:
        raise MessageTooLarge("the sealed request and its grant are larger than the fabric takes")


class NatsDispatch:
    """A `Dispatch`."""

    def __init__(self, gateway: NatsGateway, work: Work, sequence: int | None, inbound: Inbound) -> None:
        self._gateway = gateway
        self._work = work
        self._sequence = sequence
        self._inbound = inbound

    @property
    def receipt(self) -> bytes | None:
        return self._inbound.receipt

    async def frames(self) -> AsyncGenerator[Frame, None]:
        ended = False
        try:
            async with aclosing(self._inbound.frames()) as frames:
                async for frame in frames:
                    ended = frame.kind in (Kind.USAGE, Kind.ERROR)
                    yield frame
        finally:
            if ended:
                self._gateway.forget(self._work, self._sequence)
            else:
                await self.cancel()

    async def consumed(self, size: int) -> None:
        client = self._gateway.connection.client
        if client.is_connected:
            await client.publish(subjects.credit(self._work.pool, self._work.request_id), str(size).encode())

    async def cancel(self) -> None:
        if not self._gateway.forget(self._work, self._sequence):
            return
        connection = self._gateway.connection
        if not connection.connected:
            return  # the worker's credit and the message's time to live end it
        await connection.client.publish(subjects.cancel(self._work.pool, self._work.request_id))
        if self._sequence is not None and not self._inbound.started.is_set():
            try:
                await connection.jetstream.delete_msg(subjects.work_stream(self._work.pool), self._sequence)
            except (nats.errors.Error, TimeoutError):
                return  # gone already, or it goes by its time to live
