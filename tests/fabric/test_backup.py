"""Backups: what is in them, who can open them, and that a restore onto lost storage revives no revoked token."""

from __future__ import annotations

import asyncio
import io
import os
import shutil
import subprocess
import tarfile
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from lacre.errors import LacreError, SettingsError
from lacre.jose.jws import b64u
from lacre_fabric.keys.kms import WrongWrapping
from lacre_fabric.keys.secret_files import write_secret
from lacre_fabric.logs import make_log
from lacre_fabric.nats import subjects
from lacre_fabric.nats.connection import Connection
from lacre_fabric.nats.gateway import NatsGateway
from lacre_fabric.nats.kv import NatsBucket
from lacre_fabric.operate import backup, stores
from lacre_fabric.operate.backup import Backup, decrypted, encrypted, restore
from lacre_fabric.operate.fabric_check import Severity
from lacre_fabric.operate.rotation import Schedule, publish, tend
from lacre_fabric.operate.site import Site
from lacre_fabric.operate.state_check import compare_stores
from lacre_fabric.operate.stores import StoredEntry, provision_site
from lacre_fabric.work.contract import FabricUnavailable
from lacre_fabric.work.revocations import Revocation, StoreMark
from lacre_gateway.auth.revocation import RevocationList
from parts.commands import run_lacre
from parts.fabric import LiveFabric
from parts.small_disk import NO_DISK, filled, small_disk
from parts.up import LACRE

PASSPHRASE = "correct horse battery"
KEY = b64u(bytes(32))
ENTRY = StoredEntry("$KV.budgets.gateway-g1.x", b"{}", 1.0)


def site_in(folder: Path) -> Site:
    site = Site(folder, {"a": ("m1",)})
    site.create()
    return site


@asynccontextmanager
async def serving(site: Site, folder: Path, **how: Any) -> AsyncIterator[Connection]:
    """A NATS server of its own with empty storage, as `site.json` names it, and its provisioner's connection. how: as
    `LiveFabric.start` has it.
    """
    with LiveFabric.running(folder, site.roles(), **how) as live:
        site.save(live.server.url, "http://127.0.0.1:1")
        connection = await live.connect("provisioner")
        try:
            yield connection
        finally:
            await connection.close()


@asynccontextmanager
async def gateway(site: Site) -> AsyncIterator[NatsGateway]:
    fabric = await NatsGateway.connect(site.servers, site.credential("gateway-g1"), "g1")
    try:
        yield fabric
    finally:
        await fabric.close()


async def revocations(fabric: NatsGateway, log: io.StringIO | None = None) -> RevocationList:
    """Those of a gateway that starts now."""
    found = RevocationList(make_log(log or io.StringIO()))
    await found.refresh(fabric)
    return found


async def lacre(*words: str | Path, ok: bool = True) -> str:
    """What the command says; on stderr where it fails."""
    done = await asyncio.to_thread(run_lacre, *words)
    assert (done.returncode == 0) is ok, (done.stdout, done.stderr)
    return done.stdout + done.stderr


def passphrase_in(folder: Path, mode: int = 0o600) -> Path:
    path = folder / "passphrase"
    path.write_text(PASSPHRASE + "\n")
    path.chmod(mode)
    return path


async def test_a_restore_onto_lost_storage_revives_nothing_until_it_is_settled(tmp_path: Path) -> None:
    site, file, secret = site_in(tmp_path / "state"), tmp_path / "site.backup", passphrase_in(tmp_path)
    until = time.time() + 3600
    async with serving(site, tmp_path / "nats1") as connection:
        assert await provision_site(site, connection) == StoreMark()
        await publish(site, connection)
        async with gateway(site) as fabric:
            await fabric.revoke(Revocation(KEY, until))
            await NatsBucket(fabric.connection, subjects.BUDGETS_BUCKET).write("tenant", b"spent", 0)
        told = await lacre("state", "backup", file, "--state", site.folder, "--passphrase-file", secret)
        assert "2 entries of the fabric" in told
        assert "exists already" in (
            await lacre("state", "backup", file, "--state", site.folder, "--passphrase-file", secret, ok=False)
        )
    assert file.stat().st_mode & 0o077 == 0
    old = Site(tmp_path / "new", site.pools)
    await lacre("state", "restore", file, "--state", old.folder, "--passphrase-file", secret)
    assert "not empty" in await lacre("state", "restore", file, "--state", old.folder, "--passphrase-file", secret, ok=False)

    async with serving(old, tmp_path / "nats2") as connection:
        await lacre("keys", "tend", "--state", old.folder)
        assert not stores.pending_file(old.folder).exists()
        log = io.StringIO()
        async with gateway(old) as fabric:
            found = await revocations(fabric, log)
            assert (found.current, found.lost) == (False, ("budgets", "revocations"))
            assert "lacre state settle" in log.getvalue()
            assert found.refuses([KEY], time.time())
            spent = await NatsBucket(fabric.connection, subjects.BUDGETS_BUCKET).read("tenant")
            assert spent is not None
            assert spent.value == b"spent"
            await lacre("keys", "tend", "--state", old.folder)
            await found.refresh(fabric)
            assert not found.current
            issued = time.time()
            assert (await lacre("state", "settle", "--state", old.folder)).startswith(
                "settled: gateways refuse tokens issued before "
            )
            await found.refresh(fabric)
        async with gateway(old) as fabric:
            for each in (found, await revocations(fabric)):
                assert each.current
                assert each.refuses(["another"], issued)
                assert not each.refuses(["another"], time.time() + 1)
                assert each.refuses([KEY], time.time() + 1)


