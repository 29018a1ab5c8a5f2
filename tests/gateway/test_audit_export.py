"""The log for other systems (jsonl, CEF, OCSF), proofs without the log, and what a running gateway keeps."""

from __future__ import annotations

import asyncio
import hashlib
import io
import json
import re
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from lacre._version import __version__ as lacre_version
from lacre.errors import SettingsError
from lacre.jose.jws import b64u
from lacre_fabric.logs import make_log
from lacre_gateway.audit import chain, series
from lacre_gateway.audit import entries as kinds
from lacre_gateway.audit.check import verify
from lacre_gateway.audit.entries import AdminIntent, Event, encode, parse
from lacre_gateway.audit.export import Exporter, Format
from lacre_gateway.audit.feed import Cursor, PlacedEntry, read
from lacre_gateway.audit.keeping import Keeper, LogTerms
from lacre_gateway.audit.log import AuditLog
from lacre_gateway.audit.reader import LogReader, Wrong
from parts.auditing import KEY, ORIGIN, PUBLIC, erased, intent, opened, outcome
from parts.commands import run_lacre
from parts.stage import POOL, Stage
from parts.waiting import until

HOSTILE = "al|ice=\\\n\r\u2028 CEF:0|x"
GROUPS = tuple(f"group-{number}" for number in range(200))  # too long for an intent: they go into an annex
ADMIN = AdminIntent(
    request_id="f" * 32, time=50.0, subject="root", tenant="acme", issuer="i", jti=None, address="2001:db8::7", gateway="g1",
    action="admin:usage", target="bob", groups=(), scopes=(), plan=None, decision="deny", policies=(), policy_set="00",
    entities="00",
)  # fmt: skip


async def two_logs(folder: Path) -> None:
    log = opened(folder)
    for number in range(10):
        log.append(intent(number))
        log.append(outcome(number))
    log.append(intent(20, groups=GROUPS, decision="deny", subject=HOSTILE))
    log.append(outcome(20, outcome="refused", status=403, problem="denied", receipt=None))
    await log.append(intent(21, address="2001:db8::1"))
    log.rotate()
    await until(lambda: log.origin == f"{ORIGIN}/2")
    log.append(outcome(21))
    log.append(ADMIN)
    await log.append(Event(time=60.0, event=kinds.REVOKED, actor="acme/root", target="ab"))
    await log.close()


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export") / "audit"
    asyncio.run(two_logs(folder))
    return folder


@pytest.fixture
def logs(pristine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "audit"))


def exported(root: Path, form: Format, since: float | None = None, until: float | None = None) -> list[str]:
    exporter = Exporter(form, since, until)
    return [line for entry in read(root, PUBLIC) if entry is not None for line in exporter.lines(entry)]


def test_json_lines_hold_every_entry(pristine: Path) -> None:
    lines = [json.loads(line) for line in exported(pristine, "jsonl")]
    found = [(line.pop("log"), line.pop("index"), line) for line in lines]
    due = [
        (reader.checkpoint.origin, index, parse(data))
        for reader in chain.readers(pristine, PUBLIC)
        for index, data in enumerate(reader.entries())
    ]
    assert found == due and {origin for origin, _, _ in due} == {ORIGIN, f"{ORIGIN}/2"}


def test_since_and_until(pristine: Path) -> None:
    times = [json.loads(line).get("time") for line in exported(pristine, "jsonl", 3.0, 23.0)]
    assert times and all(moment is None or 3.0 <= moment < 23.0 for moment in times)
    assert times.count(None) == 1  # the annex of the intent at 21.5


def cef(line: str) -> tuple[list[str], dict[str, str]]:
    """A reader of CEF, written from its specification."""
    parts = re.split(r"(?<!\\)(?:\\\\)*\|", line, maxsplit=7)
    *head, tail = parts
    found = re.findall(r"(\w+)=((?:\\.|[^=\\])*?)(?= \w+=|$)", tail)
    plain = {key: re.sub(r"\\(.)", lambda m: {"n": "\n"}.get(m[1], m[1]), value) for key, value in found}
    return head, plain


