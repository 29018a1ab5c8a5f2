"""Someone who can write to the gateway's disk, without its keys, against the gateway and those who audit it."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import pytest

from hostile.attacks import Verdict, attack
from lacre.errors import SettingsError
from lacre_fabric.logs import make_log
from lacre_gateway.audit import entries as kinds
from lacre_gateway.audit import feed
from lacre_gateway.audit.entries import encode, parse
from lacre_gateway.audit.keeping import Keeper, LogTerms
from lacre_gateway.audit.log import AuditLog
from lacre_gateway.audit.reader import LogReader, Wrong
from lacre_gateway.audit.store import Store
from parts import disk_writer
from parts.auditing import KEY, ORIGIN, PUBLIC, erased, intent, opened, outcome
from parts.disk_writer import DAY, NOW, bent_bundle, event, linked, publish

KEPT_FOR = 30  # days; the logs of these tests ended a day ago


async def looked_after(root: Path, *changes: object) -> None:
    """A gateway runs, and looks after its old logs; each change of the disk comes before one look. Raises Wrong."""
    log = AuditLog(root, KEY, ORIGIN, log=make_log(io.StringIO()), clock=lambda: NOW + DAY)
    keeper = Keeper(root, log, LogTerms(keep_days=KEPT_FOR), log=make_log(io.StringIO()), clock=lambda: NOW + DAY)
    try:
        for change in changes:
            if callable(change):
                change(root)
            await keeper.look(seldom=True)
    finally:
        await log.close()


@attack("put another log in the place of an old one, so that the gateway signs its early erasure", "disk",
        "the gateway believes of an old log only what the first entry of the next one holds", Wrong)  # fmt: skip
async def test_another_old_log(tmp_path: Path, verdict: Verdict) -> None:
    """The thief's own log names the gateway's key as the next one."""
    with verdict.refused():
        await looked_after(linked(tmp_path / "audit"), disk_writer.another_old_log)


@attack("bring an old log back to an earlier state, so that the gateway signs its early erasure", "disk",
        "an old log ends with the checkpoint that the next one holds, also while the gateway runs", Wrong)  # fmt: skip
async def test_earlier_state(tmp_path: Path, verdict: Verdict) -> None:
    with verdict.refused():
        await looked_after(linked(tmp_path / "audit"), None, disk_writer.an_earlier_state)


@attack("mark an old log as erased, so that the gateway erases it early", "disk",
        "the gateway finishes only an erasure that is due", Wrong)  # fmt: skip
async def test_marked(tmp_path: Path, verdict: Verdict) -> None:
    with verdict.refused():
        await looked_after(linked(tmp_path / "audit"), disk_writer.marked_as_erased)


@attack("change an entry of a full bundle, but not the hashes over it", "disk",
        "every command compares each entry with the signed tree", Wrong)  # fmt: skip
async def test_full_bundle(tmp_path: Path, verdict: Verdict) -> None:
    root = linked(tmp_path / "audit", *encode(intent(1)), fill=256)
    bent_bundle(root, 0, lambda entries: [entry.replace(b"alice", b"mallo") for entry in entries])
    with verdict.refused():
        list(feed.entries(root, PUBLIC))


@attack("change the last entry of a log, so that the gateway ends the log", "disk",
        "the gateway compares the entry with the signed tree before it believes that its log has ended",
        SettingsError)  # fmt: skip
async def test_last_entry(tmp_path: Path, verdict: Verdict) -> None:
    root = tmp_path / "audit"
    store = Store(root, KEY, ORIGIN)
    publish(store, *[event(kinds.RELOADED)] * 256)
    store.close()
    bent_bundle(root, 0, lambda entries: [*entries[:-1], event(kinds.ROTATED, target=f"{ORIGIN}/2")])
    with verdict.refused():
        Store(root, KEY, ORIGIN).close()


@attack("copy a log to where the next one belongs, so that a gateway that starts signs two trees of one origin", "disk",
        "a linked log begins with a link, and has the origin that follows from it", SettingsError)  # fmt: skip
async def test_copied_log(tmp_path: Path, verdict: Verdict) -> None:
    root = linked(tmp_path / "audit", logs=1)
    disk_writer.copied_log(root)
    with verdict.refused():
        Store(root, KEY, ORIGIN).close()


@attack("copy a log to where the next one belongs, while the gateway runs", "disk",
        "the gateway ends its log only if nothing is in the way of the next one",
        gain="no rotation until the copy is removed; the gateway's log names it")  # fmt: skip
async def test_in_the_way(tmp_path: Path) -> None:
    root = linked(tmp_path / "audit", logs=1)
    store = Store(root, KEY, ORIGIN)
    disk_writer.copied_log(root)
    with pytest.raises(FileExistsError):
        store.rotate(NOW, ())
    assert not store.ended and store.origin == ORIGIN
    store.close()


@attack("make the gateway close requests that never were, so that its log no longer holds", "disk",
        "the gateway signs its list of open requests, and otherwise reads them from the log",
        gain="nothing: the gateway ignores the list")  # fmt: skip
async def test_open_requests(tmp_path: Path) -> None:
    root = tmp_path / "audit"
    log = opened(root)
    await log.append(intent(1))
    await log.close()
    state = json.loads((root / "open").read_bytes())
    (root / "open").write_text(json.dumps({**state, "open": ["e" * 32]}))
    await opened(root).close()
    ends = [entry["request_id"] for entry in map(parse, LogReader(root, PUBLIC).entries()) if entry["kind"] == "outcome"]
    assert ends == [f"{1:032x}"]


@attack("continue an erased log with a key of one's own", "disk",
        "after an erased log, another key counts only if a later log of the known key links it", Wrong)  # fmt: skip
async def test_own_key(tmp_path: Path, verdict: Verdict) -> None:
    root = linked(tmp_path / "audit")
    erased(root, 1)
    disk_writer.continued_by_a_thief(root)
    with verdict.refused():
        list(feed.entries(root, PUBLIC))


@attack("hide the newest log from an export", "disk", "the last entry of a log names the one that continues it", Wrong)
async def test_newest_log(tmp_path: Path, verdict: Verdict) -> None:
    root = linked(tmp_path / "audit")
    shutil.rmtree(root / "log-2")
    with verdict.refused():
        list(feed.read(root, PUBLIC))


@attack("hide the oldest logs from an export", "disk",
        "an export refuses a log that continues one which is not here, unless it is asked for that log alone",
        SettingsError)  # fmt: skip
async def test_oldest_log(tmp_path: Path, verdict: Verdict) -> None:
    root = linked(tmp_path / "audit")
    shutil.copytree(root / "log-2", tmp_path / "moved")
    with verdict.refused():
        list(feed.read(tmp_path / "moved", PUBLIC))


@attack("hide a log that was erased without a record behind one that was erased rightly", "disk",
        "an erased log holds the link to the log before", Wrong)  # fmt: skip
async def test_before_an_erased_log(tmp_path: Path, verdict: Verdict) -> None:
    """The thief tells another story in the place of the first log."""
    root = linked(tmp_path / "audit", *encode(intent(1)), *encode(outcome(1)), logs=3)
    erased(root, 1)
    erased(root, 2)
    disk_writer.another_old_log(root)
    with verdict.refused():
        list(feed.entries(root, PUBLIC))
