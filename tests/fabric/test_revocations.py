"""The bucket of revocations, on a real nats-server: every gateway reads what is added, which stays until its time is over."""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress
from pathlib import Path

import pytest
from nats.js.errors import APIError

from lacre.errors import InvalidMessage
from lacre_fabric.nats import subjects
from lacre_fabric.nats.connection import Connection
from lacre_fabric.nats.gateway import NatsGateway
from lacre_fabric.nats.revocations import RevocationReader, RevocationsFull, bucket, revoke
from lacre_fabric.work.contract import FabricUnavailable
from lacre_fabric.work.revocations import Revocation, subject_key, token_key
from parts.fabric import LiveFabric

KEY = "A" * 43


def some(number: int, lives: float = 600.0) -> Revocation:
    return Revocation(token_key("https://issuer.example", f"t{number}"), time.time() + lives)


@pytest.fixture
async def fresh(nats: LiveFabric) -> LiveFabric:
    """The server with an empty bucket, whose sequences begin at 1."""
    provisioner = await nats.connect("provisioner")
    await provisioner.jetstream.delete_stream(subjects.REVOCATIONS_STREAM)
    await provisioner.close()
    await nats.provision()
    return nats


async def test_every_gateway_reads_each_once(fresh: LiveFabric) -> None:
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
    await first.close()
    await second.close()


async def test_many_are_read_at_once_and_in_order(fresh: LiveFabric) -> None:
    gateway = await fresh.gateway("g1")
    await gateway.revoke(some(0))
    assert len(await gateway.revoked()) == 1
    added = [some(number) for number in range(1, 40)]
    for revocation in added:
        await gateway.revoke(revocation)
    assert await gateway.revoked() == added
    await gateway.close()


async def test_an_entry_goes_when_its_time_is_over(fresh: LiveFabric) -> None:
    gateway = await fresh.gateway("g1")
    await gateway.revoke(some(1, lives=1.0))
    lasting = some(2)
    await gateway.revoke(lasting)
    assert len(await gateway.revoked()) == 2
    other = await fresh.gateway("g2")
    async with asyncio.timeout(20):
        while (await RevocationReader(other.connection).read()) != [lasting]:
            await asyncio.sleep(0.1)
    # The last one that was read is gone, too: nothing is passed over.
    later = some(3, lives=1.0)
    await gateway.revoke(later)
    assert await gateway.revoked() == [later]
    async with asyncio.timeout(20):
        while (await RevocationReader(other.connection).read()) != [lasting]:
            await asyncio.sleep(0.1)
    await gateway.revoke(some(4))
    assert {revocation.key for revocation in await gateway.revoked()} == {lasting.key, some(4).key}  # read from the beginning
    await gateway.close()
    await other.close()


async def _read(gateway: NatsGateway) -> list[Revocation]:
    """None while the connection is on its way back."""
    with suppress(FabricUnavailable):
        return await gateway.revoked()
    return []


async def test_a_restart_keeps_them(tmp_path: Path) -> None:
    with LiveFabric.running(tmp_path) as live:
        await live.provision()
        gateway = await live.gateway("g1")
        kept = some(1)
        await gateway.revoke(kept)
        live.process.kill()
        live.process.wait(10)
        live.process = live.server.start(live.log)
        async with asyncio.timeout(30):
            while not (found := await _read(gateway)):
                await asyncio.sleep(0.1)
        assert found == [kept]
        await gateway.close()


async def test_a_bucket_made_anew_is_read_from_its_beginning(fresh: LiveFabric) -> None:
    gateway, provisioner = await fresh.gateway("g1"), await fresh.connect("provisioner")
    for number in range(3):
        await gateway.revoke(some(number))
    assert len(await gateway.revoked()) == 3
    for entries in (1, 3, 5):  # it ends before, at, and after where the reader was
        await provisioner.jetstream.delete_stream(subjects.REVOCATIONS_STREAM)
        with pytest.raises(FabricUnavailable, match="no bucket of revocations"):
            await gateway.revoked()
        with pytest.raises(FabricUnavailable, match="no bucket of revocations"):
            await gateway.revoke(some(1))
        await provisioner.jetstream.add_stream(bucket(1))
        added = [some(10 * entries + number) for number in range(entries)]
        for revocation in added:
            await gateway.revoke(revocation)
        assert await gateway.revoked() == added
    await gateway.close()
    await provisioner.close()


