"""Whatever one peer says: the others' messages flow, and `connected` tells whether they do."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager

import pytest
import structlog

from lacre_fabric.nats import subjects
from lacre_fabric.nats.client import MAX_SILENT, DirectClient
from lacre_fabric.nats.connection import Connection
from lacre_fabric.nats.gateway import NatsGateway
from lacre_fabric.nats.kv import NatsBucket
from lacre_fabric.nats.worker import NatsWorker
from lacre_fabric.work.frames import FrameKind
from parts.cut import way_to
from parts.fabric import LiveFabric, new_work
from parts.stolen_nats import StolenNats

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
# Subjects that its permissions allow a worker of pool a, and that nats-server passes on.
SUBJECTS = (
    b"reply.a.g1.\xff\xfe",
    b"reply.a.g1.x\x0c2",
    b"reply.a.g1.x\x0b1",
    b"reply.a.g1.x\ry",
    b"reply.a.g1.\x00",
    b"reply.a.g1." + b"x" * 3000,
)


@pytest.fixture
async def stack() -> AsyncIterator[AsyncExitStack]:
    async with AsyncExitStack() as stack:
        yield stack


@asynccontextmanager
async def stolen(nats: LiveFabric, name: str) -> AsyncIterator[Callable[..., Awaitable[None]]]:
    """Says messages with somebody's credential, each a subject, a payload and a header block; until the server has them."""
    thief = await StolenNats.open(nats.server.port, nats.credentials[name])

    async def say(*messages: tuple[bytes, bytes, bytes | None]) -> None:
        for subject, payload, headers in messages:
            thief.publish(subject, payload, headers=headers)
        await thief.settle()

    try:
        yield say
    finally:
        await thief.close()


async def gateway_of(nats: LiveFabric, stack: AsyncExitStack) -> NatsGateway:
    gateway = await nats.gateway()
    stack.push_async_callback(gateway.close)
    return gateway


async def worker_of(nats: LiveFabric, stack: AsyncExitStack, pool: str) -> NatsWorker:
    worker = await nats.worker(pool)
    stack.push_async_callback(worker.close)
    return worker


async def listening(gateway: NatsGateway, pool: str) -> Connection:
    """The gateway's connection for what the pool's workers say."""
    side = gateway._side(pool)
    await side.connect()
    assert side._connection is not None
    return side._connection


def reconnects(gateway: NatsGateway) -> int:
    """Of all of its connections."""
    pools = [side._connection for side in gateway._sides.values()]
    each = [gateway.connection, gateway._lobby, *(one for one in pools if one is not None)]
    return sum(connection.client.stats["reconnects"] for connection in each)


async def answers(gateway: NatsGateway, worker: NatsWorker, pool: str) -> None:
    """A question of the pool is answered from end to end."""
    async with asyncio.timeout(10):
        dispatch = await gateway.dispatch(new_work(pool))
        delivery = await worker.pull()
        await delivery.send(FrameKind.DATA, b"x")
        await delivery.send(FrameKind.USAGE, b"")
        await delivery.drop()
        worker.release()
        assert [frame.kind async for frame in dispatch.frames()] == [FrameKind.DATA, FrameKind.USAGE]


async def test_no_subject_silences_a_gateway(nats: LiveFabric, stack: AsyncExitStack) -> None:
    gateway, workers = await gateway_of(nats, stack), {pool: await worker_of(nats, stack, pool) for pool in ("a", "b")}
    attacked = await listening(gateway, "a")
    async with stolen(nats, "worker-a-n2") as say:
        for subject in SUBJECTS:
            await say((subject, b"", None), (subject, b"x", b"NATS/1.0\r\nA: b\r\n\r\n"))
            for pool, worker in workers.items():
                await answers(gateway, worker, pool)
    assert (reconnects(gateway), attacked.client.unusable) == (0, 2)


@pytest.mark.parametrize("number", range(len(HEADERS)))
async def test_no_header_silences_a_gateway(nats: LiveFabric, stack: AsyncExitStack, number: int) -> None:
    gateway, workers = await gateway_of(nats, stack), {pool: await worker_of(nats, stack, pool) for pool in ("a", "b")}
    await listening(gateway, "a")
    async with stolen(nats, "worker-a-n1") as say:
        for subject in (b"presence.a.lacre.n1", b"reply.a.g1." + b"0" * 32, b"reply.a.g1.x"):
            await say((subject, b"", HEADERS[number]), (subject, b"{}", HEADERS[number]))
        for pool, worker in workers.items():
            await answers(gateway, worker, pool)
    assert reconnects(gateway) == 0


async def test_no_message_of_a_gateway_silences_a_worker(nats: LiveFabric, stack: AsyncExitStack) -> None:
    """On the subjects that a gateway tells workers by, and as work in the queue, where the status line is the gateway's too."""
    gateway, worker = await gateway_of(nats, stack), await worker_of(nats, stack, "a")
    dispatch = await gateway.dispatch(new_work())
    delivery = await worker.pull()
    worker.release()
    request = delivery.work.request_id.encode()
    work = subjects.work("a", subjects.DEFAULT_REGION, "m1").encode()
    async with stolen(nats, "gateway-g1") as say:
        for headers in HEADERS:
            told = (b"credit.a." + request, b"credit.a.\xff\xfe", b"cancel.a.x\x0c1")
            await say(*((subject, b"9" * 5000, headers) for subject in told), (work, b"x", headers))
        await say((b"credit.a." + request, "²".encode(), None), (b"credit.a." + request, b"7" * 9, None))
    assert not delivery.cancelled.is_set()
    await delivery.send(FrameKind.USAGE, b"")
    await delivery.drop()
    assert [frame.kind async for frame in dispatch.frames()] == [FrameKind.USAGE]
    await answers(gateway, worker, "a")
    assert worker.connection.client.stats["reconnects"] == 0


