"""Answers without a seal, or with one in the wrong place: they may change what is tried next, never what is trusted."""

from __future__ import annotations

import asyncio
import gzip
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx2
import pytest

import lacre
from hostile.adversary import GatewayOwner, framed, response
from hostile.attacks import Verdict, attack
from hostile.callers import Caller
from hostile.shapes import Test, answered, flooded
from lacre import OpenError, problems
from lacre.errors import NetworkError, RefusedError, Unavailable, UnsealedResponse
from lacre.jose.jws import raw_public_key
from lacre.transport.sealed import TimedOut
from lacre.trust.chain import ConnectionString
from lacre.wire.header import MEDIA_TYPE_RESPONSE
from parts import audited
from parts.stage import Stage
from parts.wires import Pieces

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


@attack(
    "redirect the request to another host", "gateway", "redirects are not followed", Unavailable, cases=[301, 302, 307, 308]
)
async def test_redirect(stage: Stage, caller: Caller, gateway: GatewayOwner, verdict: Verdict, case: int) -> None:
    to = {"location": "http://evil.example/v1/sealed"}
    gateway.respond = lambda _request: httpx2.Response(case, headers=to, stream=Pieces([b""]))
    with verdict.refused():
        await caller.chat(stage.prompt)
    assert len(gateway.posts) == 1
    assert {request.url.host for request in gateway.requests} == {"127.0.0.1"}


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