def test_cef(pristine: Path) -> None:
    lines = exported(pristine, "cef")
    assert all(len(line.splitlines()) == 1 and line.startswith("CEF:0|Lacre|Gateway|") for line in lines)
    read = [cef(line) for line in lines]
    denied = next(pairs for head, pairs in read if head[5] == "Request denied")
    assert denied["suser"] == "al|ice=\\\n\n\n CEF:0|x"  # the one line break that CEF has
    assert denied["cs6"].split(",") == list(GROUPS) and denied["rt"] == "21500" and denied["src"] == "192.0.2.1"
    assert next(head[6] for head, _ in read if head[5] == "Request denied") == "5"
    late = next(pairs for head, pairs in read if head[4] == "outcome" and pairs["externalId"] == f"{21:032x}")
    assert (late["suser"], late["c6a2"], late["c6a2Label"]) == ("alice", "2001:db8::1", "Source IPv6 Address")
    assert "src" not in late and late["deviceExternalId"] == f"{ORIGIN}/2"
    assert [head[4] for head, _ in read if head[4] not in ("intent", "outcome")] == [
        "started", "rotated", "link", "admin", "revoked", "stopped",
    ]  # fmt: skip


def test_cef_of_an_odd_name() -> None:
    """No event has such a name today."""
    entry = PlacedEntry(ORIGIN, 0, encode(Event(time=1.0, event="a|b\\c\nd"))[0])
    (line,) = Exporter("cef").lines(entry)
    assert line.startswith(f"CEF:0|Lacre|Gateway|{lacre_version}|a\\|b\\\\c d|Gateway event a\\|b\\\\c d|1|rt=1000 ")


def test_ocsf(pristine: Path) -> None:
    events: list[dict[str, Any]] = [json.loads(line) for line in exported(pristine, "ocsf")]
    for event in events:
        required = {"activity_id", "category_uid", "class_uid", "metadata", "severity_id", "time", "type_uid"}
        own = {6002: {"app"}, 6003: {"actor", "api", "src_endpoint"}}[event["class_uid"]]
        assert required | own <= event.keys()
        assert event["type_uid"] == event["class_uid"] * 100 + event["activity_id"] and event["category_uid"] == 6
        assert event["metadata"]["version"] == "1.8.0" and event["metadata"]["product"]["name"]
        assert event["activity_id"] in (3, 4, 8) or event["activity_name"]
    denied = next(event for event in events if event["message"] == "Request denied")
    assert denied["actor"]["user"]["uid"] == HOSTILE and denied["status_id"] == 2 and denied["time"] == 21500
    assert [group["name"] for group in denied["actor"]["user"]["groups"]] == list(GROUPS)
    late = next(event for event in events if event["metadata"].get("correlation_uid") == f"{21:032x}" and "duration" in event)
    assert late["src_endpoint"] == {"ip": "2001:db8::1"} and late["actor"]["user"]["uid"] == "alice"
    assert late["metadata"]["log_name"] == f"{ORIGIN}/2" and late["duration"] == 1000
    assert late["unmapped"]["completion_tokens"] == 2
    revoked = next(event for event in events if event.get("activity_name") == "revoked")
    assert revoked["unmapped"] == {"kind": "event", "event": "revoked", "actor": "acme/root", "target": "ab"}


def lacre(*args: str | Path) -> subprocess.CompletedProcess[str]:
    return run_lacre("audit", *args)


def test_a_cursor_goes_on_where_it_was(logs: Path, tmp_path: Path) -> None:
    whole, cursor = lacre("export", logs, "--format", "cef").stdout, tmp_path / "cursor"
    Cursor(ORIGIN, 25).save(cursor)
    rest = lacre("export", logs, "--format", "cef", "--cursor", cursor)
    assert rest.stdout and whole.endswith(rest.stdout) and len(rest.stdout.splitlines()) < len(whole.splitlines())
    again = lacre("export", logs, "--format", "cef", "--cursor", cursor)
    assert (again.returncode, again.stdout) == (0, "")
    cursor.write_bytes(b'{"origin": "g')
    assert "is not the cursor of an export" in lacre("export", logs, "--cursor", cursor).stderr
    Cursor(ORIGIN, 9999).save(cursor)
    assert "rolled back" in lacre("export", logs, "--cursor", cursor).stderr
    Cursor("else/where", 1).save(cursor)
    assert "remove the cursor" in lacre("export", logs, "--cursor", cursor).stderr
    skipping = lacre("export", logs, "--until", "2026-01-01", "--cursor", cursor)
    assert skipping.returncode != 0 and "would skip later entries" in skipping.stderr
    assert "pass jsonl, cef or ocsf" in lacre("export", logs, "--format", "xml").stderr


