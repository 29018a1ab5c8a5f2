"""A pool's keys change under the traffic: who has which key when, over a real nats-server and real files."""

from __future__ import annotations

import asyncio
import hashlib
import os
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from lacre.errors import SettingsError
from lacre.runtime import tasks
from lacre.trust.chain import verify
from lacre_fabric.keys.secret_files import read_secret, write_secret
from lacre_fabric.nats import subjects
from lacre_fabric.nats.manifest_feed import ManifestFeed, memory_in
from lacre_fabric.operate import behind
from lacre_fabric.operate.rotation import LOOK, NotTakenUp, Schedule, publish, retire, rotate, tend, upkeep
from lacre_fabric.operate.site import Site
from lacre_fabric.operate.stores import provision_site
from parts.tended import POOL, TendedSite
from parts.waiting import until

# Pool `a` is first in every order. What fails for it is said with its name, and pool `b` gets what is due to it.
of_two_pools = pytest.mark.parametrize("tended", [(POOL, "b")], indirect=True, ids=["two pools"])


async def test_workers_have_a_key_before_any_manifest_names_it(tended: TendedSite) -> None:
    ring = await tended.holding()
    rotating = asyncio.create_task(rotate(tended.site, tended.connection, POOL, grace=60))
    await asyncio.sleep(4)  # longer than a sign of presence counts
    assert tended.in_folder() == "1 2 3 4"
    assert await tended.listed() == [1, 2]
    assert ring.reload()
    rotated = await rotating
    assert (rotated.lacking, [config.key_id for config in rotated.listed]) == (frozenset(), [3, 4])
    assert await tended.listed() == [3, 4, 1, 2]


@pytest.mark.slow
async def test_a_key_that_no_worker_takes_up_is_not_listed_and_tried_again(tended: TendedSite) -> None:
    ring = await tended.holding()
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
    await tended.holding("n1", watches=True)
    await tended.holding("n2")
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
    ring = await tended.holding(watches=True)
    folder = tended.site.keys_folder(POOL)
    secrets = [part for name in ("1.key", "2.key") for part in stretched(bytes(read_secret(folder / name)))]
    assert secrets[0] in (folder / "1.key").read_bytes()
    old, still = ring.keys[1], tended.site.folder / "still"
    os.link(folder / "1.key", still)  # another name for the same bytes on disk
    await rotate(tended.site, tended.connection, POOL, grace=1)
    assert 1 in ring.keys
    tended.background(upkeep(Site(tended.site.folder, tended.site.pools), tended.connection, Schedule()))
    await until(lambda: tended.in_folder() == "3 4")
    assert await tended.listed() == [3, 4]
    assert still.read_bytes() == bytes(still.stat().st_size)
    files = [path.read_bytes() for path in tended.site.folder.rglob("*") if path.is_file()]
    assert not [secret for secret in secrets for content in files if secret in content]
    await asyncio.sleep(1.5)
    assert set(ring.keys) == {3, 4}
    assert bytes(old._secret) == bytes(32)


@of_two_pools
async def test_others_may_change_the_site_while_a_pool_takes_up_its_keys(tended: TendedSite) -> None:
    await tended.worker(POOL)
    rotating = asyncio.create_task(rotate(tended.site, tended.connection, POOL, wait=60))
    await until(lambda: tended.in_folder() == "1 2 3 4")
    async with asyncio.timeout(10):
        await rotate(tended.site, tended.connection, "b")
    assert not rotating.done()
    await tasks.end(rotating)


async def test_two_that_wait_for_the_same_keys_list_them_once(tended: TendedSite) -> None:
    ring = await tended.holding()
    rotating = [asyncio.create_task(rotate(tended.site, tended.connection, POOL, grace=60)) for _ in range(2)]
    await until(lambda: tended.in_folder() == "1 2 3 4")
    ring.reload()
    assert [[config.key_id for config in (await one).listed] for one in rotating] == [[3, 4]] * 2
    assert await tended.listed() == [3, 4, 1, 2]


@of_two_pools
async def test_a_pool_that_is_damaged_is_published_as_it_was(tended: TendedSite) -> None:
    tended.damage()
    with capture_logs() as logs:
        await rotate(tended.site, tended.connection, "b", grace=60)
    assert (await tended.listed("b"), await tended.listed()) == ([3, 4, 1, 2], [1, 2])
    assert ("pool.damaged", POOL) in [(entry["event"], entry.get("pool")) for entry in logs]


