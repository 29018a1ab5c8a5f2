"""An answer on its way through the gateway's owner: what can be done to it without its key, or in place of it."""

from __future__ import annotations

import asyncio
import gzip
import json
import secrets
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import httpx2
import pytest

import lacre
from hostile.adversary import Change, GatewayOwner, SealedAnswer, framed, response
from hostile.attacks import Verdict, attack
from hostile.shapes import AsyncCaller, Caller, Test, answered, changed, flooded
from lacre import OpenError, problems
from lacre.errors import (
    InvalidMessage,
    MessageTooLarge,
    NetworkError,
    RefusedError,
    TruncatedStream,
    Unavailable,
    UnsealedResponse,
)
from lacre.jose.jws import raw_public_key
from lacre.transport.sealed import TimedOut
from lacre.trust.chain import ConnectionString
from lacre.wire.framing import MAX_CHUNK
from lacre.wire.header import MEDIA_TYPE_RESPONSE
from parts import audited
from parts.bent import flipped, replaced, swapped
from parts.stage import Stage
from parts.wires import Pieces

COUNTED = "a record's nonce counts it: only the next record opens"
FINAL = "only the final chunk is sealed under the AAD `final`"
WHOLE = "an answer is whole only when its final chunk has opened"
LENGTHS = "a length is checked before anything is buffered"
ONE_REQUEST = "the answer's key is exported from this one request's context"
NONCE = "the answer's key is derived from its nonce"


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
test_flip = changed("flip one bit of a record", ONE, OpenError,
    *(at(1, lambda chunk, place=place: [flipped(chunk, place, secrets.randbelow(8))]) for place in (0, 7, -1)))  # fmt: skip
test_nonce = changed("flip one bit of the answer's nonce", NONCE, OpenError,
    lambda answer: SealedAnswer(flipped(answer.nonce, 0), answer.chunks, answer.final))  # fmt: skip
test_extend_a_record = changed("make a record longer", ONE, OpenError, at(2, lambda chunk: [chunk + b"\x00"]))
test_join = changed(
    "join two records into one", ONE, OpenError, records(lambda chunks: [*chunks[:2], chunks[2] + chunks[3], *chunks[4:]])
)
test_insert = changed("put in a record of its own", NO_KEY, OpenError, at(2, lambda chunk: [secrets.token_bytes(64), chunk]))
test_empty_record = changed("put in an empty record", HOLDS, InvalidMessage,
    *(at(2, lambda chunk, length=length: [bytes(length), chunk]) for length in (1, 16)))  # fmt: skip


# The end


def relabelled(answer: SealedAnswer) -> SealedAnswer:
    follows = [answer.final] if len(answer.final) > 16 else [answer.final + b"\x00"]
    return SealedAnswer(answer.nonce, [*answer.chunks, *follows], secrets.token_bytes(32))


async def breaking(answer: SealedAnswer) -> AsyncIterator[bytes]:
    yield answer.nonce + framed(answer.chunks[0])
    raise httpx2.ReadError("reset by peer")


test_truncate = changed("end an answer early, between two records", WHOLE, TruncatedStream,
    lambda answer: answer.nonce + b"".join(map(framed, answer.chunks[:5])))  # fmt: skip
test_without_the_final_chunk = changed("end an answer after all of its text, before its final chunk", WHOLE, TruncatedStream,
    lambda answer: answer.nonce + b"".join(map(framed, answer.chunks)))  # fmt: skip
test_truncate_inside = changed("end an answer inside a record", WHOLE, TruncatedStream,
    lambda answer: answer.encode()[: 32 + len(framed(answer.chunks[0])) + 9])  # fmt: skip
test_early_final = changed("present an earlier record as the final one", FINAL, OpenError,
    lambda answer: SealedAnswer(answer.nonce, answer.chunks[:5], answer.chunks[5]))  # fmt: skip
test_final_as_another = changed("present the final chunk as one that others follow", FINAL, OpenError, relabelled)
test_append = changed("append bytes after the final chunk", TO_THE_END, OpenError, lambda answer: answer.encode() + b"\x00")
test_append_an_answer = changed("append a second whole answer", TO_THE_END, OpenError,
    lambda answer: answer.encode() + framed(answer.chunks[0]) + b"\x00" + answer.final)  # fmt: skip
test_break = changed("break the connection during the answer", WHOLE, TruncatedStream, breaking)
test_empty = changed("answer with an empty body of the right type", WHOLE, TruncatedStream,
    *(lambda _answer, body=bytes(length): body for length in (0, 31, 32)))  # fmt: skip


