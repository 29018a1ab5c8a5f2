"""A pool's keys change under the traffic: who has which key when, over a real nats-server and real files."""

from __future__ import annotations

import asyncio
import hashlib
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from lacre.errors import SettingsError
from lacre.trust.chain import verify
from lacre.trust.manifest import PoolKey
from lacre_backend.keyring import KeyRing
from lacre_fabric.keys.secret_files import read_secret
from lacre_fabric.nats import subjects
from lacre_fabric.nats.connection import Connection
from lacre_fabric.nats.manifest_feed import ManifestFeed, memory_in
from lacre_fabric.nats.worker import NatsWorker
from lacre_fabric.operate.rotation import NotTakenUp, Schedule, publish, retire, rotate, tend, upkeep
from lacre_fabric.operate.site import Site
from parts.fabric import POOLS, LiveFabric

POOL = "a"


@dataclass
class TendedSite:
    """A site, its provisioner's connection, and workers that hold what they say."""

    nats: LiveFabric
    site: Site
    connection: Connection
    stack: AsyncExitStack

    async def worker(self, node: str = "n1", *, watches: bool = False, pool: str = POOL) -> KeyRing:
        """A live worker, and its keys: those of the folder as it is now, or as it becomes where it watches."""
        ring = KeyRing(self.site.keys_folder(pool))
        self.stack.callback(ring.close)
        credential = self.nats.credentials[f"worker-{pool}-{node}"]
        worker = await NatsWorker.connect(self.nats.server.url, credential, pool, node, ["m1"], keys=ring.fingerprints)
        self.stack.push_async_callback(worker.close)
        if watches:
            self.background(ring.watch())
        return ring

    def background(self, coroutine) -> None:
        task = asyncio.create_task(coroutine)

        async def end() -> None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

        self.stack.push_async_callback(end)

    async def listed(self) -> list[int]:
        """The key ids in the manifest on the fabric."""
        document = await self.connection.manifest()
        assert document is not None
        return [key.config.key_id for key in verify(document, self.site.root, time.time()).manifest.pools[POOL].keys]

    async def keys(self, pool: str) -> Sequence[PoolKey]:
        """The pool's keys in the manifest on the fabric."""
        document = await self.connection.manifest()
        assert document is not None
        return verify(document, self.site.root, time.time()).manifest.pools[pool].keys

    def in_folder(self, pool: str = POOL) -> set[str]:
        return {path.name for path in self.site.keys_folder(pool).iterdir()}

    async def until_in_folder(self, *names: str, seconds: float = 10.0) -> None:
        deadline = time.monotonic() + seconds
        while self.in_folder() != set(names):
            assert time.monotonic() < deadline, self.in_folder()
            await asyncio.sleep(0.05)


@pytest.fixture
async def tended(nats: LiveFabric, tmp_path: Path) -> AsyncIterator[TendedSite]:
    site = Site(tmp_path / "state", {POOL: POOLS[POOL]})
    site.create()
    async with AsyncExitStack() as stack:
        connection = await nats.connect("provisioner")
        stack.push_async_callback(connection.close)
        await publish(site, connection)
        yield TendedSite(nats, site, connection, stack)
        await connection.jetstream.delete_stream("KV_trust")  # the next test makes it again


async def test_workers_have_a_key_before_any_manifest_names_it(tended: TendedSite) -> None:
    ring = await tended.worker()
    rotating = asyncio.create_task(rotate(tended.site, tended.connection, POOL, grace=60))
    await asyncio.sleep(4)  # longer than a sign of presence counts
    assert tended.in_folder() == {"1.key", "2.key", "3.key", "4.key"}
    assert await tended.listed() == [1, 2]
    assert ring.reload()
    rotated = await rotating
    assert (rotated.lacking, [config.key_id for config in rotated.listed]) == (frozenset(), [3, 4])
    assert await tended.listed() == [3, 4, 1, 2]


@pytest.mark.slow
async def test_a_key_that_no_worker_takes_up_is_not_listed_and_tried_again(tended: TendedSite) -> None:
    ring = await tended.worker()
    with pytest.raises(NotTakenUp, match="n1"):
        await rotate(tended.site, tended.connection, POOL, wait=3.5)
    assert await tended.listed() == [1, 2]
    before = read_secret(tended.site.keys_folder(POOL) / "3.key")
    ring.reload()
    await rotate(tended.site, tended.connection, POOL)
    assert await tended.listed() == [3, 4, 1, 2]
    assert read_secret(tended.site.keys_folder(POOL) / "3.key") == before


@pytest.mark.slow
async def test_a_worker_that_takes_up_nothing_keeps_no_old_key_alive_and_is_named(tended: TendedSite) -> None:
    await tended.worker("n1", watches=True)
    await tended.worker("n2")
    rotated = await rotate(tended.site, tended.connection, POOL, grace=0, wait=3.5)
    assert rotated.lacking == {"n2"}
    assert await tended.listed() == [3, 4]
    with capture_logs() as logs:
        (gone,) = await retire(tended.site, tended.connection, wait=2.5)
    assert gone.ids == (1, 2)
    assert [(entry["event"], entry["node"]) for entry in logs if "node" in entry] == [("key.still_held", "n2")]


