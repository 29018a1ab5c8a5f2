"""Secrets on disk, and which keys of a pool the manifest lists, which are due to go, and which key ids are free."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lacre.errors import SettingsError
from lacre.trust.chain import MAX_FUTURE
from lacre.wire.header import Aead, Kdf, Kem, KeyConfig
from lacre_fabric.keys.generations import KEY_IDS, MAX_DRAIN, Generations
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


# Generations of a pool's keys.


NOW = 1_800_000_000.0
DAY = 86400.0


def config(key_id: int, mark: int = 0) -> KeyConfig:
    return KeyConfig(key_id, Kem.X25519, mark.to_bytes(32, "big"), ((Kdf.HKDF_SHA256, Aead.AES_256_GCM),))


def rotated(generations: Generations, *ids: int, now: float, grace: float = 100.0) -> Generations:
    return generations.stage([config(key_id, int(now)) for key_id in ids]).list_staged(now, grace).published(now)


def listed(generations: Generations, now: float) -> list[tuple[int, float]]:
    return [(key.config.key_id, key.not_after) for key in generations.pool_keys(now, now + 7 * DAY)]


def test_the_new_generation_is_listed_first_and_a_staged_key_not_at_all() -> None:
    generations = rotated(rotated(Generations(), 1, 2, now=NOW - DAY), 3, 4, now=NOW).stage([config(5)])
    assert listed(generations, NOW) == [(3, NOW + 7 * DAY), (4, NOW + 7 * DAY), (1, NOW + 100), (2, NOW + 100)]
    assert generations.staged is not None
    assert generations.current is not None
    assert (generations.staged.ids, generations.current.ids) == ((5,), (3, 4))
    only = rotated(Generations(), 1, now=NOW).stage([config(2)])
    assert not only.published(NOW + 1).retirement_due(NOW + DAY)


def test_the_old_one_leaves_and_is_destroyed_after_the_queue_has_emptied() -> None:
    generations = rotated(rotated(Generations(), 1, now=NOW - DAY), 2, now=NOW)
    assert not generations.retirement_due(NOW + 99)
    assert generations.leaving(NOW + 100)
    assert generations.to_destroy(NOW + DAY) == ()  # not while the fabric may still have a manifest with it
    generations = generations.published(NOW + 100)
    assert listed(generations, NOW + 100) == [(2, NOW + 100 + 7 * DAY)]
    assert not generations.retirement_due(NOW + 100 + MAX_DRAIN - 1)
    (gone,) = generations.to_destroy(NOW + 100 + MAX_DRAIN)
    assert gone.ids == (1,)
    after = generations.destroyed(gone, NOW + 200, DAY)
    assert [one.ids for one in after.live] == [(2,)]
    assert not after.retirement_due(NOW + 10 * DAY)


@pytest.mark.parametrize(("grace", "drain"), [(0.0, 0.0), (3.0, 3.0), (1000.0, MAX_DRAIN)])
def test_who_wants_it_gone_soon_does_not_wait_for_the_queue(grace: float, drain: float) -> None:
    generations = rotated(rotated(Generations(), 1, now=NOW - DAY), 2, now=NOW, grace=grace).published(NOW + grace)
    assert bool(generations.to_destroy(NOW + grace + drain))
    assert drain == 0 or not generations.to_destroy(NOW + grace + drain - 1)


def test_another_rotation_shortens_a_grace_and_never_lengthens_it() -> None:
    generations = rotated(rotated(Generations(), 1, now=NOW - DAY), 2, now=NOW, grace=100)
    assert listed(rotated(generations, 3, now=NOW + 50, grace=1000), NOW + 50)[-1] == (1, NOW + 100)
    assert listed(rotated(generations, 3, now=NOW + 50, grace=10), NOW + 50)[-1] == (1, NOW + 60)


def test_a_key_id_is_free_again_when_no_manifest_with_it_can_be_in_use() -> None:
    generations = rotated(rotated(Generations(), 254, now=NOW - DAY), 255, now=NOW, grace=0)
    (gone,) = generations.to_destroy(NOW)
    generations = generations.destroyed(gone, NOW, DAY)
    free_at = NOW + DAY + MAX_FUTURE
    assert generations.free_ids(3, NOW) == (1, 2, 3)
    assert len(generations.free_ids(253, NOW)) == 253
    assert 254 in generations.free_ids(254, free_at)
    with pytest.raises(SettingsError, match="wait"):
        generations.free_ids(254, free_at - 1)


@settings(max_examples=25, deadline=None)
@given(st.floats(0, 1500), st.floats(0, 3600))
def test_no_manifest_in_use_names_an_id_with_another_key(wait: float, grace: float) -> None:
    """Far more rotations than there are ids: whoever holds a manifest seals to the key that the id stands for now."""
    generations, now = rotated(Generations(), 1, 2, now=NOW), NOW
    promised: dict[int, tuple[KeyConfig, float]] = {}  # by key id: what a manifest said, and when the last one expires
    for _ in range(300):
        now += wait
        try:
            ids = generations.free_ids(2, now)
        except SettingsError:
            continue
        assert set(ids) <= set(KEY_IDS)
        generations = rotated(generations, *ids, now=now, grace=grace)
        for key in generations.pool_keys(now, now):
            said, until = promised.get(key.config.key_id, (key.config, 0.0))
            assert said == key.config or until <= now
            promised[key.config.key_id] = (key.config, now + DAY)
        for gone in generations.to_destroy(now):
            generations = generations.destroyed(gone, now, DAY)
    assert Generations.parse(generations.encode()) == generations


@pytest.mark.parametrize(
    "data",
    [b"", b"{", b"[]", b"null", b'{"live": [], "spent": {}}', b'{"live": [{}], "spent": {}, "last_id": 1}',
     b'{"live": [], "spent": [], "last_id": 1}', b'{"live": [{"configs": ["AA"]}], "spent": {}, "last_id": 1}'],
)  # fmt: skip
def test_what_was_not_written_here(data: bytes) -> None:
    with pytest.raises(ValueError, match="generations"):
        Generations.parse(data)
