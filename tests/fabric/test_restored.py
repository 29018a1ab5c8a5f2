"""A state folder from a backup: it signs nothing that processes would ignore, says what to put back, and can catch up."""

from __future__ import annotations

import contextlib
import shutil
import threading
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from lacre.errors import LacreError, Rollback, SettingsError, UntrustedRoot
from lacre.trust.chain import verify
from lacre.trust.manifest import MAX_DOCUMENT
from lacre.trust.manifest_store import VersionFile, VersionMemory, accept
from lacre_fabric.nats.connection import Connection
from lacre_fabric.nats.manifest_feed import ManifestFeed
from lacre_fabric.operate import behind
from lacre_fabric.operate.behind import StateBehind
from lacre_fabric.operate.catching_up import CaughtUp, catch_up, memories, newest, remembered, served
from lacre_fabric.operate.fabric_check import Severity
from lacre_fabric.operate.rotation import Schedule, publish, rotate, tend
from lacre_fabric.operate.site import Site
from lacre_fabric.operate.state_check import compare
from parts.fabric import POOLS, LiveFabric, Parties

POOL = "a"


@dataclass
class Copied:
    """A site that went on after a copy of its folder was made. feed: a gateway that runs all the time."""

    site: Site
    old: Site
    connection: Connection
    feed: ManifestFeed

    async def caught_up(self) -> CaughtUp:
        async with self.old.changing():
            return catch_up(self.old, await self.connection.manifest(), time.time())

    def files(self) -> dict[str, bytes]:
        """What the old folder holds."""
        return {
            str(path.relative_to(self.old.folder)): path.read_bytes()
            for path in self.old.folder.rglob("*")
            if path.is_file() and path.name != "lock"
        }


@pytest.fixture
async def copied(nats: LiveFabric, tmp_path: Path) -> AsyncIterator[Copied]:
    site = Site(tmp_path / "state", {POOL: POOLS[POOL]})
    site.create()
    async with Parties.of(nats) as parties:
        connection = await parties.connect()
        await publish(site, connection)
        shutil.copytree(site.folder, tmp_path / "old")
        old = Site(tmp_path / "old", site.pools)
        feed = ManifestFeed(connection.manifest, site.root)
        await feed.refresh()
        yield Copied(site, old, connection, feed)
        await connection.jetstream.delete_stream("KV_trust")  # the next test makes it again


async def refused(copied: Copied) -> str:
    """Why every change by the old folder is refused. It leaves both the folder and the fabric as they are."""
    before, there = copied.files(), await copied.connection.manifest()
    told = set()
    for change in (
        publish(copied.old, copied.connection),
        tend(copied.old, copied.connection, Schedule()),
        rotate(copied.old, copied.connection, POOL, wait=0.1),
    ):
        with pytest.raises(StateBehind) as caught:
            await change
        told.add(str(caught.value))
    assert (copied.files(), await copied.connection.manifest()) == (before, there)
    [reason] = told
    return reason


async def test_an_older_version_is_refused_and_catches_up(copied: Copied) -> None:
    await publish(copied.site, copied.connection)
    told = await refused(copied)
    assert "version 2 of the manifest, and this folder only 1" in told
    assert "put `trust/`" in told
    assert "lacre state catch-up" in told
    assert await copied.caught_up() == CaughtUp(2, 0, ())
    assert await copied.caught_up() == CaughtUp(2, 0, ())
    await publish(copied.old, copied.connection)
    await copied.feed.refresh()
    assert copied.feed.manifest.version == 3


async def test_a_shorter_chain_is_refused_and_catches_up(copied: Copied) -> None:
    """The new signer's and the new root's private keys are only in the newer folder."""
    copied.site.authority.rotate_signer(time.time())
    await publish(copied.site, copied.connection)
    assert "the fabric has 2 root statements, and this folder only the first 1" in await refused(copied)
    done = await copied.caught_up()
    assert (done.version, done.statements) == (2, 1)
    assert done.todo == ("put back signer.pem, or make a new signer with `lacre signer rotate`",)
    with pytest.raises(SettingsError, match=r"put signer\.pem back"):
        await publish(copied.old, copied.connection)
    copied.old.authority.rotate_signer(time.time())
    await publish(copied.old, copied.connection)
    await copied.feed.refresh()
    assert copied.feed.manifest.version == 4  # one was spent on the attempt without a signer
    assert behind.why(copied.old, await copied.connection.manifest()) is None