def stretched(key: bytes) -> Sequence[bytes]:
    """A pool key's secret, and what X-Wing makes of it."""
    secret = key[15:47]
    seed = hashlib.shake_256(secret).digest(96)
    return secret, seed[:32], seed[32:64], seed[64:]


@pytest.mark.slow
async def test_what_one_process_began_another_one_ends(tended: TendedSite) -> None:
    """The grace ends after the process that set it; the key is destroyed on disk and in the workers."""
    ring = await tended.worker(watches=True)
    folder = tended.site.keys_folder(POOL)
    secrets = [part for name in ("1.key", "2.key") for part in stretched(bytes(read_secret(folder / name)))]
    assert secrets[0] in (folder / "1.key").read_bytes()
    old, still = ring.keys[1], tended.site.folder / "still"
    os.link(folder / "1.key", still)  # another name for the same bytes on disk
    await rotate(tended.site, tended.connection, POOL, grace=1)
    assert 1 in ring.keys
    tended.background(upkeep(Site(tended.site.folder, tended.site.pools), tended.connection, Schedule()))
    await tended.until_in_folder("3.key", "4.key")
    assert await tended.listed() == [3, 4]
    assert still.read_bytes() == bytes(still.stat().st_size)
    files = [path.read_bytes() for path in tended.site.folder.rglob("*") if path.is_file()]
    assert not [secret for secret in secrets for content in files if secret in content]
    await asyncio.sleep(1.5)
    assert set(ring.keys) == {3, 4}
    assert bytes(old._secret) == bytes(32)


class TestPoolsAreIndependent:
    """Pool `a` is first in every order. What fails for it is said with its name, and pool `b` gets what is due to it."""

    @pytest.fixture
    async def both(self, nats: LiveFabric, tmp_path: Path) -> AsyncIterator[TendedSite]:
        site = Site(tmp_path / "state", {POOL: POOLS[POOL], "b": POOLS["b"]})
        site.create()
        async with AsyncExitStack() as stack:
            connection = await nats.connect("provisioner")
            stack.push_async_callback(connection.close)
            await publish(site, connection)
            yield TendedSite(nats, site, connection, stack)
            await connection.jetstream.delete_stream("KV_trust")  # the next test makes it again

    async def holding_none(self, tended: TendedSite) -> None:
        """A worker of pool `a` that announces no key."""
        credential = tended.nats.credentials[f"worker-{POOL}-n1"]
        worker = await NatsWorker.connect(tended.nats.server.url, credential, POOL, "n1", ["m1"])
        tended.stack.push_async_callback(worker.close)

    @pytest.mark.slow
    async def test_a_worker_that_holds_no_key_stops_its_own_pool_alone(self, both: TendedSite) -> None:
        await rotate(both.site, both.connection, "b", grace=0)
        await self.holding_none(both)
        await both.worker(pool="b", watches=True)
        with capture_logs() as logs, pytest.raises(NotTakenUp, match=r"pool a .*\(n1\)"):
            await tend(both.site, both.connection, Schedule(every=0, grace=0), wait=4)
        assert both.in_folder("b") == {"5.key", "6.key"}, "the first keys are destroyed, and those of the grace of 0 s"
        assert [pool_key.config.key_id for pool_key in await both.keys("b")] == [5, 6]
        assert both.in_folder() == {"1.key", "2.key", "3.key", "4.key"}, "staged, and tried again"
        said = [(entry["pool"], "n1" in entry["reason"]) for entry in logs if entry["event"] == "upkeep.failed"]
        assert said == [("a", True)]

    async def test_others_may_change_the_site_while_a_pool_takes_up_its_keys(self, both: TendedSite) -> None:
        await self.holding_none(both)
        rotating = asyncio.create_task(rotate(both.site, both.connection, POOL, wait=60))
        await both.until_in_folder("1.key", "2.key", "3.key", "4.key")
        async with asyncio.timeout(10):
            await rotate(both.site, both.connection, "b")
        assert not rotating.done()
        rotating.cancel()
        await asyncio.gather(rotating, return_exceptions=True)

    async def test_two_that_wait_for_the_same_keys_list_them_once(self, both: TendedSite) -> None:
        ring = await both.worker()
        rotating = [asyncio.create_task(rotate(both.site, both.connection, POOL, grace=60)) for _ in range(2)]
        await both.until_in_folder("1.key", "2.key", "3.key", "4.key")
        ring.reload()
        assert [[config.key_id for config in (await one).listed] for one in rotating] == [[3, 4]] * 2
        assert [pool_key.config.key_id for pool_key in await both.keys(POOL)] == [3, 4, 1, 2]

    async def test_a_pool_that_is_damaged_is_published_as_it_was(self, both: TendedSite) -> None:
        damaged = both.site.folder / "pools" / POOL / "generations.json"
        damaged.write_bytes(b"{")
        with capture_logs() as logs:
            await rotate(both.site, both.connection, "b", grace=60)
        assert [pool_key.config.key_id for pool_key in await both.keys("b")] == [3, 4, 1, 2]
        assert [pool_key.config.key_id for pool_key in await both.keys(POOL)] == [1, 2]
        assert ("pool.damaged", POOL) in [(entry["event"], entry.get("pool")) for entry in logs]

    async def test_keys_that_are_out_are_destroyed_without_the_fabric(self, both: TendedSite) -> None:
        """Neither a manifest that cannot be published nor another pool's damaged file keeps a private key on disk."""
        await rotate(both.site, both.connection, "b", grace=0)
        damaged = both.site.folder / "pools" / POOL / "generations.json"
        damaged.write_bytes(b"{")
        gone = await both.nats.connect("provisioner")
        await gone.close()
        with pytest.raises(SettingsError, match="damaged"):
            await retire(both.site, gone, wait=0.1)
        assert both.in_folder("b") == {"3.key", "4.key"}