def test_following_goes_over_a_rotation(tmp_path: Path) -> None:
    folder = tmp_path / "audit"

    async def follow() -> list[tuple[str, int]]:
        log, seen = opened(folder), []
        reading = read(folder, PUBLIC, follow=True)

        def some() -> None:
            while (entry := next(reading)) is not None:
                seen.append((entry.origin, entry.index))

        await asyncio.to_thread(some)
        await log.append(intent(1))
        log.rotate()
        await until(lambda: log.origin != ORIGIN)
        await log.append(outcome(1))
        await asyncio.to_thread(some)
        await log.close()
        return seen

    assert asyncio.run(follow()) == [(ORIGIN, 0), (ORIGIN, 1), (ORIGIN, 2), (f"{ORIGIN}/2", 0), (f"{ORIGIN}/2", 1)]


def test_check_proof_without_the_log(logs: Path, tmp_path: Path) -> None:
    proof = tmp_path / "proof"
    proof.write_text(lacre("prove", logs, "--request", f"{3:032x}").stdout)  # in the older log
    shutil.rmtree(logs)
    said = lacre("check-proof", proof, "--key", b64u(PUBLIC), "--json")
    found = json.loads(said.stdout)
    assert (found["ok"], found["log"], found["entry"]["subject"]) == (True, ORIGIN, "alice")
    assert lacre("check-proof", proof, "--key", b64u(bytes(32))).returncode == 5
    text = proof.read_text()
    for bad in (text[: len(text) // 2], text.replace("index ", "index 1"), "", "c2sp.org/tlog-proof@v1\n"):
        proof.write_text(bad)
        said = lacre("check-proof", proof, "--key", b64u(PUBLIC))
        assert said.returncode != 0 and said.stdout == "" and "Traceback" not in said.stderr
    assert said.returncode == 6 and "Name the output of `lacre audit prove`" in said.stderr
    proof.write_bytes(b"\xff\xfe\x00")
    assert lacre("check-proof", proof, "--key", b64u(PUBLIC)).returncode != 0
    assert "--key" in lacre("check-proof", proof, "--key", "short").stderr


@pytest.mark.parametrize(
    ("option", "said"), [("kind", "intent, annex"), ("decision", "allow, deny"), ("outcome", "answered, refused")]
)
def test_a_search_for_what_no_log_has(logs: Path, option: str, said: str) -> None:
    """Nothing found is an answer. A misspelt word is none."""
    found = lacre("query", logs, f"--{option}", "denied")
    assert found.returncode == 1 and f"no entry has the {option} 'denied': known are {said}" in found.stderr
    assert lacre("query", logs, "--kind", "annex").returncode == 0


def test_commands_know_all_logs(logs: Path, tmp_path: Path) -> None:
    assert "2 linked logs" in lacre("verify", logs).stdout
    sql = "SELECT log, count(*) AS n FROM entries WHERE kind = 'outcome' GROUP BY log ORDER BY log"
    found = [json.loads(line) for line in lacre("query", logs, "--sql", sql).stdout.splitlines()]
    assert found == [{"log": ORIGIN, "n": 11}, {"log": f"{ORIGIN}/2", "n": 1}]
    assert json.loads(lacre("tail", logs, "-n", "1").stdout)["event"] == "stopped"
    proof = tmp_path / "proof"
    proof.write_text(lacre("prove", logs, "--index", "0", "--origin", ORIGIN).stdout)
    assert lacre("check-receipt", proof, logs).returncode == 0
    erased(logs, 1)
    assert "retention erased the log" in lacre("check-receipt", proof, logs).stderr


async def test_newer_manifests_and_their_keys_are_events(stage: Stage) -> None:
    await stage.publish(stage.document(2))  # the same keys
    await stage.publish(stage.document(3, pools=stage.pools(stage.keys.pool)))
    last = stage.document(4, pools={}, gateway_key=bytes(range(32)))
    await stage.publish(last)
    due = [
        ("manifest", 2), ("manifest", 3), (f"pool/{POOL}", 3), ("manifest", 4), ("gateway", 4), (f"pool/{POOL}", 4),
        (f"receipts/{POOL}", 4),
    ]  # fmt: skip
    told: list[dict[str, Any]] = []

    def recorded() -> list[tuple[str, int]]:
        told[:] = [entry for entry in stage.entries("event") if entry["event"] in ("manifest", "keys-rotated")]
        return [(entry["event"] if entry["event"] == "manifest" else entry["target"], entry["count"]) for entry in told]

    await until(lambda: recorded() == due, why=recorded)
    assert told[3]["target"] == hashlib.sha256(last).hexdigest()


# what a running gateway keeps


def keeper(root: Path, audit: AuditLog, keeping: LogTerms, now: float) -> Keeper:
    return Keeper(root, audit, keeping, log=make_log(io.StringIO()), clock=lambda: now)


def test_rotation_by_command(tmp_path: Path) -> None:
    folder = tmp_path / "audit"

    async def asked() -> subprocess.CompletedProcess[str]:
        log = opened(folder)
        kept = asyncio.create_task(keeper(folder, log, LogTerms(), time.time()).run())
        said = await asyncio.to_thread(lacre, "rotate", folder)
        await until(lambda: not (folder / series.ASKED).exists())
        kept.cancel()
        await log.close()
        return said

    said = asyncio.run(asked())
    assert (said.returncode, said.stdout) == (0, f"the log continues in {folder / 'log-2'}\n")
    assert verify(folder, PUBLIC).logs == 2
    assert lacre("rotate", tmp_path).returncode == 1  # no log


@pytest.mark.parametrize("keeping", [LogTerms(rotate_days=2), LogTerms(rotate_entries=3)])
def test_rotation_by_age_and_size(tmp_path: Path, keeping: LogTerms) -> None:
    folder = tmp_path / "audit"

    async def kept() -> list[str]:
        log, origins = opened(folder), []
        now = time.time() + 86400
        for later in (0, 2 * 86400):
            await keeper(folder, log, keeping, now + later).look(seldom=True)
            origins.append(log.origin)
            await log.append(intent(later))
            await log.append(outcome(later))
        await log.close()
        return origins

    assert asyncio.run(kept()) == [ORIGIN, f"{ORIGIN}/2"]


def test_retention(logs: Path) -> None:
    """A clock that is far ahead erases nothing, until an earlier process has recorded such a time."""
    future = time.time() + 400 * 86400

    async def kept() -> None:
        log = AuditLog(logs, KEY, ORIGIN, log=make_log(io.StringIO()), clock=lambda: future)
        keeping = keeper(logs, log, LogTerms(keep_days=30), future)
        await keeping.look(seldom=True)
        await keeping.look(seldom=True)  # once more changes nothing
        await log.close()

    asyncio.run(kept())
    assert not (logs / series.PROOF).exists()
    asyncio.run(kept())
    result = verify(logs, PUBLIC)
    assert (result.wrong, result.logs, result.erased) == (None, 2, 1)
    told = [entry for entry in map(parse, LogReader(logs / "log-2", PUBLIC).entries()) if entry.get("event") == "erased"]
    assert [(entry["target"], entry["count"]) for entry in told] == [(ORIGIN, 26)]


def test_a_cursor_of_an_erased_log(logs: Path) -> None:
    series.erase(logs, PUBLIC)
    with pytest.raises(SettingsError, match="erased before its entries from 3 on"):
        next(read(logs, PUBLIC, Cursor(ORIGIN, 3)))
    assert next(entry.origin for entry in read(logs, PUBLIC) if entry is not None) == f"{ORIGIN}/2"
    with pytest.raises(Wrong):
        next(read(logs, PUBLIC, Cursor(f"{ORIGIN}/2", 99)))
