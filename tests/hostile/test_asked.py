"""A malicious caller: well-formed requests that ask for what they may not, or that would hold up everybody else."""

from __future__ import annotations

import gzip
import time
from email.utils import formatdate
from typing import Any

import pytest

from hostile.adversary import GatewayOwner, inner
from hostile.attacks import Verdict, attack
from hostile.messages import FORM, chat, part, told, unread
from lacre import ApiError, problems
from lacre.asgi import Receive, Scope, Send
from lacre.errors import TruncatedStream, UsageError
from lacre.wire.bhttp import encode_request
from parts.keys import OTHER_MODEL
from parts.stage import Stage

INSIDE = "the worker compares the inside with the grant"


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
    "seal a request without a date, with two, or with an invalid one",
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
    "send JSON of millions of values, to delay all other answers",
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
    "share another caller's prefix cache by sending two salts, or an endless one",
    by="client",
    refused=ApiError,
    code="None",
    defence="one salt of at most 256 bytes, which no other caller knows",
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


@attack(
    "send no token to a service that forwards its callers' tokens, so that it answers as itself",
    by="client",
    defence="only None means absent: an empty token is refused, and the environment's token does not replace it",
    refused=UsageError,
)
@pytest.mark.parametrize("token", ["", " ", "\r\n", lambda: "", lambda: " "])
async def test_no_token_to_pass_on(
    stage: Stage, gateway: GatewayOwner, verdict: Verdict, monkeypatch: pytest.MonkeyPatch, token: Any
) -> None:
    monkeypatch.setenv("LACRE_TOKEN", "of-the-service")
    with verdict.refused():
        await stage.client(gateway, token=token).chat(stage.prompt)