@of_two_pools
async def test_keys_that_are_out_are_destroyed_without_the_fabric(tended: TendedSite) -> None:
    """Neither a manifest that cannot be published nor another pool's damaged file keeps a private key on disk."""
    await rotate(tended.site, tended.connection, "b", grace=0)
    tended.damage()
    gone = await tended.live.connect("provisioner")
    await gone.close()
    with pytest.raises(SettingsError, match="damaged"):
        await retire(tended.site, gone, wait=0.1)
    assert tended.in_folder("b") == "3 4"


async def test_queues_that_the_message_server_lost_are_made_again(tended: TendedSite) -> None:
    """Where nobody starts the two together, as `lacre up` does."""
    stream, jetstream = subjects.work_stream(POOL, subjects.DEFAULT_REGION), tended.connection.jetstream
    await jetstream.delete_stream(stream)

    async def there() -> bool:
        found = [info.config.name for info in await jetstream.streams_info()]
        return stream in found and bool(await jetstream.consumers_info(stream))

    tended.background(upkeep(tended.site, tended.connection, Schedule(), provisioning=True))
    await until(there)


async def test_a_manifest_that_the_message_server_lost_is_published_again(tended: TendedSite) -> None:
    """Also if the last one is young: a process that starts without a memory would have none for hours."""
    await tended.connection.jetstream.delete_stream("KV_trust")
    await provision_site(tended.site, tended.connection)
    assert await behind.published(tended.connection) is None
    for _ in range(2):
        await tend(tended.site, tended.connection, Schedule())
        assert verify(await tended.connection.manifest() or b"", tended.site.root, time.time()).manifest.version == 2


@pytest.mark.parametrize("content", ["", "x", "nan", "inf", "-1", "0", "1e999"])
async def test_a_damaged_time_of_the_last_publication_is_mended(tended: TendedSite, content: str) -> None:
    """It still counts as published, so that lost stores are noticed; and the next manifest is due once."""
    write_secret(tended.site.folder / "trust" / "published", content.encode())
    assert tended.site.published_at > 0
    for _ in range(2):
        await tend(tended.site, tended.connection, Schedule())
        assert (await tended.verified()).version == 2
    assert time.time() - 60 < tended.site.published_at <= time.time()


@pytest.mark.slow
async def test_keys_rotate_by_themselves_also_after_a_failure_and_without_a_worker(tended: TendedSite) -> None:
    path, kept = tended.damage()
    with capture_logs() as logs:
        tended.background(upkeep(tended.site, tended.connection, Schedule(every=1, grace=0), again=0.05))
        await until(lambda: logs)
    assert {(entry["event"], entry["pool"]) for entry in logs} == {("upkeep.failed", POOL)}
    path.write_bytes(kept)

    async def rotated_twice() -> bool:
        return (await tended.listed())[0] >= 5

    await until(rotated_twice, 30)


async def test_pauses_grow_with_each_failure_in_a_row_and_begin_anew_after_a_success(tended: TendedSite) -> None:
    slept: list[float] = []
    path, kept = tended.damage()

    async def sleep(seconds: float) -> None:
        slept.append(seconds)
        if len(slept) == 9:
            await asyncio.Event().wait()
        path.write_bytes(kept if len(slept) == 7 else b"{")

    tended.background(upkeep(tended.site, tended.connection, Schedule(every=None), sleep=sleep))
    await until(lambda: len(slept) == 9)
    assert slept == [1, 2, 4, 8, 16, 30, 30, LOOK, 1]


@pytest.mark.parametrize("seconds", [-1.0, float("nan"), float("inf")])
async def test_what_is_no_time(tended: TendedSite, seconds: float) -> None:
    with pytest.raises(SettingsError, match="grace"):
        await rotate(tended.site, tended.connection, POOL, grace=seconds)
    with pytest.raises(SettingsError, match="rotations"):
        Schedule(every=seconds)
    assert tended.in_folder() == "1 2"


async def test_one_process_at_a_time_changes_a_site(tended: TendedSite) -> None:
    tended.site.save(tended.live.server.url, "http://127.0.0.1:1")
    tended.live.credentials["provisioner"].save(tended.site.credential_file("provisioner"))
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

    async def version(root: bytes, served: bytes) -> int:
        """Of the manifest that a process works by which starts with these settings."""
        started = feed(lambda: asyncio.sleep(0, served), root)
        await started.refresh()
        return started.manifest.version

    running, before = feed(tended.connection.manifest, first), await tended.manifest()
    await running.refresh()
    for _ in range(3):
        tended.site.authority.rotate_root(time.time())
        await publish(tended.site, tended.connection)
    after = await tended.manifest()
    await publish(tended.site, tended.connection)
    await running.refresh()
    assert running.manifest.version == 5
    for root, served in ((first, before), (tended.site.root, after), (tended.site.root, await tended.manifest())):
        assert await version(root, served) == 5