async def test_a_gateway_has_seen_more_than_the_fabric(copied: Copied) -> None:
    """NATS lost its storage too, and got the old folder's manifest: every process ignores that one."""
    before = await copied.connection.manifest() or b""
    copied.site.authority.rotate_signer(time.time())
    for _ in range(3):
        await publish(copied.site, copied.connection)
    seen, root = await copied.connection.manifest() or b"", copied.old.root
    assert newest([before, seen, b"{}"], root) == newest([seen, before], root) == seen
    assert newest([b"{}", b""], root) is None
    async with copied.old.changing():
        done = catch_up(copied.old, newest([before, seen], root), time.time())
    assert (done.version, done.statements) == (4, 1)


@pytest.mark.parametrize(
    "status, content, said", [(200, b"{}", None), (503, b"", "serves no manifest"), (200, bytes(MAX_DOCUMENT + 2**20), None)]
)
def test_what_a_gateway_serves(status: int, content: bytes, said: str | None) -> None:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status if self.path == "/v1/manifest" else 404)
            self.end_headers()
            with contextlib.suppress(OSError):  # the client hangs up when it has enough
                self.wfile.write(content)

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.handle_request)
        thread.start()
        url = f"http://127.0.0.1:{server.server_port}"
        if said is None:
            found = served(url)
            assert found == content[: len(found)]
            assert len(found) < MAX_DOCUMENT + 2**20
        else:
            with pytest.raises(SettingsError, match=said):
                served(url)
        thread.join()
    with pytest.raises(SettingsError, match="serves no manifest"):
        served(url)  # nobody listens


async def test_two_copies_that_both_went_on_are_told_apart(copied: Copied) -> None:
    copied.site.authority.rotate_signer(time.time())
    await publish(copied.site, copied.connection)
    copied.old.authority.rotate_signer(time.time() + 1)
    assert "another copy of this folder changed its root or signer" in await refused(copied)


async def test_two_manifests_of_one_version(copied: Copied) -> None:
    await publish(copied.site, copied.connection)
    copied.old.sign_manifest(time.time() - 5)  # signed beside it, and not published
    assert "another copy of this folder signed version 2" in await refused(copied)


@dataclass
class Ahead:
    """A worker that alone saw the last signer of a folder that is lost. memory: what it keeps over restarts."""

    copied: Copied
    feed: ManifestFeed
    memory: Path
    version: int

    @classmethod
    async def of(cls, copied: Copied, memory: Path, *, root: bool = False) -> Ahead:
        feed = ManifestFeed(copied.connection.manifest, copied.old.root, memory=VersionFile(memory))
        before = await copied.connection.manifest() or b""
        (copied.site.authority.rotate_root if root else copied.site.authority.rotate_signer)(time.time())
        await publish(copied.site, copied.connection)
        await feed.refresh()
        bucket = await copied.connection.jetstream.key_value("trust")
        await bucket.put("manifest", before)  # NATS lost what it had; the gateways never read it
        return cls(copied, feed, memory, feed.manifest.version)

    async def caught_up(self, *memories: Path) -> CaughtUp:
        old = self.copied.old
        seen = [document for memory in memories for document in remembered(memory, old.authority.chain().roots[0])]
        async with old.changing():
            return catch_up(old, await self.copied.connection.manifest(), time.time(), seen)

    def started(self) -> ManifestFeed:
        """The worker after a restart."""
        pin = self.copied.old.authority.chain().roots[0]
        return ManifestFeed(self.copied.connection.manifest, pin, memory=VersionFile(self.memory))

    async def follows(self) -> bool:
        """Whether the worker takes what is published, also after a restart."""
        document = await self.copied.connection.manifest()
        again = self.started()
        for feed in (self.feed, again):
            with contextlib.suppress(Rollback):  # two manifests of one version
                await feed.refresh()
        if not again.known:
            return False
        return [feed.document for feed in (self.feed, again)] == [document] * 2


async def test_a_worker_saw_more_than_every_gateway(copied: Copied, tmp_path: Path) -> None:
    """Its memory leads the restored folder on: then nobody has to forget anything."""
    ahead = await Ahead.of(copied, tmp_path / "memory")
    await publish(copied.old, copied.connection)
    await copied.feed.refresh()
    assert copied.feed.manifest.version == 2
    assert not await ahead.follows()  # it would be a rollback of the signer
    done = await ahead.caught_up(ahead.memory)
    assert (done.version, done.statements) == (2, 1)
    assert done.todo == ("put back signer.pem, or make a new signer with `lacre signer rotate`",)
    copied.old.authority.rotate_signer(time.time())
    await publish(copied.old, copied.connection)
    assert await ahead.follows()
    await copied.feed.refresh()
    assert copied.feed.manifest.version == ahead.feed.manifest.version == 4  # 3 is spent: there are two of version 2


