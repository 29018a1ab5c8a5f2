"""A gateway has a connection for each pool: what becomes of one is no other pool's affair, and no request waits for nothing."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from functools import partial

import pytest

from lacre_fabric.nats.connection import Connection
from lacre_fabric.nats.pool import GRACE, KEEP, MAX_STRAY, PoolSide
from lacre_fabric.work.contract import FabricUnavailable, WorkerLost
from lacre_fabric.work.frames import Frame, FrameKind
from parts.cut import Cut, way_to
from parts.fabric import POOLS, LiveFabric, Parties, answer, new_work, read, until

WHOLE = [b"x", b"receipt"]  # an answer


@dataclass
class Both(Parties):
    """A gateway with workers of two pools. way: that to pool a's answers."""

    way: Cut = field(init=False)

    async def start(self) -> None:
        self.way = await self.stack.enter_async_context(way_to(self.live.server.port))
        self.gateway1 = await self.gateway()
        self.gateway1._open_pool = partial(self.open, "g1")
        self.workers = {pool: await self.worker(pool) for pool in POOLS}
        await until(lambda: all(self.side(pool).connected for pool in POOLS))

    async def open(self, gateway: str, pool: str) -> Connection:
        url = self.way.url if pool == "a" or gateway == "g2" else self.live.server.url
        return await Connection.open(url, self.live.credentials[f"gateway-{gateway}"], keep=KEEP)

    def side(self, pool: str) -> PoolSide:
        return self.gateway1._side(pool)

    async def answered(self, pool: str) -> None:
        dispatch = await self.gateway1.dispatch(new_work(pool))
        await answer(self.workers[pool])
        assert await read(dispatch) == WHOLE

    async def cut(self) -> None:
        self.way.cut()
        await until(lambda: not self.side("a").connected)

    async def mended(self) -> None:
        self.way.mend()
        await until(lambda: self.side("a").connected)


@pytest.fixture
async def both(nats: LiveFabric) -> AsyncIterator[Both]:
    async with AsyncExitStack() as stack:
        both = Both(stack, nats)
        await both.start()
        yield both


async def test_a_pools_lost_connection_is_its_own(both: Both) -> None:
    gateway = both.gateway1
    under_way = await gateway.dispatch(new_work("b"))
    delivery = await both.workers["b"].pull()
    both.workers["b"].release()
    await delivery.send(FrameKind.DATA, b"x")
    await both.cut()
    assert gateway.away() == {"a"}
    assert gateway.connected, "one pool that floods must not take the gateway out of service for all"
    with pytest.raises(FabricUnavailable, match="answers of pool a"):
        await gateway.dispatch(new_work("a"))
    await both.answered("b")
    await delivery.send(FrameKind.USAGE, b"receipt")
    await delivery.drop()
    assert await read(under_way) == WHOLE
    await both.mended()
    assert gateway.away() == frozenset()
    await both.answered("a")


async def test_a_gateway_whose_pools_are_all_away_says_so(both: Both) -> None:
    gateway = await both.gateway("g2")
    assert gateway.connected, "where there are no pools, none is away"
    gateway._open_pool = partial(both.open, "g2")
    for pool in POOLS:
        await gateway._side(pool).connect()
    assert gateway.connected
    both.way.cut()
    await until(lambda: not gateway.connected)
    assert gateway.connection.connected


async def test_a_pool_whose_connection_cannot_be_made_is_away(both: Both) -> None:
    gateway = await both.gateway("g2")
    both.way.cut()
    gateway._open_pool = partial(both.open, "g2")
    for _ in range(2):  # at once, the second time
        with pytest.raises(FabricUnavailable):
            await gateway.dispatch(new_work("a"))
    assert gateway.away() >= {"a"}
    both.way.mend()
    await until(lambda: not gateway.away())  # presence has it tried again


async def test_a_gateway_that_closes_leaves_no_connection_behind(both: Both) -> None:
    """Not even one that is being made."""
    for seconds in (0.0, 0.001, 0.003, 0.01):
        gateway = await both.live.gateway("g2")
        gateway._side("a").connect_soon()
        await asyncio.sleep(seconds)
        await gateway.close()
    assert len([task for task in asyncio.all_tasks() if "connection of a pool" in task.get_name()]) == 0


async def test_an_answer_that_came_while_the_connection_was_away_is_missed_at_once(both: Both) -> None:
    """The request waited for a worker, and would wait for half a minute more."""
    dispatch = await both.gateway1.dispatch(new_work("a"))
    delivery = await both.workers["a"].pull()
    await both.cut()
    await delivery.send(FrameKind.USAGE, b"")
    await delivery.drop()
    await both.mended()
    began = time.monotonic()
    with pytest.raises(WorkerLost, match="connection to NATS broke"):
        async with asyncio.timeout(GRACE + 3):
            await anext(dispatch.frames())
    assert time.monotonic() - began >= GRACE - 0.5, "a worker that has it may still say so"


async def test_what_is_in_its_queue_waits_on(both: Both) -> None:
    waiting = new_work("a")
    dispatch, gone = await both.gateway1.dispatch(waiting), await both.gateway1.dispatch(new_work("a"))
    await gone.cancel()  # leaves a gap in the queue's sequences
    await both.cut()
    await both.mended()
    await asyncio.sleep(GRACE + 0.5)
    assert await answer(both.workers["a"]) == waiting
    assert await read(dispatch) == WHOLE


async def test_a_flood_to_nobody_costs_the_other_pool_nothing(both: Both) -> None:
    """Frames that are well formed, for requests that there are none of: each one would be answered by a word to its worker."""
    thief, client = await both.stolen("worker-a-n2"), both.gateway1.connection.client
    said = client.stats["out_msgs"]

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
    assert client.stats["out_msgs"] - said < 6 * MAX_STRAY
    connection = both.side("b")._connection
    assert connection is not None
    assert connection.client.stats["reconnects"] == client.stats["reconnects"] == 0
