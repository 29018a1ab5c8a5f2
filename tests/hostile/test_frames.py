"""What passes from a worker to an honest gateway, through a fabric that belongs to somebody else."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from hostile.adversary import Eyes, HostileFabric, HttpWire, framed
from hostile.attacks import NOTHING, Verdict, attack
from hostile.shapes import Test
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
THIEF = Ed25519PrivateKey.generate()
BOOKED_LOW = "nothing above the true usage; the request is booked on an earlier receipt, or as `unreceipted`"

Frames: TypeAlias = Iterable[Frame]
PassOn: TypeAlias = Callable[[str, Frame], Iterable[tuple[str, Frame]]]


async def asked(stage: Stage, honest: Stage, wire: HttpWire) -> str:
    """Somebody asks an honest gateway; the worker's frames pass through the adversary's hands."""
    worker = await stage.worker()
    before = len(stage.hub.works)
    try:
        return "".join([piece async for piece in stage.client(wire, honest.token).chat_stream(stage.prompt)])
    finally:
        assert len(stage.hub.works) == before + 1
        assert worker.calls == (1 if stage.hub.frames else 0)


def each(change: Callable[[Frame], Frames]) -> PassOn:
    """What the gateway hears of each frame, numbered anew so that the change itself leaves no gap."""
    numbers: dict[str, int] = {}

    def pass_on(request_id: str, frame: Frame) -> Iterable[tuple[str, Frame]]:
        for changed in change(frame):
            number = numbers.get(changed.attempt, 0)
            numbers[changed.attempt] = number + 1
            yield request_id, replace(changed, sequence=number)

    return pass_on


def passed(name: str, defence: str, refused: Any, *ways: Callable[[], PassOn], gain: str = NOTHING) -> Test:
    """The attack of a fabric that passes an answer's frames on in these ways. refused: None where the caller gets the text."""

    @attack(name, "fabric", defence, refused, gain=gain, cases=ways, ids=range(len(ways)))
    async def test(stage: Stage, honest: Stage, wire: HttpWire, fabric: HostileFabric, verdict: Verdict, case: Any) -> None:
        fabric.pass_on = case()
        if refused is None:
            assert await asked(stage, honest, wire) == stage.prompt
        else:
            with verdict.refused():
                await asked(stage, honest, wire)

    return test


def at(number: int, change: Callable[[Frame], Frames], *, only: bool = False) -> Callable[[], PassOn]:
    """Other frames in the place of one of the answer's: of all data from `number` on or, with `only`, of that one alone."""

    def here(frame: Frame) -> bool:
        return frame.sequence == number if only else frame.kind is FrameKind.DATA and frame.sequence >= number

    return lambda: each(lambda frame: change(frame) if here(frame) else [frame])


def own(kind: FrameKind, payload: bytes) -> Frame:
    """Under an attempt of the adversary's own."""
    return Frame("f" * 32, 0, kind, payload)


def swapping() -> PassOn:
    held: list[tuple[str, Frame]] = []

    def swap(request_id: str, frame: Frame) -> list[tuple[str, Frame]]:
        if frame.sequence == 4:
            held.append((request_id, frame))
            return []
        return [(request_id, frame), *held] if frame.sequence == 5 else [(request_id, frame)]

    return swap


INJECTED = framed(secrets.token_bytes(64))
# Whole in all that a gateway can see.
FORGED = bytes(32) + framed(bytes(64)) + b"\x00" + bytes(64)

test_inject = passed("put a record of its own between two of the worker's", UNREAD, OpenError,
    at(3, lambda frame: [replace(frame, payload=INJECTED), frame]))  # fmt: skip
test_another_attempt = passed("send frames under an attempt of its own beside the worker's",
    "a gateway is bound to the first attempt that sends a frame", None,
    lambda: each(lambda frame: [frame, own(FrameKind.DATA, framed(bytes(64))), own(FrameKind.ERROR, b"x")]),
    gain="nothing; they are dropped")  # fmt: skip
test_first = passed("answer before the worker does", UNREAD, OpenError,
    at(0, lambda frame: [own(FrameKind.DATA, FORGED), own(FrameKind.USAGE, b""), frame], only=True))  # fmt: skip
test_swap = passed("swap two frames", COUNTED, TruncatedStream, swapping)
test_drop = passed(
    "leave out a frame, or send one twice", COUNTED, TruncatedStream,
    *(lambda times=times: lambda request_id, frame: [(request_id, frame)] * (times if frame.sequence == 4 else 1)
      for times in (0, 2)),
)  # fmt: skip
# As hard as it can try: the gateway finds nothing wrong, and the caller does.
test_renumber = passed("renumber the frames, so that none seems to be missing", UNREAD, OpenError,
    *(at(4, lambda frame, times=times: [frame] * times, only=True) for times in (0, 2)))  # fmt: skip
test_early_end = passed("tell the gateway early that the answer has ended", WHOLE, TruncatedStream,
    at(4, lambda frame: [replace(frame, kind=FrameKind.USAGE, payload=b"")]))  # fmt: skip
