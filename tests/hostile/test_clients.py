"""A malicious caller: what it seals is its own, and so is what it says outside. Neither may harm the worker or anybody else."""

from __future__ import annotations

import gzip
import json
import secrets
import time
from email.utils import formatdate
from typing import Any

import httpx2
import pytest

from hostile.adversary import AsgiWire, GatewayOwner, inner
from hostile.attacks import Verdict, attack
from hostile.honest import HonestGateway
from hostile.stage import MODEL, OTHER_MODEL, Stage
from lacre import ApiError, problems
from lacre.asgi import Receive, Scope, Send
from lacre.errors import TruncatedStream
from lacre.wire import varint
from lacre.wire.bhttp import MAX_REQUEST_PIECES, encode_request, encode_request_indeterminate
from lacre.wire.fields import MAX_FIELDS
from lacre.wire.header import MAX_REQUEST_CHUNKS, MAX_SEALED_REQUEST, MEDIA_TYPE_REQUEST, Aead, Kdf, Kem
from lacre.wire.ohttp import RequestSealer, seal_request
from lacre.wire.opening import PrivateKey

FORM = "the message in the seal is checked whole before it is acted on (RFC 9292)"
INSIDE = "the worker compares the inside with the grant"

OUTER_HEADERS = {
    "content-type": MEDIA_TYPE_REQUEST, "lacre-pool": "default", "lacre-model": MODEL, "lacre-action": "chat",
    "lacre-max-tokens": "512", "lacre-shape": "none",
}  # fmt: skip


def chat(stage: Stage, **members: Any) -> bytes:
    body = {"model": MODEL, "messages": [{"role": "user", "content": stage.prompt}], **members}
    return json.dumps({name: value for name, value in body.items() if value is not None}).encode()


def part(data: bytes) -> bytes:
    return varint.encode(len(data)) + data


def by_hand(*headers: tuple[bytes, bytes], content: bytes = b"{}", path: bytes = b"/v1/chat/completions") -> bytes:
    """A known-length request that no encoder of ours would write."""
    date = (b"date", formatdate(time.time(), usegmt=True).encode())
    control = b"".join(map(part, (b"POST", b"https", b"lacre.invalid", path)))
    lines = b"".join(part(name) + part(value) for name, value in (date, *headers))
    return b"\x00" + control + part(lines) + part(content) + b"\x00"


async def unread(gateway: GatewayOwner, stage: Stage, verdict: Verdict, message: bytes) -> None:
    """The worker takes `message` for no request: the app is not called, and it goes on working for others."""
    worker = await stage.worker()
    verdict.said((await gateway.submit(message)).problem)
    assert worker.calls == 0
    assert (await gateway.submit(encode_request(inner(chat(stage))))).status == 200


async def told(gateway: GatewayOwner, stage: Stage, verdict: Verdict, message: bytes, *, calls: int = 0, **grant: Any) -> None:
    """The worker answers `message` with an error inside the seal."""
    worker = await stage.worker()
    answer = await gateway.submit(message, **grant)
    assert answer.problem is None
    verdict.answered(answer.status, answer.code)
    assert worker.calls == calls


# The form of what is sealed


@attack("lie about the length of the content", by="client", defence=FORM, refused=problems.INVALID_REQUEST)
@pytest.mark.parametrize("length", [b"1", b"3", b"99999999999999", b"+2", b"2, 3", b"0x2", b"9" * 20])
async def test_content_length(stage: Stage, gateway: GatewayOwner, verdict: Verdict, length: bytes) -> None:
    await unread(gateway, stage, verdict, by_hand((b"content-length", length)))


@attack("give two lengths of the content", by="client", defence=FORM, refused=problems.INVALID_REQUEST)
async def test_two_lengths(stage: Stage, gateway: GatewayOwner, verdict: Verdict) -> None:
    await stage.worker()
    for other in range(3, 20):
        second = (b"content-length", str(other).encode())
        verdict.said((await gateway.submit(by_hand((b"content-length", b"2"), second))).problem)


