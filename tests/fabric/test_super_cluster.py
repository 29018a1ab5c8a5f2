"""Two regions, as `examples/nats/region.conf` joins them: a request finds a worker in either, and runs at most once in both."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from lacre_fabric import roles
from lacre_fabric.connection import Connection
from lacre_fabric.frames import Kind
from lacre_fabric.nats_gateway import NatsGateway
from lacre_fabric.nats_worker import NatsDelivery, NatsWorker
from lacre_fabric.roles import Credential
from lacre_fabric.work import CREDIT, Dispatch, FabricError
from parts.fabric import new_work
from parts.nats_cluster import SuperCluster

POOL, MODEL = "a", "m1"
POOLS = {POOL: (MODEL,), "b": (MODEL,)}
REGIONS = ("eu", "us")
HOME, AWAY = REGIONS

pytestmark = [pytest.mark.slow]


@dataclass
class Regions:
    """Both, and what was connected to them; all is closed in the end."""

    cluster: SuperCluster
    credentials: dict[str, Credential]
    stack: AsyncExitStack
    ran: list[tuple[str, bytes]] = field(default_factory=list)  # what was claimed: node, digest

    async def connect(self, name: str, region: str) -> Connection:
        connection = await Connection.open(self.cluster.servers(region), self.credentials[name])
        self.stack.push_async_callback(connection.close)
        return connection

    async def gateway(self, region: str) -> NatsGateway:
        credential = self.credentials[f"gateway-{region}"]
        gateway = await NatsGateway.connect(self.cluster.servers(region), credential, f"g-{region}", region)
        self.stack.push_async_callback(gateway.close)
        return gateway

    async def worker(self, region: str, slots: int = 1) -> NatsWorker:
        """Not working yet: it pulls when it is told to."""
        credential, servers = self.credentials[f"worker-{POOL}-{region}"], self.cluster.servers(region)
        worker = await NatsWorker.connect(servers, credential, POOL, f"n-{region}", [MODEL], slots=slots, region=region)
        self.stack.push_async_callback(worker.close)
        return worker

    async def busy(self, worker: NatsWorker, pieces: Sequence[bytes] = (b"x",)) -> None:
        """Answers one request after the other."""

        async def work() -> None:
            while True:
                delivery = await worker.pull()
                await self.answer(worker, delivery, pieces)

        await self.run(work())

    async def answer(self, worker: NatsWorker, delivery: NatsDelivery, pieces: Sequence[bytes] = (b"x",)) -> None:
        try:
            if await delivery.claim():
                self.ran.append((worker._node, delivery.work.digest))
                for piece in pieces:
                    await delivery.send(Kind.DATA, piece)
                await delivery.send(Kind.USAGE, b"receipt")
        except FabricError:
            pass  # what became of it, the gateway tells
        finally:
            await delivery.drop()
            worker.release()

    async def run(self, work: object) -> None:
        task = asyncio.ensure_future(work)  # type: ignore[call-overload]

        async def end() -> None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

        self.stack.push_async_callback(end)

    def nodes(self) -> list[str]:
        return [node for node, _ in self.ran]


@pytest.fixture(scope="module")
def names() -> dict[str, Credential]:
    fixed = ["provisioner", "inspector", *(f"gateway-{region}" for region in REGIONS)]
    return {name: Credential.new(name) for name in [*fixed, *(f"worker-{pool}-{at}" for pool in POOLS for at in REGIONS)]}


def every_role(credentials: dict[str, Credential]) -> list[roles.Role]:
    return [
        roles.provisioner(credentials["provisioner"]),
        roles.inspector(credentials["inspector"]),
        *(roles.gateway(credentials[f"gateway-{at}"], f"g-{at}", tuple(POOLS), REGIONS) for at in REGIONS),
        *(roles.worker(credentials[f"worker-{pool}-{at}"], pool, f"n-{at}", at) for pool in POOLS for at in REGIONS),
    ]


@pytest.fixture
async def regions(tmp_path: Path, names: dict[str, Credential]) -> AsyncIterator[Regions]:
    cluster = SuperCluster(tmp_path, every_role(names), POOLS, REGIONS)
    try:
        cluster.start()
        await cluster.ready(names["provisioner"])
        async with AsyncExitStack() as stack:
            yield Regions(cluster, names, stack)
    finally:
        cluster.stop()


async def read(dispatch: Dispatch) -> list[bytes]:
    frames = []
    async for frame in dispatch.frames():
        frames.append(frame.payload)
        await dispatch.consumed(len(frame.payload))
    return frames


async def until_seen(gateway: NatsGateway, **free: int) -> None:
    """Until the gateway knows that so many slots are free in each region; those that it is not told of have no worker."""
    async with asyncio.timeout(10):
        while {at: seen.free for (pool, at), seen in gateway.capacity().items() if pool == POOL} != free:
            await asyncio.sleep(0.05)


async def test_the_nearest_worker_that_is_free(regions: Regions) -> None:
    near, far = await regions.worker(HOME), await regions.worker(AWAY, slots=2)
    gateway, other = await regions.gateway(HOME), await regions.gateway(AWAY)
    for each in (gateway, other):
        await until_seen(each, eu=1, us=2)

    # One after the other: here, though more is free there.
    first = await gateway.dispatch(new_work())
    at_home = await near.pull()
    # Presence has not told yet that the only slot here is taken: what was sent counts.
    second, third, fourth = [await gateway.dispatch(new_work()) for _ in range(3)]
    away = [await far.pull() for _ in range(2)]
    assert [await gateway.backlog(POOL, at) for at in REGIONS] == [2, 2], "not acked yet; the last waits here, for all are busy"
    await asyncio.gather(*(regions.answer(far, delivery) for delivery in away), regions.answer(near, at_home))
    assert [await read(each) for each in (first, second, third)] == [[b"x", b"receipt"]] * 3
    await regions.answer(near, await near.pull())
    assert await read(fourth) == [b"x", b"receipt"]
    assert regions.nodes().count("n-eu") == 2

    regions.ran.clear()
    await regions.busy(near)
    await regions.busy(far)
    await until_seen(other, eu=1, us=2)
    assert await read(await other.dispatch(new_work())) == [b"x", b"receipt"]
    assert regions.nodes() == ["n-us"], "each gateway has a region of its own"


async def test_where_nobody_is_the_others_answer(regions: Regions) -> None:
    """And a stream that crosses is like any other: credit goes there, and word that nobody reads any more."""
    far = await regions.worker(AWAY)
    gateway = await regions.gateway(HOME)
    await until_seen(gateway, us=1)
    pieces = [bytes(CREDIT // 4)] * 12
    dispatch = await gateway.dispatch(new_work())
    answering = asyncio.create_task(regions.answer(far, await far.pull(), pieces))
    assert await read(dispatch) == [*pieces, b"receipt"]
    await answering

    dispatch = await gateway.dispatch(new_work())
    delivery = await far.pull()
    assert await delivery.claim()
    await delivery.send(Kind.DATA, b"x")
    async for frame in dispatch.frames():
        assert frame.payload == b"x"
        break
    await dispatch.cancel()
    async with asyncio.timeout(2):
        await delivery.cancelled.wait()
    await delivery.drop()
    far.release()

    near = await regions.worker(HOME)
    await until_seen(gateway, eu=1, us=1)
    await near.close()  # as one that died, but at once
    assert (POOL, HOME) not in gateway.capacity()
    await regions.busy(far)
    assert await read(await gateway.dispatch(new_work())) == [b"x", b"receipt"]
    assert regions.nodes() == ["n-us"] * 2
