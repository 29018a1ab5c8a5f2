"""The audit log while it is written: what is in it, when it is there, and what a crash or a full disk leaves of it."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import io
import itertools
import json
import os
import random
import re
import resource
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from lacre.errors import SettingsError
from lacre.evidence import audit_proof
from lacre_gateway.audit import entries as kinds
from lacre_gateway.audit import journal
from lacre_gateway.audit import log as audit_log
from lacre_gateway.audit.check import verify
from lacre_gateway.audit.entries import Entry, EntryTooLarge, Event, encode, parse
from lacre_gateway.audit.log import AuditUnavailable
from lacre_gateway.audit.reader import LogReader
from parts.auditing import ORIGIN, PUBLIC, intent, opened, outcome, written

ALLOWED = {
    "kind", "request_id", "time", "subject", "tenant", "issuer", "jti", "address", "pool", "model", "action", "shape", "kem",
    "max_tokens", "sealed_bytes", "enc", "groups", "scopes", "plan", "decision", "policies", "policy_set", "entities",
    "reserved_prompt_tokens", "reserved_money", "lease", "limits", "money", "reserved_tokens",
    "annex", "outcome", "status", "unreceipted", "receipt", "refused_receipt",
    "prompt_tokens", "cached_tokens", "completion_tokens", "duration", "problem", "exceeded",
}  # fmt: skip


def entries(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(entry) for entry in LogReader(folder, PUBLIC).entries()]


def sound(folder: Path) -> bool:
    verdict = verify(folder, PUBLIC)
    return verdict.wrong is None


async def test_entry_is_proved_when_its_future_is_done(tmp_path: Path) -> None:
    log = opened(tmp_path / "audit")
    recorded = await log.append(intent(7))
    proof = recorded.proof()
    assert proof.verify(PUBLIC).origin == ORIGIN
    assert proof.members["request_id"] == f"{7:032x}" and proof.index == 1
    assert LogReader(tmp_path / "audit").entry(1) == proof.entry  # and it is there, while the log is open
    log.append(outcome(7))
    await log.close()
    assert [entry["kind"] for entry in entries(tmp_path / "audit")] == ["event", "intent", "outcome", "event"]
    assert sound(tmp_path / "audit")


def test_fields_are_the_allowed_ones() -> None:
    [first], [second] = encode(intent(0)), encode(outcome(0))
    assert set(json.loads(first)) | set(json.loads(second)) == ALLOWED


def test_the_document_lists_them_all() -> None:
    text = (Path(__file__).resolve().parents[2] / "docs/audit.md").read_text()
    listed: dict[str, list[str]] = {}
    for names, holders in re.findall(r"^\| ((?:`\w+`(?:, )?)+) \| ([a-z, ]+) \| .*\|$", text, re.MULTILINE):
        for kind in holders.split(", "):
            listed.setdefault(kind, []).extend(re.findall(r"`(\w+)`", names))
    held = {kind.kind: [field.name for field in dataclasses.fields(kind)] for kind in get_args(Entry)}
    assert {kind: sorted(names) for kind, names in listed.items()} == {kind: sorted(names) for kind, names in held.items()}


@pytest.mark.parametrize("requests", [0, 1, 127, 128, 300, 700])
async def test_every_entry_has_a_proof(requests: int, tmp_path: Path) -> None:
    """Across full and partial tiles, of one level and of two, from the disk."""
    await written(tmp_path / "audit", requests)
    reader = LogReader(tmp_path / "audit")
    assert reader.size == 2 * requests + 2
    for index in {0, 1, 255, 256, 257, 511, 512, reader.size // 2, reader.size - 1} & set(range(reader.size)):
        reader.proof(index).verify(PUBLIC)
    assert [entry["request_id"] for entry in entries(tmp_path / "audit") if entry["kind"] == "intent"] == [
        f"{number:032x}" for number in range(requests)
    ]
    assert sound(tmp_path / "audit")


async def test_many_waiters_share_a_commit(tmp_path: Path) -> None:
    log = opened(tmp_path / "audit")
    recorded = await asyncio.gather(*(log.append(intent(number)) for number in range(1000)))
    assert len({id(each.committed) for each in recorded}) < 30
    for each in recorded[::37]:
        each.proof().verify(PUBLIC)
    await log.close()


@pytest.mark.parametrize("under_way", [1, 100])
async def test_commits_keep_a_distance_where_there_is_company(under_way: int, tmp_path: Path) -> None:
    log = opened(tmp_path / "audit", under_way=under_way)
    ends = []
    for number in range(40):
        await log.append(intent(number))
        ends.append(time.monotonic())
    gaps = [later - earlier for earlier, later in itertools.pairwise(ends)]
    if under_way == 1:
        assert min(gaps) < audit_log.DISTANCE  # whoever is alone does not wait for it
    else:
        assert ends[-1] - ends[0] >= 38 * audit_log.DISTANCE
    await log.close()
    assert sound(tmp_path / "audit")


async def test_a_log_goes_on_after_a_restart(tmp_path: Path) -> None:
    for start in range(3):
        log = opened(tmp_path / "audit")
        first = await log.append(intent(start))
        log.append(outcome(start))
        await log.close()
    assert first.proof().verify(PUBLIC).size > 8
    assert [entry.get("event") for entry in entries(tmp_path / "audit")] == 3 * ["started", None, None, "stopped"]
    assert sound(tmp_path / "audit")


async def test_modes(tmp_path: Path) -> None:
    (tmp_path / "audit").mkdir(mode=0o755)
    old = os.umask(0)
    try:
        await written(tmp_path / "audit", 200)
    finally:
        os.umask(old)
    for path in [tmp_path / "audit", *(tmp_path / "audit").rglob("*")]:
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path


async def test_intents_without_an_outcome_are_interrupted_at_the_next_start(tmp_path: Path) -> None:
    log = opened(tmp_path / "audit")
    for number in range(5):
        await log.append(intent(number))
    log.append(outcome(3))
    await log.close()
    assert verify(tmp_path / "audit").under_way == 4
    await opened(tmp_path / "audit").close()
    ends = {entry["request_id"]: entry for entry in entries(tmp_path / "audit") if entry["kind"] == "outcome"}
    assert [ends[f"{number:032x}"]["outcome"] for number in range(5)] == [
        "answered" if number == 3 else "interrupted" for number in range(5)
    ]
    starts = [entry for entry in entries(tmp_path / "audit") if entry.get("event") == kinds.STARTED]
    assert [entry["count"] for entry in starts] == [0, 4]
    assert sound(tmp_path / "audit") and verify(tmp_path / "audit").under_way == 0


async def test_one_outcome_each(tmp_path: Path) -> None:
    log = opened(tmp_path / "audit")
    await log.append(intent(1))
    await log.append(outcome(1))
    for number in (1, 2):  # a second one, and one of nothing
        with pytest.raises(AuditUnavailable):
            await log.append(outcome(number))
    await log.close()
    assert sound(tmp_path / "audit")


async def test_long_lists_stand_in_an_annex(tmp_path: Path) -> None:
    groups = tuple(f"group-{number:04d}" for number in range(200))
    log = opened(tmp_path / "audit")
    proof = (await log.append(intent(1, groups=groups))).proof()
    log.append(outcome(1))
    await log.close()
    assert len(proof.header()) < audit_proof.MAX_HEADER and proof.members["groups"] == []
    annex, told = entries(tmp_path / "audit")[1:3]
    assert (annex["kind"], annex["groups"], told["annex"] is None) == ("annex", list(groups), False)
    assert sound(tmp_path / "audit")


async def test_names_of_any_script_and_no_end(tmp_path: Path) -> None:
    log = opened(tmp_path / "audit")
    proof = (await log.append(intent(1, subject="漢" * 256, model='m"}\n{"kind":"intent'))).proof()
    assert proof.members["subject"] == "漢" * 256
    with pytest.raises(EntryTooLarge):
        log.append(intent(2, subject="漢" * 2000))
    log.append(outcome(1))
    await log.close()
    assert sound(tmp_path / "audit")


@contextlib.contextmanager
def no_space(folder: Path, more: int = 300) -> Iterator[None]:
    """Files in `folder` grow by so much and no more. (Python ignores SIGXFSZ: the write is cut, then fails.)"""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, ((folder / journal.NAME).stat().st_size + more, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


async def torn_away(folder: Path, within: float = 5.0) -> bool:
    """Whether the log, valid at each look, is soon one without a part of an entry; a commit may be failing at this moment."""
    until = asyncio.get_running_loop().time() + within
    while (verdict := verify(folder, PUBLIC)).wrong is None and verdict.torn and asyncio.get_running_loop().time() < until:
        await asyncio.sleep(0.01)
    return verdict.wrong is None and verdict.torn == 0


async def test_disk_that_is_full(tmp_path: Path) -> None:
    """Intents are refused, the log stays valid, what is owed is kept, and service returns by itself."""
    folder, said = tmp_path / "audit", io.StringIO()
    log = opened(folder, said=said)
    await log.append(intent(1))
    with no_space(folder):
        with pytest.raises(AuditUnavailable):
            await log.append(intent(2))
        assert not log.writable
        owed = log.append(outcome(1))
        with pytest.raises(AuditUnavailable):
            await log.append(outcome(2))  # whose intent was refused
        assert await torn_away(folder)  # nothing of a failed commit stays
    await asyncio.wait_for(owed, 15)  # nobody asked again
    assert log.writable
    await log.append(intent(3))
    log.append(outcome(3))
    await log.close()
    found = entries(folder)
    assert [entry.get("request_id", entry.get("event"))[-1] for entry in found] == ["d", "1", "d", "1", "3", "3", "d"]
    assert found[2] == {**found[2], "event": "resumed", "count": 1}
    assert sound(folder)
    assert "audit log cannot be written" in said.getvalue() and "audit log written again" in said.getvalue()


def mounted(disk: Path) -> bool:
    command = ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(disk)]
    return subprocess.run(command, check=False, capture_output=True).returncode == 0


def unmounted(disk: Path) -> None:
    subprocess.run(["umount", "-l", str(disk)], check=True)


@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("mount") is None, reason="mounting a small disk takes root")
async def test_small_disk(tmp_path: Path) -> None:
    """A real file system of 400 KiB, filled by the log itself: valid at each moment, and it goes on when there is space."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if not mounted(disk):
        pytest.skip("this machine mounts no tmpfs")
    try:
        log = opened(disk / "audit")
        (disk / "ballast").write_bytes(bytes(150_000))
        acknowledged = refused = 0
        for number in range(2000):
            try:
                await log.append(intent(number))
                acknowledged = number + 1
            except AuditUnavailable:
                refused += 1
            log.append(outcome(number))
            if refused > 20:
                break
        assert refused > 20 and acknowledged > 100
        assert verify(disk / "audit", PUBLIC).wrong is None
        (disk / "ballast").unlink()
        async with asyncio.timeout(10):
            while not log.writable:
                await asyncio.sleep(0.05)
        proof = (await log.append(intent(5000))).proof()
        log.append(outcome(5000))
        await log.close()
        verdict = verify(disk / "audit", PUBLIC)
        assert verdict.wrong is None and verdict.under_way == 0
        assert LogReader(disk / "audit").entry(proof.index) == proof.entry
    finally:
        unmounted(disk)