async def test_no_entry_breaks_the_readers_of_its_bucket(nats: LiveFabric, stack: AsyncExitStack) -> None:
    """Of what a peer stores, JetStream gives out its headers, too."""
    gateway, worker = await gateway_of(nats, stack), await worker_of(nats, stack, "a")
    short = [headers for headers in HEADERS if len(headers) < 256]
    work = new_work()
    claim = f"$KV.claims_a.{work.digest.hex()}".encode()
    async with stolen(nats, "gateway-g1") as say:
        await say(*((subjects.revocation("gateway-g1").encode(), b"x", headers) for headers in short))
        await say(*((b"$KV.budgets.gateway-g1.x%d" % number, b"x", headers) for number, headers in enumerate(HEADERS)))
    async with stolen(nats, "worker-a-n2") as say:
        await say((claim, b"", b"NATS/1.0 \xff\r\nKV-Operation: DEL\r\nNats-Sequence: x\r\nNats-Time-Stamp: x\r\n\r\n"))
    bucket = NatsBucket(gateway.connection, subjects.BUDGETS_BUCKET)
    async with asyncio.timeout(15):
        for number in range(len(HEADERS)):
            while (entry := await bucket.read(f"x{number}")) is None:  # it is on its way to the disk
                await asyncio.sleep(0.02)
            assert entry.value.endswith(b"x")  # nats-server takes headers that it cannot read for a part of it
    assert await gateway.revoked() == []
    await gateway.dispatch(work)
    delivery = await worker.pull()
    assert not await delivery.claim(), "a claim is a claim, whatever its headers say"
    assert await worker.connection.newest("KV_claims_a", claim.decode()) == b""
    await delivery.drop()


async def test_what_cannot_be_used_is_counted_and_told_once(nats: LiveFabric, stack: AsyncExitStack) -> None:
    connection = await listening(await gateway_of(nats, stack), "a")
    with structlog.testing.capture_logs() as lines:
        async with stolen(nats, "worker-a-n1") as say:
            await say(*[(b"reply.a.g1.\xff", b"", None)] * 50)
            await connection.round_trip()
    assert connection.client.unusable == 50
    (line,) = [line for line in lines if line["event"] == "fabric.unusable_message"]
    assert (line["kind"], line["role"]) == ("UnicodeDecodeError", "gateway-g1 pool a")


async def test_what_a_callback_raises_ends_nothing(nats: LiveFabric, stack: AsyncExitStack) -> None:
    connection = await nats.connect("provisioner")
    stack.push_async_callback(connection.close)

    def take(_subject: str, _block: bytes, payload: bytes) -> bool:
        raise RuntimeError(payload)

    await connection.client.subscribe_directly("x.a", take)
    for _ in range(3):
        await connection.client.publish("x.a", b"boo")
    await connection.round_trip()
    assert (connection.client.unusable, connection.connected) == (3, True)


async def test_who_gave_up_waiting_for_a_pong_ends_nothing(nats: LiveFabric, stack: AsyncExitStack) -> None:
    """The library's own read loop dies there, of an answer to a future that was cancelled."""
    connection = await nats.connect("provisioner")
    stack.push_async_callback(connection.close)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.0):
            await connection.client.flush(1)
    await connection.round_trip()
    assert connection.client.stats["reconnects"] == 0


# `connected`


async def connected_by(client: DirectClient, url: str, nats: LiveFabric) -> DirectClient:
    credential = nats.credentials["provisioner"]
    options = {"user": credential.name, "password": credential.password, "reconnect_time_wait": 0.05}
    await client.connect(url, **options, max_reconnect_attempts=-1)
    return client


async def test_a_connection_that_stands_still_is_lost_and_made_anew(nats: LiveFabric, stack: AsyncExitStack) -> None:
    way = await stack.enter_async_context(way_to(nats.server.port))
    client = await connected_by(DirectClient(look=0.05), way.url, nats)
    stack.push_async_callback(client.close)
    await asyncio.sleep(0.05 * 2 * MAX_SILENT)
    assert client.is_connected, "the server answers each look: a quiet connection is none that stands still"
    way.flows.clear()
    async with asyncio.timeout(10):
        while client.is_connected:
            await asyncio.sleep(0.01)
    way.flows.set()
    async with asyncio.timeout(15):
        while not client.is_connected:
            await asyncio.sleep(0.01)
    await client.flush(2)
    assert client.stats["reconnects"] == 1


async def test_a_read_loop_that_died_is_a_lost_connection(nats: LiveFabric, stack: AsyncExitStack) -> None:
    """Whatever ended it: here, somebody else."""
    client = await connected_by(DirectClient(look=0.05), nats.server.url, nats)
    stack.push_async_callback(client.close)
    assert client._reading_task is not None
    client._reading_task.cancel()
    async with asyncio.timeout(10):
        while client.stats["reconnects"] != 1:
            await asyncio.sleep(0.01)
    await client.flush(2)


async def test_an_error_of_the_server_ends_no_connection_for_good(nats: LiveFabric, stack: AsyncExitStack) -> None:
    """The library closes over it, and never comes back."""
    connection = await Connection.open(nats.server.url, nats.credentials["gateway-g1"])
    stack.push_async_callback(connection.close)
    limit = json.loads(json.dumps(connection.client.max_payload))
    connection.client._max_payload = 2 * limit  # the server has the last word, and hangs up
    await connection.client.publish(subjects.cancel("a", "0" * 32), bytes(limit + 1))
    async with asyncio.timeout(15):
        while connection.client.stats["reconnects"] != 1 or not connection.connected:
            await asyncio.sleep(0.02)
    assert not connection.lost
    await connection.round_trip()
