"""Replacing signing keys beside other commands, after failures and after crashes: over a real nats-server and real files."""

from __future__ import annotations

import asyncio
import time

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from lacre.jose.jws import raw_public_key
from lacre_backend.keyring import KeyRing
from lacre_fabric.keys.pool_keys import public_receipt_key, receipt_file
from lacre_fabric.keys.secret_files import read_ed25519s, write_ed25519, write_secret
from lacre_fabric.operate.replacing import replace_grant
from lacre_fabric.operate.rotation import NotTakenUp, Schedule, rotate, tend
from lacre_fabric.operate.stores import provision_site
from lacre_fabric.work.contract import PRESENT_FOR, FabricError
from parts.tended import POOL, TendedSite
from parts.waiting import until


def receipts_of(ring: KeyRing) -> set[bytes]:
    return {raw_public_key(key) for key in ring.receipt_keys.values()}


async def test_keys_that_get_a_receipt_key_meanwhile_are_listed_once_workers_have_it(tended: TendedSite) -> None:
    """`keys tend` waits for the workers while somebody runs `keys replace receipt`. Every worker has the pool keys by then."""
    ring, own = await tended.holding(), tended.site.receipt_keys(POOL)
    tending = asyncio.create_task(rotate(tended.site, tended.connection, POOL, grace=60))
    await until(lambda: tended.in_folder() == "1 2 3 4")
    ring.reload()
    replacing = asyncio.create_task(rotate(tended.site, tended.connection, POOL, grace=60, receipts=True))
    await until(lambda: own.changes(tended.site.generations(POOL)))
    await asyncio.sleep(PRESENT_FOR + 1)
    assert await tended.listed() == [1, 2], "no worker can sign with the new receipt key yet"
    ring.reload()
    await asyncio.gather(tending, replacing)
    assert await tended.listed() == [3, 4, 1, 2]
    assert receipts_of(ring) == {(await tended.verified()).pools[POOL].receipt_key}


@pytest.mark.slow
@pytest.mark.parametrize("left", ["one of them", "two of them", "a damaged one"])
async def test_receipt_keys_that_a_crash_left_are_repaired(tended: TendedSite, left: str) -> None:
    """By whatever rotates next: also a daily rotation, which makes no receipt key by itself."""
    ring, folder = await tended.holding(watches=True), tended.site.keys_folder(POOL)
    lazy = await tended.holding("n2")
    with pytest.raises(NotTakenUp, match="n2"):
        await rotate(tended.site, tended.connection, POOL, wait=3.5, receipts=True)
    first = receipt_file(folder, 3)
    if left == "one of them":
        receipt_file(folder, 4).unlink()
    elif left == "two of them":
        write_ed25519(receipt_file(folder, 4), Ed25519PrivateKey.generate())
    else:
        write_secret(first, first.read_bytes()[:50])
    tending = asyncio.create_task(rotate(tended.site, tended.connection, POOL, grace=60))
    await until(lambda: own_of(tended) is not None)
    await asyncio.sleep(0.1)
    lazy.reload()
    await tending
    assert await tended.listed() == [3, 4, 1, 2]
    assert receipts_of(ring) == {(await tended.verified()).pools[POOL].receipt_key}
    assert len(ring.receipt_keys) == 2


def own_of(tended: TendedSite) -> bytes | None:
    """The receipt key of the staged keys, if both have the same one."""
    try:
        own = {public_receipt_key(receipt_file(tended.site.keys_folder(POOL), number)) for number in (3, 4)}
    except Exception:  # noqa: BLE001 - the file is missing or damaged still
        return None
    return own.pop() if len(own) == 1 else None


@pytest.mark.slow
async def test_a_manifest_that_could_not_be_published_is_published_by_the_next_run(tended: TendedSite) -> None:
    """Else that run would say that all is done, and gateways would sign with the old key until it leaves."""
    site = tended.site
    replacing = asyncio.create_task(replace_grant(site, tended.connection, grace=60, wait=30))
    await until(lambda: site.grant_keys.staged)
    await until(lambda: _other_key(tended))
    await tended.connection.jetstream.delete_stream("KV_trust")  # while the workers are asked
    with pytest.raises(FabricError):
        await replacing
    await provision_site(site, tended.connection)
    began = time.time()
    again = await replace_grant(site, tended.connection, grace=60)
    manifest = await tended.verified()
    assert again.before
    assert (manifest.gateway_key, len(manifest.other_gateway_keys)) == (again.public, 1)
    assert began + 60 <= again.leave_at, "the old key's time begins with the manifest"
    version = manifest.version
    await replace_grant(site, tended.connection, grace=60)
    assert (await tended.verified()).version == version


async def _other_key(tended: TendedSite) -> bool:
    return bool((await tended.verified()).other_gateway_keys)


async def test_the_upkeep_publishes_it_as_well(tended: TendedSite) -> None:
    keys = tended.site.grant_keys
    new = keys.stage()
    keys.switch(time.time(), 60)
    await tend(tended.site, tended.connection, Schedule(every=None))
    assert (await tended.verified()).gateway_key == new
    assert not keys.unpublished


async def test_two_that_replace_the_gateways_key_make_one(tended: TendedSite) -> None:
    """The second one waits for the lock while the first one ends."""
    site = tended.site
    async with site.changing():
        second = asyncio.create_task(replace_grant(site, tended.connection, grace=60))
        await asyncio.sleep(0.2)
        new = site.grant_keys.stage()
        site.grant_keys.switch(time.time(), 60)
        site.grant_keys.published(time.time())
    done = await second
    assert (done.before, done.public) == (True, new)
    assert len(read_ed25519s(site.grant_keys.file)) == 2


async def test_two_that_wait_for_the_same_workers_tell_the_same(tended: TendedSite) -> None:
    done = await asyncio.gather(*(replace_grant(tended.site, tended.connection, grace=grace) for grace in (60, 90)))
    assert len({(each.public, each.leave_at) for each in done}) == 1
    assert {each.before for each in done} == {True, False}
    assert (await tended.verified()).gateway_key == done[0].public
