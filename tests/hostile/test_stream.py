"""A sealed answer on its way through the gateway's owner: what can be done to it without its key."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator, Callable, Iterator

import httpx2
import pytest

from hostile.adversary import GatewayOwner, SealedAnswer, framed
from hostile.attacks import Verdict, attack
from hostile.callers import Caller
from lacre import OpenError
from lacre.errors import InvalidMessage, MessageTooLarge, TruncatedStream
from lacre.wire.framing import MAX_CHUNK
from lacre.wire.header import MEDIA_TYPE_RESPONSE
from parts.stage import Stage
from parts.wires import Pieces

COUNTED = "a record's nonce counts it: only the next record opens"
FINAL = "only the final chunk is sealed under the AAD `final`"
WHOLE = "an answer is whole only when its final chunk has opened"
LENGTHS = "a length is checked before anything is buffered"
NONCE = "the answer's key is derived from its nonce"


async def asked(stage: Stage, caller: Caller, *, calls: int = 1) -> None:
    """Somebody asks, and gets an answer that the adversary has changed. calls: how often the worker's app was called."""
    worker = await stage.worker()
    try:
        await caller.stream(stage.prompt)
    finally:
        assert worker.calls == calls


def at(number: int, change: Callable[[bytes], list[bytes]]) -> Callable[[SealedAnswer], SealedAnswer]:
    """Replaces one record by others."""

    def apply(answer: SealedAnswer) -> SealedAnswer:
        answer.chunks[number : number + 1] = change(answer.chunks[number])
        return answer

    return apply


async def test_nothing(stage: Stage, caller: Caller, gateway: GatewayOwner) -> None:
    """The adversary at rest: the prompt comes back, and is seen by nobody but the worker and the caller."""
    worker = await stage.worker()
    assert await caller.stream(stage.prompt) == stage.prompt
    assert (await caller.chat(stage.prompt)).text == stage.prompt
    assert worker.calls == 2
    assert stage.canary.encode() in worker.app.bodies[0]
    assert len(SealedAnswer.parse(gateway.answers[0]).chunks) > 10


# Records


@attack("swap two records", by="gateway", defence=COUNTED, refused=OpenError)
async def test_swap(stage: Stage, caller: Caller, gateway: GatewayOwner, verdict: Verdict) -> None:
    def swap(answer: SealedAnswer) -> SealedAnswer:
        answer.chunks[2], answer.chunks[3] = answer.chunks[3], answer.chunks[2]
        return answer

    gateway.change = swap
    with verdict.refused():
        await asked(stage, caller)


@attack("send a record twice", by="gateway", defence=COUNTED, refused=OpenError)
async def test_duplicate(stage: Stage, caller: Caller, gateway: GatewayOwner, verdict: Verdict) -> None:
    gateway.change = at(3, lambda chunk: [chunk, chunk])
    with verdict.refused():
        await asked(stage, caller)


@attack("leave out a record", by="gateway", defence=COUNTED, refused=OpenError)
@pytest.mark.parametrize("number", [0, 3, -1])
async def test_drop(stage: Stage, caller: Caller, gateway: GatewayOwner, verdict: Verdict, number: int) -> None:
    def drop(answer: SealedAnswer) -> SealedAnswer:
        del answer.chunks[number]
        return answer

    gateway.change = drop
    with verdict.refused():
        await asked(stage, caller)


@attack("flip one bit of a record", by="gateway", defence="each record is authenticated (AEAD)", refused=OpenError)
@pytest.mark.parametrize("place", [0, 7, -1])
async def test_flip(stage: Stage, caller: Caller, gateway: GatewayOwner, verdict: Verdict, place: int) -> None:
    def flip(chunk: bytes) -> list[bytes]:
        altered = bytearray(chunk)
        altered[place] ^= 1 << secrets.randbelow(8)
        return [bytes(altered)]

    gateway.change = at(1, flip)
    with verdict.refused():
        await asked(stage, caller)


@attack("flip one bit of the answer's nonce", by="gateway", defence=NONCE, refused=OpenError)
async def test_nonce(stage: Stage, caller: Caller, gateway: GatewayOwner, verdict: Verdict) -> None:
    def flip(answer: SealedAnswer) -> SealedAnswer:
        answer.nonce = bytes([answer.nonce[0] ^ 1]) + answer.nonce[1:]
        return answer

    gateway.change = flip
    with verdict.refused():
        await asked(stage, caller)


@attack("make a record longer", by="gateway", defence="each record is authenticated (AEAD)", refused=OpenError)
async def test_extend_a_record(stage: Stage, caller: Caller, gateway: GatewayOwner, verdict: Verdict) -> None:
    gateway.change = at(2, lambda chunk: [chunk + b"\x00"])
    with verdict.refused():
        await asked(stage, caller)


