"""The record: what is in it, when it is there, and what a crash or a full disk leaves of it."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import resource
import stat
from pathlib import Path

import pytest

from lacre.errors import SettingsError
from lacre_gateway.audit import AuditLog, AuditUnavailable, Intent, Outcome, encode

INTENT = Intent(
    request_id="0" * 32, time=1.5, subject="alice", tenant="acme", issuer="i", pool="default", model="m", action="chat",
    shape="none", kem="X25519", max_tokens=1, sealed_bytes=2, digest="ab", decision="allow", policies=("p",),
)  # fmt: skip
OUTCOME = Outcome(
    request_id="0" * 32, time=2.5, outcome="answered", status=200, unreceipted=False, refused_receipt=None,
    prompt_tokens=1, cached_tokens=0, completion_tokens=2, duration=1.0,
)  # fmt: skip

ALLOWED = {
    "kind", "request_id", "time", "subject", "tenant", "issuer", "pool", "model", "action", "shape", "kem", "max_tokens",
    "sealed_bytes", "digest", "decision", "policies", "outcome", "status", "unreceipted", "refused_receipt", "prompt_tokens",
    "cached_tokens", "completion_tokens", "duration",
}  # fmt: skip


def lines(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


async def test_entry_is_on_disk_when_its_future_is_done(tmp_path: Path) -> None:
    log = AuditLog(tmp_path / "audit.jsonl")
    await log.append(INTENT)
    assert lines(tmp_path / "audit.jsonl") == [json.loads(encode(INTENT))]
    await log.append(OUTCOME)
    assert len(lines(tmp_path / "audit.jsonl")) == 2
    await log.close()


def test_fields_are_the_allowed_ones() -> None:
    assert set(json.loads(encode(INTENT))) | set(json.loads(encode(OUTCOME))) == ALLOWED


async def test_close_writes_what_waits(tmp_path: Path) -> None:
    log = AuditLog(tmp_path / "audit.jsonl")
    for _ in range(2000):
        log.append(INTENT)
    await log.close()
    assert len(lines(tmp_path / "audit.jsonl")) == 2000


async def test_order_is_kept(tmp_path: Path) -> None:
    log = AuditLog(tmp_path / "audit.jsonl")
    for number in range(700):
        log.append(dataclasses.replace(INTENT, max_tokens=number))
    await log.close()
    assert [entry["max_tokens"] for entry in lines(tmp_path / "audit.jsonl")] == list(range(700))


async def test_only_its_owner_reads_it(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    path.touch(mode=0o644)
    log = AuditLog(path)
    await log.close()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


async def test_appends_after_what_is_there_and_ends_a_torn_line(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    path.write_bytes(encode(INTENT) + b'{"kind":"outc')
    log = AuditLog(path)
    await log.append(OUTCOME)
    await log.close()
    whole, torn, last = path.read_text().splitlines()
    assert (json.loads(whole)["kind"], torn, json.loads(last)["kind"]) == ("intent", '{"kind":"outc', "outcome")


async def test_hostile_names_stay_on_their_line(tmp_path: Path) -> None:
    log = AuditLog(tmp_path / "audit.jsonl")
    await log.append(dataclasses.replace(INTENT, model='m"}\n{"kind":"intent\u2028', subject="\x00\x1b[31m"))
    await log.close()
    [entry] = lines(tmp_path / "audit.jsonl")
    assert entry["model"] == 'm"}\n{"kind":"intent\u2028'
    assert (tmp_path / "audit.jsonl").read_bytes().isascii()


async def test_disk_that_is_full(tmp_path: Path) -> None:
    """Nothing torn stays, whoever waits is told, and it goes on when there is space again."""
    path = tmp_path / "audit.jsonl"
    log = AuditLog(path)
    await log.append(INTENT)
    size = path.stat().st_size
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 10, hard))  # Python ignores SIGXFSZ: the write is cut, then fails
    try:
        with pytest.raises(AuditUnavailable):
            await log.append(INTENT)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.stat().st_size == size
    await log.append(OUTCOME)
    await log.close()
    assert [entry["kind"] for entry in lines(path)] == ["intent", "outcome"]


async def test_after_close(tmp_path: Path) -> None:
    log = AuditLog(tmp_path / "audit.jsonl")
    await log.close()
    with pytest.raises(AuditUnavailable):
        await log.append(INTENT)


async def test_nobody_needs_to_wait(tmp_path: Path) -> None:
    """A waiter that was cancelled, and an outcome that nobody awaits, disturb nobody."""
    log = AuditLog(tmp_path / "audit.jsonl")
    log.append(INTENT).cancel()
    log.append(OUTCOME)
    await log.append(OUTCOME)
    await log.close()
    assert len(lines(tmp_path / "audit.jsonl")) == 3


async def test_many_waiters_share_a_sync(tmp_path: Path) -> None:
    log = AuditLog(tmp_path / "audit.jsonl")
    await asyncio.gather(*(log.append(INTENT) for _ in range(1000)))
    await log.close()
    assert len(lines(tmp_path / "audit.jsonl")) == 1000


@pytest.mark.parametrize("name", ["missing/audit.jsonl", "."])
async def test_cannot_be_opened(name: str, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"^audit: "):
        AuditLog(tmp_path / name)
