"""Secrets on disk: who may read them, and what a crash leaves."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from lacre.errors import SettingsError
from lacre_fabric.keys.secret_files import closed_to, ed25519, read_ed25519, read_secret, write_secret
from lacre_fabric.nats.roles import Credential


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "new" / "secret.pem"


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077])
def test_a_secret_is_its_owner_s_alone(path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        write_secret(path, b"one")
    finally:
        os.umask(before)
    assert (mode(path), mode(path.parent)) == (0o600, 0o700), "folders that are made are private"
    assert read_secret(path) == b"one"
    path.chmod(0o644)
    write_secret(path, b"two")
    assert mode(path) == 0o600
    Credential.new("worker-a-n1").save(path)
    assert mode(path) == 0o600


def test_a_new_secret_replaces_the_old_in_one_step(path: Path) -> None:
    write_secret(path, b"old")
    with path.open("rb") as reader:
        write_secret(path, b"new and longer")
        assert reader.read() == b"old", "who was reading is not given half of each"
    assert read_secret(path) == b"new and longer"
    assert list(path.parent.iterdir()) == [path], "nothing is left beside it"


def test_a_failed_write_leaves_the_old(path: Path) -> None:
    path.mkdir(parents=True)  # cannot be replaced by a file
    (path / "inside").touch()
    with pytest.raises(OSError):
        write_secret(path, b"new")
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("bits", [0o640, 0o604, 0o610, 0o601, 0o660, 0o666, 0o620])
@pytest.mark.parametrize(
    ("make", "read"),
    [(ed25519, read_ed25519), (Credential.new("worker-a-n1").save, Credential.load)],
    ids=["key", "credential"],
)
def test_a_secret_that_others_reach_is_refused(
    path: Path, bits: int, make: Callable[[Path], object], read: Callable[[Path], object]
) -> None:
    make(path)
    path.chmod(bits)
    with pytest.raises(SettingsError, match=f"mode 0{bits:o}.*chmod 600 {path}"):
        read(path)
    path.chmod(0o600)
    read(path)


def test_a_missing_secret_is_said(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"No such file.*lacre keys init"):
        read_secret(tmp_path / "secret")
    with pytest.raises(SettingsError):
        read_secret(tmp_path)


@pytest.mark.parametrize("content", [b"", b"junk", b"\xff", b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n"])
def test_a_key_file_that_holds_no_key(path: Path, content: bytes) -> None:
    write_secret(path, content)
    with pytest.raises(SettingsError, match=r"secret\.pem"):
        read_ed25519(path)


def test_a_key_and_a_credential_are_made_once(path: Path) -> None:
    assert ed25519(path).private_bytes_raw() == ed25519(path).private_bytes_raw()
    credential = Credential.load_or_new(path.with_name("credential.json"), "worker-a-n1")
    assert Credential.load_or_new(path.with_name("credential.json"), "worker-a-n1") == credential
    assert len(credential.password) >= 43, "256 bits"
    assert credential.password not in repr(credential)


@pytest.mark.parametrize(
    "content", [b"", b"junk", b"\xff", b"[]", b"null", b"{}", b'{"name":"x"}', b'{"name":1,"password":"x"}', b"[" * 100_000]
)
def test_a_file_that_is_no_credential(path: Path, content: bytes) -> None:
    write_secret(path, content)
    with pytest.raises(SettingsError, match=r"secret\.pem is not a fabric credential"):
        Credential.load(path)


@pytest.mark.parametrize(
    ("mode", "owner", "group", "others_can"),
    [
        (0o600, 7, 7, False),
        (0o640, 7, 7, True),
        (0o400, 0, 0, False),
        (0o440, 0, 7, False),  # as kubelet hands a secret to a pod's group
        (0o640, 0, 7, False),
        (0o440, 0, 8, True),  # of a group that we are not in
        (0o460, 0, 7, True),  # whoever is in the group could change it
        (0o444, 0, 7, True),
    ],
)
def test_what_root_hands_to_our_group_is_ours(mode: int, owner: int, group: int, others_can: bool) -> None:
    assert bool(mode & closed_to(owner, group, user=7, groups={7})) == others_can


def test_root_s_own_files_are_for_no_group() -> None:
    assert 0o440 & closed_to(0, 0, user=0, groups={0})
