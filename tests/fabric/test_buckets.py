"""Shared buckets, on NATS and in memory alike: their contract, what outlives the server, and the revocations in one of them."""

from __future__ import annotations

import asyncio
import time
from functools import partial

import pytest
from nats.js.errors import APIError

from lacre.errors import InvalidMessage
from lacre_fabric.nats import revocations, subjects
from lacre_fabric.nats.kv import Bucket, Conflict, Entry, NatsBucket
from lacre_fabric.nats.revocations import RevocationReader, RevocationsFull, revoke
from lacre_fabric.work.contract import FabricUnavailable
from lacre_fabric.work.revocations import Revocation, subject_key, token_key
from parts.fabric import Parties
from parts.memory_bucket import MemoryBucket
from parts.waiting import until


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


async def test_a_scan_lists_all_parts_of_the_keys_that_begin_so(bucket: Bucket, key: str) -> None:
    for number in range(3):
        await bucket.write(f"{key}.{number}.x", b"old", 0)
    await bucket.write(f"{key}.1.x", b"new", (await held(bucket, f"{key}.1.x")).revision)
    await bucket.write(f"{key}0.1.x", b"another", 0)
    found, whole = await bucket.scan(f"{key}.", 100)
    assert (dict(sorted(found.items())), whole) == (
        {f"{key}.0.x": [b"old"], f"{key}.1.x": [b"new"], f"{key}.2.x": [b"old"]},
        True,
    )
    found, whole = await bucket.scan(f"{key}.", 2)
    assert (len(found), whole) == (2, False)
    assert await bucket.scan("none.", 100) == ({}, True)


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


# The bucket of revocations: every gateway reads what is added, which stays until its time is over.


KEY = "A" * 43


def some(number: int, lives: float = 600.0) -> Revocation:
    return Revocation(token_key("https://issuer.example", f"t{number}"), time.time() + lives)


@pytest.fixture
async def fresh(parties: Parties) -> Parties:
    """The server with an empty bucket, whose sequences begin at 1."""
    await (await parties.connect()).jetstream.delete_stream(subjects.REVOCATIONS_STREAM)
    await parties.live.provision()
    return parties


async def test_every_gateway_reads_each_once(fresh: Parties) -> None:
    first, second = await fresh.gateway("g1"), await fresh.gateway("g2")
    assert await first.revoked() == []
    added = [some(number) for number in range(3)]
    await first.revoke(added[0])
    assert await first.revoked() == added[:1]
    assert await first.revoked() == []
    await second.revoke(added[1])
    await first.revoke(added[2])
    assert await first.revoked() == added[1:]
    assert await second.revoked() == added
    # Many are read at once, and in order.
    added = [some(number) for number in range(3, 40)]
    for revocation in added:
        await first.revoke(revocation)
    assert await first.revoked() == added


async def test_an_entry_goes_when_its_time_is_over(fresh: Parties) -> None:
    gateway, other = await fresh.gateway("g1"), await fresh.gateway("g2")
    await gateway.revoke(some(1, lives=1.0))
    lasting = some(2)
    await gateway.revoke(lasting)
    assert len(await gateway.revoked()) == 2

    async def the_others_went() -> bool:
        return await RevocationReader(other.connection).read() == [lasting]

    await until(the_others_went, 20)
    # The last one that was read is gone, too: nothing is passed over.
    later = some(3, lives=1.0)
    await gateway.revoke(later)
    assert await gateway.revoked() == [later]
    await until(the_others_went, 20)
    await gateway.revoke(some(4))
    assert {revocation.key for revocation in await gateway.revoked()} == {lasting.key, some(4).key}  # read from the beginning


