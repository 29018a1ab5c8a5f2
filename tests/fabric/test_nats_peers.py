"""A gateway has a connection for each pool: whatever one pool or peer says or loses, the others' messages flow."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import pytest
import structlog
import uvloop

from lacre_fabric.nats import subjects
from lacre_fabric.nats.client import MAX_SILENT, DirectClient
from lacre_fabric.nats.connection import Connection
from lacre_fabric.nats.gateway import NatsGateway
from lacre_fabric.nats.kv import NatsBucket
from lacre_fabric.nats.pool import GRACE, KEEP, MAX_STRAY, PoolSide, _Stray
from lacre_fabric.nats.worker import NatsWorker
from lacre_fabric.work.contract import FabricUnavailable, WorkerLost
from lacre_fabric.work.frames import FrameKind
from parts.cut import Cut, way_to
from parts.fabric import POOLS, LiveFabric, Parties, answer, new_work, read
from parts.frames import frames_of
from parts.waiting import until

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
            await anext(frames_of(dispatch))
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


# Whatever one peer says: the others' messages flow, and `connected` tells whether they do.


# Header blocks that a client library's parser may raise at: an odd status, an odd description, no line, no version.
HEADERS = (
    b"NATS/1.0 \xff\xff\xff\r\n\r\n",
    b"NATS/1.0 100 \xff\xff\r\n\r\n",
    b"NATS/1.0\r\n",
    b"\r\n",
    b"x",
    b"NATS/1.0",
    b"NATS/1.0\r\n\xff\xfe: x\r\n\r\n",
    b"NATS/1.0 100 x\r\n\xff: x\r\n\r\n",
    b"NATS/1.0 404 No Messages\r\nStatus: x\r\n\r\n",
    b"NATS/1.0\r\n" + b"A: b\r\n" * 10_000 + b"\r\n",
)


@asynccontextmanager
async def stolen(parties: Parties, name: str) -> AsyncIterator[Callable[..., Awaitable[None]]]:
    """Says messages with somebody's credential, each a subject, a payload and a header block; until the server has them."""
    thief = await parties.stolen(name)

    async def say(*messages: tuple[bytes, bytes, bytes | None]) -> None:
        for subject, payload, headers in messages:
            thief.publish(subject, payload, headers=headers)
        await thief.settle()

    yield say


async def listening(gateway: NatsGateway, pool: str) -> Connection:
    """The gateway's connection for what the pool's workers say."""
    side = gateway._side(pool)
    await side.connect()
    assert side._connection is not None
    return side._connection


async def test_no_peer_silences_a_gateway(parties: Parties) -> None:
    """Whatever the headers of its presence and its frames: the gateway's answers come, over the connections that it had."""
    gateway, workers = await parties.gateway(), {pool: await parties.worker(pool) for pool in POOLS}
    attacked = await listening(gateway, "a")
    async with stolen(parties, "worker-a-n1") as say:
        for headers in HEADERS:
            for subject in (b"presence.a.lacre.n1", b"reply.a.g1." + b"0" * 32, b"reply.a.g1.x"):
                await say((subject, b"", headers), (subject, b"{}", headers))
        for pool, worker in workers.items():
            await goes_through(gateway, worker, pool)
    for connection in (gateway.connection, gateway._lobby, attacked):
        assert connection.client.stats["reconnects"] == 0


def test_words_to_workers_of_unknown_requests_are_limited() -> None:
    strays = _Stray()
    assert [strays.add(f"r{number}") for number in range(MAX_STRAY + 2)] == [True] * MAX_STRAY + [False] * 2
    assert not strays.add("r0"), "each once"


async def goes_through(gateway: NatsGateway, worker: NatsWorker, pool: str = "a") -> None:
    dispatch = await gateway.dispatch(new_work(pool))
    await answer(worker)
    assert await read(dispatch) == [b"x", b"receipt"]


async def test_no_message_of_a_gateway_silences_a_worker(parties: Parties) -> None:
    """On the subjects that a gateway tells workers by, and as work in the queue, where the status line is the gateway's too."""
    gateway, worker = await parties.gateway(), await parties.worker("a")
    dispatch = await gateway.dispatch(new_work())
    delivery = await worker.pull()
    worker.release()
    request = delivery.work.request_id.encode()
    work = subjects.work("a", subjects.DEFAULT_REGION, "m1").encode()
    async with stolen(parties, "gateway-g1") as say:
        for headers in HEADERS:
            told = (b"credit.a." + request, b"credit.a.\xff\xfe", b"cancel.a.x\x0c1")
            await say(*((subject, b"9" * 5000, headers) for subject in told), (work, b"x", headers))
        await say(*((b"credit.a." + request, told, None) for told in ("²".encode(), b"7" * 9, b"7")))
        await say((b"cancel.a." + request, b"", None))  # without a proof, like the 7
    assert not delivery.cancelled.is_set()
    await delivery.send(FrameKind.USAGE, b"")
    await delivery.drop()
    assert await read(dispatch) == [b""]
    await goes_through(gateway, worker)
    assert worker.connection.client.stats["reconnects"] == 0


