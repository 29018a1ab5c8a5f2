"""The gateway's key changes between two linked logs: the old log names the new key, and any key of them verifies all."""

from __future__ import annotations

import asyncio
import io
import json
import shutil
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from lacre.errors import SettingsError
from lacre.evidence import checkpoints
from lacre.jose.jws import b64u, raw_public_key
from lacre_fabric.logs import make_log
from lacre_gateway.audit import chain, feed, series
from lacre_gateway.audit import entries as kinds
from lacre_gateway.audit.check import verify
from lacre_gateway.audit.entries import Event, LogLink, encode, parse
from lacre_gateway.audit.log import AuditLog
from lacre_gateway.audit.reader import LogReader, Wrong
from lacre_gateway.audit.store import Store
from parts.auditing import KEY, ORIGIN, PUBLIC, intent, outcome
from parts.waiting import until

NEW = Ed25519PrivateKey.from_private_bytes(b"n" * 32)
THIEF = Ed25519PrivateKey.from_private_bytes(b"t" * 32)
NEW_PUBLIC = raw_public_key(NEW)
STRANGER = raw_public_key(Ed25519PrivateKey.from_private_bytes(b"s" * 32))


def opened(folder: Path, key: Ed25519PrivateKey, *others: Ed25519PrivateKey) -> AuditLog:
    return AuditLog(folder, key, ORIGIN, others=others, log=make_log(io.StringIO()))


async def replaced(folder: Path) -> None:
    """A request is open while the key changes."""
    log = opened(folder, KEY, NEW)
    await log.append(intent(1))
    log.rotate(key=NEW)
    log.rotate()  # somebody else asks too: the new key is not forgotten
    await until(lambda: log.public == NEW_PUBLIC)
    await log.append(outcome(1))
    recorded = await log.append(intent(2))
    assert recorded.proof().verify(NEW_PUBLIC).origin == f"{ORIGIN}/2"
    await log.append(outcome(2))
    await log.close()


@pytest.fixture
def logs(tmp_path: Path) -> Path:
    asyncio.run(replaced(tmp_path / "audit"))
    return tmp_path / "audit"


@pytest.mark.parametrize("key", [None, PUBLIC, NEW_PUBLIC])
def test_each_key_verifies_all_of_it(logs: Path, key: bytes | None) -> None:
    kept = [(logs / "checkpoint").read_bytes(), (logs / "log-2/checkpoint").read_bytes()]
    result = verify(logs, key, kept)
    assert (result.wrong, result.logs, result.requests, result.anchor) == (None, 2, 2, f"{ORIGIN}/2")
    assert len([entry for entry in feed.read(logs, key) if entry is not None]) == sum(
        reader.size for reader in chain.readers(logs, key)
    )


def test_a_strange_key_verifies_nothing(logs: Path) -> None:
    assert verify(logs, STRANGER).wrong is not None


def test_the_old_log_names_the_new_key(logs: Path) -> None:
    reader = LogReader(logs)
    assert parse(reader.entry(reader.size - 1))["reason"] == b64u(NEW_PUBLIC)


@pytest.mark.parametrize("own", [PUBLIC, NEW_PUBLIC])
def test_a_key_that_the_log_before_does_not_name(tmp_path: Path, own: bytes) -> None:
    """Whoever holds another key cannot continue the log, and whoever holds the old one cannot change what was linked."""
    log = tmp_path / "audit"
    store = Store(log, KEY, ORIGIN)
    store.commit(encode(Event(time=1.0, event=kinds.STARTED, count=0)))
    store.commit(encode(Event(time=2.0, event=kinds.ROTATED, target=f"{ORIGIN}/2")))
    store.published(store.publication(()).write())
    store.close()
    note = (log / "checkpoint").read_text()
    series.begin(log / "log-2", f"{ORIGIN}/2", NEW, LogLink(time=2.0, checkpoint=note, open=0), b"{}")
    wrong = verify(log, own).wrong
    assert wrong is not None and "does not name it" in str(wrong)
    with pytest.raises(Wrong, match=r"log-2/key: .* does not name it"):
        list(feed.read(log, own))
    with pytest.raises(Wrong, match="does not name it"):
        list(feed.entries(log, own))


def continued_by_a_thief(log: Path) -> None:
    """Whoever writes to the disk, without any key of the gateway, replaces what follows an erased log."""
    end = (log / "checkpoint").read_text()
    origin = LogReader(log / "log-2").checkpoint.origin
    shutil.rmtree(log / "log-2")
    series.begin(log / "log-2", origin, THIEF, LogLink(time=2.0, checkpoint=end, open=0), b"{}")
    store = Store(log, THIEF, ORIGIN)
    store.commit(encode(Event(time=3.0, event=kinds.ERASED, target=ORIGIN, count=checkpoints.parse(end.encode()).size)))
    store.published(store.publication(()).write())
    store.close()


def test_a_strange_key_after_an_erased_log(logs: Path) -> None:
    series.erase(logs, PUBLIC)
    continued_by_a_thief(logs)
    wrong = verify(logs, PUBLIC).wrong
    assert wrong is not None and wrong.place == "log-2/key"
    with pytest.raises(Wrong, match=r"log-2/key"):
        list(feed.read(logs, PUBLIC))
    assert verify(logs, NEW_PUBLIC).wrong is not None


def test_a_key_that_an_erased_log_named(tmp_path: Path) -> None:
    """With the newest key all of it verifies. The oldest one leads nowhere any more."""
    asyncio.run(replaced(tmp_path / "audit"))
    log = tmp_path / "audit"
    store = Store(log, NEW, ORIGIN)
    store.commit(encode(Event(time=3.0, event=kinds.ERASED, target=ORIGIN, count=LogReader(log).size)))
    store.published(store.publication(()).write())
    store.close()
    series.erase(log, PUBLIC)
    assert verify(log, NEW_PUBLIC).wrong is None and verify(log).wrong is None
    assert len([entry for entry in feed.read(log, NEW_PUBLIC) if entry is not None]) == LogReader(log / "log-2").size
    wrong = verify(log, PUBLIC).wrong
    assert wrong is not None and wrong.place == "log-2/key"


def test_a_crash_before_the_next_log(logs: Path) -> None:
    """The next start makes it, with the key that the old log names; without that key it refuses."""
    shutil.rmtree(logs / "log-2")
    with pytest.raises(SettingsError, match="signing_key lacks the key"):
        Store(logs, KEY, ORIGIN)

    async def started() -> None:
        await opened(logs, KEY, NEW).close()

    asyncio.run(started())
    result = verify(logs, NEW_PUBLIC)
    assert (result.wrong, result.logs, series.key_of(logs, 2, None)) == (None, 2, NEW_PUBLIC)


def test_a_gateway_with_both_keys_goes_on_with_the_newest_log(logs: Path) -> None:
    async def started() -> None:
        for keys in ((KEY, NEW), (NEW,)):
            log = opened(logs, *keys)
            assert log.public == NEW_PUBLIC
            await log.close()

    asyncio.run(started())
    assert verify(logs).wrong is None
    assert json.loads((logs / "log-2/open").read_text())["open"] == []
