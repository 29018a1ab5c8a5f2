"""Root and signer of a state folder: every root that ever stood here still leads to the manifest, and old keys are gone."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from lacre.errors import Expired, InvalidSignature, SettingsError
from lacre.jose.jws import b64u, raw_public_key
from lacre.trust.chain import Trusted, verify
from lacre_fabric.keys.root_and_signer import MAX_CHANGES, SIGNER_LIFETIME, SIGNER_RENEWAL, Authority
from lacre_fabric.keys.secret_files import read_ed25519, read_secret
from lacre_fabric.operate.site import Site

NOW = time.time()
DAY = 86400.0


def published(site: Site, now: float = NOW) -> bytes:
    document = site.sign_manifest(now)
    site.published(now)
    return document


def seen_from(site: Site, root: bytes, now: float = NOW) -> Trusted:
    return verify(published(site, now), root, now)


def nowhere(folder: Path, key: Ed25519PrivateKey, pem: bytes) -> bool:
    """Whether no file holds the private key, raw or as it was written."""
    forms = (key.private_bytes_raw(), pem, b"".join(pem.splitlines()[1:-1]), b64u(key.private_bytes_raw()).encode())
    return not any(form in path.read_bytes() for path in folder.rglob("*") if path.is_file() for form in forms)


def test_three_roots_and_a_signer_later(site: Site) -> None:
    roots = [site.root]
    for _ in range(3):
        site.authority.rotate_root(NOW)
        roots.append(site.root)
        published(site)
    site.authority.rotate_signer(NOW)
    assert len(set(roots)) == 4
    for number, root in enumerate(roots):
        assert seen_from(site, root).roots == tuple(roots[number:])


@pytest.mark.parametrize("name", ["root", "signer"])
def test_the_key_that_was_replaced_is_destroyed(site: Site, tmp_path: Path, name: str) -> None:
    path = site.folder / f"{name}.pem"
    key, pem = read_ed25519(path), bytes(read_secret(path))
    assert not nowhere(site.folder, key, pem)
    still = tmp_path / "still"
    os.link(path, still)  # another name for the same bytes on disk
    (site.authority.rotate_root if name == "root" else site.authority.rotate_signer)(NOW)
    published(site)
    assert nowhere(site.folder, key, pem)
    assert still.read_bytes() == bytes(len(pem))
    assert raw_public_key(read_ed25519(path)) != raw_public_key(key)
    assert path.stat().st_mode & 0o077 == 0


def test_a_new_signer_signs_and_the_old_one_no_more(site: Site) -> None:
    before = published(site)
    site.authority.rotate_signer(NOW)
    after = published(site)
    mixed = after.replace(after[after.rindex(b'"manifest"') :], before[before.rindex(b'"manifest"') :])
    assert verify(after, site.root, NOW).steps[-1].statement.signer == site.authority.chain().signer
    with pytest.raises(InvalidSignature):
        verify(mixed, site.root, NOW)


def test_a_change_that_cannot_be_published_works_all_the_same(site: Site) -> None:
    first = site.root
    site.authority.rotate_root(NOW)
    site.authority.settle()
    site.authority.rotate_signer(NOW)
    site.authority.settle()
    assert seen_from(site, first).roots == (first, site.root)


def test_the_signer_is_named_again_before_its_time_is_over(site: Site) -> None:
    published(site)
    entries = site.authority.chain().entries
    assert seen_from(site, site.root, NOW + SIGNER_LIFETIME - SIGNER_RENEWAL - DAY)
    assert site.authority.chain().entries == entries
    seen = seen_from(site, site.root, NOW + SIGNER_LIFETIME - SIGNER_RENEWAL + DAY)
    assert site.authority.chain().entries[:-1] == entries  # what clients remember stays
    assert seen.steps[-1].statement.signer == seen.steps[0].statement.signer
    assert seen.steps[-1].statement.expires_at > NOW + SIGNER_LIFETIME


def test_a_chain_that_clients_would_not_take_is_not_made(site: Site) -> None:
    path = site.folder / "trust" / "chain.json"
    members = json.loads(path.read_text())
    path.write_text(json.dumps(members | {"chain": members["chain"] * MAX_CHANGES}))
    before = sorted(path.name for path in site.folder.iterdir())
    for change in (site.authority.rotate_root, site.authority.rotate_signer):
        with pytest.raises(SettingsError, match="new state folder"):
            change(NOW)
    assert sorted(path.name for path in site.folder.iterdir()) == before
    assert seen_from(site, site.root)


@pytest.fixture
def away(site: Site, tmp_path: Path) -> Path:
    """root.pem, kept elsewhere: it is needed for statements alone."""
    return (site.folder / "root.pem").rename(tmp_path / "root.pem")


@pytest.mark.usefixtures("away")
def test_without_the_root_manifests_are_signed_until_the_signers_time_is_over(site: Site) -> None:
    site.create()  # makes none in its place
    assert seen_from(site, site.root, NOW + SIGNER_LIFETIME - DAY)
    with pytest.raises(Expired, match="lacre signer rotate"):
        site.sign_manifest(NOW + SIGNER_LIFETIME + DAY)


@pytest.mark.parametrize("change", [Authority.rotate_root, Authority.rotate_signer])
def test_a_change_asks_for_the_root(site: Site, away: Path, change) -> None:
    before = site.authority.chain()
    with pytest.raises(SettingsError, match=r"root\.pem"):
        change(site.authority, NOW)
    assert site.authority.chain() == before
    away.rename(site.folder / "root.pem")
    change(site.authority, NOW)
    assert seen_from(site, before.roots[0])


@pytest.mark.usefixtures("away")
def test_another_root_in_its_place_is_not_taken(site: Site) -> None:
    other = Site(site.folder.parent / "other", site.pools)
    other.create()
    (other.folder / "root.pem").rename(site.folder / "root.pem")
    with pytest.raises(SettingsError, match="current root"):
        site.authority.rotate_signer(NOW)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"roots": ["?"], "signer": "", "until": 0, "chain": []}'])
def test_a_damaged_chain_is_no_new_beginning(site: Site, content: str) -> None:
    (site.folder / "trust" / "chain.json").write_text(content)
    site.create()
    with pytest.raises(SettingsError, match=r"chain\.json"):
        site.sign_manifest(NOW)


@pytest.mark.parametrize("change", ["signer", "root", "keys", pytest.param("receipts", marks=pytest.mark.slow)])
def test_a_crash_at_any_step_leaves_a_working_site(crashed: Callable[[str], int], change: str) -> None:
    assert crashed(change) > 10
