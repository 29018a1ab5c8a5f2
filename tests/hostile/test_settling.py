"""The MACs by which a gateway settles requests, and the keys for them that it seals to the pool."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from hostile.adversary import GatewayOwner, HostileFabric, HttpWire
from hostile.attacks import NOTHING, Verdict, attack
from hostile.shapes import Test
from hostile.test_workers import TOKENS, LyingWorker
from lacre import problems
from lacre.evidence.receipts import Receipt
from lacre.jose.jws import b64u
from lacre.trust.manifest import Pool
from lacre.wire.header import SealedHeader
from lacre_backend.node import opened_keys
from lacre_fabric.work.contract import Work
from lacre_fabric.work.frames import Frame, FrameKind
from lacre_fabric.work.settlement_keys import LIFETIME, MAX_SEALED, SettlementKey, SettlementKeys, seal
from lacre_gateway.budget.settlement import Settlement
from parts.keys import OTHER_POOL, POOL
from parts.scraping import receipt_checks_in
from parts.stage import Stage

THIEF = Ed25519PrivateKey.generate()
DECIDES = "a MAC under another key counts for nothing: the signature decides"
CHECKED = "nothing; the gateway verifies a signature instead of a MAC"
WRONG = "receipt mac wrong"


def checks(stage: Stage) -> dict[str, int]:
    """How the gateway checked receipts, by its own metrics."""
    return receipt_checks_in(stage.gateway.metrics.show().decode())


async def settled(stage: Stage, wire: HttpWire, number: int = 1) -> list[int | None]:
    """What the gateway wrote down of so many requests, one after the other."""
    before = len(stage.entries("outcome"))
    for _ in range(number):
        assert (await stage.client(wire, stage.token).chat(stage.prompt)).text == stage.prompt
    return [outcome["completion_tokens"] for outcome in (await stage.outcomes(before + number))[before:]]


def warnings(stage: Stage) -> list[str]:
    return [entry["event"] for entry in stage.logged() if entry["level"] in ("warning", "error")]


def with_receipts(fabric: HostileFabric, change: Callable[[str, Frame], Frame]) -> None:
    """What the gateway gets in the place of frames with receipts."""

    def pass_on(request_id: str, frame: Frame) -> Iterable[tuple[str, Frame]]:
        carries = frame.kind in (FrameKind.USAGE, FrameKind.BEAT)
        return [(request_id, change(request_id, frame) if carries else frame)]

    fabric.pass_on = pass_on


def forged(fabric: HostileFabric) -> bytes:
    """A receipt over many tokens of the newest request, by the adversary's own key."""
    enc = b64u(SealedHeader.parse(fabric.works[-1].sealed).digest)
    return Receipt(enc, "sha256:00", 1, 0, 500, 0.0, 1.0, final=True).sign(THIEF).encode()


def own_key() -> SettlementKey:
    return SettlementKey(bytearray(os.urandom(32)))


def of_random(_fabric: HostileFabric, _frame: Frame) -> bytes:
    return os.urandom(32)


def of_own_key(fabric: HostileFabric, _frame: Frame) -> bytes:
    return own_key().mac(forged(fabric))


def of_honest(_fabric: HostileFabric, frame: Frame) -> bytes:
    return frame.mac


@attack("claim usage under a receipt of its own, with a MAC of its own or a worker's", "fabric", DECIDES,
        gain="nothing above the true usage; the request is booked as `unreceipted`",
        cases=[of_random, of_own_key, of_honest])  # fmt: skip
async def test_forged(stage: Stage, honest: Stage, wire: HttpWire, fabric: HostileFabric, case: Any) -> None:
    await stage.worker()
    with_receipts(fabric, lambda _id, frame: replace(frame, payload=forged(fabric), mac=case(fabric, frame)))
    assert await settled(honest, wire) == [None]
    assert "mac" not in checks(honest)


