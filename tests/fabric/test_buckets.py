"""What shared buckets promise: the contract, on NATS and in memory alike; and what becomes of a write when the server dies."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator

import pytest

from lacre_fabric.nats import subjects
from lacre_fabric.nats.connection import Connection
from lacre_fabric.nats.kv import Bucket, Conflict, NatsBucket
from lacre_fabric.work.contract import FabricUnavailable
from parts.fabric import LiveFabric
from parts.memory_bucket import MemoryBucket


@pytest.fixture(params=["nats", "memory"])
async def bucket(request: pytest.FixtureRequest) -> AsyncIterator[Bucket]:
    if request.param == "memory":
        yield MemoryBucket()
        return
    live: LiveFabric = request.getfixturevalue("server")
    await live.provision()
    connection = await live.connect("gateway-g1")
    yield NatsBucket(connection, subjects.BUDGETS_BUCKET)
    await connection.close()


@pytest.fixture
def key() -> str:
    return f"test.{time.monotonic_ns()}"


async def test_written_and_read(bucket: Bucket, key: str) -> None:
    assert await bucket.read(key) is None
    first = await bucket.write(key, b"one", 0)
    entry = await bucket.read(key)
    assert entry is not None
    assert (entry.value, entry.revision) == (b"one", first)
    assert abs(entry.time - time.time()) < 5
    second = await bucket.write(key, b"two", first)
    entry = await bucket.read(key)
    assert entry is not None
    assert (entry.value, entry.revision) == (b"two", second)


async def test_a_write_on_another_revision_does_not_happen(bucket: Bucket, key: str) -> None:
    first = await bucket.write(key, b"one", 0)
    second = await bucket.write(key, b"two", first)
    for revision in (0, first, second + 1):
        with pytest.raises(Conflict):
            await bucket.write(key, b"three", revision)
    entry = await bucket.read(key)
    assert entry is not None
    assert entry.value == b"two"


async def test_one_of_many_racing_writes_happens(bucket: Bucket, key: str) -> None:
    async def add() -> int:
        conflicts = 0
        while True:
            entry = await bucket.read(key)
            count = 0 if entry is None else int(entry.value)
            try:
                await bucket.write(key, str(count + 1).encode(), 0 if entry is None else entry.revision)
            except Conflict:
                conflicts += 1
            else:
                return conflicts

    assert sum(await asyncio.gather(*(add() for _ in range(12)))) > 0
    entry = await bucket.read(key)
    assert entry is not None
    assert entry.value == b"12"


async def test_a_credential_writes_its_own_part(server: LiveFabric, key: str) -> None:
    """All read all parts; a compare-and-set is of all of them together."""
    await server.provision()
    connections = [await server.connect("gateway-g1"), await server.connect("gateway-g2")]
    first, second = (NatsBucket(connection, subjects.BUDGETS_BUCKET) for connection in connections)
    revision = await first.write(key, b"one", 0)
    for stale in (0, revision - 1, revision + 1):
        with pytest.raises(Conflict):
            await second.write(key, b"two", stale)
    assert await _parts(second, key) == (b"", (b"one",))
    await second.write(key, b"two", revision)
    with pytest.raises(Conflict):
        await first.write(key, b"three", revision)
    assert await _parts(first, key) == (b"one", (b"two",))
    for number in range(3):
        entry = await second.read(key)
        assert entry is not None
        await second.write(key, b"two %d" % number, entry.revision)
    assert await _parts(first, key) == (b"one", (b"two 2",))
    assert await _parts(NatsBucket(connections[0], subjects.BUDGETS_BUCKET), key) == (b"one", (b"two 2",))
    await _made_anew(server, connections[1], key)
    assert await _parts(first, key) == (b"", (b"anew",))
    for connection in connections:
        await connection.close()


async def _parts(bucket: Bucket, key: str) -> tuple[bytes, tuple[bytes, ...]]:
    entry = await bucket.read(key)
    assert entry is not None
    return entry.value, entry.others


async def _made_anew(server: LiveFabric, connection: Connection, key: str) -> None:
    """Another bucket of the same name, whose sequences begin at 1."""
    provisioner = await server.connect("provisioner")
    await provisioner.jetstream.delete_stream(f"KV_{subjects.BUDGETS_BUCKET}")
    await provisioner.close()
    await server.provision()
    await NatsBucket(connection, subjects.BUDGETS_BUCKET).write(key, b"anew", 0)


async def test_what_was_acknowledged_outlives_the_server(server: LiveFabric, key: str) -> None:
    """Killed, not stopped: the file has it, for it was synced before the acknowledgement."""
    await server.provision()
    connection = await server.connect("gateway-g1")
    bucket = NatsBucket(connection, subjects.BUDGETS_BUCKET)
    revision = await bucket.write(key, b"kept", 0)
    server.process.kill()
    server.process.wait()
    while connection.connected:
        await asyncio.sleep(0.01)
    with pytest.raises(FabricUnavailable):
        await bucket.read(key)
    with pytest.raises(FabricUnavailable):
        await bucket.write(key, b"never", revision)
    server.process = server.server.start(server.log)
    await connection.wait_connected()
    entry = await bucket.read(key)
    assert entry is not None
    assert (entry.value, entry.revision) == (b"kept", revision)
    await connection.close()


async def test_workers_and_strangers_have_no_part_in_it(server: LiveFabric, key: str) -> None:
    await server.provision()
    connection = await server.connect("worker-a-n1")
    bucket = NatsBucket(connection, subjects.BUDGETS_BUCKET)
    with pytest.raises(FabricUnavailable):
        await bucket.write(key, b"mine", 0)
    with pytest.raises(FabricUnavailable):
        await bucket.read(key)
    await connection.close()