async def test_a_loss_can_be_accepted_while_nats_is_down(tmp_path: Path) -> None:
    site = site_in(tmp_path / "state")
    async with serving(site, tmp_path / "nats1") as connection:
        await provision_site(site, connection)
        await publish(site, connection)
    assert "decided" in await lacre("state", "settle", "--keep-tokens", "--state", site.folder)
    async with serving(site, tmp_path / "nats2") as connection:
        assert await provision_site(site, connection) == StoreMark()
        async with gateway(site) as fabric:
            found = await revocations(fabric)
            assert found.current
            assert not found.refuses(["any"], 1.0)


@pytest.mark.parametrize("stream", ["KV_revocations", "KV_budgets"])
async def test_one_lost_store_is_marked_and_a_crash_forgets_no_loss(tmp_path: Path, stream: str) -> None:
    site = site_in(tmp_path / "state")
    lost = (stream.removeprefix("KV_"),)
    async with serving(site, tmp_path / "nats") as connection:
        await provision_site(site, connection)
        await publish(site, connection)
        await connection.jetstream.delete_stream(stream)
        assert compare_stores(site, await stores.read_mark(connection)).verdict is Severity.OK
        assert await provision_site(site, connection) == StoreMark(lost)
        assert await provision_site(site, connection) == StoreMark(lost)
        found = compare_stores(site, await stores.read_mark(connection))
        assert (found.verdict, found.detail) == (Severity.WRONG, f"NATS lost {lost[0]}")
        stores.decide(site.folder, 0.0)
        assert await provision_site(site, connection) == StoreMark()
        (site.folder / "lost.json").write_text("{")  # of a process that ended before it wrote the mark
        (site.folder / "lost.json").chmod(0o600)
        assert await provision_site(site, connection) == StoreMark(("budgets", "revocations"))


@pytest.mark.parametrize("room", [2**20, 2**28])
async def test_what_was_never_made_is_not_lost(tmp_path: Path, room: int) -> None:
    """The first provisioning fails half-way, here for want of room: at once, or at budgets. Upkeep goes on to publish."""
    site = site_in(tmp_path / "state")
    async with serving(
        site, tmp_path / "small", change=lambda conf: conf["jetstream"].update(max_file_store=room)
    ) as connection:
        with pytest.raises(FabricUnavailable, match="insufficient storage"):
            await provision_site(site, connection)
        with pytest.raises(LacreError):
            await tend(site, connection, Schedule())
        there = {info.config.name for info in await connection.jetstream.streams_info()}
        assert there == ({"KV_revocations"} if room > 2**20 else set())
        assert site.published_at == 0
    async with serving(site, tmp_path / "nats") as connection:
        assert await provision_site(site, connection) == StoreMark()
        await tend(site, connection, Schedule(every=None))
        await connection.jetstream.delete_stream("KV_budgets")
        assert await provision_site(site, connection) == StoreMark(("budgets",))


async def test_what_nats_has_is_newer_than_a_backup(tmp_path: Path) -> None:
    site = site_in(tmp_path / "state")
    async with serving(site, tmp_path / "nats") as connection:
        await provision_site(site, connection)
        async with gateway(site) as fabric:
            bucket = NatsBucket(fabric.connection, subjects.BUDGETS_BUCKET)
            at = await bucket.write("tenant", b"before", 0)
            await fabric.revoke(Revocation(KEY, time.time() + 3600))
            kept = await stores.entries(connection)
            await bucket.write("tenant", b"after", at)
            over = StoredEntry(subjects.revocation("gateway-g1"), Revocation(KEY, 1.0).encode(), 1.0)
            stores.keep_pending(site.folder, [*kept, over])
            await provision_site(site, connection)
            assert [one.value for one in await stores.entries(connection)] == [kept[0].value, b"after"]


