"""What passes from a worker to an honest gateway, through a fabric that belongs to somebody else."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from hostile.adversary import AsgiWire, Eyes, HostileFabric, framed
from hostile.attacks import Verdict, attack
from lacre import OpenError, problems
from lacre.errors import TruncatedStream
from lacre.evidence.receipts import Receipt
from lacre.jose.jws import b64u
from lacre.wire.header import SealedHeader
from lacre_fabric.work.contract import CREDIT
from lacre_fabric.work.frames import Frame, FrameKind
from lacre_fabric.work.gateway_stream import MAX_PENDING_FRAMES
from lacre_fabric.work.worker_stream import Outbound
from parts.issuer import Issuer
from parts.stage import Stage

COUNTED = "frames of an attempt are counted, and a gap ends the answer"
WHOLE = "an answer is whole only when its final chunk has opened"
UNREAD = "the gateway forwards what it cannot read; the caller opens it"
OF_THE_POOL = "a receipt is signed with the pool's receipt key"

Frames = Iterable[Frame]


async def asked(stage: Stage, honest: Stage, wire: AsgiWire) -> str:
    """Somebody asks an honest gateway; the worker's frames pass through the adversary's hands."""
    worker = await stage.worker()
    before = len(stage.hub.works)
    try:
        return "".join([piece async for piece in stage.client(wire, honest.token).chat_stream(stage.prompt)])
    finally:
        assert len(stage.hub.works) == before + 1
        assert worker.calls == (1 if stage.hub.frames else 0)


def each(change: Callable[[Frame], Frames]) -> Callable[[str, Frame], list[tuple[str, Frame]]]:
    """What the gateway hears of each frame, numbered anew so that the change itself leaves no gap."""
    numbers: dict[str, int] = {}

    def pass_on(request_id: str, frame: Frame) -> list[tuple[str, Frame]]:
        passed = []
        for changed in change(frame):
            number = numbers.get(changed.attempt, 0)
            numbers[changed.attempt] = number + 1
            passed.append((request_id, replace(changed, sequence=number)))
        return passed

    return pass_on


def data(frame: Frame, number: int) -> bool:
    return frame.kind is FrameKind.DATA and frame.sequence >= number


@attack("put a record of its own between two of the worker's", by="fabric", defence=UNREAD, refused=OpenError)
async def test_inject(stage: Stage, honest: Stage, wire: AsgiWire, fabric: HostileFabric, verdict: Verdict) -> None:
    injected = framed(secrets.token_bytes(64))
    fabric.pass_on = each(lambda frame: [replace(frame, payload=injected), frame] if data(frame, 3) else [frame])
    with verdict.refused():
        await asked(stage, honest, wire)


@attack(
    "send frames under an attempt of its own beside the worker's",
    by="fabric",
    refused=None,
    gain="nothing; they are dropped",
    defence="a gateway is bound to the first attempt that sends a frame",
)
async def test_another_attempt(stage: Stage, honest: Stage, wire: AsgiWire, fabric: HostileFabric) -> None:
    def beside(frame: Frame) -> Frames:
        return [frame, Frame("f" * 32, 0, FrameKind.DATA, framed(bytes(64))), Frame("f" * 32, 0, FrameKind.ERROR, b"x")]

    fabric.pass_on = each(beside)
    assert await asked(stage, honest, wire) == stage.prompt


@attack("answer before the worker does", by="fabric", defence=UNREAD, refused=OpenError)
async def test_first(stage: Stage, honest: Stage, wire: AsgiWire, fabric: HostileFabric, verdict: Verdict) -> None:
    """The gateway is bound to the impostor, whose answer is whole in all that a gateway can see."""
    forged = bytes(32) + framed(bytes(64)) + b"\x00" + bytes(64)

    def first(frame: Frame) -> Frames:
        own = (Frame("f" * 32, 0, FrameKind.DATA, forged), Frame("f" * 32, 0, FrameKind.USAGE, b""))
        return [*own, frame] if frame.sequence == 0 else [frame]

    fabric.pass_on = each(first)
    with verdict.refused():
        await asked(stage, honest, wire)


@attack("swap two frames", by="fabric", defence=COUNTED, refused=TruncatedStream)
async def test_swap(stage: Stage, honest: Stage, wire: AsgiWire, fabric: HostileFabric, verdict: Verdict) -> None:
    held: list[tuple[str, Frame]] = []

    def swap(request_id: str, frame: Frame) -> list[tuple[str, Frame]]:
        if frame.sequence == 4:
            held.append((request_id, frame))
            return []
        return [(request_id, frame), *held] if frame.sequence == 5 else [(request_id, frame)]

    fabric.pass_on = swap
    with verdict.refused():
        await asked(stage, honest, wire)


@attack("leave out a frame, or send one twice", by="fabric", defence=COUNTED, refused=TruncatedStream)
@pytest.mark.parametrize("times", [0, 2])
async def test_drop(stage: Stage, honest: Stage, wire: AsgiWire, fabric: HostileFabric, verdict: Verdict, times: int) -> None:
    fabric.pass_on = lambda request_id, frame: [(request_id, frame)] * (times if frame.sequence == 4 else 1)
    with verdict.refused():
        await asked(stage, honest, wire)


@attack("renumber the frames, so that none seems to be missing", by="fabric", defence=UNREAD, refused=OpenError)
@pytest.mark.parametrize("times", [0, 2])
async def test_renumber(
    stage: Stage, honest: Stage, wire: AsgiWire, fabric: HostileFabric, verdict: Verdict, times: int
) -> None:
    """As hard as it can try: the gateway finds nothing wrong, and the caller does."""
    fabric.pass_on = each(lambda frame: [frame] * (times if frame.sequence == 4 else 1))
    with verdict.refused():
        await asked(stage, honest, wire)


@attack("tell the gateway early that the answer has ended", by="fabric", defence=WHOLE, refused=TruncatedStream)
async def test_early_end(stage: Stage, honest: Stage, wire: AsgiWire, fabric: HostileFabric, verdict: Verdict) -> None:
    fabric.pass_on = each(lambda frame: [replace(frame, kind=FrameKind.USAGE, payload=b"")] if data(frame, 4) else [frame])
    with verdict.refused():
        await asked(stage, honest, wire)


@attack(
    "exchange the frames of two callers' answers",
    by="fabric",
    defence="each answer is sealed for its one request",
    refused=OpenError,
)
async def test_exchange(stage: Stage, honest: Stage, wire: AsgiWire, fabric: HostileFabric, verdict: Verdict) -> None:
    """The second caller is given the first one's recorded frames."""
    await asked(stage, honest, wire)
    recorded = [frame for _, frame in fabric.frames]
    second = len(fabric.works)

    def exchange(request_id: str, frame: Frame) -> list[tuple[str, Frame]]:
        assert len(fabric.works) == second + 1
        return [(request_id, old) for old in recorded] if frame.sequence == 0 else []

    fabric.pass_on = exchange
    with verdict.refused():
        await stage.client(wire, honest.token).chat(stage.prompt)


