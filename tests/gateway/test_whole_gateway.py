"""The whole gateway, killed at any moment and starved of disk: what its audit log is then, and what its clients can show."""

from __future__ import annotations

import asyncio
import json
import random
import signal
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path

import pytest

from lacre.evidence import checkpoints
from lacre.evidence.audit_proof import AuditProof
from lacre_gateway.audit import chain
from lacre_gateway.audit import entries as kinds
from lacre_gateway.audit.check import AuditResult, check_receipt, verify
from lacre_gateway.audit.reader import LogReader
from parts.small_disk import NO_DISK, filled, small_disk
from parts.stage import EchoStage
from parts.up import run

LIVES = 20


def checked(gateway: EchoStage, proofs: Sequence[AuditProof], kept: Sequence[bytes] = ()) -> AuditResult:
    """The log holds, also against what clients kept of it; and every one of the proofs is of an intent in it."""
    verdict = verify(gateway.audit, gateway.key, kept)
    assert verdict.wrong is None, verdict.words
    reader = LogReader(gateway.audit, gateway.key)
    for proof in proofs:
        check_receipt(proof, reader)
        assert proof.members["kind"] == "intent"
    return verdict


def events(gateway: EchoStage, event: str) -> list[dict[str, object]]:
    entries = map(json.loads, LogReader(gateway.audit, gateway.key).entries())
    return [entry for entry in entries if entry.get("event") == event]


@pytest.mark.slow
@pytest.mark.timeout(400)
async def test_kill_9(tmp_path: Path) -> None:
    """Twenty times, with requests running: whatever any client received is in the log, and the log holds each time."""
    chance, kept, left = random.Random(7), [], []
    async with EchoStage.standing(tmp_path) as gateway:
        async with gateway.load() as load:
            for _ in range(LIVES):
                await gateway.start()
                before = len(load.proofs)
                await gateway.until(lambda goal=before + 20: len(load.proofs) >= goal)
                await asyncio.sleep(chance.uniform(0, 0.3))
                assert await gateway.kill() == -signal.SIGKILL
                verdict = await asyncio.to_thread(checked, gateway, load.proofs[before:], kept)
                assert not kept or verdict.anchored
                kept.append(max(load.proofs, key=lambda proof: proof.index).checkpoint)
                left.append(verdict.under_way)
        await gateway.start()
        assert await gateway.kill(signal.SIGTERM) == 0
        verdict = checked(gateway, load.proofs, kept)
        assert verdict.under_way == 0
        # Each start gave the intents that its predecessor left open their outcome, and there were such.
        assert [event["count"] for event in events(gateway, kinds.STARTED)] == [0, *left]
        interrupted = [entry for entry in LogReader(gateway.audit).entries() if b'"outcome":"interrupted"' in entry]
        assert len(interrupted) == sum(left) > LIVES
    assert load.whole > LIVES and len(load.proofs) > 20 * LIVES
    assert sum(load.failed.values()) >= LIVES, load.failed


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    with small_disk(tmp_path / "disk", "1m") as disk:
        yield disk


@pytest.mark.slow
@pytest.mark.timeout(200)
@pytest.mark.skipif(NO_DISK is not None, reason=NO_DISK or "")
async def test_full_disk(tmp_path: Path, disk: Path) -> None:
    """A real file system that is full: requests are refused with the problem that says so, and served again when it is not."""
    async with EchoStage.standing(tmp_path, audit=disk / "audit") as gateway:

        async def starved() -> bool:
            return "audit" in (await gateway.detail()).get("missing", {})

        await gateway.start()
        async with gateway.load(6) as load:
            await gateway.until(lambda: len(load.proofs) >= 20)
            with filled(disk):
                await gateway.until(starved)
                refused, served = load.failed["Unavailable"], load.whole
                await gateway.until(lambda: load.failed["Unavailable"] >= refused + 20)
                assert load.whole <= served + 6  # what was under way then
                await asyncio.to_thread(checked, gateway, load.proofs)
                assert {problem for wire in load.wires for problem in wire.problems} == {(503, "2")}
            await gateway.until(gateway.ready)  # by itself
            served = load.whole
            await gateway.until(lambda: load.whole >= served + 20)
        assert await gateway.kill(signal.SIGTERM) == 0
        verdict = checked(gateway, load.proofs)
        assert (verdict.under_way, verdict.torn) == (0, 0)
        resumed = events(gateway, kinds.RESUMED)
        assert resumed and all(event["count"] for event in resumed[:1])
        assert set(load.failed) == {"Unavailable"}, load.failed


@pytest.mark.slow
@pytest.mark.timeout(200)
async def test_rotation(tmp_path: Path) -> None:
    """By the command, twice, with requests running: none fails, no entry is lost, and each log holds the last one's end."""
    async with EchoStage.standing(tmp_path) as gateway:
        await gateway.start()
        async with gateway.load() as load:
            for number in (2, 3):
                served = load.whole
                await gateway.until(lambda served=served: load.whole >= served + 20)
                said = await asyncio.to_thread(run, "audit", "rotate", str(gateway.audit))
                assert (said.returncode, said.stdout) == (0, f"the log continues in {gateway.audit / f'log-{number}'}\n")
            served = load.whole
            await gateway.until(lambda: load.whole >= served + 20)
        assert await gateway.kill(signal.SIGTERM) == 0
    assert not load.failed, load.failed
    readers = chain.readers(gateway.audit, gateway.key)
    verdict = verify(gateway.audit, gateway.key, [proof.checkpoint for proof in load.proofs[:: len(load.proofs) // 20]])
    assert (verdict.wrong, verdict.logs, verdict.under_way, verdict.torn) == (None, 3, 0, 0), verdict.words
    for before, after in pairwise(readers):
        assert json.loads(after.entry(0))["checkpoint"].encode() == before.note
        assert json.loads(before.entry(before.size - 1))["event"] == kinds.ROTATED
    by_origin = {reader.checkpoint.origin: reader for reader in readers}
    for proof in load.proofs:
        check_receipt(proof, by_origin[checkpoints.parse(proof.checkpoint).origin])
    assert {checkpoints.parse(proof.checkpoint).origin for proof in load.proofs} == set(by_origin)
    told = [json.loads(entry) for reader in readers for entry in reader.entries()]
    intents = {entry["request_id"] for entry in told if entry["kind"] == "intent"}
    ends = [entry["request_id"] for entry in told if entry["kind"] == "outcome"]
    assert {proof.members["request_id"] for proof in load.proofs} <= intents == set(ends) and len(ends) == len(intents)
    assert verdict.requests == len(intents) >= load.whole
    assert any(json.loads(reader.entry(0))["open"] for reader in readers[1:])  # a request was under way