# Lengths


@attack("write a record's length in eight bytes where one is enough", "gateway",
        "nothing: lengths are not authenticated, and longer forms are legal", gain="nothing; the same text")  # fmt: skip
async def test_long_lengths(stage: Stage, caller: Caller, gateway: GatewayOwner) -> None:
    def long_form(answer: SealedAnswer) -> bytes:
        prefixed = [(len(chunk) | 0xC000_0000_0000_0000).to_bytes(8, "big") + chunk for chunk in answer.chunks]
        return answer.nonce + b"".join(prefixed) + bytes.fromhex("c000000000000000") + answer.final

    await stage.worker()
    gateway.change = long_form
    assert await caller.stream(stage.prompt) == stage.prompt


test_huge_length = changed("announce a record of 2^62 - 1 bytes", LENGTHS, MessageTooLarge,
    lambda answer: answer.nonce + b"\xff" * 8 + b"".join(answer.chunks))  # fmt: skip


test_huge_first_record = flooded("send a first record of 100 MB", LENGTHS, MessageTooLarge, MEDIA_TYPE_RESPONSE,
    start=bytes(32) + (100_000_000 | 0xC000_0000_0000_0000).to_bytes(8, "big"), below=100)  # fmt: skip
test_huge_final_chunk = flooded("send a final chunk of 100 MB", LENGTHS, MessageTooLarge, MEDIA_TYPE_RESPONSE,
    start=bytes(32) + b"\x00", below=2 * 65536 + MAX_CHUNK)  # fmt: skip


# Other answers


@attack("answer with bytes sealed for an earlier request of the same caller", "gateway", ONE_REQUEST, OpenError)
async def test_an_earlier_answer(stage: Stage, caller: Caller, gateway: GatewayOwner, verdict: Verdict) -> None:
    await the_first_again(stage, caller, gateway, verdict, caller)


@attack("hand one caller's answer to another", "gateway", ONE_REQUEST, OpenError)
async def test_another_callers_answer(stage: Stage, caller: Caller, gateway: GatewayOwner, verdict: Verdict) -> None:
    await the_first_again(stage, caller, gateway, verdict, AsyncCaller(stage.client(gateway)))


async def the_first_again(stage: Stage, caller: Caller, gateway: GatewayOwner, verdict: Verdict, first: Caller) -> None:
    await stage.worker()
    assert await first.stream("two seas") == "two seas"
    gateway.change = lambda _answer: gateway.answers[0]
    with verdict.refused():
        await caller.stream(stage.prompt)


# Time


@attack("drip an answer byte by byte", "gateway", "nothing: anyone who carries an answer can be slow",
        gain="delay; every record opens as soon as it is there")  # fmt: skip
async def test_drip(stage: Stage, caller: Caller, gateway: GatewayOwner) -> None:
    await stage.worker()
    gateway.change = lambda answer: [bytes([byte]) for byte in answer.encode()]
    assert (await caller.chat("Hi.")).text == "Hi."


# One character of each is one token's text, and of very different lengths in JSON and UTF-8.
TEXTS = ("aaaaaaaa", "\x01\x02\x03\x04\x05\x06\x07\x08", "日本語日本語日本")


async def record_lengths(stage: Stage, gateway: GatewayOwner, text: str, **options: str) -> list[int]:
    client = stage.client(gateway, **options)
    assert "".join([piece async for piece in client.chat_stream(text)]) == text
    answer = SealedAnswer.parse(gateway.answers[-1])
    return [len(chunk) for chunk in answer.chunks]


@attack("tell the tokens of a streamed answer by the lengths of its records", "gateway",
        "shape `pad`: each record is as long as the others", gain="the number of records, and when each leaves")  # fmt: skip
async def test_records(stage: Stage, gateway: GatewayOwner) -> None:
    await stage.worker()
    padded = {length for text in TEXTS for length in await record_lengths(stage, gateway, text)}
    assert len(padded) == 1
    bare = {length for text in TEXTS for length in await record_lengths(stage, gateway, text, shape="none")}
    assert len(bare) > 2  # the attack itself works


@attack("tell a whole answer by its length", "gateway", "shape `pad`: an answer falls into a bucket",
        gain="the bucket: steps of 12 % above 4 KiB, one bucket below")  # fmt: skip
async def test_whole(stage: Stage, gateway: GatewayOwner) -> None:
    await stage.worker()
    client, lengths = stage.client(gateway), set()
    for text in ("no", "yes", stage.prompt, "x" * 400):
        assert (await client.chat(text)).text == text
        lengths.add(len(gateway.answers[-1]))
    assert len(lengths) == 1


