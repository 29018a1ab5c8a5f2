"""Secrets on disk: who may read them, and what a crash leaves."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from lacre.errors import SettingsError
from lacre_fabric.keys.secret_files import closed_to, ed25519, read_ed25519, read_secret, write_secret
from lacre_fabric.nats.roles import Credential


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077])
def test_a_secret_is_its_owner_s_alone(tmp_path: Path, umask: int) -> None:
    path = tmp_path / "secret"
    before = os.umask(umask)
    try:
        write_secret(path, b"one")
    finally:
        os.umask(before)
    assert mode(path) == 0o600
    assert read_secret(path) == b"one"
    assert mode(write_credential(tmp_path)) == 0o600


def write_credential(folder: Path) -> Path:
    Credential.new("worker-a-n1").save(folder / "credential.json")
    return folder / "credential.json"


def test_folders_that_are_made_are_private(tmp_path: Path) -> None:
    write_secret(tmp_path / "new" / "secret", b"x")
    assert mode(tmp_path / "new") == 0o700


def test_a_new_secret_replaces_the_old_in_one_step(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    write_secret(path, b"old")
    with path.open("rb") as reader:
        write_secret(path, b"new and longer")
        assert reader.read() == b"old", "who was reading is not given half of each"
    assert read_secret(path) == b"new and longer"
    assert list(tmp_path.iterdir()) == [path], "nothing is left beside it"


def test_a_secret_readable_for_others_is_not_widened(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    path.write_bytes(b"old")
    path.chmod(0o644)
    write_secret(path, b"new")
    assert mode(path) == 0o600


def test_a_failed_write_leaves_the_old(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    path.mkdir()  # cannot be replaced by a file
    (path / "inside").touch()
    with pytest.raises(OSError):
        write_secret(path, b"new")
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("bits", [0o640, 0o604, 0o610, 0o601, 0o660, 0o666, 0o620])
def test_a_secret_that_others_reach_is_refused(tmp_path: Path, bits: int) -> None:
    for path, read in ((write_credential(tmp_path), Credential.load), (tmp_path / "key.pem", read_ed25519)):
        if path.suffix == ".pem":
            ed25519(path)
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
def test_a_key_file_that_holds_no_key(tmp_path: Path, content: bytes) -> None:
    write_secret(tmp_path / "key.pem", content)
    with pytest.raises(SettingsError, match=r"key\.pem"):
        read_ed25519(tmp_path / "key.pem")


def test_a_key_is_made_once(tmp_path: Path) -> None:
    key = ed25519(tmp_path / "key.pem")
    assert ed25519(tmp_path / "key.pem").private_bytes_raw() == key.private_bytes_raw()


def test_a_credential_is_found_again(tmp_path: Path) -> None:
    path = tmp_path / "credential.json"
    credential = Credential.load_or_new(path, "worker-a-n1")
    assert Credential.load_or_new(path, "worker-a-n1") == credential
    assert len(credential.password) >= 43, "256 bits"
    assert credential.password not in repr(credential)


@pytest.mark.parametrize(
    "content", [b"", b"junk", b"\xff", b"[]", b"null", b"{}", b'{"name":"x"}', b'{"name":1,"password":"x"}', b"[" * 100_000]
)
def test_a_file_that_is_no_credential(tmp_path: Path, content: bytes) -> None:
    write_secret(tmp_path / "c.json", content)
    with pytest.raises(SettingsError, match=r"c\.json is not a fabric credential"):
        Credential.load(tmp_path / "c.json")


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
