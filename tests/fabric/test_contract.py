"""One suite for the fabric in memory and over NATS: how work goes out and frames come back."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from typing import Any

import pytest

from lacre_fabric.nats import subjects
from lacre_fabric.nats.gateway import NatsGateway
from lacre_fabric.work.contract import (
    CREDIT,
    Cancelled,
    Delivery,
    Dispatch,
    DuplicateWork,
    FabricUnavailable,
    GatewayFabric,
    NoWorkers,
    QueueTimeout,
    WorkerFabric,
    WorkerLost,
)
from lacre_fabric.work.frames import Frame, FrameKind
from lacre_fabric.work.gateway_stream import PARTING
from parts.fabric import LiveFabric, new_work
from parts.memory_fabric import MemoryFabric


@dataclass
class Fabric:
    """Makes both ends; everything made is closed after the test."""

    make_gateway: Callable[[], Awaitable[GatewayFabric]]
    make_worker: Callable[..., Awaitable[WorkerFabric]]
    stack: AsyncExitStack

    async def gateway(self) -> GatewayFabric:
        gateway = await self.make_gateway()
        self.stack.push_async_callback(gateway.close)
        return gateway

    async def worker(self, **options: object) -> WorkerFabric:
        worker = await self.make_worker(**options)
        self.stack.push_async_callback(worker.close)
        return worker


@pytest.fixture(params=["memory", "nats"])
async def fabric(request: pytest.FixtureRequest, nats: LiveFabric) -> AsyncIterator[Fabric]:
    hub = MemoryFabric()

    async def memory_gateway() -> GatewayFabric:
        return hub.gateway()

    async def memory_worker(node: str = "n1", models: Sequence[str] = ("m1",), **slots: Any) -> WorkerFabric:
        return hub.worker("a", models, **slots)

    async def nats_worker(node: str = "n1", models: Sequence[str] = ("m1",), **slots: Any) -> WorkerFabric:
        return await nats.worker(node=node, models=models, **slots)

    async with AsyncExitStack() as stack:
        if request.param == "memory":
            yield Fabric(memory_gateway, memory_worker, stack)
        else:
            yield Fabric(nats.gateway, nats_worker, stack)


async def collect(dispatch: Dispatch) -> list[Frame]:
    frames = []
    async for frame in dispatch.frames():
        frames.append(frame)
        await dispatch.consumed(len(frame.payload))
    return frames


async def test_frames_come_back_in_order(fabric: Fabric) -> None:
    gateway, worker = await fabric.gateway(), await fabric.worker()
    work = new_work()
    dispatch = await gateway.dispatch(work)
    delivery = await worker.pull()
    assert delivery.work == work
    assert await delivery.claim()
    for number in range(5):
        await delivery.send(FrameKind.DATA, b"%d" % number)
        await delivery.send(FrameKind.BEAT, b"so far")
    await delivery.send(FrameKind.USAGE, b"final")
    await delivery.drop()
    frames = await collect(dispatch)
    assert [(frame.kind, frame.payload) for frame in frames] == [
        *((FrameKind.DATA, b"%d" % number) for number in range(5)),
        (FrameKind.USAGE, b"final"),
    ]
    assert dispatch.receipt == b"final"


async def test_a_rejection_is_an_error_frame(fabric: Fabric) -> None:
    gateway, worker = await fabric.gateway(), await fabric.worker()
    dispatch = await gateway.dispatch(new_work())
    await (await worker.pull()).reject("urn:lacre:problem:invalid-sealed-request")
    assert [(frame.kind, frame.payload) for frame in await collect(dispatch)] == [
        (FrameKind.ERROR, b"urn:lacre:problem:invalid-sealed-request")
    ]


async def test_no_workers_is_said(fabric: Fabric) -> None:
    gateway = await fabric.gateway()
    with pytest.raises(NoWorkers):
        await gateway.dispatch(new_work())


async def test_a_drained_worker_is_not_counted(fabric: Fabric) -> None:
    gateway, worker = await fabric.gateway(), await fabric.worker()
    await (await gateway.dispatch(new_work())).cancel()
    assert gateway.workers("a", "m1") == 1
    await worker.drain()
    await asyncio.sleep(0.1)
    assert gateway.workers("a", "m1") == 0
    with pytest.raises(FabricUnavailable):
        await worker.pull()


async def test_the_same_sealed_request_is_refused(fabric: Fabric) -> None:
    gateway, other = await fabric.gateway(), await fabric.gateway()
    await fabric.worker()
    work = new_work()
    await (await gateway.dispatch(work)).cancel()
    for again in (gateway, other):
        with pytest.raises(DuplicateWork):
            await again.dispatch(new_work(sealed=work.sealed))


async def test_a_claim_is_won_once(fabric: Fabric) -> None:
    gateway, first = await fabric.gateway(), await fabric.worker(node="n1", slots=2)
    work = new_work()
    dispatch = await gateway.dispatch(work)
    delivery = await first.pull()
    assert await delivery.claim()
    await dispatch.cancel()
    await delivery.drop()
    # The fabric forgot (or a hostile one replays): the same sealed request under another id.
    replayed = new_work(sealed=work.sealed)
    if isinstance(gateway, NatsGateway):
        await gateway.connection.client.publish(
            subjects.work("a", subjects.DEFAULT_REGION, "m1"),
            replayed.sealed,
            headers={"Grant": "g", "Request": replayed.request_id, "Gateway": "g1"},
        )
    else:
        await gateway._hub.enqueue(replayed, 1)
    again = await first.pull()
    assert not await again.claim()
    await again.drop()


async def test_cancel_reaches_the_worker(fabric: Fabric) -> None:
    gateway, worker = await fabric.gateway(), await fabric.worker()
    dispatch = await gateway.dispatch(new_work())
    delivery = await worker.pull()
    await delivery.send(FrameKind.DATA, b"x")
    frames = dispatch.frames()
    await anext(frames)
    await frames.aclose()
    async with asyncio.timeout(10):
        await delivery.cancelled.wait()
    with pytest.raises(Cancelled):
        await delivery.send(FrameKind.DATA, b"y")


async def test_who_is_withdrawn_says_what_it_used(fabric: Fabric) -> None:
    gateway, worker = await fabric.gateway(), await fabric.worker()
    dispatch = await gateway.dispatch(new_work())
    delivery = await worker.pull()
    await delivery.send(FrameKind.BEAT, b"so far")

    async def leave() -> None:
        await delivery.cancelled.wait()
        await delivery.stop(b"in the end")

    frames = dispatch.frames()
    await delivery.send(FrameKind.DATA, b"x")
    await anext(frames)
    leaving = asyncio.create_task(leave())
    await frames.aclose()
    assert dispatch.receipts == (b"so far", b"in the end")
    await leaving


# The clock is in `Inbound`, which both fabrics share.
@pytest.mark.parametrize("fabric", ["memory"], indirect=True)
async def test_who_says_nothing_is_not_waited_for(fabric: Fabric) -> None:
    gateway, worker = await fabric.gateway(), await fabric.worker()
    dispatch = await gateway.dispatch(new_work())
    await (await worker.pull()).send(FrameKind.BEAT, b"so far")
    began = time.monotonic()
    await dispatch.cancel()
    assert time.monotonic() - began >= PARTING
    assert dispatch.receipt == b"so far"


@pytest.mark.parametrize("end", ["withdrawn unread", "withdrawn in mid-answer", "refused"])
async def test_a_request_that_is_over_leaves_no_timer(fabric: Fabric, end: str) -> None:
    """Its queue limit is far away: of a flood, each request's timer would stay until then."""
    gateway, worker = await fabric.gateway(), await fabric.worker()
    work = new_work()
    dispatch = await gateway.dispatch(work, queue_limit=300.0)
    if end == "withdrawn in mid-answer":
        delivery = await worker.pull()
        await delivery.send(FrameKind.DATA, b"x")
        frames = dispatch.frames()
        await anext(frames)
        await frames.aclose()
        await delivery.drop()
    elif end == "refused":
        with pytest.raises(DuplicateWork):
            await gateway.dispatch(replace(work, request_id=new_work().request_id), queue_limit=300.0)
    await dispatch.cancel()
    assert _far(asyncio.get_running_loop()) == []


