"""One suite for the fabric in memory and over NATS: how work goes out and frames come back."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import pytest

from lacre_fabric.nats import subjects
from lacre_fabric.nats.gateway import NatsGateway
from lacre_fabric.work import contract
from lacre_fabric.work.contract import CREDIT, Delivery, Dispatch, GatewayFabric, Work, WorkerFabric
from lacre_fabric.work.frames import Frame, FrameKind
from lacre_fabric.work.gateway_stream import PARTING
from parts.fabric import Kept, LiveFabric, Parties, new_work
from parts.frames import frames_of
from parts.memory_fabric import MemoryFabric


class Fabric(Protocol):
    """Makes both ends of pool `a`; everything made is closed after the test."""

    async def gateway(self) -> GatewayFabric: ...
    async def worker(self, **options: Any) -> WorkerFabric: ...


@dataclass
class InMemory(Kept):
    hub: MemoryFabric = field(default_factory=MemoryFabric)

    async def gateway(self) -> GatewayFabric:
        return self.hub.gateway()

    async def worker(self, node: str = "n1", models: Sequence[str] = ("m1",), **slots: Any) -> WorkerFabric:
        return self.hub.worker("a", models, **slots)


@pytest.fixture(params=["memory", "nats"])
async def fabric(request: pytest.FixtureRequest, nats: LiveFabric) -> AsyncIterator[Fabric]:
    async with AsyncExitStack() as stack:
        yield InMemory(stack) if request.param == "memory" else Parties(stack, nats)


async def collect(dispatch: Dispatch) -> list[tuple[FrameKind, bytes]]:
    frames = []
    async for frame in frames_of(dispatch):
        frames.append((frame.kind, frame.payload))
        await dispatch.consumed(len(frame.payload))
    return frames


@dataclass
class UnderWay:
    """A request that a worker has pulled."""

    gateway: GatewayFabric
    worker: WorkerFabric
    work: Work
    dispatch: Dispatch
    delivery: Delivery

    async def part_read(self) -> AsyncGenerator[Frame, None]:
        """Its frames, the first of which is read."""
        await self.delivery.send(FrameKind.DATA, b"x")
        frames = frames_of(self.dispatch)
        await anext(frames)
        return frames


@pytest.fixture
async def under_way(fabric: Fabric) -> UnderWay:
    gateway, worker, work = await fabric.gateway(), await fabric.worker(slots=2), new_work()
    dispatch = await gateway.dispatch(work)
    return UnderWay(gateway, worker, work, dispatch, await worker.pull())


async def test_frames_come_back_in_order(under_way: UnderWay) -> None:
    delivery = under_way.delivery
    assert delivery.work == under_way.work
    assert await delivery.claim()
    for number in range(5):
        await delivery.send(FrameKind.DATA, b"%d" % number)
        await delivery.send(FrameKind.BEAT, b"so far")
    await delivery.send(FrameKind.USAGE, b"final")
    await delivery.drop()
    data = [(FrameKind.DATA, b"%d" % number) for number in range(5)]
    assert await collect(under_way.dispatch) == [*data, (FrameKind.USAGE, b"final")]
    assert under_way.dispatch.receipt == b"final"


async def test_a_rejection_is_an_error_frame(under_way: UnderWay) -> None:
    await under_way.delivery.reject("urn:lacre:problem:invalid-sealed-request")
    assert await collect(under_way.dispatch) == [(FrameKind.ERROR, b"urn:lacre:problem:invalid-sealed-request")]


async def test_no_workers_is_said(fabric: Fabric) -> None:
    gateway = await fabric.gateway()
    with pytest.raises(contract.NoWorkers):
        await gateway.dispatch(new_work())


async def test_a_drained_worker_is_not_counted(fabric: Fabric) -> None:
    gateway, worker = await fabric.gateway(), await fabric.worker()
    await (await gateway.dispatch(new_work())).cancel()
    assert gateway.workers("a", "m1") == 1
    await worker.drain()
    await asyncio.sleep(0.1)
    assert gateway.workers("a", "m1") == 0
    with pytest.raises(contract.FabricUnavailable):
        await worker.pull()


async def test_the_same_sealed_request_is_refused(fabric: Fabric) -> None:
    gateway, other = await fabric.gateway(), await fabric.gateway()
    await fabric.worker()
    work = new_work()
    await (await gateway.dispatch(work)).cancel()
    for again in (gateway, other):
        with pytest.raises(contract.DuplicateWork):
            await again.dispatch(new_work(sealed=work.sealed))


async def test_a_claim_is_won_once(under_way: UnderWay) -> None:
    gateway = under_way.gateway
    assert await under_way.delivery.claim()
    await under_way.dispatch.cancel()
    await under_way.delivery.drop()
    # The fabric forgot (or a hostile one replays): the same sealed request under another id.
    replayed = new_work(sealed=under_way.work.sealed)
    if isinstance(gateway, NatsGateway):
        headers = {"Grant": "g", "Request": replayed.request_id, "Gateway": "g1"}
        subject = subjects.work("a", subjects.DEFAULT_REGION, "m1")
        await gateway.connection.client.publish(subject, replayed.sealed, headers=headers)
    else:
        await gateway._hub.enqueue(replayed, 1)
    again = await under_way.worker.pull()
    assert not await again.claim()
    await again.drop()


async def test_cancel_reaches_the_worker(under_way: UnderWay) -> None:
    await (await under_way.part_read()).aclose()
    async with asyncio.timeout(10):
        await under_way.delivery.cancelled.wait()
    with pytest.raises(contract.Cancelled):
        await under_way.delivery.send(FrameKind.DATA, b"y")


async def test_who_is_withdrawn_says_what_it_used(under_way: UnderWay) -> None:
    async def leave() -> None:
        await under_way.delivery.cancelled.wait()
        await under_way.delivery.stop(b"in the end")

    await under_way.delivery.send(FrameKind.BEAT, b"so far")
    frames = await under_way.part_read()
    leaving = asyncio.create_task(leave())
    await frames.aclose()
    assert [frame.payload for frame in under_way.dispatch.receipts] == [b"so far", b"in the end"]
    await leaving


# The clock is in `Inbound`, which both fabrics share.
@pytest.mark.parametrize("fabric", ["memory"], indirect=True)
async def test_who_says_nothing_is_not_waited_for(under_way: UnderWay) -> None:
    await under_way.delivery.send(FrameKind.BEAT, b"so far")
    began = time.monotonic()
    await under_way.dispatch.cancel()
    assert time.monotonic() - began >= PARTING
    assert under_way.dispatch.receipt == b"so far"


@pytest.mark.parametrize("end", ["withdrawn unread", "withdrawn in mid-answer", "refused"])
async def test_a_request_that_is_over_leaves_no_timer(fabric: Fabric, end: str) -> None:
    """Its queue limit is far away: of a flood, each request's timer would stay until then."""
    gateway, worker = await fabric.gateway(), await fabric.worker()
    work = new_work()
    dispatch = await gateway.dispatch(work, queue_limit=300.0)
    if end == "withdrawn in mid-answer":
        under_way = UnderWay(gateway, worker, work, dispatch, await worker.pull())
        await (await under_way.part_read()).aclose()
        await under_way.delivery.drop()
    elif end == "refused":
        with pytest.raises(contract.DuplicateWork):
            await gateway.dispatch(replace(work, request_id=new_work().request_id), queue_limit=300.0)
    await dispatch.cancel()
    loop = asyncio.get_running_loop()
    timers: list[asyncio.TimerHandle] = loop._scheduled  # type: ignore[attr-defined]
    assert not [timer for timer in timers if not timer.cancelled() and timer.when() > loop.time() + 60]