@attack("smuggle a second request by a transfer coding", by="client", defence=FORM, refused=problems.INVALID_REQUEST)
@pytest.mark.parametrize("header", [(b"transfer-encoding", b"chunked"), (b"connection", b"upgrade"), (b"te", b"gzip")])
async def test_transfer_coding(stage: Stage, gateway: GatewayOwner, verdict: Verdict, header: tuple[bytes, bytes]) -> None:
    await unread(gateway, stage, verdict, by_hand(header, content=b"0\r\n\r\nGET /admin HTTP/1.1\r\n\r\n"))


@attack(
    "split a header by line breaks, or name one in capitals or like a pseudo-field",
    by="client",
    defence=FORM,
    refused=problems.INVALID_REQUEST,
)
@pytest.mark.parametrize(
    "header",
    [(b"x", b"a\r\nhost: evil"), (b"x\ny", b"a"), (b"x", b"\x00"), (b"Date", b"a"), (b":path", b"/admin"), (b"", b"a")],
)
async def test_header_splitting(stage: Stage, gateway: GatewayOwner, verdict: Verdict, header: tuple[bytes, bytes]) -> None:
    await unread(gateway, stage, verdict, by_hand(header))


@attack(
    "flood the worker with headers",
    by="client",
    defence="limits on fields and on their sections",
    refused=problems.INVALID_REQUEST,
)
@pytest.mark.parametrize(
    "headers",
    [((b"x", b"a"),) * MAX_FIELDS, ((b"x", b"a" * 16384),) * 5, ((b"x", b"a" * 16385),), ((b"x" * 257, b"a"),)],
    ids=["many", "large", "long", "long-name"],
)
async def test_header_flood(
    stage: Stage, gateway: GatewayOwner, verdict: Verdict, headers: tuple[tuple[bytes, bytes], ...]
) -> None:
    await unread(gateway, stage, verdict, by_hand(*headers))


@attack(
    "announce a part of the message of 2^62 - 1 bytes",
    by="client",
    defence="a length is judged before anything of it is buffered",
    refused=problems.INVALID_REQUEST,
)
@pytest.mark.parametrize("before", [b"", b"\x04POST", b"\x04POST\x05https\x0dlacre.invalid\x01/"])
async def test_huge_part(stage: Stage, gateway: GatewayOwner, verdict: Verdict, before: bytes) -> None:
    await unread(gateway, stage, verdict, b"\x00" + before + b"\xff" * 8)


@attack(
    "send the content in hundreds of thousands of chunks of a byte, and hold up everybody else's answers",
    by="client",
    defence="a limit on chunks of content",
    refused=problems.INVALID_REQUEST,
)
async def test_tiny_pieces(stage: Stage, gateway: GatewayOwner, verdict: Verdict) -> None:
    whole = encode_request_indeterminate(inner())
    head = whole[: whole.index(b"\x00\x02{}\x00\x00") + 1]
    began = time.monotonic()
    await unread(gateway, stage, verdict, head + b"\x01a" * 500_000 + b"\x00\x00")
    assert time.monotonic() - began < 2
    fewer = head + b"\x01 " * (MAX_REQUEST_PIECES - 1) + part(chat(stage)) + b"\x00\x00"
    assert (await gateway.submit(fewer)).status == 200


@attack(
    "end the message in the middle of one of its parts, in a seal that is whole",
    by="client",
    defence=FORM,
    refused=problems.INVALID_REQUEST,
)
@pytest.mark.parametrize("kept", [0, 1, 9, 40, -3])
async def test_cut_inside(stage: Stage, gateway: GatewayOwner, verdict: Verdict, kept: int) -> None:
    await unread(gateway, stage, verdict, encode_request(inner(b"0123456789"))[:kept])


@attack("put a second message after the first", by="client", defence=FORM, refused=problems.INVALID_REQUEST)
async def test_after_the_end(stage: Stage, gateway: GatewayOwner, verdict: Verdict) -> None:
    await unread(gateway, stage, verdict, encode_request(inner()) * 2)