async def test_a_restored_folder_went_on_before_anybody_missed_a_worker(copied: Copied, tmp_path: Path) -> None:
    """A fork: gateways know the new signer, the worker knows the lost one. Both statements are the root's."""
    ahead = await Ahead.of(copied, tmp_path / "memory")
    copied.old.authority.rotate_signer(time.time() + 1)
    for _ in range(3):
        await publish(copied.old, copied.connection)
    await copied.feed.refresh()
    assert copied.feed.manifest.version == 4
    assert not await ahead.follows()  # a higher version does not excuse a missing statement
    assert await ahead.caught_up() == CaughtUp(4, 0, ())  # the fabric alone knows nothing of it
    assert (await ahead.caught_up(ahead.memory)).statements == 1
    with pytest.raises(SettingsError, match=r"put signer\.pem back"):
        await publish(copied.old, copied.connection)
    copied.old.authority.rotate_signer(time.time())
    await publish(copied.old, copied.connection)
    assert await ahead.follows()
    await copied.feed.refresh()
    assert copied.feed.document == ahead.feed.document
    assert behind.why(copied.old, await copied.connection.manifest()) is None


async def test_a_root_that_handed_over_twice(copied: Copied, tmp_path: Path) -> None:
    """No chain holds both: the folder says what to do, and changes nothing."""
    ahead = await Ahead.of(copied, tmp_path / "memory", root=True)
    copied.old.authority.rotate_root(time.time() + 1)
    await publish(copied.old, copied.connection)
    await publish(copied.old, copied.connection)
    before = copied.files()
    with pytest.raises(SettingsError, match="Remove the memory of that process, and restart it"):
        await ahead.caught_up(ahead.memory)
    assert copied.files() == before
    assert not await ahead.follows()
    shutil.rmtree(ahead.memory)
    ahead.feed = ahead.started()
    assert await ahead.follows()


async def test_a_memory_that_is_none_of_this_root(copied: Copied, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="remembers no manifest of this folder's root"):
        remembered(tmp_path, copied.old.root)
    memory = copied.old.folder / "workers" / "1" / "manifests"
    accept(await copied.connection.manifest() or b"", copied.old.root, VersionFile(memory), time.time())
    assert memories(copied.old.folder) == [memory]
    with pytest.raises(SettingsError, match="remembers no manifest of this folder's root"):
        remembered(memory, bytes(32))


async def test_keys_of_a_pool_that_only_the_newer_folder_has(copied: Copied) -> None:
    for folder in (copied.site.keys_folder(POOL), copied.old.keys_folder(POOL)):
        assert sorted(path.stem for path in folder.iterdir()) == ["1", "2"]
    await rotate(copied.site, copied.connection, POOL, wait=0.1)
    done = await copied.caught_up()
    assert done.todo == (
        f"pool {POOL}: keys 3, 4 are not in this folder. Put `pools/{POOL}` back, or run `lacre keys rotate --pool {POOL}`",
    )
    await rotate(copied.old, copied.connection, POOL, wait=0.1)
    pools = verify(await copied.connection.manifest() or b"", copied.old.root, time.time()).manifest.pools
    assert [key.config.key_id for key in pools[POOL].keys] == [5, 6, 1, 2]


async def test_another_root_is_not_replaced_by_accident(copied: Copied, tmp_path: Path) -> None:
    other = Site(tmp_path / "other", copied.site.pools)
    other.create()
    with pytest.raises(StateBehind, match=r"another root.*--new-root"):
        await publish(other, copied.connection)
    async with other.changing():
        with pytest.raises(SettingsError, match="nothing to catch up with"):
            catch_up(other, await copied.connection.manifest(), time.time())
    await publish(other, copied.connection, new_root=True)
    await publish(other, copied.connection)


async def test_damage_in_the_bucket_is_replaced(copied: Copied) -> None:
    bucket = await copied.connection.jetstream.key_value("trust")
    await bucket.put("manifest", b"{}")
    await publish(copied.site, copied.connection)
    assert verify(await copied.connection.manifest() or b"", copied.site.root, time.time()).manifest.version == 2


async def test_a_damaged_count_of_versions(copied: Copied) -> None:
    (copied.old.folder / "trust" / "version").write_text("")
    with pytest.raises(SettingsError, match="catch-up"):
        await publish(copied.old, copied.connection)
    await copied.caught_up()
    await publish(copied.old, copied.connection)