@attack("spoil the MACs of honest receipts", "fabric", DECIDES, gain=f"{CHECKED}; one line in its log for each key")
async def test_wrong(stage: Stage, honest: Stage, wire: HttpWire, fabric: HostileFabric) -> None:
    await stage.worker()
    [true] = await settled(honest, wire)
    assert checks(honest) == {"mac": 1}
    assert true
    with_receipts(fabric, lambda _id, frame: replace(frame, mac=os.urandom(32)))
    assert await settled(honest, wire, 3) == [true] * 3
    assert checks(honest) == {"mac": 1, "signature": 3, "wrong-mac": 3}
    assert warnings(honest) == [WRONG]


@attack("settle one request with the receipt and the MAC of another", "fabric", "a receipt names the digest of its request",
        gain="nothing; the request is booked as `unreceipted`")  # fmt: skip
async def test_of_another_request(stage: Stage, honest: Stage, wire: HttpWire, fabric: HostileFabric) -> None:
    await stage.worker()
    [true] = await settled(honest, wire)
    [recorded] = [frame for _, frame in fabric.frames if frame.kind is FrameKind.USAGE]
    assert recorded.mac
    with_receipts(fabric, lambda _id, frame: replace(frame, payload=recorded.payload, mac=recorded.mac))
    await stage.client(wire, honest.token).chat(stage.prompt)
    assert [outcome["completion_tokens"] for outcome in await honest.outcomes(2)] == [true, None]


def swapped(name: str, defence: str, sealed: Callable[[Stage, Work], str], *, opens: bool, gain: str = NOTHING) -> Test:
    """The attack of a fabric that gives workers another sealed key. opens: whether it does at the worker."""

    @attack(name, "fabric", defence, gain=gain)
    async def test(stage: Stage, honest: Stage, wire: HttpWire, fabric: HostileFabric) -> None:
        await stage.worker()
        fabric.deliver = lambda work: [replace(work, settlement=sealed(stage, work))]
        [counted] = await settled(honest, wire)
        assert counted
        assert [bool(frame.mac) for _, frame in fabric.frames if frame.kind is FrameKind.USAGE] == [opens]
        assert checks(honest)["signature"] == 1 and "mac" not in checks(honest)

    return test


def pool_of(stage: Stage, name: str = POOL) -> Pool:
    return stage.manifest().pools[name]


def another_gateway(stage: Stage, _work: Work) -> str:
    key = SettlementKeys("g2").of(POOL, pool_of(stage), 1)
    assert key is not None
    return key.sealed


def of_the_thief(stage: Stage, work: Work) -> str:
    return seal(stage.keys.pool.config, bytearray(32), POOL, work.gateway)


def of_another_pool(stage: Stage, work: Work) -> str:
    return seal(stage.keys.other.config, bytearray(32), OTHER_POOL, work.gateway)


def to_another_key(stage: Stage, work: Work) -> str:
    return seal(stage.keys.classic.config, bytearray(32), POOL, work.gateway)


OPENS = "a worker opens only what this gateway sealed for its pool, to the key of the request"
test_of_the_thief = swapped("have a worker make MACs under a key of the fabric's own", DECIDES, of_the_thief, opens=True,
    gain=CHECKED)  # fmt: skip
test_of_another_gateway = swapped("have a worker make MACs under the key of another gateway", OPENS, another_gateway,
    opens=False, gain=CHECKED)  # fmt: skip
test_of_another_pool = swapped("have a worker make MACs under the key of another pool", OPENS, of_another_pool,
    opens=False, gain=CHECKED)  # fmt: skip
test_to_another_key = swapped("seal the key for MACs to another key of the pool than the request", OPENS, to_another_key,
    opens=False, gain=CHECKED)  # fmt: skip
test_none = swapped("take the key for MACs away", "signatures stay, and decide where there is no MAC",
    lambda _stage, _work: "", opens=False, gain=CHECKED)  # fmt: skip
