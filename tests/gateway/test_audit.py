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
from collections.abc import AsyncIterator, Iterator
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
from lacre_gateway.audit.entries import Entry, EntryTooLarge, Event, encode, parse, parse_known
from lacre_gateway.audit.log import AuditLog, AuditUnavailable
from lacre_gateway.audit.reader import LogReader
from parts.auditing import ORIGIN, PUBLIC, intent, opened, outcome, written
from parts.small_disk import NO_DISK, small_disk
from parts.stage import until


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "audit"


@contextlib.asynccontextmanager
async def writing(folder: Path, **how: Any) -> AsyncIterator[AuditLog]:
    """A log that holds when it is closed."""
    log = opened(folder, **how)
    yield log
    await log.close()
    assert sound(folder)


def entries(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(entry) for entry in LogReader(folder, PUBLIC).entries()]


def sound(folder: Path) -> bool:
    return verify(folder, PUBLIC).wrong is None


async def test_entry_is_proved_when_its_future_is_done(folder: Path) -> None:
    async with writing(folder) as log:
        proof = (await log.append(intent(7))).proof()
        assert proof.verify(PUBLIC).origin == ORIGIN
        assert proof.members["request_id"] == f"{7:032x}" and proof.index == 1
        assert LogReader(folder).entry(1) == proof.entry  # and it is there, while the log is open
        log.append(outcome(7))
    assert [entry["kind"] for entry in entries(folder)] == ["event", "intent", "outcome", "event"]


def test_the_fields_are_those_of_the_document() -> None:
    text = (Path(__file__).resolve().parents[2] / "docs/audit.md").read_text()
    listed: dict[str, list[str]] = {}
    for names, holders in re.findall(r"^\| ((?:`\w+`(?:, )?)+) \| ([a-z, ]+) \| .*\|$", text, re.MULTILINE):
        for kind in holders.split(", "):
            listed.setdefault(kind, []).extend(re.findall(r"`(\w+)`", names))
    held = {kind.kind: sorted(field.name for field in dataclasses.fields(kind)) for kind in get_args(Entry)}
    assert {kind: sorted(names) for kind, names in listed.items()} == held
    for entry in (intent(0, affinity=True), outcome(0)):
        assert set(json.loads(encode(entry)[0])) == {"kind", *held[entry.kind]}
    assert set(json.loads(encode(intent(0))[0])) == {"kind", *held["intent"]} - {"affinity"}