@pytest.mark.parametrize("content", [b"", b"{", b'{"entries": [{"subject": "$JS.API.x", "value": "", "time": 1}]}'])
async def test_pending_entries_that_are_damaged_or_forged(tmp_path: Path, content: bytes) -> None:
    site = site_in(tmp_path / "state")
    stores.keep_pending(site.folder, [])
    stores.pending_file(site.folder).write_bytes(content)
    async with serving(site, tmp_path / "nats") as connection:
        with pytest.raises(SettingsError, match="damaged"):
            await provision_site(site, connection)


def made(folder: Path) -> Backup:
    return Backup.of(site_in(folder).folder, [ENTRY])


def test_what_is_in_a_backup(tmp_path: Path) -> None:
    site = site_in(tmp_path / "state")
    for name in ("nats/jetstream", "logs/up.log", "gateway/audit/log", "trust/lock", "env", ".root.pem.going"):
        path = site.folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("x")
    (site.folder / "link").symlink_to("/etc/passwd")
    found = Backup.parse(Backup.of(site.folder, [ENTRY]).encode())
    assert found.entries == [ENTRY]
    assert {"root.pem", "signer.pem", "trust/chain.json", "pools/a/keys/1.key", "gateway/grant.pem"} <= found.files.keys()
    assert not {name for name in found.files if name.startswith(("nats", "logs", "gateway/audit", ".", "env", "link"))}
    restore(found, tmp_path / "new")
    again = Site(tmp_path / "new", site.pools)
    assert again.root == site.root
    assert again.sign_manifest()
    assert all(path.stat().st_mode & 0o077 == 0 for path in again.folder.rglob("*"))


def test_only_the_passphrase_opens_it(tmp_path: Path) -> None:
    content = made(tmp_path / "state").encode()
    data = encrypted(content, passphrase=PASSPHRASE, address=None)
    assert data.startswith(b"age-encryption.org/v1\n")
    assert decrypted(data, passphrase=PASSPHRASE, address=None) == content
    for wrong, said in ((PASSPHRASE + "!", "wrong"), (None, "--passphrase-file")):
        with pytest.raises(SettingsError, match=said):
            decrypted(data, passphrase=wrong, address=None)
    for short in (None, "", "short"):
        with pytest.raises(SettingsError, match="12 characters"):
            encrypted(content, passphrase=short, address=None)


def test_only_the_key_of_the_kms_opens_it(tmp_path: Path) -> None:
    content = made(tmp_path / "state").encode()
    for name in ("one", "two"):
        write_secret(tmp_path / name, os.urandom(32))
    one, two = (f"file:{tmp_path / name}" for name in ("one", "two"))
    data = encrypted(content, passphrase=None, address=one)
    assert decrypted(data, passphrase=None, address=one) == content
    with pytest.raises(WrongWrapping):
        decrypted(data, passphrase=None, address=two)
    with pytest.raises(SettingsError, match="--kms"):
        decrypted(data, passphrase=PASSPHRASE, address=None)
    with pytest.raises(SettingsError, match="always encrypted"):
        encrypted(content, passphrase=PASSPHRASE, address="plain:")


def test_a_damaged_file_restores_nothing(tmp_path: Path) -> None:
    whole = made(tmp_path / "state").encode()
    data = encrypted(whole, passphrase=PASSPHRASE, address=None)
    for cut in (0, 10, 100, len(data) // 2, len(data) - 1):
        with pytest.raises(SettingsError, match="damaged"):
            decrypted(data[:cut], passphrase=PASSPHRASE, address=None)
    for cut in range(0, len(whole), len(whole) // 20):
        with pytest.raises(SettingsError, match="damaged"):
            Backup.parse(whole[:cut])


def archive(*names: str, kind: bytes = tarfile.REGTYPE, about: bytes = b'{"format": 1, "made_at": 1.0}') -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as file:
        for name in ("backup.json", *names):
            entry = tarfile.TarInfo(name)
            content = about if name == "backup.json" else b"x"
            if name != "backup.json":
                entry.type = kind
            entry.size = len(content) if entry.isreg() else 0
            entry.linkname = "/etc/passwd"
            file.addfile(entry, io.BytesIO(content))
    return packed.getvalue()


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (lambda: archive("state/../../outside"), "damaged"),
        (lambda: archive("/etc/outside"), "damaged"),
        (lambda: archive("outside"), "damaged"),
        (lambda: archive("state/link", kind=tarfile.SYMTYPE), "damaged"),
        (lambda: archive("state/device", kind=tarfile.CHRTYPE), "damaged"),
        (lambda: archive("fabric.json"), "damaged"),
        (lambda: archive(about=b"[]"), "damaged"),
        (lambda: archive(about=b'{"format": 2, "made_at": 1.0}'), "upgrade this command"),
    ],
)
def test_a_forged_archive_writes_nothing(data: Callable[[], bytes], said: str) -> None:
    with pytest.raises(SettingsError, match=said):
        Backup.parse(data())