test_nonsense = swapped("put nonsense in the place of the key for MACs", "what does not open is no key, and no error",
    lambda _stage, work: work.settlement[:-4] + "AAAA", opens=False, gain=CHECKED)  # fmt: skip


@attack("have a worker make MACs under a key that its gateway no longer uses", "fabric", "a gateway's key counts for the "
        "requests that it was sent with, and a new one comes every ten minutes", gain=CHECKED)  # fmt: skip
async def test_expired(stage: Stage, honest: Stage, wire: HttpWire, fabric: HostileFabric) -> None:
    passed = [0.0]
    honest.gateway.settlement_keys = SettlementKeys(honest.gateway.settings.instance, lambda: time.monotonic() + passed[0])
    await stage.worker()
    await settled(honest, wire, 2)
    first = fabric.works[0].settlement
    assert fabric.works[1].settlement == first
    passed[0] = LIFETIME
    fabric.deliver = lambda work: [replace(work, settlement=first)]
    assert None not in await settled(honest, wire)
    assert fabric.works[2].settlement != first
    assert checks(honest) == {"mac": 2, "signature": 1, "wrong-mac": 1}


@attack("flood workers with keys for MACs", "fabric", "a bounded number is remembered, of bounded length, and only for "
        "requests whose grant and seal hold", gain="one opening of a key for each request that a gateway granted")  # fmt: skip
async def test_flood(
    stage: Stage, honest: Stage, wire: HttpWire, fabric: HostileFabric, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(opened_keys, "MOST", 3)
    worker = await stage.worker()
    remembered = worker.node._settlement_keys._found
    fabric.deliver = lambda work: [replace(work, settlement=of_the_thief(stage, work))]
    await settled(honest, wire, 8)
    assert len(remembered) == 3
    fabric.deliver = lambda work: [replace(work, settlement="A" * (MAX_SEALED + 1))]
    await settled(honest, wire)
    assert len(remembered) == 3 and max(len(sealed) for _, sealed in remembered) <= MAX_SEALED


@attack("have a worker open keys for MACs without a grant", "gateway", "the grant is verified first", problems.INVALID_GRANT)
async def test_ungranted(stage: Stage, gateway: GatewayOwner, fabric: HostileFabric, verdict: Verdict) -> None:
    worker = await stage.worker()
    fabric.deliver = lambda work: [replace(work, settlement=of_the_thief(stage, work), gateway="g1")]
    verdict.said((await gateway.run(stage.seal().body, token="none")).problem)
    assert not worker.node._settlement_keys._found
    await gateway.run(stage.seal().body)
    assert len(worker.node._settlement_keys._found) == 1


# A worker, or a thief of the pool's private key who has not its receipt key


def junk(name: str, defence: str, gain: str, draw: int, *counts: Any) -> Test:
    """The attack of a worker whose receipts to the gateway have a right MAC, and a signature by another key. draw: which of
    its claims the gateway picks.
    """

    @attack(name, "worker", defence, gain=gain)
    async def test(stage: Stage, honest: Stage, wire: HttpWire) -> None:
        honest.gateway.settlement = Settlement(honest.gateway.log, draw=lambda: draw)
        async with LyingWorker(stage, told_by=THIEF):
            for _ in counts:
                await stage.client(wire, honest.token).chat(stage.prompt)
        outcomes = await honest.outcomes(len(counts))
        assert [outcome["completion_tokens"] for outcome in outcomes] == list(counts)
        found = counts.count(None)
        assert [outcome["refused_receipt"] for outcome in outcomes].count("not-by-the-pool") == found
        assert checks(honest).get("mac-without-signature", 0) == found
        assert warnings(honest).count("receipt unsigned") == found

    return test


test_unsigned = junk("sign receipts for the gateway with a key that is not the pool's, under a right MAC",
    "the signatures of one claim in 64 are verified, at random", "a bill up to the reservation, until the sample finds it; "
    "the caller's own receipt must be signed", 3, TOKENS, TOKENS, None, TOKENS, TOKENS, None)  # fmt: skip