@attack(
    "have the gateway tell the caller that its token is invalid",
    by="fabric",
    refused=problems.WORKER_LOST,
    defence="the gateway passes on only the problems that a worker may report",
)
async def test_problem(stage: Stage, honest: Stage, wire: AsgiWire, fabric: HostileFabric, verdict: Verdict) -> None:
    said = problems.INVALID_TOKEN.type.encode()
    fabric.pass_on = each(lambda frame: [replace(frame, kind=FrameKind.ERROR, payload=said)])
    with verdict.refused():
        await asked(stage, honest, wire)


@attack(
    "flood a gateway with frames",
    by="fabric",
    defence="unread bytes are bounded for each request",
    refused=problems.WORKER_LOST,
)
async def test_flood(stage: Stage, honest: Stage, wire: AsgiWire, fabric: HostileFabric, verdict: Verdict) -> None:
    flood = MAX_PENDING_FRAMES + 2
    fabric.pass_on = each(lambda frame: [replace(frame, payload=b"")] * flood + [frame] if frame.sequence == 0 else [frame])
    with verdict.refused():
        await asked(stage, honest, wire)
    fabric.pass_on = lambda request_id, frame: [(request_id, frame)]
    assert (await stage.client(wire, honest.token).chat(stage.prompt)).text == stage.prompt


@attack("withhold work from every worker", by="fabric", defence="a queue limit", refused=problems.BUSY)
async def test_withhold(
    stage: Stage, tmp_path: Path, issuer: Issuer, fabric: HostileFabric, eyes: Eyes, verdict: Verdict
) -> None:
    stage.build_gateway(tmp_path, issuer, limits="queue_limit = 0.1")
    await stage.publish()
    fabric.deliver = lambda _work: []
    with verdict.refused():
        await asked(stage, stage, AsgiWire(stage.app, eyes))


