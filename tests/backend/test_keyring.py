"""The pool's keys that a worker holds: what is in the folder, taken up and destroyed as it comes and goes."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from lacre.errors import SettingsError
from lacre.manifest import fingerprint
from lacre.wire.header import Kem
from lacre_backend.keyring import KeyRing
from lacre_fabric.poolkeys import keep_only, make, public_parts


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make(tmp_path / "keys", (1, 2), (Kem.XWING, Kem.X25519))
    return tmp_path / "keys"


@pytest.fixture
def ring(folder: Path) -> KeyRing:
    return KeyRing(folder)


def test_holds_what_is_there(folder: Path, ring: KeyRing) -> None:
    assert {key.config for key in ring.keys.values()} == set(public_parts(folder))
    assert set(ring.fingerprints()) == {fingerprint(config) for config in public_parts(folder)}
    assert not ring.reload()


def test_takes_up_what_appears(folder: Path, ring: KeyRing) -> None:
    (config,) = make(folder, (3,), (Kem.XWING,))
    assert ring.reload()
    assert ring.keys[3].config == config
    assert fingerprint(config) in ring.fingerprints()
    assert not ring.reload()


def test_destroys_what_disappears(folder: Path, ring: KeyRing) -> None:
    old = ring.keys[1]
    keep_only(folder, [2])
    assert not ring.reload()
    assert set(ring.keys) == {2}
    assert bytes(old._secret) == bytes(32)


def test_another_key_under_the_same_name(folder: Path, ring: KeyRing) -> None:
    old = ring.keys[1]
    (config,) = make(folder, (1,), (Kem.XWING,))
    assert ring.reload()
    assert ring.keys[1].config == config != old.config
    assert bytes(old._secret) == bytes(32)


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
    if harm == "open to others":
        path.chmod(0o644)
    else:
        path.write_bytes(b"nothing" if harm == "not a key" else whole[:30])
    with capture_logs() as logs:
        assert ring.reload()
        assert not ring.reload()
    assert [entry["event"] for entry in logs if entry["log_level"] == "warning"] == ["key.unreadable"]
    assert set(ring.keys) == {1, 2, 4}
    if harm == "open to others":
        path.chmod(0o600)
    else:
        path.write_bytes(whole)
    assert ring.reload()
    assert set(ring.keys) == {1, 2, 3, 4}


def test_nothing_is_served_without_keys(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(SettingsError, match="lacre keys init"):
        KeyRing(tmp_path / "elsewhere")
    (folder / "1.key").chmod(0o644)
    with pytest.raises(SettingsError, match="chmod 600"):
        KeyRing(folder)


def test_an_end_destroys_them_all(ring: KeyRing) -> None:
    keys = list(ring.keys.values())
    ring.close()
    assert {bytes(key._secret) for key in keys} == {bytes(32)}
    assert not ring.keys