@attack("join two records into one", by="gateway", defence="each record is authenticated (AEAD)", refused=OpenError)
async def test_join(stage: Stage, caller: Caller, gateway: GatewayOwner, verdict: Verdict) -> None:
    def join(answer: SealedAnswer) -> SealedAnswer:
        answer.chunks[2:4] = [answer.chunks[2] + answer.chunks[3]]
        return answer

    gateway.change = join
    with verdict.refused():
        await asked(stage, caller)


@attack(
    "put in a record of its own", by="gateway", defence="the answer's key never leaves worker and caller", refused=OpenError
)
async def test_insert(stage: Stage, caller: Caller, gateway: GatewayOwner, verdict: Verdict) -> None:
    gateway.change = at(2, lambda chunk: [secrets.token_bytes(64), chunk])
    with verdict.refused():
        await asked(stage, caller)


@attack(
    "put in an empty record", by="gateway", defence="a record that is not final holds at least one byte", refused=InvalidMessage
)
@pytest.mark.parametrize("length", [1, 16])
async def test_empty_record(stage: Stage, caller: Caller, gateway: GatewayOwner, verdict: Verdict, length: int) -> None:
    gateway.change = at(2, lambda chunk: [bytes(length), chunk])
    with verdict.refused():
        await asked(stage, caller)


# The end


@attack("end an answer early, between two records", by="gateway", defence=WHOLE, refused=TruncatedStream)
async def test_truncate(stage: Stage, caller: Caller, gateway: GatewayOwner, verdict: Verdict) -> None:
    gateway.change = lambda answer: answer.nonce + b"".join(map(framed, answer.chunks[:5]))
    with verdict.refused():
        await asked(stage, caller)


@attack("end an answer after all of its text, before its final chunk", by="gateway", defence=WHOLE, refused=TruncatedStream)
async def test_without_the_final_chunk(stage: Stage, caller: Caller, gateway: GatewayOwner, verdict: Verdict) -> None:
    gateway.change = lambda answer: answer.nonce + b"".join(map(framed, answer.chunks))
    with verdict.refused():
        await asked(stage, caller)


@attack("end an answer inside a record", by="gateway", defence=WHOLE, refused=TruncatedStream)
async def test_truncate_inside(stage: Stage, caller: Caller, gateway: GatewayOwner, verdict: Verdict) -> None:
    gateway.change = lambda answer: answer.encode()[: 32 + len(framed(answer.chunks[0])) + 9]
    with verdict.refused():
        await asked(stage, caller)


@attack("present an earlier record as the final one", by="gateway", defence=FINAL, refused=OpenError)
async def test_early_final(stage: Stage, caller: Caller, gateway: GatewayOwner, verdict: Verdict) -> None:
    gateway.change = lambda answer: SealedAnswer(answer.nonce, answer.chunks[:5], answer.chunks[5])
    with verdict.refused():
        await asked(stage, caller)


@attack("present the final chunk as one that others follow", by="gateway", defence=FINAL, refused=OpenError)
async def test_final_as_another(stage: Stage, caller: Caller, gateway: GatewayOwner, verdict: Verdict) -> None:
    def relabel(answer: SealedAnswer) -> SealedAnswer:
        follows = [answer.final] if len(answer.final) > 16 else [answer.final + b"\x00"]
        return SealedAnswer(answer.nonce, [*answer.chunks, *follows], secrets.token_bytes(32))

    gateway.change = relabel
    with verdict.refused():
        await asked(stage, caller)


@attack(
    "append bytes after the final chunk",
    by="gateway",
    defence="the final chunk reaches to the end of the body",
    refused=OpenError,
)
async def test_append(stage: Stage, caller: Caller, gateway: GatewayOwner, verdict: Verdict) -> None:
    gateway.change = lambda answer: answer.encode() + b"\x00"
    with verdict.refused():
        await asked(stage, caller)


@attack(
    "append a second whole answer", by="gateway", defence="the final chunk reaches to the end of the body", refused=OpenError
)
async def test_append_an_answer(stage: Stage, caller: Caller, gateway: GatewayOwner, verdict: Verdict) -> None:
    gateway.change = lambda answer: answer.encode() + framed(answer.chunks[0]) + b"\x00" + answer.final
    with verdict.refused():
        await asked(stage, caller)


@attack("break the connection during the answer", by="gateway", defence=WHOLE, refused=TruncatedStream)
async def test_break(stage: Stage, caller: Caller, gateway: GatewayOwner, verdict: Verdict) -> None:
    async def breaking(answer: SealedAnswer) -> AsyncIterator[bytes]:
        yield answer.nonce + framed(answer.chunks[0])
        raise httpx2.ReadError("reset by peer")

    gateway.change = breaking
    with verdict.refused():
        await asked(stage, caller)