async def test_after_close(tmp_path: Path) -> None:
    log = opened(tmp_path / "audit")
    await log.close()
    with pytest.raises(AuditUnavailable):
        await log.append(intent(1))


async def test_nobody_needs_to_wait(tmp_path: Path) -> None:
    """A waiter that was cancelled, and an outcome that nobody awaits, disturb nobody."""
    log = opened(tmp_path / "audit")
    log.append(intent(1)).cancel()
    log.append(outcome(1))
    await log.append(intent(2))
    await log.close()
    assert sound(tmp_path / "audit")


@pytest.mark.parametrize("name", ["missing/audit", "file"])
async def test_cannot_be_opened(name: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SettingsError, match=r"^audit: "):
        opened(tmp_path / name)


async def test_one_writer_at_a_time(tmp_path: Path) -> None:
    log = opened(tmp_path / "audit")
    with pytest.raises(SettingsError, match="another gateway writes"):
        opened(tmp_path / "audit")
    await log.close()


async def test_another_key_does_not_write_on(tmp_path: Path) -> None:
    await written(tmp_path / "audit", 3)
    with pytest.raises(SettingsError, match="has another key"):
        opened(tmp_path / "audit", Ed25519PrivateKey.generate())
    await opened(tmp_path / "audit").close()


async def test_a_log_that_does_not_hold_is_not_written_on(tmp_path: Path) -> None:
    await written(tmp_path / "audit", 3)
    (bundle,) = (tmp_path / "audit" / "tile" / "entries").rglob("[0-9]")
    bundle.write_bytes(bundle.read_bytes().replace(b"alice", b"mallo", 1))
    with pytest.raises(SettingsError, match="does not hold"):
        opened(tmp_path / "audit")


