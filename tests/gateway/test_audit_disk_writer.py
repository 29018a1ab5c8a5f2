"""Someone who can write to the gateway's disk, and holds no key: what neither the gateway nor an auditor's command believes.

Each attack here once succeeded.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from lacre.errors import LacreError, SettingsError
from lacre.jose.jws import b64u
from lacre_fabric.logs import make_log
from lacre_gateway.audit import entries as kinds
from lacre_gateway.audit import feed, series, tiles
from lacre_gateway.audit.check import verify
from lacre_gateway.audit.commands import audit_app
from lacre_gateway.audit.entries import LogLink, encode, parse
from lacre_gateway.audit.feed import Cursor
from lacre_gateway.audit.keeping import Keeper, LogTerms
from lacre_gateway.audit.log import AuditLog
from lacre_gateway.audit.reader import LogReader, Wrong
from lacre_gateway.audit.store import Store
from parts.auditing import KEY, ORIGIN, PUBLIC, erased, intent, opened, outcome
from parts.disk_writer import (
    DAY,
    NOW,
    THIEF,
    THIEF_PUBLIC,
    an_earlier_last_entry,
    an_earlier_state,
    another_old_log,
    bent_bundle,
    copied_log,
    event,
    forged,
    linked,
    marked_as_erased,
    publish,
)
from parts.waiting import until


def origins(root: Path, key: bytes | None = PUBLIC) -> list[str]:
    return [entry.origin for entry in feed.read(root, key) if entry is not None]


@dataclass(frozen=True, slots=True)
class Said:
    returncode: int
    stdout: str
    stderr: str


def lacre(*args: str | Path) -> Said:
    """`lacre audit`, in this process."""
    ran = CliRunner().invoke(audit_app, list(map(str, args)))
    error = ran.exception if isinstance(ran.exception, LacreError) else None
    assert error is not None or isinstance(ran.exception, SystemExit | None), ran.exception
    return Said(ran.exit_code, ran.stdout, ran.stderr + str(error or ""))


# the gateway must not sign what the disk says


async def kept_in_order(root: Path, days: int) -> None:
    """A running gateway, as its settings ask for."""
    said = io.StringIO()
    log = AuditLog(root, KEY, ORIGIN, log=make_log(said), clock=lambda: NOW + DAY)
    keeper = Keeper(root, log, LogTerms(keep_days=days), log=make_log(said), clock=lambda: NOW + DAY)
    try:
        await keeper.look(seldom=True)
    finally:
        await log.close()


def records_of_erasure(root: Path) -> list[str]:
    newest = series.place(root, series.newest(root))
    return [entry["target"] for entry in map(parse, LogReader(newest, PUBLIC).entries()) if entry.get("event") == kinds.ERASED]


@pytest.mark.parametrize("attack", [another_old_log, an_earlier_state, an_earlier_last_entry, marked_as_erased])
def test_no_early_erasure_is_signed(tmp_path: Path, attack: Callable[[Path], None]) -> None:
    """The log is a day old, and is kept for 30. The disk says that its last entry is older."""
    root = linked(tmp_path / "audit", fill=256)
    attack(root)
    with pytest.raises(Wrong):
        asyncio.run(kept_in_order(root, 30))
    assert records_of_erasure(root) == [] and (root / "tile").exists()


def test_a_true_erasure_is_signed(tmp_path: Path) -> None:
    root = linked(tmp_path / "audit", fill=256, logs=3)
    asyncio.run(kept_in_order(root, 0))
    assert records_of_erasure(root) == [ORIGIN, f"{ORIGIN}/2"] and verify(root, PUBLIC).wrong is None
    asyncio.run(kept_in_order(root, 0))  # and only once
    assert records_of_erasure(root) == [ORIGIN, f"{ORIGIN}/2"]


def test_a_log_that_did_not_end_is_not_continued(tmp_path: Path) -> None:
    """All entries are in a full bundle. A changed last one would make the gateway begin another log, out of the blue."""
    root = tmp_path / "audit"
    store = Store(root, KEY, ORIGIN)
    publish(store, *[event(kinds.RELOADED)] * 256)
    store.close()
    bent_bundle(root, 0, lambda entries: [*entries[:-1], event(kinds.ROTATED, target=f"{ORIGIN}/2")])
    with pytest.raises(SettingsError, match=r"does not hold.*tile/entries/000, entry 255"):
        Store(root, KEY, ORIGIN)


def strange_log(root: Path) -> None:
    series.begin(root / "log-2", f"{ORIGIN}/2", THIEF, LogLink(time=1.0, checkpoint="x", open=0), b"{}")


def empty_log(root: Path) -> None:
    (root / "log-2").mkdir()


@pytest.mark.parametrize("planted", [copied_log, strange_log, empty_log])
def test_a_folder_planted_where_the_next_log_belongs(tmp_path: Path, planted: Callable[[Path], None]) -> None:
    """With a copy of the old log, the gateway would sign two trees of one origin."""
    root, said = linked(tmp_path / "audit", logs=1), io.StringIO()

    async def rotates() -> None:
        log = opened(root, said=said)
        planted(root)
        log.rotate()
        await until(lambda: "cannot be rotated" in said.getvalue())
        assert "log-2 is in the way" in said.getvalue()
        await log.append(intent(1))  # and it serves
        await log.append(outcome(1))
        shutil.rmtree(root / "log-2")
        await until(lambda: log.origin == f"{ORIGIN}/2")
        await log.close()

    asyncio.run(rotates())
    result = verify(root, PUBLIC)
    assert (result.wrong, result.logs, result.requests) == (None, 2, 1)


def test_a_copy_of_the_log_is_not_taken_for_the_next_one(tmp_path: Path) -> None:
    root = linked(tmp_path / "audit", logs=1)
    copied_log(root)
    with pytest.raises(SettingsError, match=r"log-2.*no link"):
        opened(root)


def nothing_open(state: dict[str, Any]) -> None:
    state["open"] = []


def invented(state: dict[str, Any]) -> None:
    state["open"] = ["e" * 32]


def no_seal(state: dict[str, Any]) -> None:
    invented(state)
    state.pop("signature", None)


@pytest.mark.parametrize("change", [nothing_open, invented, no_seal])
def test_the_list_of_open_requests(tmp_path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """The gateway would close requests that never were, or forget one: then its own log would not hold any more."""
    root = tmp_path / "audit"

    async def cut_off() -> None:
        log = opened(root)
        await log.append(intent(1))
        await log.append(outcome(1))
        await log.append(intent(2))
        await log.close()

    async def restarted() -> None:
        await opened(root).close()

    asyncio.run(cut_off())
    state = json.loads((root / "open").read_bytes())
    assert state["open"] == [f"{2:032x}"]
    change(state)
    (root / "open").write_text(json.dumps(state))
    asyncio.run(restarted())
    ends = [entry for entry in map(parse, LogReader(root, PUBLIC).entries()) if entry["kind"] == "outcome"]
    assert [(entry["request_id"], entry["outcome"]) for entry in ends] == [
        (f"{1:032x}", "answered"), (f"{2:032x}", "interrupted"),
    ]  # fmt: skip
    assert verify(root, PUBLIC).wrong is None


@pytest.mark.parametrize("name", [".checkpoint.new", ".open.new", "journal", "checkpoints", ".reserve.new", ".journal.new"])
def test_no_link_leads_the_gateway_elsewhere(tmp_path: Path, name: str) -> None:
    root, elsewhere = linked(tmp_path / "audit", logs=1), tmp_path / "key.pem"
    (root / name).unlink(missing_ok=True)
    elsewhere.write_bytes(b"secret")
    (root / name).symlink_to(elsewhere)

    async def lives() -> None:
        log = opened(root)
        await log.append(intent(1))
        await Keeper(root, log, LogTerms(), log=make_log(io.StringIO())).look(seldom=True)
        await log.close()

    with contextlib.suppress(LacreError, OSError):
        asyncio.run(lives())
    assert elsewhere.read_bytes() == b"secret"


@pytest.mark.parametrize("name", ["checkpoint", "journal", "key", "checkpoints", "erased", "tile/0/000.p/3"])
def test_nobody_waits_for_a_pipe(tmp_path: Path, name: str) -> None:
    root = linked(tmp_path / "audit")
    erased(root, 1)
    path = root / "log-2" / name
    path.unlink(missing_ok=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    os.mkfifo(path)
    with contextlib.suppress(SettingsError):
        assert verify(root, PUBLIC).wrong is not None
    if name != "checkpoints":  # only `verify` reads it
        with pytest.raises(LacreError):
            list(feed.entries(root, PUBLIC))


# what an auditor's commands believe


def test_a_changed_full_bundle_is_not_searched(tmp_path: Path) -> None:
    root = linked(tmp_path / "audit", *encode(intent(1)), *encode(outcome(1)), fill=256)
    bent_bundle(root, 0, lambda entries: [entry.replace(b"alice", b"mallo") for entry in entries])
    for args in (["query"], ["prove", "--request", f"{1:032x}"], ["prove", "--index", "1", "--origin", ORIGIN]):
        said = lacre(args[0], root, *args[1:])
        assert said.returncode != 0 and said.stdout == "" and "tile/entries/000" in said.stderr
    with pytest.raises(Wrong):
        LogReader(root, PUBLIC).entry(1)


def test_a_changed_tile_gives_no_proof(tmp_path: Path) -> None:
    root = linked(tmp_path / "audit", fill=600)
    tile = root / tiles.tile(0, 1)
    tile.write_bytes(bytes(32) + tile.read_bytes()[32:])
    with pytest.raises(Wrong, match="tile/0/001"):
        LogReader(root, PUBLIC).proof(257)


def test_a_key_that_only_a_changed_entry_names(tmp_path: Path) -> None:
    root = linked(tmp_path / "audit", fill=256)
    note = (root / "checkpoint").read_text()
    shutil.rmtree(root / "log-2")
    series.begin(root / "log-2", f"{ORIGIN}/2", THIEF, LogLink(time=2.0, checkpoint=note, open=0), b"{}")
    end = event(kinds.ROTATED, target=f"{ORIGIN}/2", reason=b64u(THIEF_PUBLIC))
    bent_bundle(root, 0, lambda entries: [*entries[:-1], end])
    said = lacre("query", root, "--key", b64u(PUBLIC))
    assert (said.returncode != 0, said.stdout) == (True, "") and "tile/entries/000" in said.stderr


def iter_origins(root: Path) -> list[str]:
    """Those that an export has printed before it fails, too."""
    seen: list[str] = []
    try:
        for entry in feed.read(root, PUBLIC):
            if entry is not None:
                seen.append(entry.origin)
    except LacreError:
        assert f"{ORIGIN}/2" not in seen, "a line of the thief was printed"
        raise
    return seen


def test_a_key_file_alone_vouches_for_nothing(tmp_path: Path) -> None:
    """After an erased log: a later folder whose key file holds the gateway's key, and nothing else of it."""
    root = linked(tmp_path / "audit")
    erased(root, 1)
    last = (root / "checkpoint").read_text()
    size = int(last.splitlines()[1])
    shutil.rmtree(root / "log-2")
    series.begin(root / "log-2", f"{ORIGIN}/2", THIEF, LogLink(time=2.0, checkpoint=last, open=0), b"{}")
    store = Store(root, THIEF, ORIGIN)
    publish(store, event(kinds.ERASED, target=ORIGIN, count=size), event(kinds.ROTATED, target=f"{ORIGIN}/3"))
    store.close()
    note = (root / "log-2/checkpoint").read_text()
    series.begin(root / "log-3", f"{ORIGIN}/3", THIEF, LogLink(time=2.0, checkpoint=note, open=0), b"{}")
    (root / "log-3/key").write_bytes((root / "key").read_bytes())
    with pytest.raises(LacreError):
        iter_origins(root)
    assert verify(root, PUBLIC).wrong is not None


