"""A node's side of the fabric, over NATS. It only dials out, and pulls as much work of its region as it has free slots."""

from __future__ import annotations

import asyncio
import json
import secrets
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from itertools import cycle
from typing import Final, Protocol, Self

import nats.errors
import nats.js.errors
import structlog
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription
from nats.js.api import Header
from nats.js.client import JetStreamContext

from lacre import problems, tasks
from lacre.errors import ProtocolError, SettingsError
from lacre.wire.header import SealedHeader
from lacre_fabric import nats_protocol, orders, subjects
from lacre_fabric.buckets import CONFLICTS
from lacre_fabric.connection import API_TIMEOUT, Connection, headers_of
from lacre_fabric.endpoints import Servers
from lacre_fabric.frames import Frame, Kind
from lacre_fabric.nats_gateway import GATEWAY, GRANT, REQUEST
from lacre_fabric.outbound import Outbound
from lacre_fabric.presence import KEYS, WRONG
from lacre_fabric.roles import MAX_SLOTS, Credential
from lacre_fabric.work import BEAT, Cancelled, FabricUnavailable, Work

PULL: Final = 2.0  # seconds that one pull waits, where the node serves one model; one that NATS lost is made good this soon
PULL_EACH: Final = 0.5  # and where it serves several, asked in turn
NOT_ABLE: Final = 0.5  # seconds until the next look whether the worker can work
_STAMP: Final = "Nats-Time-Stamp"  # of what JetStream gives back: when it was written
NO_QUEUE: Final = 1.0  # seconds until the next look for a queue that is not there
IN_PROGRESS: Final = 2.0  # seconds between signs that unacked work goes on; well inside `ACK_WAIT`
MAX_CREDIT_DIGITS: Final = 12  # of the bytes that a reader took: more than any answer has

log = structlog.get_logger("lacre.fabric")


@dataclass(slots=True)
class _Queue:
    """A model's queue. there: NATS has it, as far as the last pull could tell."""

    model: str
    pull: JetStreamContext.PullSubscription
    there: bool = True


class Able(Protocol):
    """What a worker can serve now, and the kinds of what keeps it from serving the rest."""

    def models(self) -> Collection[str]: ...

    def kinds(self) -> Sequence[str]: ...