def crashed(folder: Path, into: Path) -> Path:
    """What a crash at this moment would leave: a copy, without the lock."""
    shutil.rmtree(into, ignore_errors=True)
    shutil.copytree(folder, into)
    return into


async def test_torn_commits(tmp_path: Path) -> None:
    """Cut anywhere, or with a hole in it, the last commit was never made; nothing before it is lost, and the log goes on."""
    folder = tmp_path / "audit"
    log = opened(folder)
    await log.append(intent(1))
    before = (folder / journal.NAME).stat().st_size
    await log.append(intent(2))
    data = (folder / journal.NAME).read_bytes()
    folder = crashed(folder, tmp_path / "then")
    tails = [data[:size] for size in {before + 1, before + 7, before + 8, before + 9, before + 300, len(data) - 1}]
    tails += [data[:before] + bytes(len(data) - before), data[: before + 8] + bytes(64) + data[before + 72 :]]
    for tail in tails:
        left = crashed(folder, tmp_path / "left")
        (left / journal.NAME).write_bytes(tail)
        verdict = verify(left, PUBLIC)
        assert verdict.wrong is None and verdict.torn == len(tail) - before and verdict.size == 2
        await opened(left).close()
        found = entries(left)
        assert (found[2]["event"], found[2]["count"]) == (kinds.RECOVERED, len(tail) - before)
        assert [entry.get("outcome") for entry in found][3] == "interrupted"
        assert sound(left)
    await log.close()