async def test_a_process_that_ignores_an_older_manifest_says_so_once(copied: Copied) -> None:
    older = await copied.connection.manifest()
    await publish(copied.site, copied.connection)
    await copied.feed.refresh()
    bucket = await copied.connection.jetstream.key_value("trust")
    await bucket.put("manifest", older or b"")
    with capture_logs() as logs:
        for _ in range(3):
            await copied.feed.refresh()
    assert [(entry["event"], entry["version"]) for entry in logs] == [("manifest.ignored", 2)]
    assert (copied.feed.ignored, copied.feed.manifest.version) == (1, 2)


async def test_the_state_the_fabric_and_what_processes_remember_are_compared(copied: Copied) -> None:
    memory = copied.old.folder / "gateway" / "manifests"

    async def found() -> dict[str, tuple[Severity, str]]:
        findings = compare(copied.old, await copied.connection.manifest())
        assert all(bool(finding.remedy) == (finding.verdict is not Severity.OK) for finding in findings)
        return {finding.check: (finding.verdict, finding.detail) for finding in findings}

    assert await found() == {"state": (Severity.OK, "version 1, as the fabric has it")}
    remembering = ManifestFeed(copied.connection.manifest, copied.site.root, memory=VersionFile(memory))
    await publish(copied.site, copied.connection)
    await remembering.refresh()
    told = await found()
    assert told["state"] == (Severity.WRONG, "the fabric has version 2 of the manifest, and this folder only 1")
    assert told["memory gateway/manifests"] == (Severity.OK, "version 2")
    bucket = await copied.connection.jetstream.key_value("trust")
    await bucket.put("manifest", (copied.old.folder / "trust" / "manifest.json").read_bytes())
    ignored = "it has seen version 2, and ignores version 1 of the fabric"
    assert (await found())["memory gateway/manifests"] == (Severity.WRONG, ignored)
    (memory / "seen.json").write_text("{")
    assert "damaged" in (await found())["memory gateway/manifests"][1]
    await bucket.put("manifest", b"{}")
    assert (await found())["state"][0] is Severity.WRONG


async def test_a_lost_root_is_replaced_beside_the_old_pins(copied: Copied) -> None:
    """Old and new pins verify the same document, until the old root's statement about the signer ends."""
    site, now = copied.site, time.time()
    old, signed = site.root, site.authority.chain()
    with pytest.raises(SettingsError, match="lacre root rotate"):
        site.authority.replace_root(now)
    (site.folder / "root.pem").unlink()
    with pytest.raises(SettingsError, match=r"put root\.pem back"):
        site.authority.rotate_root(now)
    site.authority.replace_root(now)
    await publish(site, copied.connection)
    await publish(site, copied.connection)
    document = await copied.connection.manifest() or b""
    assert site.root != old
    for pin in (old, site.root):
        memory = VersionMemory()
        assert accept(document, pin, memory, now).roots == (pin,)
        assert accept(document, pin, memory, now).manifest.version == 3
    with pytest.raises(UntrustedRoot):
        verify(document, bytes(32), now)
    await copied.feed.refresh()  # a gateway that pins the old root, and runs all the time
    assert copied.feed.manifest.version == 3
    assert "another copy of this folder replaced the root" in await refused(copied)
    with pytest.raises(SettingsError, match="newest copy"):
        await copied.caught_up()
    later = site.authority.document("x", site.authority.renewed(signed.until), signed.until)
    assert (later.beside, len(later.roots)) == ((), 2)


async def test_a_lost_root_and_a_lost_signer(copied: Copied) -> None:
    site, old = copied.site, copied.site.root
    for name in ("root", "signer"):
        (site.folder / f"{name}.pem").unlink()
    site.authority.replace_root(time.time())
    with pytest.raises(SettingsError, match=r"put signer\.pem back"):
        await publish(site, copied.connection)
    site.authority.rotate_signer(time.time())
    await publish(site, copied.connection)
    await publish(site, copied.connection)
    document = await copied.connection.manifest() or b""
    assert verify(document, site.root, time.time()).manifest.version == 4
    with pytest.raises(LacreError):
        verify(document, old, time.time())


async def test_a_lost_signer(copied: Copied) -> None:
    (copied.site.folder / "signer.pem").unlink()
    with pytest.raises(SettingsError, match=r"put signer\.pem back"):
        await publish(copied.site, copied.connection)
    copied.site.authority.rotate_signer(time.time())
    await publish(copied.site, copied.connection)
    await copied.feed.refresh()
    assert copied.feed.manifest.version == 3
    assert (copied.site.folder / "signer.pem").exists()
