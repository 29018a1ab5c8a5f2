"""The fabric inside one process: what one gateway and its nodes need, with the semantics of the real one, and no server.

For tests, and held to the same contract suite as NATS. Redelivery is there too: a delivery that is abandoned before it was
acked comes back once.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Mapping, Sequence

from lacre.runtime import tasks
from lacre_fabric.nats.subjects import DEFAULT_REGION
from lacre_fabric.work.contract import (
    MAX_DELIVER,
    QUEUE_LIMIT,
    Backlog,
    Capacity,
    Delivery,
    DuplicateWork,
    FabricUnavailable,
    NoWorkers,
    QueueFull,
    SeenWorker,
    Work,
    WorkerLost,
)
from lacre_fabric.work.frames import Frame, FrameKind
from lacre_fabric.work.gateway_stream import Inbound
from lacre_fabric.work.model_counts import ModelCounts
from lacre_fabric.work.revocations import Revocation, StoreMark
from lacre_fabric.work.slots import Slots
from lacre_fabric.work.worker_stream import Outbound


class MemoryFabric:
    """The hub: make gateways and workers from it."""

    def __init__(self, *, max_queue: int = 1000) -> None:
        self.max_queue = max_queue
        self.queue: deque[tuple[Work, int]] = deque()
        self.published: set[bytes] = set()
        self.claims: dict[bytes, str] = {}
        self.revocations: list[Revocation] = []
        self.store_mark = StoreMark()
        self.inbound: dict[str, Inbound] = {}
        self.outbound: dict[str, Outbound] = {}
        self.live: list[MemoryWorker] = []
        self.arrived = asyncio.Condition()
        self.cut_off: set[str] = set()  # pools, by their names: what `away` says
        self.counts: dict[tuple[str, str, str], ModelCounts] = {}  # what workers' presence would tell

    def gateway(self) -> MemoryGateway:
        return MemoryGateway(self)

    async def claim(self, digest: bytes, attempt: str) -> bool:
        return self.claims.setdefault(digest, attempt) == attempt

    def worker(
        self, pool: str, models: Sequence[str], *, slots: int = 1, each: Mapping[str, int] | None = None
    ) -> MemoryWorker:
        worker = MemoryWorker(self, pool, models, Slots(slots, models, each))
        self.live.append(worker)
        return worker

    async def enqueue(self, work: Work, deliveries: int) -> None:
        async with self.arrived:
            self.queue.append((work, deliveries))
            self.arrived.notify_all()

    async def look(self) -> None:
        async with self.arrived:
            self.arrived.notify_all()

    def withdraw(self, request_id: str) -> None:
        self.queue = deque(entry for entry in self.queue if entry[0].request_id != request_id)
        if request_id in self.outbound:
            self.outbound[request_id].cancel()

    def receive(self, request_id: str, frame: Frame) -> None:
        if request_id in self.inbound:
            self.inbound[request_id].put(frame)
        elif frame.kind in (FrameKind.DATA, FrameKind.BEAT):
            self.withdraw(request_id)


class MemoryGateway:
    """A `GatewayFabric`."""

    def __init__(self, hub: MemoryFabric) -> None:
        self._hub = hub
        self._revocations_read = 0
        self.connected = True

    async def dispatch(self, work: Work, *, queue_limit: float = QUEUE_LIMIT) -> MemoryDispatch:
        if not self.workers(work.pool, work.model):
            raise NoWorkers("no live worker of the pool serves the model")
        if len(self._hub.queue) >= self._hub.max_queue:
            raise QueueFull("the pool's queue is full")
        if work.digest in self._hub.published:
            raise DuplicateWork("this sealed request was published before")
        self._hub.published.add(work.digest)
        inbound = self._hub.inbound[work.request_id] = Inbound(queue_limit)
        await self._hub.enqueue(work, 1)
        return MemoryDispatch(self._hub, work.request_id, inbound)

    def workers(self, pool: str, model: str) -> int:
        return sum(worker.pool == pool and model in worker.taken for worker in self._hub.live)

    async def order(self, pool: str, region: str, node: str, order: str) -> None:
        for number, worker in enumerate(self._hub.live):
            if (worker.pool, DEFAULT_REGION, f"node-{number}") == (pool, region, node) and worker.on_order is not None:
                worker.on_order(order.encode())
                await self._hub.look()

    async def revoke(self, revocation: Revocation) -> None:
        self._hub.revocations.append(revocation)

    async def revoked(self) -> list[Revocation]:
        if not self.connected:
            raise FabricUnavailable("the fabric is away")
        since, self._revocations_read = self._revocations_read, len(self._hub.revocations)
        return self._hub.revocations[since:]

    @property
    def store_mark(self) -> StoreMark:
        return self._hub.store_mark

    def capacity(self) -> Mapping[tuple[str, str], Capacity]:
        found: dict[tuple[str, str], Capacity] = {}
        for worker in self._hub.live:
            if worker.drained():
                continue
            at = found.get((worker.pool, DEFAULT_REGION), Capacity())
            found[worker.pool, DEFAULT_REGION] = Capacity(
                at.workers + 1, at.busy + worker.slots.busy, at.free + worker.slots.total - worker.slots.busy
            )
        return found

    def away(self) -> frozenset[str]:
        return frozenset(self._hub.cut_off)

    def counts(self) -> Mapping[tuple[str, str, str], ModelCounts]:
        return self._hub.counts

    def seen(self) -> Mapping[tuple[str, str, str], SeenWorker]:
        return {
            (worker.pool, DEFAULT_REGION, f"node-{number}"): SeenWorker(
                worker.taken, worker.slots.busy, worker.slots.total - worker.slots.busy, version=worker.version,
                drained=worker.drained(), hears=worker.on_order is not None, keys=worker.keys,
            ) for number, worker in enumerate(self._hub.live)
        }  # fmt: skip

    async def backlog(self, pool: str, region: str, models: Sequence[str] = ()) -> Backlog:
        waiting = [work.model for work, _ in self._hub.queue if work.pool == pool and region == DEFAULT_REGION]
        return Backlog(len(waiting), {model: waiting.count(model) for model in models})

    async def close(self) -> None:
        self.connected = False


class MemoryDispatch:
    """A `Dispatch`."""

    def __init__(self, hub: MemoryFabric, request_id: str, inbound: Inbound) -> None:
        self._hub = hub
        self._request_id = request_id
        self._inbound = inbound
        self._consumed = 0

    @property
    def receipt(self) -> bytes | None:
        return self._inbound.receipt

    @property
    def receipts(self) -> tuple[Frame, ...]:
        return self._inbound.receipts

    async def next(self) -> Frame:
        frame = await self._inbound.next()
        if frame.kind in (FrameKind.USAGE, FrameKind.ERROR):
            self._forget()
        return frame

    @property
    def ready(self) -> bool:
        return self._inbound.ready

    def more(self, most: int) -> list[bytes]:
        return self._inbound.more(most)

    async def consumed(self, size: int) -> None:
        self._consumed += size
        if self._request_id in self._hub.outbound:
            self._hub.outbound[self._request_id].renew(self._consumed)

    async def cancel(self) -> None:
        if self._request_id not in self._hub.inbound:
            return
        try:
            self._hub.withdraw(self._request_id)
            await self._inbound.parting()
        finally:
            self._forget()

    def _forget(self) -> None:
        self._hub.inbound.pop(self._request_id, None)
        self._inbound.drop()


class MemoryWorker:
    """A `WorkerFabric`."""

    def __init__(self, hub: MemoryFabric, pool: str, models: Sequence[str], slots: Slots) -> None:
        self._hub = hub
        self.pool = pool
        self.models = tuple(models)
        self.slots = slots
        self.version, self.keys = "", frozenset[str]()  # what its presence would tell
        self.on_order: Callable[[bytes], bool] | None = None
        self.drained: Callable[[], bool] = lambda: False

    @property
    def taken(self) -> tuple[str, ...]:
        """The models that it takes work for now."""
        return () if self.drained() else self.models

    async def pull(self) -> MemoryDelivery:
        async with self._hub.arrived:
            while (entry := self._next()) is None:
                if self not in self._hub.live:
                    raise FabricUnavailable("this worker is draining: it takes no more work")
                await self._hub.arrived.wait()
        delivery = MemoryDelivery(self._hub, *entry)
        self.slots.take(delivery.attempt, delivery.work.model)
        return delivery

    def _next(self) -> tuple[Work, int] | None:
        for entry in self._hub.queue if self in self._hub.live else ():
            if entry[0].pool == self.pool and entry[0].model in self.taken and self.slots.may_pull(entry[0].model):
                self._hub.queue.remove(entry)
                return entry
        return None

    def weigh(self, delivery: Delivery, sequences: int | None) -> None:
        self.slots.weigh(delivery.attempt, sequences)
        self._look_again()

    def release(self, delivery: Delivery | None = None) -> None:
        self.slots.give(None if delivery is None else delivery.attempt)
        self._look_again()

    def _look_again(self) -> None:
        tasks.detach("a free slot", self._hub.look())

    async def drain(self) -> None:
        if self in self._hub.live:
            self._hub.live.remove(self)
            async with self._hub.arrived:
                self._hub.arrived.notify_all()

    async def close(self) -> None:
        await self.drain()


class MemoryDelivery:
    """A `Delivery`. `abandon` is what the death of its worker looks like from outside."""

    def __init__(self, hub: MemoryFabric, work: Work, deliveries: int) -> None:
        self._hub = hub
        self._deliveries = deliveries
        self._acked = False
        self._out = Outbound(self._publish)
        self.work = work
        self.attempt = self._out.attempt
        self.cancelled = self._out.cancelled
        self.again = deliveries > 1
        hub.outbound[work.request_id] = self._out

    async def claim(self) -> bool:
        return await self._hub.claim(self.work.digest, self.attempt)

    async def send(self, kind: FrameKind, payload: bytes, mac: bytes = b"") -> None:
        await self._out.send(kind, payload, mac)
        self._acked = True

    async def stop(self, receipt: bytes, mac: bytes = b"") -> None:
        await self._out.stop(receipt, mac)

    async def reject(self, problem_type: str) -> None:
        await self.send(FrameKind.ERROR, problem_type.encode())
        await self.drop()

    async def drop(self) -> None:
        self._acked = True
        if self._hub.outbound.get(self.work.request_id) is self._out:
            del self._hub.outbound[self.work.request_id]

    async def abandon(self) -> None:
        if self._acked:
            return
        if self._deliveries < MAX_DELIVER:
            await self._hub.enqueue(self.work, self._deliveries + 1)
        elif self.work.request_id in self._hub.inbound:
            self._hub.inbound[self.work.request_id].fail(WorkerLost("every delivery of the request failed"))

    async def _publish(self, frame: Frame) -> None:
        self._hub.receive(self.work.request_id, frame)