test_problem = passed(
    "have the gateway tell the caller that its token is invalid",
    "the gateway passes on only the problems that a worker may report", problems.WORKER_LOST,
    lambda: each(lambda frame: [replace(frame, kind=FrameKind.ERROR, payload=problems.INVALID_TOKEN.type.encode())]),
)  # fmt: skip


@attack("exchange the frames of two callers' answers", "fabric", "each answer is sealed for its one request", OpenError)
async def test_exchange(stage: Stage, honest: Stage, wire: HttpWire, fabric: HostileFabric, verdict: Verdict) -> None:
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


@attack("flood a gateway with frames", "fabric", "unread bytes are bounded for each request", problems.WORKER_LOST)
async def test_flood(stage: Stage, honest: Stage, wire: HttpWire, fabric: HostileFabric, verdict: Verdict) -> None:
    honest_way, flood = fabric.pass_on, MAX_PENDING_FRAMES + 2
    fabric.pass_on = at(0, lambda frame: [*[replace(frame, payload=b"")] * flood, frame], only=True)()
    with verdict.refused():
        await asked(stage, honest, wire)
    fabric.pass_on = honest_way
    assert (await stage.client(wire, honest.token).chat(stage.prompt)).text == stage.prompt


@attack("withhold work from every worker", "fabric", "a queue limit", problems.BUSY)
async def test_withhold(
    stage: Stage, tmp_path: Path, issuer: Issuer, fabric: HostileFabric, eyes: Eyes, verdict: Verdict
) -> None:
    stage.build_gateway(tmp_path, issuer, limits="queue_limit = 0.1")
    await stage.publish()
    fabric.deliver = lambda _work: []
    with verdict.refused():
        await asked(stage, stage, HttpWire(stage.app, eyes))


@attack("claim that there is no worker", "fabric", "nothing: presence is the fabric's word", problems.NO_WORKER)
async def test_presence(stage: Stage, honest: Stage, wire: HttpWire, fabric: HostileFabric, verdict: Verdict) -> None:
    fabric.live.clear()
    with verdict.refused():
        await stage.client(wire, honest.token).chat(stage.prompt)


@attack("cancel a request during its answer", "fabric", WHOLE, TruncatedStream)
async def test_cancel(stage: Stage, honest: Stage, wire: HttpWire, fabric: HostileFabric, verdict: Verdict) -> None:
    def cancelling(request_id: str, frame: Frame) -> list[tuple[str, Frame]]:
        if frame.sequence != 4:
            return [(request_id, frame)]
        fabric.outbound[request_id].cancel()
        return [(request_id, replace(frame, kind=FrameKind.ERROR, payload=b""))]

    fabric.pass_on = cancelling
    with verdict.refused():
        await asked(stage, honest, wire)


@attack("promise a worker endless credit, so that it fills the fabric", "fabric",
        "credit never runs ahead of the bytes sent: 256 KiB", gain="nothing; the worker waits for a reader")  # fmt: skip
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


def booked(name: str, defence: str, gain: str, told: Callable[[Stage, list[bytes]], bytes], *counts: Any) -> Test:
    """The attack of a fabric that shows the gateway another receipt at the end of an answer, which the caller gets whole.

    told: given the receipts that came before. counts: of tokens that the gateway may then write down.
    """

    @attack(name, "fabric", defence, gain=gain)
    async def test(stage: Stage, honest: Stage, wire: HttpWire, fabric: HostileFabric) -> None:
        beats: list[bytes] = []

        def change(frame: Frame) -> Frames:
            if frame.kind is FrameKind.BEAT:
                beats.append(frame.payload)
            return [replace(frame, payload=told(stage, beats))] if frame.kind is FrameKind.USAGE else [frame]

        fabric.pass_on = each(change)
        assert await asked(stage, honest, wire) == stage.prompt
        (outcome,) = await honest.outcomes()
        assert outcome["completion_tokens"] in counts

    return test


def claim(key: Ed25519PrivateKey, enc: str = "A" * 43) -> bytes:
    """A receipt over many tokens."""
    return Receipt(enc, "sha256:00", 1, 0, 500, 0.0, 1.0, final=True).sign(key).encode()


test_forged_receipt = booked("claim usage under a receipt of its own", OF_THE_POOL, BOOKED_LOW,
    lambda stage, _beats: claim(THIEF, b64u(SealedHeader.parse(stage.hub.works[0].sealed).digest)), None, 0)  # fmt: skip
test_another_receipt = booked("settle one request with another's receipt", "a receipt names the digest of its request",
    BOOKED_LOW, lambda stage, _beats: claim(stage.keys.receipts), None, 0)  # fmt: skip
test_first_receipt = booked("settle a request with its first receipt in place of its last", "nothing: the pool signed both",
    "a lower bill for one caller; never a higher one than the pool signed", lambda _stage, beats: beats[0], 0)  # fmt: skip