@attack(
    "claim that there is no worker", by="fabric", defence="nothing: presence is the fabric's word", refused=problems.NO_WORKER
)
async def test_presence(stage: Stage, honest: Stage, wire: AsgiWire, fabric: HostileFabric, verdict: Verdict) -> None:
    fabric.live.clear()
    with verdict.refused():
        await stage.client(wire, honest.token).chat(stage.prompt)


@attack("cancel a request during its answer", by="fabric", defence=WHOLE, refused=TruncatedStream)
async def test_cancel(stage: Stage, honest: Stage, wire: AsgiWire, fabric: HostileFabric, verdict: Verdict) -> None:
    def cancelling(request_id: str, frame: Frame) -> list[tuple[str, Frame]]:
        if frame.sequence == 4:
            fabric.outbound[request_id].cancel()
            return [(request_id, replace(frame, kind=FrameKind.ERROR, payload=b""))]
        return [(request_id, frame)]

    fabric.pass_on = cancelling
    with verdict.refused():
        await asked(stage, honest, wire)


@attack(
    "promise a worker endless credit, so that it fills the fabric",
    by="fabric",
    refused=None,
    defence="credit never runs ahead of the bytes sent: 256 KiB",
    gain="nothing; the worker waits for a reader",
)
async def test_credit() -> None:
    sent: list[Frame] = []

    async def publish(frame: Frame) -> None:
        sent.append(frame)

    worker = Outbound(publish)
    worker.renew(10**12)
    await worker.send(FrameKind.DATA, bytes(CREDIT))
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.05):
            await worker.send(FrameKind.DATA, bytes(1))
    assert len(sent) == 1


# The gateway's books


async def booked(stage: Stage, honest: Stage, wire: AsgiWire) -> dict[str, Any]:
    """What the gateway writes down of an answer that the caller got whole."""
    assert await asked(stage, honest, wire) == stage.prompt
    (outcome,) = await honest.outcomes()
    return outcome


def usage(change: Callable[[Frame], bytes]) -> Callable[[str, Frame], list[tuple[str, Frame]]]:
    return each(lambda frame: [replace(frame, payload=change(frame))] if frame.kind is FrameKind.USAGE else [frame])


def claim(**members: Any) -> Receipt:
    """A receipt over many tokens."""
    many: dict[str, Any] = {
        "enc": "A" * 43, "model": "sha256:00", "prompt_tokens": 1, "cached_tokens": 0, "completion_tokens": 500,
        "start": 0.0, "end": 1.0, "final": True,
    }  # fmt: skip
    return Receipt(**{**many, **members})


@attack(
    "claim usage under a receipt of its own",
    by="fabric",
    defence=OF_THE_POOL,
    refused=None,
    gain="nothing above the true usage; the request is booked on an earlier receipt, or as `unreceipted`",
)
async def test_forged_receipt(stage: Stage, honest: Stage, wire: AsgiWire, fabric: HostileFabric) -> None:
    own = Ed25519PrivateKey.generate()

    def forged(_frame: Frame) -> bytes:
        enc = b64u(SealedHeader.parse(fabric.works[0].sealed).digest)
        return claim(enc=enc).sign(own).encode()

    fabric.pass_on = usage(forged)
    booked_as = await booked(stage, honest, wire)
    assert booked_as["completion_tokens"] in (None, 0)


@attack(
    "settle one request with another's receipt",
    by="fabric",
    defence="a receipt names the digest of its request",
    refused=None,
    gain="nothing above the true usage; the request is booked on an earlier receipt, or as `unreceipted`",
)
async def test_another_receipt(stage: Stage, honest: Stage, wire: AsgiWire, fabric: HostileFabric) -> None:
    fabric.pass_on = usage(lambda _frame: claim().sign(stage.keys.receipts).encode())
    booked_as = await booked(stage, honest, wire)
    assert booked_as["completion_tokens"] in (None, 0)


@attack(
    "settle a request with its first receipt in place of its last",
    by="fabric",
    defence="nothing: the pool signed both",
    refused=None,
    gain="a lower bill for one caller; never a higher one than the pool signed",
)
async def test_first_receipt(stage: Stage, honest: Stage, wire: AsgiWire, fabric: HostileFabric) -> None:
    beats: list[bytes] = []

    def change(frame: Frame) -> Frames:
        if frame.kind is FrameKind.BEAT:
            beats.append(frame.payload)
        return [replace(frame, payload=beats[0])] if frame.kind is FrameKind.USAGE else [frame]

    fabric.pass_on = each(change)
    booked_as = await booked(stage, honest, wire)
    assert booked_as["completion_tokens"] == 0