@pytest.mark.parametrize("requests", [0, 1, 127, 128, 300, 700])
async def test_every_entry_has_a_proof(requests: int, folder: Path) -> None:
    """Across full and partial tiles, of one level and of two, from the disk."""
    await written(folder, requests)
    reader = LogReader(folder)
    assert reader.size == 2 * requests + 2
    for index in {0, 1, 255, 256, 257, 511, 512, reader.size // 2, reader.size - 1} & set(range(reader.size)):
        reader.proof(index).verify(PUBLIC)
    intents = [entry["request_id"] for entry in entries(folder) if entry["kind"] == "intent"]
    assert intents == [f"{number:032x}" for number in range(requests)]
    assert sound(folder)


async def test_many_waiters_share_a_commit(folder: Path) -> None:
    async with writing(folder) as log:
        recorded = await asyncio.gather(*(log.append(intent(number)) for number in range(1000)))
        assert len({id(each.committed) for each in recorded}) < 30
        for each in recorded[::37]:
            each.proof().verify(PUBLIC)


@pytest.mark.parametrize("under_way", [1, 100])
async def test_commits_keep_a_distance_where_there_is_company(under_way: int, folder: Path) -> None:
    ends = []
    async with writing(folder, under_way=under_way) as log:
        for number in range(40):
            await log.append(intent(number))
            ends.append(time.monotonic())
    gaps = [later - earlier for earlier, later in itertools.pairwise(ends)]
    if under_way == 1:
        assert min(gaps) < audit_log.DISTANCE  # whoever is alone does not wait for it
    else:
        assert ends[-1] - ends[0] >= 38 * audit_log.DISTANCE


async def test_a_log_goes_on_after_a_restart(folder: Path) -> None:
    for start in range(3):
        async with writing(folder) as log:
            first = await log.append(intent(start))
            log.append(outcome(start))
    assert first.proof().verify(PUBLIC).size > 8
    assert [entry.get("event") for entry in entries(folder)] == 3 * ["started", None, None, "stopped"]


def test_modes(folder: Path) -> None:
    folder.mkdir(mode=0o755)
    old = os.umask(0)
    try:
        asyncio.run(written(folder, 200))
    finally:
        os.umask(old)
    for path in [folder, *folder.rglob("*")]:
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path


async def test_intents_without_an_outcome_are_interrupted_at_the_next_start(folder: Path) -> None:
    async with writing(folder) as log:
        for number in range(5):
            await log.append(intent(number))
        log.append(outcome(3))
    assert verify(folder).under_way == 4
    await opened(folder).close()
    ends = {entry["request_id"]: entry["outcome"] for entry in entries(folder) if entry["kind"] == "outcome"}
    assert ends == {f"{number:032x}": "answered" if number == 3 else "interrupted" for number in range(5)}
    assert [entry["count"] for entry in entries(folder) if entry.get("event") == kinds.STARTED] == [0, 4]
    assert sound(folder) and verify(folder).under_way == 0


async def test_one_outcome_each_and_nobody_needs_to_wait(folder: Path) -> None:
    """A waiter that was cancelled, and an outcome that nobody awaits, disturb nobody. After its end, a log takes nothing."""
    async with writing(folder) as log:
        log.append(intent(1)).cancel()
        log.append(outcome(1))
        await log.append(intent(2))
        for number in (1, 3):  # a second one, and one of nothing
            with pytest.raises(AuditUnavailable):
                await log.append(outcome(number))
    with pytest.raises(AuditUnavailable):
        await log.append(intent(4))


async def test_long_lists_stand_in_an_annex(folder: Path) -> None:
    groups = tuple(f"group-{number:04d}" for number in range(200))
    async with writing(folder) as log:
        proof = (await log.append(intent(1, groups=groups))).proof()
        log.append(outcome(1))
    assert len(proof.header()) < audit_proof.MAX_HEADER and proof.members["groups"] == []
    annex, told = entries(folder)[1:3]
    assert (annex["kind"], annex["groups"], told["annex"] is None) == ("annex", list(groups), False)


async def test_names_of_any_script_and_no_end(folder: Path) -> None:
    async with writing(folder) as log:
        proof = (await log.append(intent(1, subject="漢" * 256, model='m"}\n{"kind":"intent'))).proof()
        assert proof.members["subject"] == "漢" * 256
        with pytest.raises(EntryTooLarge):
            log.append(intent(2, subject="漢" * 2000))
        log.append(outcome(1))


@contextlib.contextmanager
def no_space(folder: Path, more: int = 300) -> Iterator[None]:
    """Files in `folder` grow by so much and no more. (Python ignores SIGXFSZ: the write is cut, then fails.)"""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, ((folder / journal.NAME).stat().st_size + more, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


async def test_disk_that_is_full(folder: Path) -> None:
    """Intents are refused, the log stays valid, what is owed is kept, and service returns by itself."""
    said = io.StringIO()
    async with writing(folder, said=said) as log:
        await log.append(intent(1))
        with no_space(folder):
            with pytest.raises(AuditUnavailable):
                await log.append(intent(2))
            assert not log.writable
            owed = log.append(outcome(1))
            with pytest.raises(AuditUnavailable):
                await log.append(outcome(2))  # whose intent was refused
            await until(lambda: verify(folder, PUBLIC).torn == 0, 5)  # nothing of a failed commit stays
            assert sound(folder)
        await asyncio.wait_for(owed, 15)  # nobody asked again
        assert log.writable
        await log.append(intent(3))
        log.append(outcome(3))
    found = entries(folder)
    assert [entry.get("request_id", entry.get("event"))[-1] for entry in found] == ["d", "1", "d", "1", "3", "3", "d"]
    assert found[2] == {**found[2], "event": "resumed", "count": 1}
    assert "audit log cannot be written" in said.getvalue() and "audit log written again" in said.getvalue()


@pytest.mark.skipif(NO_DISK is not None, reason=str(NO_DISK))
async def test_small_disk(tmp_path: Path) -> None:
    """A real file system, filled by the log itself: valid at each moment, and it goes on when there is space."""
    acknowledged = refused = 0
    with small_disk(tmp_path / "disk", "400k") as disk:
        async with writing(disk / "audit") as log:
            (disk / "ballast").write_bytes(bytes(150_000))
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
            assert sound(disk / "audit")
            (disk / "ballast").unlink()
            await until(lambda: log.writable)
            proof = (await log.append(intent(5000))).proof()
            log.append(outcome(5000))
        assert verify(disk / "audit", PUBLIC).under_way == 0
        assert LogReader(disk / "audit").entry(proof.index) == proof.entry


@pytest.mark.parametrize("name", ["missing/audit", "file"])
async def test_cannot_be_opened(name: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SettingsError, match=r"^audit: "):
        opened(tmp_path / name)


async def test_a_log_is_written_on_by_one_gateway_with_its_key_where_it_holds(folder: Path) -> None:
    await written(folder, 3)
    with pytest.raises(SettingsError, match="has another key"):
        opened(folder, Ed25519PrivateKey.generate())
    async with writing(folder):
        with pytest.raises(SettingsError, match="another gateway writes"):
            opened(folder)
    (bundle,) = (folder / "tile" / "entries").rglob("[0-9][0-9]")
    bundle.write_bytes(bundle.read_bytes().replace(b"alice", b"mallo", 1))
    with pytest.raises(SettingsError, match="does not hold"):
        opened(folder)


def crashed(folder: Path, into: Path) -> Path:
    """What a crash at this moment would leave: a copy, without the lock."""
    shutil.rmtree(into, ignore_errors=True)
    shutil.copytree(folder, into)
    return into


# What stands in the journal when the log is opened, made of its bytes and its length before the last commit.
TORN = [
    *(lambda data, before, size=size: data[: before + size] for size in (1, 7, 8, 9, 300)), lambda data, _: data[:-1],
    lambda data, before: data[:before] + bytes(len(data) - before),
    lambda data, before: data[: before + 8] + bytes(64) + data[before + 72 :],
]  # fmt: skip
SPOILED = [
    lambda data, _: data.replace(b"alice", b"mallo", 1),
    lambda data, before: data[:before] + data[before:].replace(b"alice", b"mallo"),
    lambda data, _: b"\x00\xff" + data[2:],
    lambda data, _: data[: len(data) // 2] + data[len(data) // 2 + 1 :],
]


async def test_journals_that_a_crash_leaves_and_others(folder: Path, tmp_path: Path) -> None:
    """Cut anywhere, or with a hole in it, the last commit was never made; nothing before it is lost, and the log goes on.

    A commit that was changed, with others behind it or without, is not cut off: people have to look at it.
    """
    log = opened(folder)
    for number in range(3):
        before = (folder / journal.NAME).stat().st_size
        await log.append(intent(number))
    data = (folder / journal.NAME).read_bytes()
    then = crashed(folder, tmp_path / "then")
    for spoil in (*TORN, *SPOILED):
        left = crashed(then, tmp_path / "left")
        (left / journal.NAME).write_bytes(tail := spoil(data, before))
        verdict = verify(left, PUBLIC)
        if spoil in SPOILED:
            assert verdict.wrong is not None
            with pytest.raises(SettingsError, match="does not hold"):
                opened(left)
            continue
        assert verdict.wrong is None and verdict.torn == len(tail) - before and verdict.size == 3
        await opened(left).close()
        found = entries(left)
        assert (found[3]["event"], found[3]["count"]) == (kinds.RECOVERED, len(tail) - before)
        assert [entry.get("outcome") for entry in found][4] == "interrupted"
        assert sound(left)
    await log.close()


async def test_crashes_while_tiles_are_written(folder: Path, tmp_path: Path) -> None:
    """Whatever of a publication is on disk: the log holds, and goes on."""
    async with writing(folder) as log:
        for number in range(400):
            log.append(intent(number))
            log.append(outcome(number))
        await log.append(intent(1000))
        before = crashed(folder, tmp_path / "before")
        await asyncio.sleep(1.5)  # idle: the tiles are written
        after = crashed(folder, tmp_path / "after")
    assert (after / "checkpoint").read_bytes() != (before / "checkpoint").read_bytes()
    names = sorted(path.relative_to(after) for path in after.rglob("*") if path.is_file() and path.name != "checkpoint")
    written_first = [name for name in names if name.parts[0] == "tile"]
    in_order = [*written_first, "checkpoint", "checkpoints", "open"]
    for count in (0, 1, len(written_first) // 2, len(written_first), len(in_order)):
        left = crashed(before, tmp_path / "left")
        for name in in_order[:count]:
            (left / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(after / name, left / name)
        assert sound(left), count
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
def test_kill_9(folder: Path, lives: int) -> None:
    """So many times, at any moment: the log holds each time, and everything that was acknowledged is in it."""
    chance = random.Random(lives)
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


async def test_a_reader_beside_the_writer(folder: Path) -> None:
    """Verified again and again while it grows and its tiles are written: it never looks wrong."""
    async with writing(folder) as log:
        for number in range(3000):
            log.append(intent(number))
            last = log.append(outcome(number))
            if number % 150 == 0:
                verdict = await asyncio.to_thread(verify, folder, PUBLIC)
                assert verdict.wrong is None, verdict.words
        await last
    assert verify(folder, PUBLIC).requests == 3000


def test_no_other_entries() -> None:
    for data in (b"", b"[]", b"{}", b'{"kind":"event"}', b'{"kind":["event"]}'):
        with pytest.raises(kinds.InvalidMessage):
            parse(data)
    more = encode(outcome(1))[0][:-1] + b',"prompt":""}'  # of a newer version, or of a gateway that hides something there
    assert parse(more)["prompt"] == ""
    with pytest.raises(kinds.NewerFormat, match="its fields are not those of an outcome"):
        parse_known(more)
    assert parse(encode(Event(time=1.0, event="started"))[0])["event"] == "started"