@attack("answer with an empty body of the right type", by="gateway", defence=WHOLE, refused=TruncatedStream)
@pytest.mark.parametrize("body", [b"", bytes(31), bytes(32)])
async def test_empty(stage: Stage, caller: Caller, gateway: GatewayOwner, verdict: Verdict, body: bytes) -> None:
    gateway.change = lambda _answer: body
    with verdict.refused():
        await asked(stage, caller)


# Lengths


@attack(
    "write a record's length in eight bytes where one is enough",
    by="gateway",
    refused=None,
    defence="nothing: lengths are not authenticated, and longer forms are legal",
    gain="nothing; the same text",
)
async def test_long_lengths(stage: Stage, caller: Caller, gateway: GatewayOwner) -> None:
    def long_form(answer: SealedAnswer) -> bytes:
        prefixed = [(len(chunk) | 0xC000_0000_0000_0000).to_bytes(8, "big") + chunk for chunk in answer.chunks]
        return answer.nonce + b"".join(prefixed) + bytes.fromhex("c000000000000000") + answer.final

    await stage.worker()
    gateway.change = long_form
    assert await caller.stream(stage.prompt) == stage.prompt


@attack("announce a record of 2^62 - 1 bytes", by="gateway", defence=LENGTHS, refused=MessageTooLarge)
async def test_huge_length(stage: Stage, caller: Caller, gateway: GatewayOwner, verdict: Verdict) -> None:
    gateway.change = lambda answer: answer.nonce + b"\xff" * 8 + b"".join(answer.chunks)
    with verdict.refused():
        await asked(stage, caller)


def flood(prefix: bytes) -> tuple[Pieces, Callable[[httpx2.Request], httpx2.Response]]:
    """100 MB of a body that begins with `prefix`."""

    def pieces() -> Iterator[bytes]:
        yield bytes(32) + prefix
        for _ in range(1600):
            yield bytes(65536)

    body = Pieces(pieces())
    headers = {"content-type": MEDIA_TYPE_RESPONSE}
    return body, lambda _request: httpx2.Response(200, headers=headers, stream=body)


@attack("send a first record of 100 MB", by="gateway", defence=LENGTHS, refused=MessageTooLarge)
async def test_huge_first_record(stage: Stage, caller: Caller, gateway: GatewayOwner, verdict: Verdict) -> None:
    body, gateway.respond = flood((100_000_000 | 0xC000_0000_0000_0000).to_bytes(8, "big"))
    with verdict.refused():
        await asked(stage, caller, calls=0)
    assert body.pulled < 100


@attack("send a final chunk of 100 MB", by="gateway", defence=LENGTHS, refused=MessageTooLarge)
async def test_huge_final_chunk(stage: Stage, caller: Caller, gateway: GatewayOwner, verdict: Verdict) -> None:
    body, gateway.respond = flood(b"\x00")
    with verdict.refused():
        await asked(stage, caller, calls=0)
    assert body.pulled < 2 * 65536 + MAX_CHUNK


# Other answers


@attack(
    "answer with bytes sealed for an earlier request of the same caller",
    by="gateway",
    refused=OpenError,
    defence="the answer's key is exported from this one request's context",
)
async def test_an_earlier_answer(stage: Stage, caller: Caller, gateway: GatewayOwner, verdict: Verdict) -> None:
    await stage.worker()
    await caller.stream(stage.prompt)
    gateway.change = lambda _answer: gateway.answers[0]
    with verdict.refused():
        await caller.stream(stage.prompt)


@attack(
    "hand one caller's answer to another",
    by="gateway",
    refused=OpenError,
    defence="the answer's key is exported from this one request's context",
)
async def test_another_callers_answer(stage: Stage, caller: Caller, gateway: GatewayOwner, verdict: Verdict) -> None:
    await stage.worker()
    assert "two seas" in (await stage.client(gateway).chat("two seas")).text
    gateway.change = lambda _answer: gateway.answers[0]
    with verdict.refused():
        await caller.chat(stage.prompt)


# Time


@attack(
    "drip an answer byte by byte",
    by="gateway",
    defence="nothing: anyone who carries an answer can be slow",
    refused=None,
    gain="delay; every record opens as soon as it is there",
)
async def test_drip(stage: Stage, caller: Caller, gateway: GatewayOwner) -> None:
    await stage.worker()
    gateway.change = lambda answer: [bytes([byte]) for byte in answer.encode()]
    assert (await caller.chat("Hi.")).text == "Hi."
