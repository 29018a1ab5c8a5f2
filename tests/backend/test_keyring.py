"""The pool's keys that a worker holds: what is in the folder, taken up and destroyed as it comes and goes."""

from __future__ import annotations

import asyncio
import shutil
import time
from contextlib import closing
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from lacre.errors import SettingsError
from lacre.trust.manifest import fingerprint
from lacre.wire.header import Kem
from lacre_backend.keyring import KeyRing
from lacre_fabric.keys.kms import WrongWrapping
from lacre_fabric.keys.kms.wrapping import keeping
from lacre_fabric.keys.pool_keys import keep_only, make, public_parts
from lacre_fabric.keys.secret_files import write_secret
from parts.key_services.http import Answer, Asked, Loopback


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make(tmp_path / "keys", (1, 2), (Kem.XWING, Kem.X25519))
    return tmp_path / "keys"


@pytest.fixture
def ring(folder: Path) -> KeyRing:
    return KeyRing(folder)


def test_holds_what_is_there_and_takes_up_what_appears(folder: Path, ring: KeyRing) -> None:
    assert {key.config for key in ring.keys.values()} == set(public_parts(folder))
    assert set(ring.fingerprints()) == {fingerprint(config) for config in public_parts(folder)}
    assert not ring.reload()
    (config,) = make(folder, (3,), (Kem.XWING,))
    assert ring.reload()
    assert ring.keys[3].config == config
    assert fingerprint(config) in ring.fingerprints()
    assert not ring.reload()


def test_destroys_what_disappears_or_is_replaced(folder: Path, ring: KeyRing) -> None:
    old, gone = ring.keys[2], ring.keys[1]
    keep_only(folder, [2])
    assert not ring.reload()
    assert set(ring.keys) == {2}
    (config,) = make(folder, (2,), (Kem.XWING,))  # another key under the same name
    assert ring.reload()
    assert ring.keys[2].config == config != old.config
    now = ring.keys[2]
    ring.close()
    assert {bytes(key._secret) for key in (old, gone, now)} == {bytes(32)}
    assert not ring.keys


@pytest.mark.parametrize("empty", [True, False], ids=["empty", "gone"])
def test_a_folder_without_keys_is_a_fault_and_no_order(folder: Path, ring: KeyRing, tmp_path: Path, empty: bool) -> None:
    shutil.copytree(folder, tmp_path / "kept")
    if empty:
        for path in folder.iterdir():
            path.unlink()
    else:
        shutil.rmtree(folder)
    with capture_logs() as logs:
        for _ in range(3):
            assert not ring.reload()
    assert [entry["event"] for entry in logs] == ["keys.folder_empty"]  # said once
    assert set(ring.keys) == {1, 2}
    shutil.copytree(tmp_path / "kept", folder, dirs_exist_ok=True)
    ring.reload()
    assert set(ring.keys) == {1, 2}


@pytest.mark.parametrize("harm", ["open to others", "not a key", "half a key"])
def test_a_file_that_cannot_be_used_keeps_nothing_else_back(folder: Path, ring: KeyRing, harm: str) -> None:
    make(folder, (3, 4), (Kem.XWING, Kem.X25519))
    path = folder / "3.key"
    whole = path.read_bytes()
    path.write_bytes({"not a key": b"nothing", "half a key": whole[:30]}.get(harm, whole))
    path.chmod(0o644 if harm == "open to others" else 0o600)
    with capture_logs() as logs:
        assert ring.reload()
        assert not ring.reload()
    assert [entry["event"] for entry in logs if entry["log_level"] == "warning"] == ["key.unreadable"]
    assert set(ring.keys) == {1, 2, 4}
    path.write_bytes(whole)
    path.chmod(0o600)
    assert ring.reload()
    assert set(ring.keys) == {1, 2, 3, 4}