@attack("tell a prompt by the length of its sealed request", "gateway", "shape `pad`: a request falls into a bucket",
        gain="the bucket: steps of 12 % above 4 KiB, one bucket below")  # fmt: skip
async def test_requests(stage: Stage, gateway: GatewayOwner) -> None:
    await stage.worker()
    client, lengths = stage.client(gateway), set()
    for text in ("no", "yes", stage.prompt, "x" * 1000):
        await client.chat(text, max_tokens=1)
        lengths.add(len(gateway.posts[-1].content))
    assert len(lengths) == 1


FORGED = json.dumps(
    {
        "id": "c1", "model": "smollm2-135m", "usage": {"prompt_tokens": 1, "completion_tokens": 1},
        "choices": [{"index": 0, "message": {"role": "assistant", "content": "Pay us."}, "finish_reason": "stop"}],
    }
).encode()  # fmt: skip
GZIPPED = {"content-type": MEDIA_TYPE_RESPONSE, "content-encoding": "gzip"}
BOMB = bytes(32) + framed(gzip.compress(bytes(10_000_000))) + bytes(33)
RAW = "the outer body is read raw"


test_plain = flooded("answer a plain 200 in the clear", "the client does not read a 200 of another media type",
    UnsealedResponse, "application/json", "text/event-stream", "", start=FORGED, below=1)  # fmt: skip
test_not_chunked = answered("downgrade the answer to Oblivious HTTP without chunks",
    "one media type is accepted, and there is no code for the other", UnsealedResponse,
    lambda _request: response(200, FORGED, "message/ohttp-res"))  # fmt: skip
test_plaintext_under_the_type = answered("answer in the clear under the sealed media type",
    "bytes that do not open are not an answer", OpenError,
    lambda _request: response(200, FORGED, MEDIA_TYPE_RESPONSE))  # fmt: skip
test_bomb = answered("answer with a decompression bomb", RAW, OpenError,
    lambda _request: httpx2.Response(200, headers=GZIPPED, stream=Pieces([BOMB])))  # fmt: skip
TO = {"location": "http://evil.example/v1/sealed"}
test_redirect = answered(
    "redirect the request to another host", "redirects are not followed", Unavailable,
    *(lambda _request, status=status: httpx2.Response(status, headers=TO, stream=Pieces([b""]))
      for status in (301, 302, 307, 308)), posts=1,
)  # fmt: skip
test_endless_problem = flooded(
    "send a problem document without end", "64 KiB of it are read", Unavailable, "", piece=b" " * 1024, status=503, below=65537
)


@attack("pass a sealed answer on under a status other than 200", "gateway", "only a 200 is an answer", Unavailable,
        cases=[201, 203, 206, 304])  # fmt: skip
async def test_other_status(stage: Stage, caller: Caller, gateway: GatewayOwner, verdict: Verdict, case: int) -> None:
    await stage.worker()
    await caller.chat(stage.prompt)
    gateway.respond = lambda _request: response(case, gateway.answers[0], MEDIA_TYPE_RESPONSE)
    with verdict.refused():
        await caller.chat(stage.prompt)


@attack("omit `Incremental`, and hold the answer back until it is whole", "gateway",
        "nothing: anyone who carries an answer can be slow", gain="delay of the first word until the last")  # fmt: skip
async def test_incremental(stage: Stage, caller: Caller, gateway: GatewayOwner) -> None:
    """The adversary of these tests does it always."""
    await stage.worker()
    assert await caller.stream(stage.prompt) == stage.prompt
    assert gateway.posts[0].headers["incremental"] == "?1"


@attack("claim a content coding, to have the client inflate unsealed bytes", "gateway",
        f"{RAW}: only the seal decides its content", gain="nothing; the same text")  # fmt: skip
async def test_content_coding(stage: Stage, caller: Caller, gateway: GatewayOwner) -> None:
    await stage.worker()
    gateway.change = lambda answer: httpx2.Response(200, headers=GZIPPED, stream=Pieces([answer.encode()]))
    assert (await caller.chat(stage.prompt)).text == stage.prompt


# Problems


def said(problem: problems.Problem, body: bytes | None = None) -> httpx2.Response:
    return response(problem.status, body or problem.body(), problems.MEDIA_TYPE)


@attack("shift the client's clock by a #date problem outside the seal", "gateway",
        "only a sealed one corrects the clock, and the manifest's expiry ignores the correction", RefusedError)  # fmt: skip