def test_another_log_before_an_erased_one(tmp_path: Path) -> None:
    """Two logs were erased rightly. The thief tells another story in the place of the first."""
    root = linked(tmp_path / "audit", logs=3)
    erased(root, 1)
    erased(root, 2)
    assert set(origins(root)) == {f"{ORIGIN}/3"}
    forged(root, ORIGIN, event(kinds.STARTED, count=0), event(kinds.ROTATED, target=f"{ORIGIN}/2", reason=b64u(PUBLIC)))
    with pytest.raises(Wrong, match="log-2/entry 0: it is no link"):
        origins(root)


def test_an_old_log_of_the_thief_that_names_the_key(tmp_path: Path) -> None:
    """The first log is the thief's own, and its last entry names the gateway's key as the next one."""
    root = linked(tmp_path / "audit")
    named = b64u(PUBLIC)
    forged(root, ORIGIN, *encode(intent(666)), event(kinds.ROTATED, target=f"{ORIGIN}/2", reason=named))
    said = lacre("query", root, "--key", b64u(PUBLIC))
    assert (said.returncode != 0, said.stdout) == (True, "")
    said = lacre("export", root, "--key", b64u(PUBLIC))
    assert (said.returncode != 0, said.stdout) == (True, "")


def test_a_caller_from_a_changed_intent_before_the_cursor(tmp_path: Path) -> None:
    root = linked(tmp_path / "audit", *encode(intent(1)), fill=256)
    store = Store(root, KEY, ORIGIN)
    publish(store, *encode(outcome(1)))
    store.close()
    cursor = tmp_path / "cursor"
    Cursor(ORIGIN, 256).save(cursor)
    bent_bundle(root, 0, lambda entries: [entry.replace(b"alice", b"mallo") for entry in entries])
    said = lacre("export", root, "--format", "cef", "--cursor", cursor, "--key", b64u(PUBLIC))
    assert said.returncode != 0 and "mallo" not in said.stdout and "tile/entries/000" in said.stderr