@attack("seal a response in place of a request", by="client", defence=FORM, refused=problems.INVALID_REQUEST)
@pytest.mark.parametrize("framing", [1, 3, 4, 63])
async def test_framing(stage: Stage, gateway: GatewayOwner, verdict: Verdict, framing: int) -> None:
    await unread(gateway, stage, verdict, bytes([framing]) + encode_request(inner())[1:])


# The seal


async def sealed_by_hand(gateway: GatewayOwner, stage: Stage, verdict: Verdict, sealed: bytes) -> None:
    worker = await stage.worker()
    ran = await gateway.run(sealed)
    verdict.said(ran.problem)
    assert worker.calls == 0


@attack(
    "seal to a key that the pool does not hold",
    by="client",
    defence="keys are looked up by their id",
    refused=problems.UNKNOWN_KEY,
)
async def test_unknown_key(stage: Stage, gateway: GatewayOwner, verdict: Verdict) -> None:
    sealed, *_ = seal_request(PrivateKey.generate(200).config, encode_request(inner()))
    await sealed_by_hand(gateway, stage, verdict, sealed)


@attack("seal under a key's id with another KEM", by="client", defence="a key has one KEM", refused=problems.UNKNOWN_KEY)
async def test_another_kem(stage: Stage, gateway: GatewayOwner, verdict: Verdict) -> None:
    sealed, *_ = seal_request(PrivateKey.generate(1, Kem.X25519).config, encode_request(inner()))
    await sealed_by_hand(gateway, stage, verdict, sealed)


@attack(
    "encapsulate to a point of low order",
    by="client",
    defence="an all-zero shared secret is refused (RFC 9180 section 7.1.4)",
    refused=problems.INVALID_REQUEST,
)
async def test_low_order(stage: Stage, gateway: GatewayOwner, verdict: Verdict) -> None:
    await sealed_by_hand(gateway, stage, verdict, bytes.fromhex("02002000010002") + bytes(32) + b"\x00" + bytes(32))


@attack(
    "seal under an AEAD that the key's configuration does not offer",
    by="client",
    refused=problems.INVALID_REQUEST,
    defence="the worker takes what its configuration offers",
)
async def test_not_offered(stage: Stage, gateway: GatewayOwner, verdict: Verdict) -> None:
    seed = secrets.token_bytes(32)
    strict = PrivateKey(1, Kem.XWING, seed, ((Kdf.HKDF_SHA256, Aead.AES_256_GCM),))
    lax = PrivateKey(1, Kem.XWING, seed).config
    worker = await stage.worker(keys={1: strict})
    sealed, *_ = seal_request(lax, encode_request(inner()), lax.suite((Aead.AES_128_GCM,)))
    verdict.said((await gateway.run(sealed)).problem)
    assert worker.calls == 0


@attack(
    "send a request of more chunks than any needs", by="client", defence="a limit on chunks", refused=problems.INVALID_REQUEST
)
async def test_chunk_flood(stage: Stage, gateway: GatewayOwner, verdict: Verdict) -> None:
    """Each of a byte, and all of them good."""
    message = encode_request(inner(chat(stage)), padded_to=MAX_REQUEST_CHUNKS)
    sealer = Boundless(stage.keys.pool.config)
    sealed = b"".join(sealer.seal(message[at : at + 1]) for at in range(len(message)))
    await sealed_by_hand(gateway, stage, verdict, sealed + sealer.finish()[0])


class Boundless(RequestSealer):
    """Our own sealer refuses what the other side would."""

    def _account(self, length: int, *, final: bool) -> None:
        pass


# What is asked for