def test_nothing_is_served_without_keys(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(SettingsError, match="lacre keys init"):
        KeyRing(tmp_path / "elsewhere")
    (folder / "1.key").chmod(0o644)
    with pytest.raises(SettingsError, match="chmod 600"):
        KeyRing(folder)


class Transit:
    """Answers as a vault's transit does, with what it was given; 503 while it is away."""

    away = False
    asked = 0
    delay = 0.0

    def __call__(self, asked: Asked) -> Answer:
        self.asked += 1
        time.sleep(self.delay)
        if self.away:
            return 503, {"errors": ["Vault is sealed"]}
        said = asked.members
        if asked.path.endswith("/encrypt/lacre"):
            return 200, {"data": {"ciphertext": said["plaintext"]}}
        return 200, {"data": {"plaintext": said["ciphertext"]}}


async def test_a_service_that_is_away_is_asked_again_and_told_of_once(tmp_path: Path) -> None:
    token, folder, transit = tmp_path / "token", tmp_path / "keys", Transit()
    write_secret(token, b"t")
    with (
        closing(Loopback(transit)) as server,
        keeping(f"vault://127.0.0.1:{server.port}/transit/lacre?token-file={token}", "default") as kept,
    ):
        make(folder, (1,), (Kem.XWING,), kept)
        ring = KeyRing(folder, kept)
        make(folder, (2,), (Kem.XWING,), kept)
        transit.away, asked = True, transit.asked
        with capture_logs() as logs:
            for _ in range(3):
                await ring.look()
        assert [(entry["event"], entry["kind"]) for entry in logs] == [("key.unreadable", "KmsUnreachable")]
        assert transit.asked == asked + 3
        assert set(ring.keys) == {1}, "what is held stays held"
        transit.away = False
        await ring.look()
        await ring.look()
        assert set(ring.keys) == {1, 2}
        assert transit.asked == asked + 4, "a key that is held is not asked for again"
        make(folder, (3,), (Kem.XWING,), kept)
        transit.delay, looking, ticks = 0.5, asyncio.create_task(ring.look()), 0
        while not looking.done():
            await asyncio.sleep(0.01)
            ticks += 1
        assert set(ring.keys) == {1, 2, 3}
        assert ticks > 10, "answers under way go on meanwhile"


async def test_a_key_that_the_service_withholds_keeps_nothing_else_back(tmp_path: Path) -> None:
    folder = tmp_path / "keys"
    with keeping(f"file:{tmp_path / 'kms.key'}", "default") as kept, keeping(f"file:{tmp_path / 'b.key'}", "default") as other:
        make(folder, (1,), (Kem.XWING,), kept)
        ring = KeyRing(folder, kept)
        make(folder, (2,), (Kem.XWING,), other)
        make(folder, (3,), (Kem.XWING,), kept)
        with capture_logs() as logs:
            await ring.look()
        assert ("key.unreadable", "WrongWrapping") in [(entry["event"], entry.get("kind")) for entry in logs]
        assert set(ring.keys) == {1, 3}
        with pytest.raises(WrongWrapping, match=r"2\.key"):
            KeyRing(folder, kept)
        held = ring.keys[1].config
        make(folder, (1,), (Kem.XWING,), other)  # as `lacre keys rewrap` leaves it to a worker that was not started anew
        await ring.look()
        assert ring.keys[1].config == held


async def test_a_right_that_comes_late_is_taken(tmp_path: Path) -> None:
    folder, key_file = tmp_path / "keys", tmp_path / "kms.key"
    with keeping(f"file:{key_file}", "default") as kept:
        make(folder, (1,), (Kem.XWING,), kept)
        ring = KeyRing(folder, kept, again=0.2)
        make(folder, (2,), (Kem.XWING,), kept)
        key_file.rename(tmp_path / "away")
        with capture_logs() as logs:
            await ring.look()
            (tmp_path / "away").rename(key_file)
            await ring.look()
            assert set(ring.keys) == {1}, "not asked again at once"
            await asyncio.sleep(0.25)
            await ring.look()
        assert set(ring.keys) == {1, 2}
        assert [entry["kind"] for entry in logs if entry["event"] == "key.unreadable"] == ["KeyWithheld"]