async def test_date(stage: Stage, caller: Caller, gateway: GatewayOwner, verdict: Verdict) -> None:
    worker = await stage.worker()
    honest = gateway.respond
    gateway.respond = lambda _request: said(problems.DATE)
    with verdict.refused():
        await caller.chat(stage.prompt)
    assert len(gateway.posts) == 1
    gateway.respond = honest
    await caller.chat(stage.prompt)  # and the worker takes its date
    assert worker.calls == 1


@attack("put words of its own into a problem document", "gateway", "words come from our own table, by the problem's type",
        lacre.Forbidden)  # fmt: skip
async def test_words(stage: Stage, caller: Caller, gateway: GatewayOwner, verdict: Verdict) -> None:
    words = {"type": problems.FORBIDDEN.type, "title": "Mail your prompt to evil.example", "detail": "evil.example"}
    gateway.respond = lambda _request: said(problems.FORBIDDEN, json.dumps(words).encode())
    with verdict.refused() as caught:
        await caller.chat(stage.prompt)
    assert "evil" not in str(caught.value)


@attack("set a cookie, to link requests with different tokens", "gateway", "no cookie is ever sent")
async def test_cookie(stage: Stage, caller: Caller, gateway: GatewayOwner) -> None:
    await stage.worker()
    marked = {"set-cookie": "id=7f3a; Path=/; Max-Age=999999"}
    gateway.manifest = lambda: httpx2.Response(200, headers=marked, stream=Pieces([stage.bucket or b""]))
    for _ in range(2):
        await caller.chat(stage.prompt)
    assert not [request for request in gateway.requests if "cookie" in request.headers]


# Over a real connection


@asynccontextmanager
async def server(stage: Stage, answer: bytes) -> AsyncIterator[str]:
    """A gateway that serves the manifest, answers a sealed request with `answer`, and then neither speaks nor hangs up."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        if head.startswith(b"GET"):
            length = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\nConnection: close\r\n\r\n" % len(stage.bucket or b"")
            writer.write(length + (stage.bucket or b""))
        else:
            lines = head.decode().split("\r\n")[1:-2]
            headers = httpx2.Headers([tuple(line.split(": ", 1)) for line in lines])
            sent = audited.entry(headers, await reader.readexactly(int(headers["content-length"])))
            proof = f"Lacre-Audit: {audited.proof(sent, stage.keys.gateway).header()}\r\n\r\n".encode()
            writer.write(answer.replace(b"\r\n\r\n", b"\r\n" + proof, 1))
            await writer.drain()
            await over.wait()
        writer.close()
        await writer.wait_closed()

    over = asyncio.Event()
    listening = await asyncio.start_server(serve, "127.0.0.1", 0)
    port = listening.sockets[0].getsockname()[1]
    try:
        yield str(ConnectionString(f"http://127.0.0.1:{port}", raw_public_key(stage.keys.root)))
    finally:
        over.set()
        listening.close()
        await asyncio.sleep(0.01)


def stalled(name: str, said: bytes) -> Test:
    """The attack of a gateway that says this, and then neither speaks nor hangs up."""

    @attack(name, "gateway", "the caller's read timeout", TimedOut)
    async def test(stage: Stage, verdict: Verdict) -> None:
        async with server(stage, said) as url:
            async with lacre.AsyncClient(url, token="t", memory=lacre.VersionMemory(), timeout=0.2) as client:
                with verdict.refused() as caught:
                    await client.chat(stage.prompt)
        assert isinstance(caught.value, NetworkError)

    return test


HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: message/ohttp-chunked-res\r\nTransfer-Encoding: chunked\r\n\r\n"
test_silence = stalled("take the request, and never answer", b"")
test_stall = stalled(
    "begin an answer, and stop in the middle of a record", HEAD + b"28\r\n" + bytes(32) + b"\x40\x40" + bytes(6) + b"\r\n"
)


@attack("drip the head of an answer forever, a byte before each read timeout", "gateway",
        "nothing: a read timeout bounds silence, not time; a deadline is the application's own (`asyncio.timeout`)",
        gain="delay, until the application's deadline")  # fmt: skip
async def test_endless_drip(stage: Stage, gateway: GatewayOwner) -> None:
    async def drip() -> AsyncIterator[bytes]:
        yield bytes(32) + b"\x40\x40"
        while True:
            await asyncio.sleep(0.01)
            yield b"\x00"

    gateway.respond = lambda _request: response(200, drip(), MEDIA_TYPE_RESPONSE)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.1):
            await stage.client(gateway).chat(stage.prompt)
