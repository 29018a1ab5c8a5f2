"""The manifest that a process works by: the newest that verifies, whatever the fabric has."""

from __future__ import annotations

import asyncio
import fcntl
import os
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from lacre.errors import Expired, InvalidMessage, LacreError, Rollback, UntrustedRoot, UsageError
from lacre.jose.jws import raw_public_key
from lacre.trust.manifest import Document, Manifest, RootStatement
from lacre.trust.manifest_store import VersionFile
from lacre.trust.signing import sign_manifest, sign_statement
from lacre_fabric.nats.manifest_feed import ManifestFeed
from lacre_fabric.work.contract import FabricUnavailable
from parts.waiting import until

ROOT, SIGNER = Ed25519PrivateKey.generate(), Ed25519PrivateKey.generate()
NOW = time.time()
STATEMENT = sign_statement(RootStatement(raw_public_key(SIGNER), NOW + 7200), ROOT)


def document(version: int, *, lives: float = 3600.0, signer: Ed25519PrivateKey = SIGNER) -> bytes:
    manifest = Manifest("test", version, NOW - 10, NOW + lives, raw_public_key(SIGNER), {})
    return Document((STATEMENT,), sign_manifest(manifest, signer)).encode()


class Bucket:
    """What is published, or what is wrong with the fabric."""

    def __init__(self) -> None:
        self.holds: bytes | LacreError | None = None
        self.now = NOW

    async def fetch(self) -> bytes | None:
        if isinstance(self.holds, LacreError):
            raise self.holds
        return self.holds


@pytest.fixture
def bucket() -> Bucket:
    return Bucket()


@pytest.fixture
async def feed(bucket: Bucket) -> AsyncIterator[ManifestFeed]:
    feed = ManifestFeed(bucket.fetch, raw_public_key(ROOT), clock=lambda: bucket.now, poll=0.01)
    yield feed
    await feed.close()


async def test_nothing_published_yet(feed: ManifestFeed) -> None:
    await feed.refresh()
    assert not feed.ready
    for read in (lambda: feed.manifest, lambda: feed.document):
        with pytest.raises(UsageError, match="lacre manifest publish"):
            read()


async def test_a_newer_one_is_taken_and_an_older_one_changes_nothing(bucket: Bucket, feed: ManifestFeed) -> None:
    for version, newest in ((1, 1), (2, 2), (5, 5), (3, 5)):
        bucket.holds = document(version)
        await feed.refresh()
        assert feed.ready
        assert feed.manifest.version == newest
        assert (feed.document == bucket.holds) == (version == newest)


@pytest.mark.parametrize(
    ("holds", "error"),
    [
        (FabricUnavailable("NATS did not answer"), FabricUnavailable),
        (b"junk", InvalidMessage),
        (document(9, signer=ROOT), LacreError),
        (document(9, lives=-1), Expired),
        (Document((sign_statement(RootStatement(raw_public_key(SIGNER), NOW + 60), SIGNER),), "x").encode(), UntrustedRoot),
        (document(3, lives=1800), Rollback),
    ],
    ids=["no fabric", "junk", "not by the signer", "expired", "not by the root", "another of the same version"],
)
async def test_a_failure_keeps_what_was_there(
    bucket: Bucket, feed: ManifestFeed, holds: bytes | LacreError, error: type[LacreError]
) -> None:
    bucket.holds = kept = document(3)
    await feed.refresh()
    bucket.holds = holds
    with pytest.raises(error):
        await feed.refresh()
    assert feed.ready
    assert feed.document == kept


async def test_an_expired_one_is_not_ready_and_no_older_one_comes_back(bucket: Bucket, feed: ManifestFeed) -> None:
    bucket.holds = document(3, lives=60)
    await feed.refresh()
    assert feed.ready
    bucket.now += 60
    assert not feed.ready
    bucket.holds = document(2)
    with pytest.raises(Rollback):
        await feed.refresh()
    assert not feed.ready


async def test_it_follows_the_fabric(bucket: Bucket, feed: ManifestFeed) -> None:
    bucket.holds = FabricUnavailable("not yet")
    await feed.start()
    await feed.start()  # a second connection starts it again: one poll goes on
    assert not feed.ready
    bucket.holds = document(1)
    await until(lambda: feed.ready)
    bucket.holds = b"junk"
    await asyncio.sleep(0.05)
    assert feed.manifest.version == 1
    bucket.holds = document(2)
    await until(lambda: feed.manifest.version == 2)
    await feed.close()
    bucket.holds = document(3)
    await asyncio.sleep(0.05)
    assert feed.manifest.version == 2, "closed is closed"


async def test_a_memory_that_others_hold_does_not_hold_the_loop(bucket: Bucket, tmp_path: Path) -> None:
    """The one that holds the file's lock lets go of it on this very loop: it could not, if the loop waited for it."""
    bucket.holds = document(1)
    feed = ManifestFeed(bucket.fetch, raw_public_key(ROOT), memory=VersionFile(tmp_path), clock=lambda: bucket.now)
    holder = os.open(tmp_path / "seen.lock", os.O_RDWR | os.O_CREAT, 0o600)
    fcntl.flock(holder, fcntl.LOCK_EX)
    async with asyncio.TaskGroup() as group:
        group.create_task(feed.refresh())
        await asyncio.sleep(0.05)
        assert not feed.ready
        os.close(holder)
    assert feed.manifest.version == 1
