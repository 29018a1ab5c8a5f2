"""A gateway has a connection for each pool: what becomes of one is no other pool's affair, and no request waits for nothing."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack

import pytest

from lacre_fabric.nats.connection import Connection
from lacre_fabric.nats.pool import GRACE, KEEP, MAX_STRAY, PoolSide
from lacre_fabric.nats.worker import NatsDelivery, NatsWorker
from lacre_fabric.work.contract import FabricUnavailable, WorkerLost
from lacre_fabric.work.frames import Frame, FrameKind
from parts.cut import Cut, way_to
from parts.fabric import LiveFabric, new_work
from parts.stolen_nats import StolenNats


class Both:
    """A gateway with workers of two pools. way: that to pool a's answers."""

    def __init__(self, nats: LiveFabric, way: Cut, stack: AsyncExitStack) -> None:
        self.nats, self.way, self.stack = nats, way, stack

    async def start(self) -> None:
        self.gateway = await self.nats.gateway()
        self.stack.push_async_callback(self.gateway.close)
        self.gateway._open_pool = self._open
        self.workers = {pool: await self._worker(pool) for pool in ("a", "b")}
        async with asyncio.timeout(15):
            while not (self.side("a").connected and self.side("b").connected):
                await asyncio.sleep(0.02)

    async def _open(self, pool: str) -> Connection:
        url = self.way.url if pool == "a" else self.nats.server.url
        return await Connection.open(url, self.nats.credentials["gateway-g1"], keep=KEEP)

    async def _worker(self, pool: str) -> NatsWorker:
        worker = await self.nats.worker(pool)
        self.stack.push_async_callback(worker.close)
        return worker

    def side(self, pool: str) -> PoolSide:
        return self.gateway._side(pool)

    async def answered(self, pool: str) -> None:
        async with asyncio.timeout(10):
            dispatch = await self.gateway.dispatch(new_work(pool))
            await whole_answer(await self.pulled(pool))
            assert [frame.kind async for frame in dispatch.frames()] == [FrameKind.DATA, FrameKind.USAGE]

    async def pulled(self, pool: str) -> NatsDelivery:
        delivery = await self.workers[pool].pull()
        self.workers[pool].release()
        return delivery

    async def cut(self, pool: str = "a") -> None:
        self.way.cut()
        async with asyncio.timeout(10):
            while self.side(pool).connected:
                await asyncio.sleep(0.01)

    async def mended(self, pool: str = "a") -> None:
        self.way.mend()
        async with asyncio.timeout(15):
            while not self.side(pool).connected:
                await asyncio.sleep(0.01)


async def whole_answer(delivery: NatsDelivery) -> None:
    await delivery.send(FrameKind.DATA, b"x")
    await delivery.send(FrameKind.USAGE, b"")
    await delivery.drop()


@pytest.fixture
async def both(nats: LiveFabric) -> AsyncIterator[Both]:
    async with AsyncExitStack() as stack:
        both = Both(nats, await stack.enter_async_context(way_to(nats.server.port)), stack)
        await both.start()
        yield both


async def test_a_pools_lost_connection_is_its_own(both: Both) -> None:
    under_way = await both.gateway.dispatch(new_work("b"))
    delivery = await both.pulled("b")
    await delivery.send(FrameKind.DATA, b"x")
    await both.cut()
    assert both.gateway.away() == {"a"}
    assert both.gateway.connected, "one pool that floods must not take the gateway out of service for all"
    with pytest.raises(FabricUnavailable, match="answers of pool a"):
        await both.gateway.dispatch(new_work("a"))
    await both.answered("b")
    await delivery.send(FrameKind.USAGE, b"")
    await delivery.drop()
    assert [frame.kind async for frame in under_way.frames()] == [FrameKind.DATA, FrameKind.USAGE]
    await both.mended()
    assert both.gateway.away() == frozenset()
    await both.answered("a")


async def test_a_gateway_whose_pools_are_all_away_says_so(both: Both) -> None:
    gateway = await both.nats.gateway("g2")
    both.stack.push_async_callback(gateway.close)
    assert gateway.connected, "where there are no pools, none is away"
    credential = both.nats.credentials["gateway-g2"]
    gateway._open_pool = lambda _pool: Connection.open(both.way.url, credential, keep=KEEP)
    for pool in ("a", "b"):
        await gateway._side(pool).connect()
    assert gateway.connected
    both.way.cut()
    async with asyncio.timeout(10):
        while gateway.connected:
            await asyncio.sleep(0.01)
    assert gateway.connection.connected