def test_an_export_without_the_newest_log(tmp_path: Path) -> None:
    root = linked(tmp_path / "audit", logs=3)
    shutil.rmtree(root / "log-3")
    said = lacre("export", root)
    assert said.returncode != 0 and "log-3: it is missing" in said.stderr


def test_a_linked_log_alone_says_so(tmp_path: Path) -> None:
    root = linked(tmp_path / "audit")
    moved = Path(shutil.copytree(root / "log-2", tmp_path / "moved"))
    kept = (moved / "checkpoint").read_bytes()
    for notes in ((), (kept,)):
        result = verify(moved, PUBLIC, notes)
        assert result.wrong is None and f"continues the log {ORIGIN}, which is not here" in result.words
    assert json.loads(lacre("verify", moved, "--json").stdout)["continues"] == ORIGIN
    assert json.loads(lacre("verify", root, "--json").stdout)["continues"] is None
    refused = lacre("export", moved)
    assert (refused.returncode != 0, refused.stdout) == (True, "") and "--alone" in refused.stderr
    assert len(lacre("export", moved, "--alone").stdout.splitlines()) == 2


def test_a_claimed_erasure_excuses_no_lost_log(tmp_path: Path) -> None:
    """A client's proof of a log that is gone: only a recorded erasure explains it."""
    root, kept = linked(tmp_path / "audit"), tmp_path / "kept"
    kept.write_text(LogReader(root, PUBLIC).proof(0).text())
    series.erase(root, PUBLIC)
    said = lacre("check-receipt", kept, root)
    assert said.returncode != 0 and "no later log has recorded that" in said.stderr and "retention" not in said.stderr


