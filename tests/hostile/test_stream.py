"""A sealed answer on its way through the gateway's owner: what can be done to it without its key."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator

import httpx2
import pytest

from hostile.adversary import Change, GatewayOwner, SealedAnswer, framed
from hostile.attacks import Verdict, attack
from hostile.callers import Caller
from lacre import OpenError
from lacre.errors import InvalidMessage, MessageTooLarge, TruncatedStream
from lacre.wire.framing import MAX_CHUNK
from lacre.wire.header import MEDIA_TYPE_RESPONSE
from parts.bent import flipped, replaced, swapped
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


def changed(name: str, defence: str, refused: type[Exception], *changes: Change) -> Callable[..., Awaitable[None]]:
    """The attack of a gateway that changes an answer so; with several `changes`, each has a test of its own."""

    @attack(name, by="gateway", defence=defence, refused=refused)
    @pytest.mark.parametrize("change", changes, ids=map(str, range(len(changes))))
    async def test(stage: Stage, caller: Caller, gateway: GatewayOwner, verdict: Verdict, change: Change) -> None:
        gateway.change = change
        with verdict.refused():
            await asked(stage, caller)

    return test


def records(change: Callable[[list[bytes]], list[bytes]]) -> Change:
    """A change of the records alone."""
    return lambda answer: SealedAnswer(answer.nonce, change(answer.chunks), answer.final)


def at(number: int, change: Callable[[bytes], list[bytes]]) -> Change:
    """Replaces one record by others."""
    return records(lambda chunks: replaced(chunks, number, *change(chunks[number])))


async def test_nothing(stage: Stage, caller: Caller, gateway: GatewayOwner) -> None:
    """The adversary at rest: the prompt comes back, and is seen by nobody but the worker and the caller."""
    worker = await stage.worker()
    assert await caller.stream(stage.prompt) == stage.prompt
    assert (await caller.chat(stage.prompt)).text == stage.prompt
    assert worker.calls == 2
    assert stage.canary.encode() in worker.app.bodies[0]
    assert len(SealedAnswer.parse(gateway.answers[0]).chunks) > 10


# Records


ONE = "each record is authenticated (AEAD)"
NO_KEY = "the answer's key never leaves worker and caller"
HOLDS = "a record that is not final holds at least one byte"
TO_THE_END = "the final chunk reaches to the end of the body"

test_swap = changed("swap two records", COUNTED, OpenError, records(lambda chunks: swapped(chunks, 2, 3)))
test_duplicate = changed("send a record twice", COUNTED, OpenError, at(3, lambda chunk: [chunk, chunk]))
test_drop = changed("leave out a record", COUNTED, OpenError, *(at(number, lambda _chunk: []) for number in (0, 3, -1)))
test_flip = changed(
    "flip one bit of a record", ONE, OpenError,
    *(at(1, lambda chunk, place=place: [flipped(chunk, place, secrets.randbelow(8))]) for place in (0, 7, -1)),
)  # fmt: skip
test_nonce = changed(
    "flip one bit of the answer's nonce", NONCE, OpenError,
    lambda answer: SealedAnswer(flipped(answer.nonce, 0), answer.chunks, answer.final),
)  # fmt: skip
test_extend_a_record = changed("make a record longer", ONE, OpenError, at(2, lambda chunk: [chunk + b"\x00"]))
test_join = changed(
    "join two records into one", ONE, OpenError, records(lambda chunks: [*chunks[:2], chunks[2] + chunks[3], *chunks[4:]])
)
test_insert = changed("put in a record of its own", NO_KEY, OpenError, at(2, lambda chunk: [secrets.token_bytes(64), chunk]))
test_empty_record = changed(
    "put in an empty record", HOLDS, InvalidMessage,
    *(at(2, lambda chunk, length=length: [bytes(length), chunk]) for length in (1, 16)),
)  # fmt: skip


# The end


def relabelled(answer: SealedAnswer) -> SealedAnswer:
    follows = [answer.final] if len(answer.final) > 16 else [answer.final + b"\x00"]
    return SealedAnswer(answer.nonce, [*answer.chunks, *follows], secrets.token_bytes(32))


async def breaking(answer: SealedAnswer) -> AsyncIterator[bytes]:
    yield answer.nonce + framed(answer.chunks[0])
    raise httpx2.ReadError("reset by peer")


test_truncate = changed(
    "end an answer early, between two records", WHOLE, TruncatedStream,
    lambda answer: answer.nonce + b"".join(map(framed, answer.chunks[:5])),
)  # fmt: skip
test_without_the_final_chunk = changed(
    "end an answer after all of its text, before its final chunk", WHOLE, TruncatedStream,
    lambda answer: answer.nonce + b"".join(map(framed, answer.chunks)),
)  # fmt: skip
test_truncate_inside = changed(
    "end an answer inside a record", WHOLE, TruncatedStream,
    lambda answer: answer.encode()[: 32 + len(framed(answer.chunks[0])) + 9],
)  # fmt: skip
test_early_final = changed(
    "present an earlier record as the final one", FINAL, OpenError,
    lambda answer: SealedAnswer(answer.nonce, answer.chunks[:5], answer.chunks[5]),
)  # fmt: skip
test_final_as_another = changed("present the final chunk as one that others follow", FINAL, OpenError, relabelled)
test_append = changed("append bytes after the final chunk", TO_THE_END, OpenError, lambda answer: answer.encode() + b"\x00")
test_append_an_answer = changed(
    "append a second whole answer", TO_THE_END, OpenError,
    lambda answer: answer.encode() + framed(answer.chunks[0]) + b"\x00" + answer.final,
)  # fmt: skip
test_break = changed("break the connection during the answer", WHOLE, TruncatedStream, breaking)
test_empty = changed(
    "answer with an empty body of the right type", WHOLE, TruncatedStream,
    *(lambda _answer, body=bytes(length): body for length in (0, 31, 32)),
)  # fmt: skip


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


test_huge_length = changed(
    "announce a record of 2^62 - 1 bytes", LENGTHS, MessageTooLarge,
    lambda answer: answer.nonce + b"\xff" * 8 + b"".join(answer.chunks),
)  # fmt: skip


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