async def test_what_no_crash_leaves_is_not_cut_off(tmp_path: Path) -> None:
    """A commit that was changed, with others behind it or without: people have to look at it."""
    folder = tmp_path / "audit"
    log = opened(folder)
    for number in range(3):
        await log.append(intent(number))
    data = (folder / journal.NAME).read_bytes()
    folder = crashed(folder, tmp_path / "then")
    last = data.rindex(b"alice")
    for spoiled in (
        data.replace(b"alice", b"mallo", 1),
        data[:last] + b"mallo" + data[last + 5 :],
        b"\x00\xff" + data[2:],
        data[: len(data) // 2] + data[len(data) // 2 + 1 :],
    ):
        left = crashed(folder, tmp_path / "left")
        (left / journal.NAME).write_bytes(spoiled)
        assert verify(left, PUBLIC).wrong is not None
        with pytest.raises(SettingsError, match="does not hold"):
            opened(left)
    await log.close()


async def test_crashes_while_tiles_are_written(tmp_path: Path) -> None:
    """Whatever of a publication is on disk: the log holds, and goes on."""
    folder = tmp_path / "audit"
    log = opened(folder)
    for number in range(400):
        log.append(intent(number))
        log.append(outcome(number))
    await log.append(intent(1000))
    before = crashed(folder, tmp_path / "before")
    await asyncio.sleep(1.5)  # idle: the tiles are written
    after = crashed(folder, tmp_path / "after")
    await log.close()
    assert (after / "checkpoint").read_bytes() != (before / "checkpoint").read_bytes()
    names = sorted(path.relative_to(after) for path in after.rglob("*") if path.is_file() and path.name != "checkpoint")
    written_first = [name for name in names if name.parts[0] == "tile"]
    for count in (0, 1, len(written_first) // 2, len(written_first)):
        for checkpoint in (False, True) if count == len(written_first) else (False,):
            left = crashed(before, tmp_path / "left")
            for name in [*written_first[:count], *(["checkpoint", "checkpoints", "open"] if checkpoint else [])]:
                (left / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(after / name, left / name)
            assert sound(left), (count, checkpoint)
            await opened(left).close()
            assert sound(left) and verify(left).under_way == 0


WRITER = """
import asyncio, io, sys, pathlib
sys.path.insert(0, sys.argv[2])
from parts.auditing import intent, outcome, opened
async def main():
    log = opened(pathlib.Path(sys.argv[1]))
    base = int(sys.argv[3]) * 1_000_000
    async def one(lane):
        for number in range(base + lane * 10_000, base + (lane + 1) * 10_000):
            proof = (await log.append(intent(number))).proof()
            sys.stdout.write(f"{proof.index} {number}\\n"); sys.stdout.flush()
            log.append(outcome(number))
    await asyncio.gather(*map(one, range(16)))
asyncio.run(main())
"""


def killed(folder: Path, life: int, after: float) -> list[bytes]:
    """What a writer acknowledged until it was killed."""
    command = [sys.executable, "-c", WRITER, str(folder), str(Path(__file__).parent.parent), str(life)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        first = process.stdout.readline()
        time.sleep(after)
        process.send_signal(signal.SIGKILL)
        return [first, *(line for line in process.stdout.read().splitlines(keepends=True) if line.endswith(b"\n"))]


@pytest.mark.parametrize("lives", [4, pytest.param(20, marks=pytest.mark.slow)])
def test_kill_9(tmp_path: Path, lives: int) -> None:
    """So many times, at any moment: the log holds each time, and everything that was acknowledged is in it."""
    folder, chance = tmp_path / "audit", random.Random(lives)
    acknowledged: dict[int, int] = {}
    for life in range(lives):
        for line in killed(folder, life, chance.uniform(0, 0.25)):
            index, number = map(int, line.split())
            acknowledged[index] = number
        verdict = verify(folder, PUBLIC)
        assert verdict.wrong is None, verdict.words
        assert verdict.size > max(acknowledged)
    assert len(acknowledged) > 10 * lives
    found = entries(folder)
    for index, number in acknowledged.items():
        assert (found[index]["kind"], found[index]["request_id"]) == ("intent", f"{number:032x}")


async def test_a_reader_beside_the_writer(tmp_path: Path) -> None:
    """Verified again and again while it grows and its tiles are written: it never looks wrong."""
    folder = tmp_path / "audit"
    log, checks = opened(folder), 0
    for number in range(3000):
        log.append(intent(number))
        last = log.append(outcome(number))
        if number % 150 == 0:
            verdict = await asyncio.to_thread(verify, folder, PUBLIC)
            assert verdict.wrong is None, verdict.words
            checks += 1
    await last
    await log.close()
    assert checks == 20 and verify(folder, PUBLIC).requests == 3000


def test_no_other_entries() -> None:
    for data in (b"", b"[]", b"{}", b'{"kind":"event"}', b'{"kind":["event"]}', encode(outcome(1))[0][:-1] + b',"prompt":""}'):
        with pytest.raises(kinds.InvalidMessage):
            parse(data)
    assert parse(encode(Event(time=1.0, event="started"))[0])["event"] == "started"