@attack(
    "leave the path by dot segments, plain or escaped",
    by="client",
    defence="a path in its normal form only",
    refused=ApiError,
    code="invalid_path",
)
@pytest.mark.parametrize(
    "path",
    [
        "/../etc/passwd",
        "/v1/./models",
        "/v1/%2e%2e/admin",
        "/v1/..%2fadmin",
        "//evil.example/v1",
        "/v1/models%00.html",
        "/..",
        "/v1/%0d%0a",
    ],
)
async def test_path_traversal(stage: Stage, gateway: GatewayOwner, verdict: Verdict, path: str) -> None:
    await told(gateway, stage, verdict, encode_request(inner(path=path)), action="http")


@attack(
    "reach the chat by an escaped path, under a grant for another action",
    by="client",
    refused=ApiError,
    code="grant_mismatch",
    defence="the path is compared as the app will read it",
)
@pytest.mark.parametrize("path", ["/v1/%63hat/completions", "/v1/chat%2Fcompletions", "/v1/chat/completions?x=1"])
async def test_escaped_path(stage: Stage, gateway: GatewayOwner, verdict: Verdict, path: str) -> None:
    await told(gateway, stage, verdict, encode_request(inner(chat(stage), path=path)), action="http")


@attack(
    "name an authority other than ours",
    by="client",
    defence="a sealed request is for the pool, and for no host",
    refused=ApiError,
    code="grant_mismatch",
)
@pytest.mark.parametrize(
    "changes", [{"authority": "169.254.169.254"}, {"authority": ""}, {"authority": "lacre.invalid:22"}, {"scheme": "http"}]
)
async def test_authority(stage: Stage, gateway: GatewayOwner, verdict: Verdict, changes: dict[str, str]) -> None:
    await told(gateway, stage, verdict, encode_request(inner(chat(stage), **changes)))


@attack("tunnel through the worker", by="client", defence=FORM, refused=problems.INVALID_REQUEST)
@pytest.mark.parametrize(("method", "authority"), [(b"CONNECT", b"db.internal:5432"), (b"GET /", b"x"), (b"GET", b"user@x")])
async def test_connect(stage: Stage, gateway: GatewayOwner, verdict: Verdict, method: bytes, authority: bytes) -> None:
    control = b"".join(map(part, (method, b"https", authority, b"/")))
    await unread(gateway, stage, verdict, b"\x00" + control + b"\x00\x00\x00")


@attack("ask for more tokens inside than were granted", by="client", defence=INSIDE, refused=ApiError, code="grant_mismatch")
@pytest.mark.parametrize(
    "asked", [{"max_tokens": 513}, {"max_completion_tokens": 100_000}, {"max_tokens": 300, "n": 2}, {"n": 16}]
)
async def test_more_tokens(stage: Stage, gateway: GatewayOwner, verdict: Verdict, asked: dict[str, int]) -> None:
    """Without the copies of the outer headers, which may be left out."""
    allowed = 512 if asked != {"n": 16} else 8
    await told(gateway, stage, verdict, encode_request(inner(chat(stage, **asked))), calls=1, max_tokens=allowed)


@attack("ask for another model inside than was granted", by="client", defence=INSIDE, refused=ApiError, code="grant_mismatch")
async def test_another_model(stage: Stage, gateway: GatewayOwner, verdict: Verdict) -> None:
    await told(gateway, stage, verdict, encode_request(inner(chat(stage, model=OTHER_MODEL))), calls=1)


@attack("send more prompt than the reservation covers", by="client", defence=INSIDE, refused=ApiError, code="grant_mismatch")
async def test_more_prompt(stage: Stage, gateway: GatewayOwner, verdict: Verdict) -> None:
    await told(gateway, stage, verdict, encode_request(inner(chat(stage))), calls=1, max_prompt_tokens=10)


@attack(
    "seal a request without a date, with two, or with one that is none",
    by="client",
    refused=ApiError,
    code=problems.DATE.type,
    defence="a request without one good date is not run",
)
@pytest.mark.parametrize(
    "dates",
    [
        (),
        ("now",),
        (formatdate(time.time() - 301, usegmt=True),),
        (formatdate(None, usegmt=True),) * 2,
        ("Mon, 01 Jan 99999999999999999999 00:00:00 GMT",),
        ("Mon, 01 Jan 2024 99999999999:00:00 GMT",),
    ],
    ids=["none", "word", "old", "two", "year", "hour"],
)
async def test_dates(stage: Stage, gateway: GatewayOwner, verdict: Verdict, dates: tuple[str, ...]) -> None:
    headers = tuple(("date", date) for date in dates)
    await told(gateway, stage, verdict, encode_request(inner(chat(stage), headers=headers)))


