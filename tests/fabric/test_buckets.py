"""What shared buckets promise: the contract, on NATS and in memory alike; and what becomes of a write when the server dies."""

from __future__ import annotations

import asyncio
import time
from functools import partial

import pytest

from lacre_fabric.nats import subjects
from lacre_fabric.nats.kv import Bucket, Conflict, Entry, NatsBucket
from lacre_fabric.work.contract import FabricUnavailable
from parts.fabric import Parties, until
from parts.memory_bucket import MemoryBucket


@pytest.fixture(params=["nats", "memory"])
async def bucket(request: pytest.FixtureRequest, parties: Parties) -> Bucket:
    return MemoryBucket() if request.param == "memory" else await of(parties, "gateway-g1")


async def of(parties: Parties, role: str) -> NatsBucket:
    return NatsBucket(await parties.connect(role), subjects.BUDGETS_BUCKET)


@pytest.fixture
def key() -> str:
    return f"test.{time.monotonic_ns()}"


async def held(bucket: Bucket, key: str) -> Entry:
    entry = await bucket.read(key)
    assert entry is not None
    return entry


async def test_written_and_read(bucket: Bucket, key: str) -> None:
    assert await bucket.read(key) is None
    revision = 0
    for value in (b"one", b"two"):
        revision = await bucket.write(key, value, revision)
        entry = await held(bucket, key)
        assert (entry.value, entry.revision) == (value, revision)
        assert abs(entry.time - time.time()) < 5


async def test_a_write_on_another_revision_does_not_happen(bucket: Bucket, key: str) -> None:
    first = await bucket.write(key, b"one", 0)
    second = await bucket.write(key, b"two", first)
    for revision in (0, first, second + 1):
        with pytest.raises(Conflict):
            await bucket.write(key, b"three", revision)
    assert (await held(bucket, key)).value == b"two"


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
    assert (await held(bucket, key)).value == b"12"


async def test_a_credential_writes_its_own_part(parties: Parties, key: str) -> None:
    """All read all parts; a compare-and-set is of all of them together."""
    first, second = await of(parties, "gateway-g1"), await of(parties, "gateway-g2")

    async def parts(bucket: Bucket) -> tuple[bytes, tuple[bytes, ...]]:
        entry = await held(bucket, key)
        return entry.value, entry.others

    revision = await first.write(key, b"one", 0)
    for stale in (0, revision - 1, revision + 1):
        with pytest.raises(Conflict):
            await second.write(key, b"two", stale)
    assert await parts(second) == (b"", (b"one",))
    await second.write(key, b"two", revision)
    with pytest.raises(Conflict):
        await first.write(key, b"three", revision)
    assert await parts(first) == (b"one", (b"two",))
    for number in range(3):
        await second.write(key, b"two %d" % number, (await held(second, key)).revision)
    for reader in (first, await of(parties, "gateway-g1")):
        assert await parts(reader) == (b"one", (b"two 2",))
    # Another bucket of the same name, whose sequences begin at 1.
    await (await parties.connect()).jetstream.delete_stream(f"KV_{subjects.BUDGETS_BUCKET}")
    await parties.live.provision()
    await (await of(parties, "gateway-g2")).write(key, b"anew", 0)
    assert await parts(first) == (b"", (b"anew",))


async def test_what_was_acknowledged_outlives_the_server(parties: Parties, key: str) -> None:
    """Killed, not stopped: the file has it, for it was synced before the acknowledgement."""
    live, connection = parties.live, await parties.connect("gateway-g1")
    bucket = NatsBucket(connection, subjects.BUDGETS_BUCKET)
    revision = await bucket.write(key, b"kept", 0)
    live.process.kill()
    live.process.wait()
    await until(lambda: not connection.connected)
    for ask in (partial(bucket.read, key), partial(bucket.write, key, b"never", revision)):
        with pytest.raises(FabricUnavailable):
            await ask()
    live.process = live.server.start(live.log)
    await connection.wait_connected()
    entry = await held(bucket, key)
    assert (entry.value, entry.revision) == (b"kept", revision)


async def test_workers_and_strangers_have_no_part_in_it(parties: Parties, key: str) -> None:
    bucket = await of(parties, "worker-a-n1")
    for ask in (partial(bucket.write, key, b"mine", 0), partial(bucket.read, key)):
        with pytest.raises(FabricUnavailable):
            await ask()