def _far(loop: asyncio.AbstractEventLoop) -> list[asyncio.TimerHandle]:
    """What the loop would still do beyond the next minute."""
    timers: list[asyncio.TimerHandle] = loop._scheduled  # type: ignore[attr-defined]
    return [timer for timer in timers if not timer.cancelled() and timer.when() > loop.time() + 60]


async def test_cancelled_work_leaves_the_queue(fabric: Fabric) -> None:
    gateway, worker = await fabric.gateway(), await fabric.worker(slots=2)
    await (await gateway.dispatch(new_work())).cancel()
    kept = new_work()
    await gateway.dispatch(kept)
    assert (await worker.pull()).work.request_id == kept.request_id


async def test_the_queue_limit_withdraws_the_work(fabric: Fabric) -> None:
    gateway, worker = await fabric.gateway(), await fabric.worker(slots=2)
    dispatch = await gateway.dispatch(new_work(), queue_limit=0.2)
    with pytest.raises(QueueTimeout):
        await collect(dispatch)
    kept = new_work()
    await gateway.dispatch(kept)
    assert (await worker.pull()).work.request_id == kept.request_id


async def test_credit_holds_a_worker_back(fabric: Fabric) -> None:
    gateway, worker = await fabric.gateway(), await fabric.worker()
    dispatch = await gateway.dispatch(new_work())
    delivery = await worker.pull()
    piece = bytes(CREDIT // 4)
    sent = 0

    async def send() -> None:
        nonlocal sent
        for _ in range(8):
            await delivery.send(FrameKind.DATA, piece)
            sent += 1
        await delivery.send(FrameKind.USAGE, b"")

    sending = asyncio.create_task(send())
    await asyncio.sleep(0.3)
    assert sent == 4
    frames = await collect(dispatch)
    await sending
    assert sum(len(frame.payload) for frame in frames) == 2 * CREDIT


# The clocks of these two are in `Outbound` and `Inbound`, which both fabrics share: to wait once is enough.
@pytest.mark.parametrize("fabric", ["memory"], indirect=True)
async def test_a_stalled_reader_is_a_cancel(fabric: Fabric) -> None:
    gateway, worker = await fabric.gateway(), await fabric.worker()
    await gateway.dispatch(new_work())
    delivery = await worker.pull()
    began = time.monotonic()
    with pytest.raises(Cancelled):
        while True:
            await delivery.send(FrameKind.DATA, bytes(CREDIT // 2))
    assert time.monotonic() - began > 4


@pytest.mark.parametrize("fabric", ["memory"], indirect=True)
async def test_a_silent_worker_is_lost(fabric: Fabric) -> None:
    gateway, worker = await fabric.gateway(), await fabric.worker()
    dispatch = await gateway.dispatch(new_work())
    delivery = await worker.pull()
    await delivery.send(FrameKind.DATA, b"x")
    with pytest.raises(WorkerLost):
        await collect(dispatch)


async def test_slots_bound_what_is_pulled(fabric: Fabric) -> None:
    gateway, worker = await fabric.gateway(), await fabric.worker(slots=1)
    await gateway.dispatch(new_work())
    await gateway.dispatch(new_work())
    first = await worker.pull()
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.3):
            await worker.pull()
    await first.drop()
    worker.release()
    async with asyncio.timeout(10):
        await worker.pull()


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


async def test_a_flood_of_one_model_takes_no_slot_of_another(fabric: Fabric) -> None:
    gateway, worker = await fabric.gateway(), await fabric.worker(**TWO)
    for _ in range(8):
        await gateway.dispatch(new_work(model="m1"))
    for _ in range(8):
        await gateway.dispatch(new_work(model="m2"))
    taken = await pulled(worker)
    assert sorted(delivery.work.model for delivery in taken) == ["m1", "m1", "m2", "m2", "m2"]
    worker.release(next(delivery for delivery in taken if delivery.work.model == "m2"))
    assert [delivery.work.model for delivery in await pulled(worker)] == ["m2"]


async def test_what_a_worker_cannot_begin_stays_for_others(fabric: Fabric) -> None:
    gateway, worker = await fabric.gateway(), await fabric.worker(**TWO)
    works = [new_work(model="m1") for _ in range(4)]
    for work in works:
        await gateway.dispatch(work)
    taken = await pulled(worker)
    other = await fabric.worker(node="n2", models=("m1",), slots=4)
    async with asyncio.timeout(10):
        rest = [await other.pull(), await other.pull()]
    assert not any(delivery.again for delivery in rest), "it was never given to the first one"
    assert {delivery.work.request_id for delivery in [*taken, *rest]} == {work.request_id for work in works}


async def test_a_request_of_many_sequences_takes_as_many_slots(fabric: Fabric) -> None:
    gateway, worker = await fabric.gateway(), await fabric.worker(models=("m1", "m2"), slots=6, each={"m1": 4, "m2": 2})
    for _ in range(5):
        await gateway.dispatch(new_work(model="m1"))
    async with asyncio.timeout(10):
        heavy = await worker.pull()
    worker.weigh(heavy, 16)
    for _ in range(3):
        await gateway.dispatch(new_work(model="m2"))
    assert [delivery.work.model for delivery in await pulled(worker)] == ["m2", "m2"], "its weight is its own model's affair"
    worker.weigh(heavy, 4)
    assert await pulled(worker) == []
    worker.weigh(heavy, 3)
    assert [delivery.work.model for delivery in await pulled(worker)] == ["m1"]
    worker.release(heavy)
    worker.weigh(heavy, 16)  # too late to mean anything
    assert [delivery.work.model for delivery in await pulled(worker)] == ["m1", "m1", "m1"]


async def test_a_request_whose_sequences_are_not_known_holds_its_model_back(fabric: Fabric) -> None:
    gateway, worker = await fabric.gateway(), await fabric.worker(slots=4)
    for _ in range(4):
        await gateway.dispatch(new_work())
    async with asyncio.timeout(10):
        first = await worker.pull()
    worker.weigh(first, None)
    assert await pulled(worker) == []
    worker.weigh(first, 2)
    assert len(await pulled(worker)) == 2
    worker.weigh(first, 1)
    assert len(await pulled(worker)) == 1