def test_a_secret_that_others_can_read_is_refused(tmp_path: Path) -> None:
    site_in(tmp_path / "state").save("nats://127.0.0.1:1", "http://127.0.0.1:1")
    words = ["state", "backup", tmp_path / "file", "--no-fabric", "--state", tmp_path / "state", "--passphrase-file"]
    assert "chmod" in asyncio.run(lacre(*words, passphrase_in(tmp_path, 0o644), ok=False))
    assert not (tmp_path / "file").exists()
    assert "without the fabric" in asyncio.run(lacre(*words, passphrase_in(tmp_path)))


def test_no_terminal_to_ask_for_the_passphrase(tmp_path: Path) -> None:
    site_in(tmp_path / "state").save("nats://127.0.0.1:1", "http://127.0.0.1:1")
    words = ["state", "backup", tmp_path / "file", "--no-fabric", "--state", tmp_path / "state"]
    done = subprocess.run(
        [*LACRE, *words], capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL, start_new_session=True
    )
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and "name its file with --passphrase-file" in done.stderr


@pytest.mark.skipif(NO_DISK is not None, reason=str(NO_DISK))
def test_a_full_disk_leaves_neither_half_a_file_nor_half_a_folder(tmp_path: Path) -> None:
    found = made(tmp_path / "state")
    with small_disk(tmp_path / "disk", "400k") as disk:
        with filled(disk):
            for fails in (lambda: backup.save(disk / "file", bytes(8192)), lambda: restore(found, disk / "state")):
                with pytest.raises(LacreError, match="No space left"):
                    fails()
            assert [path.name for path in disk.iterdir()] == ["ballast"]
        restore(found, disk / "state")
        shutil.rmtree(disk / "state")


@pytest.mark.slow
@pytest.mark.timeout(400)  # fifteen commands, each a Python of its own
async def test_an_operator_restores_an_old_backup_and_loses_the_root(tmp_path: Path) -> None:
    """By the commands alone, as docs/rotation.md has them."""
    site, file, secret = site_in(tmp_path / "state"), tmp_path / "site.backup", passphrase_in(tmp_path)
    old = tmp_path / "old"
    async with serving(site, tmp_path / "nats"):
        await lacre("manifest", "publish", "--state", site.folder)
        await lacre("state", "backup", file, "--state", site.folder, "--passphrase-file", secret)
        await lacre("signer", "rotate", "--state", site.folder)
        await lacre("state", "restore", file, "--state", old, "--passphrase-file", secret)
        for command in (("manifest", "publish"), ("keys", "tend"), ("signer", "rotate")):
            told = await lacre(*command, "--state", old, ok=False)
            assert "is behind" in told
            assert "lacre state catch-up" in told
        told = await lacre("state", "backup", tmp_path / "b", "--state", old, "--passphrase-file", secret, ok=False)
        assert "is behind" in told
        assert "wrong" in await lacre("fabric", "check", "--state", old, ok=False)
        told = await lacre("state", "catch-up", "--state", old)
        assert "version 2, 1 root statements added" in told
        assert "put back signer.pem" in told
        await lacre("signer", "rotate", "--state", old)
        await lacre("manifest", "publish", "--state", old)
        assert "behind" in await lacre("manifest", "publish", "--state", site.folder, ok=False)
        (old / "root.pem").unlink()
        before = Site.load(old).root
        assert "old pins work until" in await lacre("root", "replace", "--state", old)
        assert Site.load(old).root != before
        await lacre("fabric", "check", "--state", old)


def test_a_machine_that_seems_too_slow_is_not_called_a_wrong_passphrase() -> None:
    """age refuses the work that the file's head asks for, before it tries the passphrase."""
    made = encrypted(b"content", passphrase=PASSPHRASE, address=None)
    head, last = made.split(b"\n", 2)[1].rsplit(b" ", 1)
    assert int(last) < 30
    with pytest.raises(SettingsError, match="too busy, or much slower"):
        decrypted(made.replace(head + b" " + last, head + b" 40", 1), passphrase=PASSPHRASE, address=None)
    with pytest.raises(SettingsError, match="the passphrase is wrong"):
        decrypted(made, passphrase=PASSPHRASE + "x", address=None)