async def test_a_bucket_made_anew_is_read_from_its_beginning(fresh: Parties) -> None:
    gateway, provisioner = await fresh.gateway("g1"), await fresh.connect("provisioner")
    for number in range(3):
        await gateway.revoke(some(number))
    assert len(await gateway.revoked()) == 3
    for entries in (1, 3, 5):  # it ends before, at, and after where the reader was
        await provisioner.jetstream.delete_stream(subjects.REVOCATIONS_STREAM)
        for ask in (gateway.revoked, partial(gateway.revoke, some(1))):
            with pytest.raises(FabricUnavailable, match="no bucket of revocations"):
                await ask()
        await provisioner.jetstream.add_stream(revocations.bucket(1))
        added = [some(10 * entries + number) for number in range(entries)]
        for revocation in added:
            await gateway.revoke(revocation)
        assert await gateway.revoked() == added


async def test_a_share_that_is_full_says_so_and_the_reserve_stands(fresh: Parties) -> None:
    provisioner, stolen, other = await fresh.connect(), await fresh.gateway("g1"), await fresh.gateway("g2")
    await provisioner.jetstream.update_stream(revocations.bucket(1).evolve(max_msgs_per_subject=2))
    for number in (1, 2):
        await stolen.revoke(some(number))
    with pytest.raises(RevocationsFull, match="gateway-g1 has used its share"):
        await stolen.revoke(some(3))
    headers = {"Nats-TTL": "never"}
    with pytest.raises(APIError, match="maximum messages per subject exceeded"):
        await stolen.connection.jetstream.publish(subjects.revocation("gateway-g1"), b"", headers=headers)
    await other.revoke(some(4))
    await revoke(provisioner, some(5))
    assert [each.key for each in await other.revoked()] == [some(number).key for number in (1, 2, 4, 5)]
    await fresh.live.provision()


async def test_what_is_no_revocation_is_passed_over(fresh: Parties) -> None:
    gateway, good = await fresh.gateway(), some(1)
    await gateway.connection.jetstream.publish(subjects.revocation("gateway-g1"), b"nonsense")
    await gateway.revoke(good)
    assert await gateway.revoked() == [good]


async def test_no_gateway_takes_one_back(fresh: Parties) -> None:
    """Neither by another value, nor by what deletes in a bucket, nor by JetStream's API."""
    gateway, kept = await fresh.gateway(), some(1)
    await gateway.revoke(kept)
    subject, client = subjects.revocation("gateway-g1"), gateway.connection.client
    rollups = ({"KV-Operation": "PURGE", "Nats-Rollup": "sub"}, {"Nats-Rollup": "all"})
    for headers in (None, {"KV-Operation": "DEL"}, *rollups):
        await client.publish(subject, b"", headers=headers)
    denials = gateway.connection.denials
    for call in ("STREAM.DELETE", "STREAM.PURGE", "STREAM.MSG.DELETE", "STREAM.UPDATE"):
        await client.publish(f"{subjects.API}.{call}.{subjects.REVOCATIONS_STREAM}", b'{"seq":1}')
    await gateway.connection.round_trip()
    assert gateway.connection.denials == denials + 4
    assert await RevocationReader(gateway.connection).read() == [kept]


def test_keys_of_different_names_differ() -> None:
    keys = {token_key("a", "b"), token_key("b", "a"), subject_key("a", "b"), token_key("a,b", ""), token_key("", "a,b")}
    assert len(keys) == 5
    assert token_key("a", "\ud800") != token_key("a", "?")


@pytest.mark.parametrize(
    "value",
    [
        *(b"", b"[]", b"nonsense", b"{}", b'{"until":1}', b'{"until":"1","issued_until":null}'),
        *(  # a key is a digest
            f'{{"key":{key},"until":99.0,"issued_until":null}}'.encode()
            for key in ('"k"', '"%s"' % ("A" * 44), "1", "null", '"\\ud800%s"' % ("A" * 42))
        ),
    ],
)
def test_no_revocation(value: bytes) -> None:
    with pytest.raises(InvalidMessage):
        Revocation.parse(value, KEY)


@pytest.mark.parametrize("issued_until", [None, 12.5])
def test_round_trip(issued_until: float | None) -> None:
    revocation = Revocation(KEY, 99.0, issued_until)
    assert Revocation.parse(revocation.encode()) == revocation
    older = b'{"until":99.0,"issued_until":null}'
    assert Revocation.parse(older, KEY) == Revocation(KEY, 99.0), "its key is in its subject"