@pytest.mark.parametrize("by", ["its caller", "the queue limit"])
async def test_withdrawn_work_leaves_the_queue(fabric: Fabric, by: str) -> None:
    gateway, worker = await fabric.gateway(), await fabric.worker(slots=2)
    dispatch = await gateway.dispatch(new_work(), queue_limit=0.2)
    if by == "its caller":
        await dispatch.cancel()
    else:
        with pytest.raises(contract.QueueTimeout):
            await collect(dispatch)
    kept = new_work()
    await gateway.dispatch(kept)
    assert (await worker.pull()).work.request_id == kept.request_id


async def test_credit_holds_a_worker_back(under_way: UnderWay) -> None:
    sent = 0

    async def send() -> None:
        nonlocal sent
        for _ in range(8):
            await under_way.delivery.send(FrameKind.DATA, bytes(CREDIT // 4))
            sent += 1
        await under_way.delivery.send(FrameKind.USAGE, b"")

    sending = asyncio.create_task(send())
    await asyncio.sleep(0.3)
    assert sent == 4
    frames = await collect(under_way.dispatch)
    await sending
    assert sum(len(payload) for _, payload in frames) == 2 * CREDIT


# The clocks of these two are in `Outbound` and `Inbound`, which both fabrics share: to wait once is enough.
@pytest.mark.parametrize("fabric", ["memory"], indirect=True)
async def test_a_stalled_reader_is_a_cancel(under_way: UnderWay) -> None:
    began = time.monotonic()
    with pytest.raises(contract.Cancelled):
        while True:
            await under_way.delivery.send(FrameKind.DATA, bytes(CREDIT // 2))
    assert time.monotonic() - began > 4


@pytest.mark.parametrize("fabric", ["memory"], indirect=True)
async def test_a_silent_worker_is_lost(under_way: UnderWay) -> None:
    await under_way.delivery.send(FrameKind.DATA, b"x")
    with pytest.raises(contract.WorkerLost):
        await collect(under_way.dispatch)


async def test_slots_bound_what_is_pulled(fabric: Fabric) -> None:
    gateway, worker = await fabric.gateway(), await fabric.worker(slots=1)
    await dispatched(gateway, 2)
    (first,) = await pulled(worker)
    await first.drop()
    worker.release()
    assert len(await pulled(worker)) == 1


# Several models, and requests of several sequences

TWO = {"models": ("m1", "m2"), "slots": 5, "each": {"m1": 2, "m2": 3}}


async def pulled(worker: WorkerFabric, patience: float = 0.4) -> list[Delivery]:
    """All that it pulls until nothing more comes."""
    deliveries = []
    while True:
        try:
            async with asyncio.timeout(patience):
                deliveries.append(await worker.pull())
        except TimeoutError:
            return deliveries


def models(deliveries: list[Delivery]) -> list[str]:
    return sorted(delivery.work.model for delivery in deliveries)


async def dispatched(gateway: GatewayFabric, count: int, model: str = "m1") -> set[str]:
    """The ids of so many requests."""
    works = [new_work(model=model) for _ in range(count)]
    for work in works:
        await gateway.dispatch(work)
    return {work.request_id for work in works}


async def test_a_flood_of_one_model_takes_no_slot_of_another(fabric: Fabric) -> None:
    gateway, worker = await fabric.gateway(), await fabric.worker(**TWO)
    await dispatched(gateway, 8)
    await dispatched(gateway, 8, "m2")
    taken = await pulled(worker)
    assert models(taken) == ["m1", "m1", "m2", "m2", "m2"]
    worker.release(next(delivery for delivery in taken if delivery.work.model == "m2"))
    assert models(await pulled(worker)) == ["m2"]


async def test_what_a_worker_cannot_begin_stays_for_others(fabric: Fabric) -> None:
    gateway, worker = await fabric.gateway(), await fabric.worker(**TWO)
    asked = await dispatched(gateway, 4)
    taken = await pulled(worker)
    rest = await pulled(await fabric.worker(node="n2", slots=4))
    assert [delivery.again for delivery in rest] == [False, False], "it was never given to the first one"
    assert {delivery.work.request_id for delivery in [*taken, *rest]} == asked


async def test_a_request_of_many_sequences_takes_as_many_slots(fabric: Fabric) -> None:
    gateway, worker = await fabric.gateway(), await fabric.worker(models=("m1", "m2"), slots=6, each={"m1": 4, "m2": 2})
    await dispatched(gateway, 5)
    async with asyncio.timeout(10):
        heavy = await worker.pull()
    worker.weigh(heavy, 16)
    await dispatched(gateway, 3, "m2")
    assert models(await pulled(worker)) == ["m2", "m2"], "its weight is its own model's affair"
    worker.weigh(heavy, 4)
    assert await pulled(worker) == []
    worker.weigh(heavy, 3)
    assert models(await pulled(worker)) == ["m1"]
    worker.release(heavy)
    worker.weigh(heavy, 16)  # too late to mean anything
    assert models(await pulled(worker)) == ["m1", "m1", "m1"]


async def test_a_request_whose_sequences_are_not_known_holds_its_model_back(fabric: Fabric) -> None:
    gateway, worker = await fabric.gateway(), await fabric.worker(slots=4)
    await dispatched(gateway, 4)
    async with asyncio.timeout(10):
        first = await worker.pull()
    for weight, more in ((None, 0), (2, 2), (1, 1)):
        worker.weigh(first, weight)
        assert len(await pulled(worker)) == more