# What the app reads


@attack("nest JSON a hundred thousand deep", by="client", defence="the API's parser has a depth", refused=ApiError, code="None")
@pytest.mark.parametrize("nested", [b"[" * 100_000, b'{"a":' * 100_000, b'{"messages":' + b"[" * 50_000 + b"]" * 50_000 + b"}"])
async def test_nesting(stage: Stage, gateway: GatewayOwner, verdict: Verdict, nested: bytes) -> None:
    worker = await stage.worker()
    answer = await gateway.submit(encode_request(inner(nested)))
    verdict.answered(answer.status, str(answer.code))
    assert worker.calls == 1


@attack(
    "send JSON of millions of values, and hold up everybody else's answers",
    by="client",
    defence="a limit on values",
    refused=ApiError,
    code="request_too_large",
)
@pytest.mark.parametrize("member", [b'"stop":[' + b'"",' * 300_000 + b'""]', b",".join(b'"%x":1' % n for n in range(100_000))])
async def test_many_values(stage: Stage, gateway: GatewayOwner, verdict: Verdict, member: bytes) -> None:
    await told(gateway, stage, verdict, encode_request(inner(b"{%b}" % member)), calls=1)


@attack("send a decompression bomb", by="client", defence="nothing inside the seal is inflated", refused=ApiError, code="None")
async def test_bomb(stage: Stage, gateway: GatewayOwner, verdict: Verdict) -> None:
    headers = (*inner().headers, ("content-encoding", "gzip"))
    bomb = gzip.compress(b'{"messages":[' + b" " * 50_000_000)
    worker = await stage.worker()
    answer = await gateway.submit(encode_request(inner(bomb, headers=headers)))
    verdict.answered(answer.status, str(answer.code))
    assert worker.calls == 1


@attack(
    "share another caller's prefix cache by naming two salts, or an endless one",
    by="client",
    refused=ApiError,
    code="None",
    defence="one salt, of 256 bytes at most, known to nobody else",
)
@pytest.mark.parametrize("salts", [("a", "b"), ("a" * 257,)], ids=["two", "long"])
async def test_salts(stage: Stage, gateway: GatewayOwner, verdict: Verdict, salts: tuple[str, ...]) -> None:
    headers = (*inner().headers, *(("lacre-cache-salt", salt) for salt in salts))
    worker = await stage.worker()
    answer = await gateway.submit(encode_request(inner(chat(stage), headers=headers)))
    verdict.answered(answer.status, str(answer.code))
    assert worker.calls == 1


@attack(
    "make the app fail, and read the prompt in the worker's log",
    by="gateway",
    refused=TruncatedStream,
    defence="logs name places in the code, never an exception's text; a broken answer has no final chunk",
)
@pytest.mark.parametrize("way", ["raises", "returns", "answers twice"])
async def test_log(stage: Stage, gateway: GatewayOwner, verdict: Verdict, way: str) -> None:
    async def failing(_scope: Scope, receive: Receive, send: Send) -> None:
        body = (await receive())["body"]
        head = {"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]}
        await send(head)
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n" * 9, "more_body": True})
        if way == "raises":
            raise ValueError(body)
        if way == "answers twice":
            await send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})
            await send({"type": "http.response.body", "body": body})

    await stage.worker(failing)
    with verdict.refused():
        [piece async for piece in stage.client(gateway).chat_stream(stage.prompt)]
    assert "app.failed" in gateway.eyes.log.getvalue()


# The honest gateway