class NatsWorker:
    """A `WorkerFabric`. It outlives its queues: a model whose queue is gone is not announced, and looked for again.

    A worker that cannot work takes no work and announces no model, until it can (`Able`).
    """

    def __init__(
        self,
        connection: Connection,
        pool: str,
        node: str,
        slots: int,
        *,
        keys: Callable[[], Sequence[str]] = tuple,
        able: Able | None = None,
        region: str = subjects.DEFAULT_REGION,
    ) -> None:
        self.connection = connection
        self._able = able
        self._keys = keys
        self._pool = pool
        self._node = node
        self._region = region
        self._slots = slots
        self._free = slots
        self._waiting = 0  # slots that a pull holds for work that has not come yet
        self._slot_freed = asyncio.Event()
        self._queues: list[_Queue] = []
        self._turn: Iterator[_Queue] = iter(())
        self._presence: tasks.Background | None = None
        self._draining = False
        self.claims_of = pool

    @classmethod
    async def connect(
        cls,
        servers: Servers | str,
        credential: Credential,
        pool: str,
        node: str,
        models: Sequence[str],
        *,
        slots: int = 1,
        keys: Callable[[], Sequence[str]] = tuple,
        able: Able | None = None,
        region: str = subjects.DEFAULT_REGION,
    ) -> Self:
        """slots: at most `MAX_SLOTS`. keys: the fingerprints of the pool's keys that are held here now; presence tells them.
        able: what keeps the worker from working; None for nothing.

        Raises SettingsError or FabricUnavailable.
        """
        if slots > MAX_SLOTS:
            raise SettingsError(f"slots: a worker has at most {MAX_SLOTS}, not {slots}: run more workers of the pool")
        worker = cls(await Connection.open(servers, credential), pool, node, slots, keys=keys, able=able, region=region)
        try:
            await worker._bind(models)
        except BaseException:
            await worker.connection.close()
            raise
        worker._presence = tasks.start("presence", worker._announce)
        return worker

    async def _bind(self, models: Sequence[str]) -> None:
        connection, stream = self.connection, subjects.work_stream(self._pool, self._region)
        async with connection.mapped(confirmed=True):
            for model in models:
                pull = await connection.jetstream.pull_subscribe_bind(consumer=subjects.consumer(model), stream=stream)
                self._queues.append(_Queue(model, pull))
            self._turn = cycle(self._queues)
            await self._say_presence()

    async def pull(self) -> NatsDelivery:
        if self._presence is not None:
            self._presence.check()
        while self._free == 0:
            self._slot_freed.clear()
            await self._slot_freed.wait()
        self._free -= 1
        self._waiting += 1
        try:
            return await self._pull()
        except BaseException:
            self.release()
            raise
        finally:
            self._waiting -= 1

    async def _pull(self) -> NatsDelivery:
        while not self._draining:
            # Pulls that the library keeps until it is connected would come in a heap, and take more work than there are slots.
            await self.connection.wait_connected()
            queue, denials = next(self._turn), self.connection.denials
            if not self._serves(queue.model):
                await asyncio.sleep(NOT_ABLE / len(self._queues))
                continue
            try:
                (message,) = await queue.pull.fetch(1, timeout=PULL if len(self._queues) == 1 and queue.there else PULL_EACH)
            except (nats.js.errors.ServiceUnavailableError, nats.errors.NoRespondersError):
                await self._look(queue, there=False)
                await asyncio.sleep(NO_QUEUE / len(self._queues))
                continue
            except nats.errors.Error as exc:
                if isinstance(exc, TimeoutError) and self.connection.denials == denials:
                    await self._look(queue, there=self.connection.connected)
                    continue
                raise self.connection.unavailable(exc, denials) from exc
            await self._look(queue, there=True)
            delivery = await self._take(message)
            if delivery is not None and self._serves(queue.model):
                return delivery
            if delivery is not None:  # it cannot any more, since it asked: the client may send it again, to another
                with suppress(FabricUnavailable, Cancelled):
                    await delivery.reject(problems.UNCLAIMED.type)
        raise FabricUnavailable("this worker is draining: it takes no more work")

    async def _look(self, queue: _Queue, *, there: bool) -> None:
        if queue.there != there:
            queue.there = there
            log.warning("queue.found" if there else "queue.missing", pool=self._pool, model=queue.model)
            await self._say_presence()

    async def _take(self, message: Msg) -> NatsDelivery | None:
        """The delivery, ready to be worked on; None where nobody could be answered."""
        headers = headers_of(message)
        request_id, gateway = headers.get(REQUEST, ""), headers.get(GATEWAY, "")
        models = (queue.model for queue in self._queues)
        model = next((name for name in models if subjects.work(self._pool, self._region, name) == message.subject), None)
        try:
            order_key = orders.parse_key(headers.get(orders.KEY))
        except ValueError:
            model = None
        if model is None or not subjects.is_request(request_id) or not subjects.is_name(gateway):
            log.warning("work.unanswerable")
            await message.ack()
            return None
        work = Work(request_id, self._pool, model, _digest(message.data), headers.get(GRANT, ""), message.data)
        delivery = NatsDelivery(self, message, work, subjects.reply(self._pool, gateway, request_id), order_key)
        await delivery.start()
        return delivery

    def _serves(self, model: str) -> bool:
        return self._able is None or model in self._able.models()

    def release(self) -> None:
        self._free += 1
        self._slot_freed.set()

    async def try_claim(self) -> float | None:
        """As the function of this name."""
        return await try_claim(self.connection, self.claims_of)

    async def drain(self) -> None:
        if self._draining:
            return
        self._draining = True
        if self._presence is not None:
            await self._presence.close()
        await self._say_presence()
        if not self.connection.connected:
            return
        with suppress(nats.errors.Error):
            for queue in self._queues:  # with nobody there to hear the answer, the server drops a pull that waits
                await queue.pull.unsubscribe()
            await self.connection.round_trip()

    async def close(self) -> None:
        await self.drain()
        await self.connection.close()

    async def _announce(self) -> None:
        while True:
            await self._say_presence()
            await asyncio.sleep(BEAT)

    async def announce(self) -> None:
        """Tells who is there and what it serves at once, beside once a second."""
        await self._say_presence()

    async def _say_presence(self) -> None:
        models = [q.model for q in self._queues if q.there and not self._draining and self._serves(q.model)]
        free = self._free + self._waiting
        wrong = [] if self._able is None else self._able.kinds()
        said = {"models": models, "free": free, "busy": self._slots - free, KEYS: list(self._keys()), WRONG: wrong}
        with suppress(nats.errors.Error):  # while NATS is away there is nobody to tell
            subject = subjects.presence(self._pool, self._region, self._node)
            await self.connection.client.publish(subject, json.dumps(said).encode())


