"""A worker's side of the fabric, over NATS. It only dials out, and pulls only as much work of its region as it has free slots.

Each model has its own queue, and one pull at a time while it has a free slot (`slots.py`). So a flood of requests for one model
takes no slot of another's. Work that this worker cannot start stays in the queue for other workers.

A gateway may also offer work to this very worker, because it has the beginning of a conversation in its cache:
- An offer waits nowhere. The worker takes it into a free slot at once, or declines it, and the gateway queues it.
- The worker takes it only while its own pull waits in vain (`ModelQueue.quiet`). So an offer overtakes no request in the queue.
- If it takes the last slot, the waiting pull may still bring work. That work returns to the queue.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from typing import Final, Protocol, Self

import nats.errors
import nats.js.errors
import structlog
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription
from nats.js.api import Header

from lacre import __version__, problems
from lacre.errors import NewerFormat, ProtocolError, SettingsError
from lacre.jose.formats import HEADER
from lacre.runtime import tasks
from lacre_fabric.nats import orders, protocol, subjects
from lacre_fabric.nats.connection import API_TIMEOUT, Connection, headers_of
from lacre_fabric.nats.delivery import NatsDelivery, digest_of
from lacre_fabric.nats.gateway import GATEWAY, GRANT, REQUEST, WORK
from lacre_fabric.nats.handing_back import was_handed_back
from lacre_fabric.nats.model_queue import ModelQueue
from lacre_fabric.nats.roles import MAX_SLOTS, OFFERS_GROUP, Credential
from lacre_fabric.nats.servers import Servers
from lacre_fabric.work.contract import BEAT, Cancelled, Delivery, FabricUnavailable, NoMoreWork, Work
from lacre_fabric.work.model_counts import ModelCounts
from lacre_fabric.work.presence import COUNTS, KEYS, MAX_BYTES, ROOM, VERSION, WRONG
from lacre_fabric.work.presence import OFFERS as TAKES_OFFERS
from lacre_fabric.work.settlement_keys import SETTLE
from lacre_fabric.work.slots import Slots

PULL: Final = 2.0  # seconds that one pull waits; a pull that NATS loses is repeated this soon
PULL_EACH: Final = 0.5  # seconds, if there are fewer free slots than models; the models then take turns
NOT_ABLE: Final = 0.5  # seconds between checks whether the worker can work
_STAMP: Final = "Nats-Time-Stamp"  # header of stored messages that JetStream returns: when they were written
LAST_PULL: Final = PULL + 0.5  # seconds until a draining worker's pulls have ended: NATS ends them in time for `PULL`
FREE_AGAIN: Final = 0.05  # seconds from a full worker's first free slot until it announces it

log = structlog.get_logger("lacre.fabric")

Counts = Callable[[], Mapping[str, ModelCounts]]


class Able(Protocol):
    """The models that a worker can serve now, and the faults that keep it from serving the rest."""

    def models(self) -> Collection[str]: ...

    def kinds(self) -> Sequence[str]: ...


class NatsWorker:
    """A `WorkerFabric`. It survives missing queues: it stops announcing such a model and keeps looking for its queue.

    A worker that cannot work (`Able`) pulls nothing and announces no model until it can.
    """

    def __init__(
        self,
        connection: Connection,
        pool: str,
        node: str,
        slots: Slots,
        *,
        keys: Callable[[], Sequence[str]] = tuple,
        able: Able | None = None,
        region: str = subjects.DEFAULT_REGION,
        counts: Counts = dict,
    ) -> None:
        self.connection = connection
        self._counts = counts
        self._able = able
        self._keys = keys
        self._pool = pool
        self._node = node
        self._region = region
        self._slots = slots
        self._changed = asyncio.Event()  # a slot may be free, or the worker drains
        self._queues: list[ModelQueue] = []  # the next in turn comes first
        self._offers: Subscription | None = None  # of work for this worker
        self._offered: deque[NatsDelivery] = deque()  # taken, and in a slot each
        self._soon: asyncio.TimerHandle | None = None  # the next presence, if it is due before its time
        self._pulls: dict[str, asyncio.Task[NatsDelivery | None]] = {}  # pulls in progress, by model
        self._pullers = 0
        self._presence: tasks.Background | None = None
        self._draining = False
        self.on_order: Callable[[bytes], bool] | None = None  # takes signed orders; True: the worker now does something else
        self.claims_of = pool
        connection.on_reconnect = self._returned

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
        each: Mapping[str, int] | None = None,
        sharing: Mapping[str, str] | None = None,
        keys: Callable[[], Sequence[str]] = tuple,
        able: Able | None = None,
        region: str = subjects.DEFAULT_REGION,
        counts: Counts = dict,
    ) -> Self:
        """Connects, binds the queues and starts to announce. Raises SettingsError or FabricUnavailable.

        - slots: at most `MAX_SLOTS`. each, sharing: as in `Slots`.
        - keys: returns the fingerprints of the pool keys held now, for presence.
        - able: reports faults; None: none. counts: returns the work so far by model, for presence.
        """
        if slots > MAX_SLOTS:
            raise SettingsError(f"slots: a worker has at most {MAX_SLOTS}, not {slots}: run more workers of the pool")
        room = Slots(slots, models, each, sharing)
        worker = cls(
            await Connection.open(servers, credential), pool, node, room, keys=keys, able=able, region=region, counts=counts
        )
        try:
            await worker._bind(models)
            await worker._hear_offers()
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
                self._queues.append(ModelQueue(model, pull))
            await self._say_presence()

    async def _hear_offers(self) -> None:
        """NATS servers with the permissions of an older version deny it. Then no gateway learns of it, and none offers work."""
        subject = subjects.offers(self._pool, self._region, self._node)
        offers: Subscription | None = None
        try:
            async with self.connection.mapped(confirmed=True):
                offers = await self.connection.client.subscribe_directly(subject, self._on_offer, group=OFFERS_GROUP)
        except FabricUnavailable:
            log.warning("offers.denied", pool=self._pool, remedy="configure NATS again with this version")
            if offers is not None:
                with suppress(nats.errors.Error):
                    await offers.unsubscribe()
            return
        self._offers = offers
        await self._say_presence()

    def _returned(self) -> None:
        """Runs after each reconnection: the pulls that waited are lost, and there may be work by now."""
        for queue in self._queues:
            queue.unknown()

    def _on_offer(self, subject: str, block: bytes, payload: bytes) -> bool:
        if subjects.is_order(subject):
            return self._ordered(payload)
        headers = protocol.fields(block, status=False)
        try:
            WORK.check_header(headers.get(HEADER))
            known = True
        except ProtocolError:
            known = False  # another worker of the pool may be upgraded already
        offered = {subjects.offer(self._pool, self._region, self._node, queue.model): queue for queue in self._queues}
        queue = offered.get(subject)
        delivery = None if queue is None else self._made(queue.model, headers, payload, None)
        if queue is None or delivery is None:
            return False
        if taken := known and self._takes(queue):
            self._slots.take(delivery.attempt, queue.model)
            self._slots.weigh(delivery.attempt, None)  # until `pull` returns it: it may have many sequences
            for one in self._queues:
                one.filled = one.filled or not self._slots.free(one.model)
        tasks.detach("an offer", self._answer_offer(delivery, taken=taken))
        return True

    def _ordered(self, order: bytes) -> bool:
        if self.on_order is None or not self.on_order(order):
            return False
        self._changed.set()
        tasks.detach("presence", self._say_presence())
        return True

    def _takes(self, queue: ModelQueue) -> bool:
        """Whether work of this queue may be taken although it is not in it."""
        waiting = self._pulls.get(queue.model)
        idle = queue.quiet(time.monotonic(), waits=waiting is not None and not waiting.done())
        free = self._slots.may_take(queue.model) and self._serves(queue.model)
        return idle and free and self._pullers > 0 and not self._draining

    async def _answer_offer(self, delivery: NatsDelivery, *, taken: bool) -> None:
        if not taken:
            await delivery.hand_back()
            return
        await delivery.start()
        if self._draining:
            self.release(delivery)
            await _hand_back(delivery)
            return
        self._offered.append(delivery)
        self._changed.set()

    async def pull(self) -> NatsDelivery:
        if self._presence is not None:
            self._presence.check()
        self._pullers += 1
        try:
            return await self._next()
        except asyncio.CancelledError:
            if self._pullers == 1:  # no caller is left to take the work
                for waiting in self._pulls.values():
                    waiting.cancel()
            raise
        finally:
            self._pullers -= 1

    async def _next(self) -> NatsDelivery:
        while not self._draining:
            self._changed.clear()
            if (delivery := self._arrived()) is not None:
                return delivery
            # The library would buffer pulls until it is connected, then send them together and take more work than there are
            # slots.
            await self.connection.wait_connected()
            able = self._ask()
            changed = tasks.spawn("a free slot", self._changed.wait())
            try:
                wait = {changed, *self._pulls.values()}
                await asyncio.wait(wait, timeout=None if able else NOT_ABLE, return_when=asyncio.FIRST_COMPLETED)
            finally:
                changed.cancel()
        raise NoMoreWork("this worker is draining: it takes no more work")

    def _arrived(self) -> NatsDelivery | None:
        """Taken work, or the delivery from a finished pull. Raises FabricUnavailable if the pull failed."""
        if self._offered:
            offered = self._offered.popleft()
            self._slots.weigh(offered.attempt, 1)
            offered.take()  # no sooner: a worker that drains declines what it has not begun
            return offered
        for model, waiting in [(model, waiting) for model, waiting in self._pulls.items() if waiting.done()]:
            del self._pulls[model]
            self._slots.pulled(model)
            if not waiting.cancelled() and (delivery := waiting.result()) is not None:
                self._slots.take(delivery.attempt, model)
                return delivery
        return None

    def _ask(self) -> bool:
        """Starts a pull for each model that has a free slot and no pull yet. False: some models cannot be served now."""
        if self._draining:
            return True
        able = [queue for queue in self._queues if self._serves(queue.model)]
        patience = PULL if self._slots.roomy([queue.model for queue in able]) else PULL_EACH
        for queue in able:
            if self._slots.may_pull(queue.model):
                self._slots.pull(queue.model)
                self._pulls[queue.model] = tasks.spawn(f"pull {queue.model}", self._fetch(queue, patience))
                self._queues.remove(queue)
                self._queues.append(queue)
        return len(able) == len(self._queues)

    async def _fetch(self, queue: ModelQueue, patience: float) -> NatsDelivery | None:
        """One pull; None if it brought nothing. Raises FabricUnavailable."""
        denials = self.connection.denials
        queue.pulling(time.monotonic())
        try:
            (message,) = await queue.pull.fetch(1, timeout=patience if queue.there else PULL_EACH)
        except (nats.js.errors.ServiceUnavailableError, nats.errors.NoRespondersError):
            await self._looked(queue, found=False)
            await asyncio.sleep(queue.pause)
            return None
        except nats.errors.Error as exc:
            if isinstance(exc, TimeoutError) and self.connection.denials == denials:
                if self.connection.connected:  # otherwise the pull says nothing of the queue
                    queue.empty(time.monotonic())
                    await self._looked(queue, found=True)
                return None
            raise self.connection.unavailable(exc, denials) from exc
        queue.brought()
        async with self.connection.mapped():
            await self._looked(queue, found=True)
            delivery = await self._take(message)
            if delivery is None or self._serves(queue.model):
                full = queue.filled and not self._slots.free(queue.model)
                return None if delivery is not None and full and await delivery.hand_back() else delivery
            await _hand_back(delivery)  # the worker became unable to serve it after it pulled
        return None

    async def _looked(self, queue: ModelQueue, *, found: bool) -> None:
        before = queue.there
        if found:
            queue.answered()
        else:
            queue.silent(time.monotonic())
        if queue.there != before:
            log.warning("queue.found" if queue.there else "queue.missing", pool=self._pool, model=queue.model)
            await self._say_presence()

    async def _take(self, message: Msg) -> NatsDelivery | None:
        """Makes the delivery ready for work; None if the message names no one to answer."""
        headers = headers_of(message)
        models = (queue.model for queue in self._queues)
        model = next((name for name in models if subjects.work(self._pool, self._region, name) == message.subject), None)
        delivery = None if model is None else self._made(model, headers, message.data, message)
        if delivery is None:
            log.warning("work.unanswerable")
            await message.ack()
            return None
        await delivery.start()
        if delivery.again:
            delivery.again = not await was_handed_back(self.connection, self.claims_of, delivery.work.digest, message)
        try:
            WORK.check_header(headers.get(HEADER))
        except ProtocolError as exc:
            log.error("work.newer" if isinstance(exc, NewerFormat) else "work.unanswerable", reason=str(exc))
            await _hand_back(delivery)  # another worker of the pool may be upgraded already
            return None
        return delivery

    def _made(self, model: str, headers: Mapping[str, str], sealed: bytes, message: Msg | None) -> NatsDelivery | None:
        """The delivery of a message; None if the message names no one to answer."""
        request_id, gateway = headers.get(REQUEST, ""), headers.get(GATEWAY, "")
        try:
            order_key = orders.parse_key(headers.get(orders.KEY))
        except ValueError:
            return None
        if not subjects.is_request(request_id) or not subjects.is_name(gateway):
            return None
        work = Work(
            request_id, self._pool, model, digest_of(sealed), headers.get(GRANT, ""), sealed,
            gateway=gateway, settlement=headers.get(SETTLE, ""),
        )  # fmt: skip
        return NatsDelivery(self, message, work, subjects.reply(self._pool, gateway, request_id), order_key)

    def _serves(self, model: str) -> bool:
        return self._able is None or model in self._able.models()

    def weigh(self, delivery: Delivery, sequences: int | None) -> None:
        self._slots.weigh(delivery.attempt, sequences)
        self._changed.set()

    def release(self, delivery: Delivery | None = None) -> None:
        full = self._slots.busy >= self._slots.total
        self._slots.give(None if delivery is None else delivery.attempt)
        self._changed.set()
        if full and self._offers is not None and self._soon is None:
            self._soon = asyncio.get_running_loop().call_later(FREE_AGAIN, self._free_again)

    def _free_again(self) -> None:
        """Announces a free slot early: the next turn of a conversation may come at once."""
        self._soon = None
        if not self._draining:
            tasks.detach("presence", self._say_presence())

    async def try_claim(self) -> float | None:
        """See the function of the same name."""
        return await try_claim(self.connection, self.claims_of)

    async def drain(self) -> None:
        """Takes at most a few seconds. Work that arrives meanwhile returns to its queue."""
        await self._leave(LAST_PULL)

    async def close(self) -> None:
        await self._leave(0)
        await self.connection.close()

    async def _leave(self, patience: float) -> None:
        """patience: seconds for pulls to end by themselves. Work on its way to a pull that is given up earlier is lost here."""
        if self._draining:
            return
        self._draining = True
        self._changed.set()
        if self._presence is not None:
            await self._presence.close()
        await self._say_presence()
        while self._offered:
            await _hand_back(self._offered.popleft())
        pulls, self._pulls = self._pulls, {}
        await tasks.together(*(_returned(pull, patience) for pull in pulls.values()))
        if self.connection.connected:
            with suppress(nats.errors.Error):
                for queue in self._queues:  # once its subscriber is gone, the server drops a waiting pull
                    await queue.pull.unsubscribe()
                await self.connection.round_trip()
                if self._offers is not None:  # until now it declined them: gateways wait for an answer to each
                    await self.connection.client.leave(self._offers)
                    await self.connection.round_trip()
        await tasks.end(*pulls.values(), expected=(FabricUnavailable,))

    async def _announce(self) -> None:
        while True:
            await self._say_presence()
            await asyncio.sleep(BEAT)

    async def announce(self) -> None:
        """Sends presence at once, in addition to once a second."""
        await self._say_presence()

    async def _say_presence(self) -> None:
        models = [q.model for q in self._queues if q.there and not self._draining and self._serves(q.model)]
        busy, room = self._slots.busy, {model: self._slots.free(model) for model in models}
        wrong = [] if self._able is None else self._able.kinds()
        said = {"models": models, "free": self._slots.total - busy, "busy": busy, ROOM: room}
        said |= {KEYS: list(self._keys()), WRONG: wrong, TAKES_OFFERS: self._offers is not None, VERSION: __version__}
        counted = said | {COUNTS: {model: counts.encode() for model, counts in self._counts().items()}}
        message = json.dumps(counted).encode()
        if len(message) > MAX_BYTES:  # without counts, because the rest must arrive
            message = json.dumps(said).encode()
        with suppress(nats.errors.Error):  # while NATS is down there is no listener
            subject = subjects.presence(self._pool, self._region, self._node)
            await self.connection.client.publish(subject, message)


async def _returned(pull: asyncio.Task[NatsDelivery | None], patience: float) -> None:
    """Waits for a last pull, and returns what it brings."""
    await asyncio.wait([pull], timeout=patience)
    if _is_good(pull) and (delivery := pull.result()) is not None:
        await _hand_back(delivery)


async def _hand_back(delivery: NatsDelivery) -> None:
    """Returns work that never started to its queue, for another worker. If that fails, rejects it: the client sends it again.

    Not as `UNCLAIMED`, because that counts as a worker that the request may have ended.
    """
    if not await delivery.hand_back():
        with suppress(FabricUnavailable, Cancelled):
            await delivery.reject(problems.BUSY.type)


def _is_good(waiting: asyncio.Task[NatsDelivery | None]) -> bool:
    return waiting.done() and not waiting.cancelled() and waiting.exception() is None


async def try_claim(connection: Connection, pool: str) -> float | None:
    """Writes a dummy claim and reads it back. Returns when the server wrote it, in seconds since the epoch.

    None if the server that was asked does not have it yet. Raises FabricUnavailable.
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