async def test_queues_that_the_message_server_lost_are_made_again(tended: TendedSite) -> None:
    """Where nobody starts the two together, as `lacre up` does."""
    stream = subjects.work_stream(POOL, subjects.DEFAULT_REGION)
    await tended.connection.jetstream.delete_stream(stream)
    tended.background(upkeep(tended.site, tended.connection, Schedule(), provisioning=True))
    async with asyncio.timeout(15):
        while stream not in [found.config.name for found in await tended.connection.jetstream.streams_info()]:
            await asyncio.sleep(0.05)
        while not await tended.connection.jetstream.consumers_info(stream):
            await asyncio.sleep(0.05)


@pytest.mark.slow
async def test_keys_rotate_by_themselves_also_after_a_failure_and_without_a_worker(tended: TendedSite) -> None:
    path = tended.site.folder / "pools" / POOL / "generations.json"
    kept = path.read_bytes()
    path.write_bytes(b"{")
    with capture_logs() as logs:
        tended.background(upkeep(tended.site, tended.connection, Schedule(every=1, grace=0), again=0.05))
        while not logs:
            await asyncio.sleep(0.05)
    assert {entry["event"] for entry in logs} == {"upkeep.failed"}
    path.write_bytes(kept)
    deadline = time.monotonic() + 30
    while (await tended.listed())[0] < 5:
        assert time.monotonic() < deadline
        await asyncio.sleep(0.1)


@pytest.mark.parametrize("seconds", [-1.0, float("nan"), float("inf")])
async def test_what_is_no_time(tended: TendedSite, seconds: float) -> None:
    with pytest.raises(SettingsError, match="grace"):
        await rotate(tended.site, tended.connection, POOL, grace=seconds)
    with pytest.raises(SettingsError, match="rotations"):
        Schedule(every=seconds)
    assert tended.in_folder() == {"1.key", "2.key"}


async def test_one_process_at_a_time_changes_a_site(tended: TendedSite) -> None:
    tended.site.save(tended.nats.server.url, "http://127.0.0.1:1")
    tended.nats.credentials["provisioner"].save(tended.site.credential_file("provisioner"))
    command = [sys.executable, "-m", "lacre", "manifest", "publish", "--state", str(tended.site.folder)]
    async with tended.site.changing():
        process = await asyncio.create_subprocess_exec(*command, stdout=subprocess.DEVNULL)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(process.wait(), 3)
        assert (tended.site.folder / "trust" / "version").read_text() == "1"
    assert await process.wait() == 0
    assert (tended.site.folder / "trust" / "version").read_text() == "2"


async def test_gateways_and_workers_follow_a_new_root_and_remember_under_it(tended: TendedSite, tmp_path: Path) -> None:
    first = tended.site.root

    def feed(fetch: Callable[[], Awaitable[bytes | None]], root: bytes) -> ManifestFeed:
        return ManifestFeed(fetch, root, memory=memory_in(tmp_path / "memory"))

    async def now_on_fabric() -> bytes:
        document = await tended.connection.manifest()
        assert document is not None
        return document

    async def version(root: bytes, served: bytes) -> int:
        """Of the manifest that a process works by which starts with these settings."""
        started = feed(lambda: asyncio.sleep(0, served), root)
        await started.refresh()
        return started.manifest.version

    running, before = feed(tended.connection.manifest, first), await now_on_fabric()
    await running.refresh()
    for _ in range(3):
        tended.site.authority.rotate_root(time.time())
        await publish(tended.site, tended.connection)
    after = await now_on_fabric()
    await publish(tended.site, tended.connection)
    await running.refresh()
    assert running.manifest.version == 5
    assert await version(first, before) == 5
    assert await version(tended.site.root, after) == 5
    assert await version(tended.site.root, await now_on_fabric()) == 5