async def refused_outside(wire: AsgiWire, verdict: Verdict, content: bytes, headers: list[tuple[str, str]]) -> None:
    request = httpx2.Request("POST", "http://gateway.test/v1/sealed", headers=headers, content=content)
    verdict.said(problems.Problem.type_in(await (await wire.handle_async_request(request)).aread()))


def headers_of(honest: HonestGateway, **changes: str) -> list[tuple[str, str]]:
    return [*(OUTER_HEADERS | {name.replace("_", "-"): value for name, value in changes.items()}).items(),
            ("authorization", f"Bearer {honest.token}")]  # fmt: skip


@attack(
    "send a request in the clear",
    by="client",
    defence="there is one media type, and no other way in",
    refused=problems.UNSUPPORTED_MEDIA_TYPE,
)
@pytest.mark.parametrize("media_type", ["application/json", "message/ohttp-req", "message/bhttp"])
async def test_clear(honest: HonestGateway, wire: AsgiWire, verdict: Verdict, media_type: str) -> None:
    await refused_outside(wire, verdict, b'{"messages":[]}', headers_of(honest, content_type=media_type))


@attack(
    "say one thing to policy and another to the worker, by an outer header given twice",
    by="client",
    refused=problems.INVALID_HEADERS,
    defence="each outer header appears once",
)
@pytest.mark.parametrize("name", ["lacre-model", "lacre-pool", "lacre-action", "lacre-max-tokens", "lacre-shape"])
async def test_twice(stage: Stage, honest: HonestGateway, wire: AsgiWire, verdict: Verdict, name: str) -> None:
    worker = await stage.worker()
    sealed, *_ = seal_request(stage.keys.pool.config, encode_request(inner()))
    await refused_outside(wire, verdict, sealed, [*headers_of(honest), (name, OUTER_HEADERS[name])])
    assert worker.calls == 0


@attack(
    "send the gateway a request that is cut short",
    by="client",
    defence="the gateway walks the chunks to the final one",
    refused=problems.INVALID_REQUEST,
)
async def test_cut_outside(stage: Stage, honest: HonestGateway, wire: AsgiWire, fabric: Any, verdict: Verdict) -> None:
    sealed, *_ = seal_request(stage.keys.pool.config, bytes(20_000))
    await refused_outside(wire, verdict, sealed[:8000], headers_of(honest))
    assert not fabric.works


@attack(
    "send the gateway more than 7 MiB", by="client", defence="a limit, counted while it is read", refused=problems.TOO_LARGE
)
async def test_too_large(honest: HonestGateway, wire: AsgiWire, verdict: Verdict) -> None:
    headers = [pair for pair in headers_of(honest) if pair[0] != "content-length"]
    await refused_outside(wire, verdict, bytes(MAX_SEALED_REQUEST + 1), headers)


@attack(
    "use an action that policy does not grant", by="client", defence="Cedar policies, default deny", refused=problems.FORBIDDEN
)
async def test_policy(stage: Stage, honest: HonestGateway, wire: AsgiWire, verdict: Verdict) -> None:
    worker = await stage.worker()
    sealed, *_ = seal_request(stage.keys.pool.config, encode_request(inner(path="/admin")))
    await refused_outside(wire, verdict, sealed, headers_of(honest, lacre_action="http"))
    assert worker.calls == 0


@attack(
    "seal to an older generation's key",
    by="client",
    defence="the gateway knows each key's `not_after`",
    refused=problems.UNKNOWN_KEY,
)
@pytest.mark.parametrize("taken_out", [True, False])
async def test_old_generation(stage: Stage, honest: HonestGateway, wire: AsgiWire, verdict: Verdict, taken_out: bool) -> None:
    worker = await stage.worker()
    older = stage.pools(PrivateKey.generate(7)) if taken_out else stage.pools(stage.keys.pool, lives=-1)
    stage.bucket = stage.document(2, pools=older)
    await honest.gateway.feed.refresh()
    sealed, *_ = seal_request(stage.keys.pool.config, encode_request(inner()))
    await refused_outside(wire, verdict, sealed, headers_of(honest))
    assert worker.calls == 0