class NatsDelivery:
    """A `Delivery`."""

    def __init__(self, worker: NatsWorker, message: Msg, work: Work, reply: str, order_key: bytes | None) -> None:
        self._worker = worker
        self._message = message
        self._reply = reply
        self._order_key = order_key
        self._unproven = False
        self._doubtful = False  # whether a claim may be this attempt's though nobody said so
        self._out = Outbound(self._publish)
        self._subscriptions: list[Subscription] = []
        self._progress: asyncio.Task[object] | None = None
        self._settled = False
        self.work = work
        self.attempt = self._out.attempt
        self.cancelled = self._out.cancelled
        self.again = _deliveries(message) > 1

    async def start(self) -> None:
        client = self._worker.connection.client
        pool, request_id = self.work.pool, self.work.request_id
        self._subscriptions = [
            await client.subscribe_directly(subjects.cancel(pool, request_id), self._on_cancel),
            await client.subscribe_directly(subjects.credit(pool, request_id), self._on_credit),
        ]
        self._progress = tasks.detach("signs of work", self._in_progress())

    async def claim(self) -> bool:
        """The first to create the key has the request. A create that timed out may have been done: it is read back.

        Raises FabricUnavailable where that cannot be told; to call it again is safe.
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
            self._doubtful = True  # this create, or one before it, may have been done
            if connection.denials == denials:
                with suppress(nats.errors.Error):
                    if (
                        held := await connection.newest(f"KV_{subjects.claims_bucket(self._worker.claims_of)}", subject)
                    ) is not None:
                        return held == mine
            raise connection.unavailable(failed, denials) from failed
        return True

    async def send(self, kind: Kind, payload: bytes) -> None:
        await self._out.send(kind, payload)
        await self._settle()

    async def stop(self, receipt: bytes) -> None:
        await self._out.stop(receipt)

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
        """block: headers, as on the wire. Raises InvalidMessage."""
        given = nats_protocol.fields(block, status=False).get(orders.PROOF, "") if block else ""
        if orders.proven(self._order_key, order, given):
            return True
        if not self._unproven:  # one line, however many come
            self._unproven = True
            log.warning("order.unproven", pool=self.work.pool, remedy="see who holds the pool's credentials: one may be stolen")
        return False


def _deliveries(message: Msg) -> int:
    """How often JetStream has delivered the message, this time among them."""
    try:
        return message.metadata.num_delivered or 1
    except (nats.errors.Error, ValueError, LookupError, ArithmeticError, OSError):
        return 1  # its reply subject is not JetStream's: nobody will deliver it again


async def try_claim(connection: Connection, pool: str) -> float | None:
    """Writes a claim that is no request's, and reads it back: when the server wrote it, in seconds since the epoch. None where
    a server was asked that does not have it yet. Raises FabricUnavailable.
    """
    subject = subjects.claim(pool, secrets.token_hex(32))
    async with connection.mapped():
        first = {Header.EXPECTED_LAST_SUBJECT_SEQUENCE.value: "0"}
        await connection.jetstream.publish(subject, b"", headers=first)
        found = f"{subjects.API}.DIRECT.GET.KV_{subjects.claims_bucket(pool)}.{subject}"
        stamp = headers_of(await connection.client.request(found, timeout=API_TIMEOUT)).get(_STAMP, "")
    try:
        return datetime.fromisoformat(stamp).timestamp()
    except ValueError:
        return None


def _digest(sealed: bytes) -> bytes:
    """Of `hdr ‖ enc`; empty where the bytes are no sealed request, which the node will say to the gateway."""
    try:
        return SealedHeader.parse(sealed).digest
    except ProtocolError:
        return b""