async def test_a_pool_whose_connection_cannot_be_made_is_away(both: Both) -> None:
    gateway = await both.nats.gateway("g2")
    both.stack.push_async_callback(gateway.close)
    both.way.cut()
    credential = both.nats.credentials["gateway-g2"]
    gateway._open_pool = lambda _pool: Connection.open(both.way.url, credential, keep=KEEP)
    for _ in range(2):  # at once, the second time
        with pytest.raises(FabricUnavailable):
            await gateway.dispatch(new_work("a"))
    assert gateway.away() >= {"a"}
    both.way.mend()
    async with asyncio.timeout(15):
        while gateway.away():
            await asyncio.sleep(0.05)  # presence has it tried again


async def test_a_gateway_that_closes_leaves_no_connection_behind(both: Both) -> None:
    """Not even one that is being made."""
    for seconds in (0.0, 0.001, 0.003, 0.01):
        gateway = await both.nats.gateway("g2")
        gateway._side("a").connect_soon()
        await asyncio.sleep(seconds)
        await gateway.close()
    assert len([task for task in asyncio.all_tasks() if "connection of a pool" in task.get_name()]) == 0


async def test_an_answer_that_came_while_the_connection_was_away_is_missed_at_once(both: Both) -> None:
    """The request waited for a worker, and would wait for half a minute more."""
    dispatch = await both.gateway.dispatch(new_work("a"))
    delivery = await both.pulled("a")
    await both.cut()
    await whole_answer(delivery)
    await both.mended()
    began = time.monotonic()
    with pytest.raises(WorkerLost, match="connection to NATS broke"):
        async with asyncio.timeout(GRACE + 3):
            await anext(dispatch.frames())
    assert time.monotonic() - began >= GRACE - 0.5, "a worker that has it may still say so"


async def test_what_is_in_its_queue_waits_on(both: Both) -> None:
    waiting, other = new_work("a"), new_work("a")
    dispatch, gone = await both.gateway.dispatch(waiting), await both.gateway.dispatch(other)
    await gone.cancel()  # leaves a gap in the queue's sequences
    await both.cut()
    await both.mended()
    await asyncio.sleep(GRACE + 0.5)
    delivery = await both.pulled("a")
    assert delivery.work == waiting
    await whole_answer(delivery)
    assert [frame.kind async for frame in dispatch.frames()] == [FrameKind.DATA, FrameKind.USAGE]


async def test_a_flood_to_nobody_costs_the_other_pool_nothing(both: Both) -> None:
    """Frames that are well formed, for requests that there are none of: each one would be answered by a word to its worker."""
    thief = await StolenNats.open(both.nats.server.port, both.nats.credentials["worker-a-n2"])
    both.stack.push_async_callback(thief.close)
    said = both.gateway.connection.client.stats["out_msgs"]

    async def flood() -> None:
        for number in range(20_000):
            frame = Frame(secrets.token_hex(16), 0, FrameKind.DATA, b"x")
            thief.publish(f"reply.a.g1.{secrets.token_hex(16)}", b"x", headers=frame.headers())
            if number % 500 == 0:
                await thief.settle()

    flooding = asyncio.create_task(flood())
    while not flooding.done():
        await both.answered("b")
    await flooding
    told = both.gateway.connection.client.stats["out_msgs"] - said
    assert told < 6 * MAX_STRAY
    side = both.side("b")
    assert side._connection is not None
    assert side._connection.client.stats["reconnects"] == both.gateway.connection.client.stats["reconnects"] == 0


async def test_a_message_longer_than_any_frame_is_never_kept(both: Both) -> None:
    thief = await StolenNats.open(both.nats.server.port, both.nats.credentials["worker-a-n2"])
    both.stack.push_async_callback(thief.close)
    for _ in range(8):
        thief.publish(f"reply.a.g1.{'0' * 32}", bytes(KEEP + 1))
    await thief.settle()
    await both.answered("a")
    side = both.side("a")
    assert side._connection is not None
    assert side._connection.client.unusable == 8
