"""The steps of replacing the gateways' key and receipt keys: each may be repeated, and bad files change nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from lacre.errors import SettingsError
from lacre.jose.jws import raw_public_key
from lacre_backend.keyring import KeyRing
from lacre_fabric.keys.grant_keys import GrantKeys
from lacre_fabric.keys.pool_keys import public_receipt_key, receipt_file
from lacre_fabric.keys.secret_files import ed25519_pem, read_ed25519s, write_ed25519, write_secret
from lacre_fabric.operate.site import Site

NOW = 1_800_000_000.0
FIRST, OTHER = (Ed25519PrivateKey.from_private_bytes(bytes([number]) * 32) for number in (1, 2))
POOL = "a"


@pytest.fixture
def keys(tmp_path: Path) -> GrantKeys:
    found = GrantKeys(tmp_path)
    write_ed25519(found.file, FIRST)
    return found


def test_the_life_of_a_replacement(keys: GrantKeys) -> None:
    first = raw_public_key(FIRST)
    assert keys.public() == (first,)
    new = keys.stage()
    assert keys.stage() == new == keys.staged
    assert keys.public() == (first, new)  # workers accept it, and gateways do not use it
    for _ in range(2):
        keys.switch(NOW, 10)
        assert keys.public() == (new, first)
        assert (keys.staged, keys.leaving, keys.unpublished) == (None, NOW + 10, True)
    keys.settle(NOW + 11)
    assert keys.public() == (new, first), "until a manifest names the new key, the old one is the only one in use"
    for now in (NOW + 20, NOW + 25):
        keys.published(now)
        assert (keys.leaving, keys.unpublished) == (NOW + 30, False)
    assert raw_public_key(read_ed25519s(keys.file)[0]) == new
    keys.settle(NOW + 29)
    assert keys.public() == (new, first) and not keys.due(NOW + 29)
    assert keys.due(NOW + 30)
    for _ in range(2):
        keys.settle(NOW + 30)
        assert (keys.public(), keys.leaving) == ((new,), None)


def test_a_crash_between_the_files(keys: GrantKeys) -> None:
    new = keys.stage()
    both = keys.file.read_bytes()
    keys.switch(NOW, 0)
    keys.published(NOW)
    write_secret(keys.file, both)  # the file still has the old order
    assert keys.public()[0] == new
    state = (keys.file.parent / "grant_keys.json").read_bytes()
    keys.settle(NOW)
    write_secret(keys.file.parent / "grant_keys.json", state)  # the file with one key was written, and this one not removed
    assert keys.public() == (new,)
    keys.settle(NOW)
    assert (keys.public(), keys.leaving) == ((new,), None)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"in_use": "AA", "leave_at": 1}', b'{"leave_at": 1}'])
def test_a_damaged_state_is_named(keys: GrantKeys, content: bytes) -> None:
    keys.stage()
    keys.switch(NOW, 0)
    write_secret(keys.file.parent / "grant_keys.json", content)
    for call in (keys.public, lambda: keys.settle(NOW)):
        with pytest.raises(SettingsError, match=r"grant_keys\.json is damaged"):
            call()


@pytest.mark.parametrize("end", [b"", b"\n", b"\n\n# a comment\n"])
def test_a_file_of_several_keys(tmp_path: Path, end: bytes) -> None:
    write_secret(tmp_path / "keys.pem", b"# first\n" + ed25519_pem(FIRST) + ed25519_pem(OTHER).rstrip() + end)
    assert list(map(raw_public_key, read_ed25519s(tmp_path / "keys.pem"))) == list(map(raw_public_key, (FIRST, OTHER)))


def _cut(content: bytes) -> bytes:
    return content[: len(content) * 3 // 4]


@pytest.mark.parametrize("spoil", [_cut, lambda _: b"", lambda content: content.replace(b"MC4C", b"XXXX")])
def test_a_file_that_cannot_be_used(tmp_path: Path, spoil: Callable[[bytes], bytes]) -> None:
    """A half-written second key is a fault: else a gateway would take the file for one without it."""
    path = tmp_path / "keys.pem"
    write_secret(path, spoil(ed25519_pem(FIRST) + ed25519_pem(OTHER)))
    with pytest.raises(SettingsError, match=r"keys\.pem"):
        read_ed25519s(path)


def test_a_copy_that_was_cut_anywhere(tmp_path: Path) -> None:
    """Only a cut between two keys leaves a file that can be used: it has the first key."""
    first, both, path = ed25519_pem(FIRST), ed25519_pem(FIRST) + ed25519_pem(OTHER), tmp_path / "keys.pem"
    for size in range(len(both)):
        write_secret(path, both[:size])
        if size in (len(first) - 1, len(first)) or size == len(both) - 1:
            assert raw_public_key(read_ed25519s(path)[0]) == raw_public_key(FIRST)
        else:
            with pytest.raises(SettingsError, match=r"keys\.pem"):
                read_ed25519s(path)


@pytest.fixture
def site(tmp_path: Path) -> Site:
    made = Site(tmp_path / "state", {POOL: ("m",)})
    made.create()
    return made


def test_a_receipt_key_belongs_to_the_keys_that_came_with_it(site: Site) -> None:
    folder, own = site.keys_folder(POOL), site.receipt_keys(POOL)
    first = own.of(None)
    before = site.generations(POOL)
    with site.keeping(POOL) as kept:
        own.prepare(before.current.ids if before.current else (), None, kept, anew=True)
    ring = KeyRing(folder)
    announced = [name for name in ring.fingerprints() if "+" in name]
    assert len(announced) == len(ring.keys) == len(ring.receipt_keys) == 2
    assert {raw_public_key(key) for key in ring.receipt_keys.values()} == {own.of(before.current)} != {first}
    own.settle(before, NOW)
    assert public_receipt_key(site.receipt_file(POOL)) == own.of(before.current)
    assert [one.key for one in own.past()] == [first]
    own.settle(before, NOW)
    assert [one.key for one in own.past()] == [first]
    ring.close()


def test_a_worker_takes_up_a_receipt_key_with_its_key_or_not_at_all(site: Site) -> None:
    folder = site.keys_folder(POOL)
    ring = KeyRing(folder)
    write_secret(receipt_file(folder, 1), b"-----BEGIN PRIVATE KEY-----\n")
    assert not ring.reload()
    assert (len(ring.keys), ring.receipt_keys) == (2, {})  # what it had stays
    write_ed25519(receipt_file(folder, 1), OTHER)
    assert ring.reload()
    assert {number: raw_public_key(key) for number, key in ring.receipt_keys.items()} == {1: raw_public_key(OTHER)}
    receipt_file(folder, 1).chmod(0o644)
    assert not ring.reload()
    assert set(ring.receipt_keys) == {1}
    ring.close()


def test_first_keys_that_an_interrupted_run_left_are_completed(site: Site) -> None:
    """A disk that was full after the first key: without the second one, older clients could not seal."""
    before = site.generations(POOL).live[0].configs
    (site.folder / "pools" / POOL / "generations.json").unlink()
    (site.keys_folder(POOL) / "2.key").unlink()
    for _ in range(2):
        site.create()
        one, two = site.generations(POOL).live[0].configs
        assert (one, two.key_id, two.kem) == (before[0], 2, before[1].kem)
        assert {number: key.config for number, key in KeyRing(site.keys_folder(POOL)).keys.items()} == {1: one, 2: two}