CONTROLS = "a\x1b[31m\x7f\x9b31m\u202e\u2028z"


@pytest.mark.parametrize("command", ["tail", "query", "export", "export --format ocsf", "export --format cef"])
def test_no_name_controls_a_terminal(tmp_path: Path, command: str) -> None:
    root = tmp_path / "audit"
    store = Store(root, KEY, ORIGIN)
    publish(store, *encode(intent(1, subject=CONTROLS)), *encode(intent(2, subject="Zoë")))
    store.close()
    said = lacre(*command.split(), root)
    assert said.returncode == 0 and not set(CONTROLS[1:-1]) & set(said.stdout) - set("[31m")
    assert "Zoë" in said.stdout and len(said.stdout.splitlines()) == 2
    if not command.endswith("cef"):
        assert any(CONTROLS in texts_in(json.loads(line)) for line in said.stdout.splitlines())


def texts_in(value: Any) -> list[str]:
    """All texts in a JSON value."""
    if isinstance(value, dict):
        return [text for each in value.values() for text in texts_in(each)]
    return [text for each in value for text in texts_in(each)] if isinstance(value, list) else [value]


def test_a_file_name_controls_no_terminal(tmp_path: Path) -> None:
    root = linked(tmp_path / "audit")
    (root / "tile/\x1b]0;all is well\x07").write_bytes(b"")
    said = lacre("verify", root)
    assert said.returncode == 1 and "no such file belongs to a log" in said.stdout and "\x1b" not in said.stdout


# what is true, and must not be taken for an attack


def test_an_erasure_whose_record_was_erased_too(tmp_path: Path) -> None:
    """After twice the time of retention, the records of the oldest erasures are gone with the logs that held them."""
    root = linked(tmp_path / "audit")
    erased(root, 1)  # recorded in the second log
    store = Store(root, KEY, ORIGIN)
    store.rotate(NOW, ())
    store.close()
    erased(root, 2)
    assert verify(root, PUBLIC).wrong is None
    assert set(origins(root)) == {f"{ORIGIN}/3"}