async def test_no_entry_breaks_the_readers_of_its_bucket(parties: Parties) -> None:
    """Of what a peer stores, JetStream gives out its headers, too."""
    gateway, worker = await parties.gateway(), await parties.worker("a")
    short = [headers for headers in HEADERS if len(headers) < 256]
    work = new_work()
    await gateway.revoked()  # those of other tests
    claim = f"$KV.claims_a.{work.digest.hex()}".encode()
    async with stolen(parties, "gateway-g1") as say:
        await say(*((subjects.revocation("gateway-g1").encode(), b"x", headers) for headers in short))
        await say(*((b"$KV.budgets.gateway-g1.x%d" % number, b"x", headers) for number, headers in enumerate(HEADERS)))
    async with stolen(parties, "worker-a-n2") as say:
        await say((claim, b"", b"NATS/1.0 \xff\r\nKV-Operation: DEL\r\nNats-Sequence: x\r\nNats-Time-Stamp: x\r\n\r\n"))
    bucket = NatsBucket(gateway.connection, subjects.BUDGETS_BUCKET)
    for number in range(len(HEADERS)):
        await until(lambda: bucket.read(f"x{number}"))  # noqa: B023 - it is on its way to the disk
        entry = await bucket.read(f"x{number}")
        assert entry is not None
        assert entry.value.endswith(b"x")  # nats-server takes headers that it cannot read for a part of it
    assert await gateway.revoked() == []
    await gateway.dispatch(work)
    delivery = await worker.pull()
    assert not await delivery.claim(), "a claim is a claim, whatever its headers say"
    assert await worker.connection.newest("KV_claims_a", claim.decode()) == b""
    await delivery.drop()


async def test_what_cannot_be_used_is_counted_and_told_once(parties: Parties) -> None:
    connection = await listening(await parties.gateway(), "a")
    with structlog.testing.capture_logs() as lines:
        async with stolen(parties, "worker-a-n1") as say:
            await say(*[(b"reply.a.g1.\xff", b"", None)] * 50)
            await connection.round_trip()
    assert connection.client.unusable == 50
    (line,) = [line for line in lines if line["event"] == "fabric.unusable_message"]
    assert (line["kind"], line["role"]) == ("UnicodeDecodeError", "gateway-g1 pool a")


async def test_what_a_callback_raises_ends_nothing(parties: Parties) -> None:
    connection = await parties.connect("provisioner")

    def take(_subject: str, _block: bytes, payload: bytes) -> bool:
        raise RuntimeError(payload)

    await connection.client.subscribe_directly("x.a", take)
    for _ in range(3):
        await connection.client.publish("x.a", b"boo")
    await connection.round_trip()
    assert (connection.client.unusable, connection.connected) == (3, True)


async def test_who_gave_up_waiting_for_a_pong_ends_nothing(parties: Parties) -> None:
    """The library's own read loop dies there, of an answer to a future that was cancelled."""
    connection = await parties.connect("provisioner")
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.0):
            await connection.client.flush(1)
    await connection.round_trip()
    assert connection.client.stats["reconnects"] == 0


# `connected`


async def looking(parties: Parties, url: str) -> DirectClient:
    client, credential = DirectClient(look=0.05), parties.live.credentials["provisioner"]
    options = {"user": credential.name, "password": credential.password, "reconnect_time_wait": 0.05}
    await client.connect(url, **options, max_reconnect_attempts=-1)
    parties.stack.push_async_callback(client.close)
    return client


async def test_a_connection_that_stands_still_is_lost_and_made_anew(parties: Parties) -> None:
    way = await parties.stack.enter_async_context(way_to(parties.live.server.port))
    client = await looking(parties, way.url)
    await asyncio.sleep(0.05 * 2 * MAX_SILENT)
    assert client.is_connected, "the server answers each look: a quiet connection is none that stands still"
    way.flows.clear()
    await until(lambda: not client.is_connected)
    way.flows.set()
    await until(lambda: client.is_connected)
    await client.flush(2)
    assert client.stats["reconnects"] == 1


async def test_a_read_loop_that_died_is_a_lost_connection(parties: Parties) -> None:
    """Whatever ended it: here, somebody else."""
    client = await looking(parties, parties.live.server.url)
    assert client._reading_task is not None
    client._reading_task.cancel()
    await until(lambda: client.stats["reconnects"] == 1)
    await client.flush(2)


async def test_an_error_of_the_server_ends_no_connection_for_good(parties: Parties) -> None:
    """The library closes over it, and never comes back."""
    connection = await parties.connect("gateway-g1")
    limit = connection.client.max_payload
    connection.client._max_payload = 2 * limit  # the server has the last word, and hangs up
    await connection.client.publish(subjects.cancel("a", "0" * 32), bytes(limit + 1))
    await until(lambda: connection.client.stats["reconnects"] == 1 and connection.connected)
    assert not connection.lost
    await connection.round_trip()


@pytest.mark.parametrize("new_loop", [asyncio.new_event_loop, uvloop.new_event_loop])
def test_a_connection_closes_though_the_server_is_gone_with_something_left_to_say(
    tmp_path: Path, new_loop: Callable[[], asyncio.AbstractEventLoop]
) -> None:
    live = LiveFabric.make(tmp_path)

    async def run() -> None:
        live.start()
        connection = await live.connect("provisioner")
        live.stop()
        await until(lambda: not connection.connected)
        await connection.client.publish("presence.a.lacre.n1", b"{}")  # the library keeps it until it is connected again
        await connection.close()
        assert connection.lost

    with asyncio.Runner(loop_factory=new_loop) as runner:
        runner.run(run())