async def test_a_share_that_is_full_says_so_and_the_reserve_stands(fresh: LiveFabric) -> None:
    provisioner, stolen, other = await fresh.connect("provisioner"), await fresh.gateway("g1"), await fresh.gateway("g2")
    await provisioner.jetstream.update_stream(bucket(1).evolve(max_msgs_per_subject=2))
    held = [some(1), some(2)]
    for revocation in held:
        await stolen.revoke(revocation)
    with pytest.raises(RevocationsFull, match="gateway-g1 has used its share"):
        await stolen.revoke(some(3))
    headers = {"Nats-TTL": "never"}
    with pytest.raises(APIError, match="maximum messages per subject exceeded"):
        await stolen.connection.jetstream.publish(subjects.revocation("gateway-g1"), b"", headers=headers)
    for subject in (subjects.revocation("gateway-g2"), subjects.revocation("provisioner"), subjects.revocation(KEY)):
        denials = stolen.connection.denials
        await stolen.connection.client.publish(subject, some(3).encode())
        await stolen.connection.round_trip()
        assert stolen.connection.denials == denials + 1
    await other.revoke(some(4))
    await revoke(provisioner, some(5))
    assert [each.key for each in await other.revoked()] == [some(number).key for number in (1, 2, 4, 5)]
    for each in (stolen, other, provisioner):
        await each.close()
    await fresh.provision()


async def test_what_is_no_revocation_is_passed_over(fresh: LiveFabric) -> None:
    gateway = await fresh.gateway("g1")
    await gateway.connection.jetstream.publish(subjects.revocation("gateway-g1"), b"nonsense")
    good = some(1)
    await gateway.revoke(good)
    assert await gateway.revoked() == [good]
    await gateway.close()


async def test_no_gateway_takes_one_back(fresh: LiveFabric) -> None:
    """Neither by another value, nor by what deletes in a bucket, nor by JetStream's API."""
    gateway = await fresh.gateway("g1")
    kept = some(1)
    await gateway.revoke(kept)
    subject, client = subjects.revocation("gateway-g1"), gateway.connection.client
    await client.publish(subject, b"")
    await client.publish(subject, b"", headers={"KV-Operation": "DEL"})
    await client.publish(subject, b"", headers={"KV-Operation": "PURGE", "Nats-Rollup": "sub"})
    await client.publish(subject, b"", headers={"Nats-Rollup": "all"})
    denials = gateway.connection.denials
    for call in ("STREAM.DELETE", "STREAM.PURGE", "STREAM.MSG.DELETE", "STREAM.UPDATE"):
        await client.publish(f"{subjects.API}.{call}.{subjects.REVOCATIONS_STREAM}", b'{"seq":1}')
    await gateway.connection.round_trip()
    assert gateway.connection.denials == denials + 4
    assert await RevocationReader(gateway.connection).read() == [kept]
    await gateway.close()


@pytest.mark.parametrize("role", ["worker-a-n1"])
async def test_workers_neither_read_nor_write(fresh: LiveFabric, role: str) -> None:
    who: Connection = await fresh.connect(role)
    with pytest.raises(FabricUnavailable, match="denies"):
        await revoke(who, some(1))
    with pytest.raises(FabricUnavailable, match="denies"):
        await RevocationReader(who).read()
    await who.close()


def test_keys_of_different_names_differ() -> None:
    keys = {token_key("a", "b"), token_key("b", "a"), subject_key("a", "b"), token_key("a,b", ""), token_key("", "a,b")}
    assert len(keys) == 5
    assert token_key("a", "\ud800") != token_key("a", "?")


@pytest.mark.parametrize("value", [b"", b"[]", b"nonsense", b"{}", b'{"until":1}', b'{"until":"1","issued_until":null}'])
def test_no_revocation(value: bytes) -> None:
    with pytest.raises(InvalidMessage):
        Revocation.parse(value, KEY)


@pytest.mark.parametrize("issued_until", [None, 12.5])
def test_round_trip(issued_until: float | None) -> None:
    revocation = Revocation(KEY, 99.0, issued_until)
    assert Revocation.parse(revocation.encode()) == revocation


def test_an_older_entry_has_its_key_in_its_subject() -> None:
    assert Revocation.parse(b'{"until":99.0,"issued_until":null}', KEY) == Revocation(KEY, 99.0)


@pytest.mark.parametrize("key", ['"k"', '"%s"' % ("A" * 44), "1", "null", '"\\ud800%s"' % ("A" * 42)])
def test_a_key_is_a_digest(key: str) -> None:
    with pytest.raises(InvalidMessage):
        Revocation.parse(f'{{"key":{key},"until":99.0,"issued_until":null}}'.encode(), KEY)
