"""A node's side of the fabric, over NATS. It only dials out, and pulls as much work as it has free slots."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Sequence
from contextlib import suppress
from itertools import cycle
from typing import Final, Self

import nats.errors
import nats.js.errors
import structlog
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription
from nats.js.client import JetStreamContext
from nats.js.kv import KeyValue

from lacre.errors import ProtocolError
from lacre.wire.header import SealedHeader
from lacre_fabric import subjects
from lacre_fabric.connection import Connection, headers_of
from lacre_fabric.frames import Frame, Kind
from lacre_fabric.nats_gateway import GATEWAY, GRANT, REQUEST
from lacre_fabric.outbound import Outbound
from lacre_fabric.roles import Credential
from lacre_fabric.work import BEAT, FabricUnavailable, Work

PULL: Final = 2.0  # seconds that one pull waits, where the node serves one model; one that NATS lost is made good this soon
PULL_EACH: Final = 0.5  # and where it serves several, asked in turn
NO_QUEUE: Final = 1.0  # seconds until the next look for a queue that is not there
IN_PROGRESS: Final = 2.0  # seconds between signs that unacked work goes on; well inside `ACK_WAIT`
_REQUEST_ID: Final = re.compile(r"[0-9a-f]{32}")

log = structlog.get_logger("lacre.fabric")


class NatsWorker:
    """A `WorkerFabric`. It outlives its queue: while there is none (NATS forgot it) it announces no model, and looks again."""

    def __init__(self, connection: Connection, pool: str, node: str, models: Sequence[str], slots: int) -> None:
        self.connection = connection
        self._pool = pool
        self._node = node
        self._models = tuple(models)
        self._slots = slots
        self._free = slots
        self._slot_freed = asyncio.Event()
        self._pulls: list[JetStreamContext.PullSubscription] = []
        self._claims: KeyValue | None = None
        self._presence: asyncio.Task[None] | None = None
        self._queued = True  # there is a queue to pull from
        self._draining = False
        self._turn = cycle(range(len(self._models)))

    @classmethod
    async def connect(
        cls, url: str, credential: Credential, pool: str, node: str, models: Sequence[str], *, slots: int = 1
    ) -> Self:
        """Raises FabricUnavailable."""
        worker = cls(await Connection.open(url, credential), pool, node, models, slots)
        try:
            await worker._bind()
        except BaseException:
            await worker.connection.close()
            raise
        worker._presence = asyncio.create_task(worker._announce())
        return worker

    async def _bind(self) -> None:
        connection, stream = self.connection, subjects.work_stream(self._pool)
        async with connection.mapped(confirmed=True):
            for model in self._models:
                pull = await connection.jetstream.pull_subscribe_bind(consumer=subjects.consumer(model), stream=stream)
                self._pulls.append(pull)
            self._claims = await connection.jetstream.key_value(subjects.claims_bucket(self._pool))
            await self._say_presence()

    async def pull(self) -> NatsDelivery:
        while self._free == 0:
            self._slot_freed.clear()
            await self._slot_freed.wait()
        self._free -= 1
        try:
            return await self._pull()
        except BaseException:
            self.release()
            raise

    async def _pull(self) -> NatsDelivery:
        wait = PULL if len(self._pulls) == 1 else PULL_EACH
        while not self._draining:
            # Pulls that the library keeps until it is connected would come in a heap, and take more work than there are slots.
            await self.connection.wait_connected()
            denials = self.connection.denials
            try:
                (message,) = await self._pulls[next(self._turn)].fetch(1, timeout=wait)
            except (nats.js.errors.ServiceUnavailableError, nats.errors.NoRespondersError):
                await self._without_queue()
                continue
            except nats.errors.Error as exc:
                if isinstance(exc, TimeoutError) and self.connection.denials == denials:
                    self._queued = True
                    continue
                raise self.connection.unavailable(exc, denials) from exc
            self._queued = True
            delivery = await self._take(message)
            if delivery is not None:
                return delivery
        raise FabricUnavailable("this worker is draining: it takes no more work")

    async def _without_queue(self) -> None:
        if self._queued:
            log.warning("queue.missing", pool=self._pool, remedy="provision the fabric")
            self._queued = False
            await self._say_presence()
        await asyncio.sleep(NO_QUEUE)

    async def _take(self, message: Msg) -> NatsDelivery | None:
        """The delivery, ready to be worked on; None where nobody could be answered."""
        headers = headers_of(message)
        request_id, gateway = headers.get(REQUEST, ""), headers.get(GATEWAY, "")
        model = next((name for name in self._models if subjects.work(self._pool, name) == message.subject), None)
        if model is None or not _REQUEST_ID.fullmatch(request_id) or not subjects.is_name(gateway):
            log.warning("work.unanswerable")
            await message.ack()
            return None
        work = Work(request_id, self._pool, model, _digest(message.data), headers.get(GRANT, ""), message.data)
        delivery = NatsDelivery(self, message, work, subjects.reply(self._pool, gateway, request_id))
        await delivery.start()
        return delivery

    def release(self) -> None:
        self._free += 1
        self._slot_freed.set()

    @property
    def claims(self) -> KeyValue:
        if self._claims is None:
            raise FabricUnavailable("not bound yet")
        return self._claims

    async def drain(self) -> None:
        if self._draining:
            return
        self._draining = True
        if self._presence is not None:
            self._presence.cancel()
            await asyncio.gather(self._presence, return_exceptions=True)
        await self._say_presence()
        for pull in self._pulls:  # with nobody there to hear the answer, the server drops a pull that waits
            with suppress(nats.errors.Error):
                await pull.unsubscribe()

    async def close(self) -> None:
        await self.drain()
        await self.connection.close()

    async def _announce(self) -> None:
        while True:
            await self._say_presence()
            await asyncio.sleep(BEAT)

    async def _say_presence(self) -> None:
        models = list(self._models) if self._queued and not self._draining else []
        said = {"models": models, "free": self._free, "busy": self._slots - self._free}
        with suppress(nats.errors.Error):  # while NATS is away there is nobody to tell
            await self.connection.client.publish(subjects.presence(self._pool, self._node), json.dumps(said).encode())


class NatsDelivery:
    """A `Delivery`."""

    def __init__(self, worker: NatsWorker, message: Msg, work: Work, reply: str) -> None:
        self._worker = worker
        self._message = message
        self._reply = reply
        self._out = Outbound(self._publish)
        self._subscriptions: list[Subscription] = []
        self._progress: asyncio.Task[None] | None = None
        self._settled = False
        self.work = work
        self.attempt = self._out.attempt
        self.cancelled = self._out.cancelled

    async def start(self) -> None:
        client = self._worker.connection.client
        pool, request_id = self.work.pool, self.work.request_id
        self._subscriptions = [
            await client.subscribe(subjects.cancel(pool, request_id), cb=self._on_cancel),
            await client.subscribe(subjects.credit(pool, request_id), cb=self._on_credit),
        ]
        self._progress = asyncio.create_task(self._in_progress())

    async def claim(self) -> bool:
        """The first to create the key has the request. A create that timed out may have been done: it is read back.

        Raises FabricUnavailable where that cannot be told: the work is left for another worker.
        """
        key, mine = self.work.digest.hex(), self.attempt.encode()
        denials = self._worker.connection.denials
        try:
            await self._worker.claims.create(key, mine)
        except nats.js.errors.KeyWrongLastSequenceError:
            return False
        except nats.errors.Error:
            try:
                return (await self._worker.claims.get(key)).value == mine
            except nats.errors.Error as exc:
                self._leave()
                raise self._worker.connection.unavailable(exc, denials) from exc
        return True

    async def send(self, kind: Kind, payload: bytes) -> None:
        await self._out.send(kind, payload)
        await self._settle()

    async def reject(self, problem_type: str) -> None:
        await self.send(Kind.ERROR, problem_type.encode())
        await self.drop()

    async def drop(self) -> None:
        await self._settle()
        subscriptions, self._subscriptions = self._subscriptions, []
        for subscription in subscriptions:
            with suppress(nats.errors.Error):
                await subscription.unsubscribe()

    async def _settle(self) -> None:
        """Acks once. The work leaves the queue with it: what breaks from here on is the client's to resume."""
        if not self._settled:
            self._leave()
            with suppress(nats.errors.Error):
                await self._message.ack()

    def _leave(self) -> None:
        """No sign any more that the work goes on: unless it is acked now, it is delivered again."""
        self._settled = True
        if self._progress is not None:
            self._progress.cancel()

    async def _in_progress(self) -> None:
        while True:
            await asyncio.sleep(IN_PROGRESS)
            with suppress(nats.errors.Error):
                await self._message.in_progress()

    async def _publish(self, frame: Frame) -> None:
        try:
            await self._worker.connection.client.publish(self._reply, frame.payload, headers=frame.headers())
        except nats.errors.Error as exc:
            raise FabricUnavailable("the connection to NATS is gone") from exc

    async def _on_cancel(self, _message: Msg) -> None:
        self._out.cancel()

    async def _on_credit(self, message: Msg) -> None:
        if message.data.isdigit() and len(message.data) < 10:
            self._out.renew(int(message.data))


def _digest(sealed: bytes) -> bytes:
    """Of `hdr ‖ enc`; empty where the bytes are no sealed request, which the node will say to the gateway."""
    try:
        return SealedHeader.parse(sealed).digest
    except ProtocolError:
        return b""
