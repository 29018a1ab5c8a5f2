"""A malicious caller: well-formed requests that ask for what they may not, or that would hold up everybody else."""

from __future__ import annotations

import gzip
import time
from collections.abc import Callable
from email.utils import formatdate
from functools import partial
from typing import Any, Final

import pytest

from hostile.adversary import GatewayOwner, inner
from hostile.attacks import Verdict, attack
from hostile.messages import FORM, chat, part
from hostile.shapes import told, unread
from lacre import ApiError, problems
from lacre.asgi import Receive, Scope, Send
from lacre.errors import TruncatedStream, UsageError
from lacre.wire.bhttp import encode_request
from parts.keys import OTHER_MODEL
from parts.stage import Stage

INSIDE = "the worker compares the inside with the grant"
MISMATCH = "grant_mismatch"


def sent(content: bytes | None = None, more: tuple[tuple[str, str], ...] = (), **parts: Any) -> Callable[[Stage], bytes]:
    """A well-formed request, with these parts. content: in place of an honest chat. more: headers beside the usual."""

    def message(stage: Stage) -> bytes:
        headers = {"headers": (*inner().headers, *more)} if more else {}
        return encode_request(inner(chat(stage) if content is None else content, **headers, **parts))

    return message


def asking(**members: Any) -> Callable[[Stage], bytes]:
    return lambda stage: encode_request(inner(chat(stage, **members)))


test_path_traversal = told(
    "leave the path by dot segments, plain or escaped", "a path in its normal form only", "invalid_path",
    *(sent(b"{}", path=path) for path in (
        "/../etc/passwd", "/v1/./models", "/v1/%2e%2e/admin", "/v1/..%2fadmin", "//evil.example/v1", "/v1/models%00.html",
        "/..", "/v1/%0d%0a")),
    action="http",
)  # fmt: skip
test_escaped_path = told("reach the chat by an escaped path, under a grant for another action",
    "the path is compared as the app will read it", MISMATCH,
    *(sent(path=path) for path in ("/v1/%63hat/completions", "/v1/chat%2Fcompletions", "/v1/chat/completions?x=1")),
    action="http")  # fmt: skip
test_authority = told("name an authority other than ours", "a sealed request is for the pool, and for no host", MISMATCH,
    *(sent(authority=name) for name in ("169.254.169.254", "", "lacre.invalid:22")), sent(scheme="http"))  # fmt: skip
test_connect = unread(
    "tunnel through the worker", FORM,
    *(lambda _stage, control=control: b"\x00" + b"".join(map(part, control.split(b"|"))) + b"\x00\x00\x00"
      for control in (b"CONNECT|https|db.internal:5432|/", b"GET /|https|x|/", b"GET|https|user@x|/")),
)  # fmt: skip
test_another_model = told("ask for another model inside than was granted", INSIDE, MISMATCH, asking(model=OTHER_MODEL), calls=1)
test_more_prompt = told(
    "send more prompt than the reservation covers", INSIDE, MISMATCH, asking(), calls=1, max_prompt_tokens=10
)


@attack("ask for more tokens inside than were granted", "client", INSIDE, ApiError, code=MISMATCH,
        cases=[{"max_tokens": 513}, {"max_completion_tokens": 100_000}, {"max_tokens": 300, "n": 2}, {"n": 16}])  # fmt: skip
async def test_more_tokens(stage: Stage, gateway: GatewayOwner, verdict: Verdict, case: dict[str, int]) -> None:
    """Without the copies of the outer headers, which may be left out."""
    worker = await stage.worker()
    answer = await gateway.submit(asking(**case)(stage), max_tokens=512 if case != {"n": 16} else 8)
    verdict.answered(answer.status, answer.code)
    assert worker.calls == 1


TODAY: Final = formatdate(None, usegmt=True)
test_dates = told(
    "seal a request without a date, with two, or with an invalid one", "a request without one good date is not run",
    problems.DATE.type,
    *(sent(headers=tuple(("date", date) for date in dates)) for dates in (
        (), ("now",), (formatdate(time.time() - 301, usegmt=True),), (TODAY,) * 2,
        ("Mon, 01 Jan 99999999999999999999 00:00:00 GMT",), ("Mon, 01 Jan 2024 99999999999:00:00 GMT",))),
)  # fmt: skip


# What the app reads


read: Final = partial(told, calls=1)
test_nesting = read("nest JSON a hundred thousand deep", "the API's parser has a depth", "None",
    *map(sent, (b"[" * 100_000, b'{"a":' * 100_000, b'{"messages":' + b"[" * 50_000 + b"]" * 50_000 + b"}")))  # fmt: skip
test_many_values = read(
    "send JSON of millions of values, to delay all other answers", "a limit on values", "request_too_large",
    *(sent(b"{%b}" % member) for member in (
        b'"stop":[' + b'"",' * 300_000 + b'""]', b",".join(b'"%x":1' % number for number in range(100_000)))),
)  # fmt: skip
test_bomb = read("send a decompression bomb", "nothing inside the seal is inflated", "None",
    sent(gzip.compress(b'{"messages":[' + b" " * 50_000_000), (("content-encoding", "gzip"),)))  # fmt: skip
test_salts = read("share another caller's prefix cache by sending two salts, or an endless one",
    "one salt of at most 256 bytes, which no other caller knows", "None",
    *(sent(more=tuple(("lacre-cache-salt", salt) for salt in salts)) for salts in (("a", "b"), ("a" * 257,))))  # fmt: skip


@attack("make the app fail, and read the prompt in the worker's log", "gateway",
        "logs name places in the code, never an exception's text; a broken answer has no final chunk", TruncatedStream,
        cases=["raises", "returns", "answers twice"])  # fmt: skip
async def test_log(stage: Stage, gateway: GatewayOwner, verdict: Verdict, case: str) -> None:
    async def failing(_scope: Scope, receive: Receive, send: Send) -> None:
        body = (await receive())["body"]
        done = {"type": "http.response.body", "body": b"data: [DONE]\n\n"}
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]})
        await send({**done, "body": done["body"] * 9, "more_body": True})
        if case == "raises":
            raise ValueError(body)
        if case == "answers twice":
            await send(done)
            await send({**done, "body": body})

    await stage.worker(failing)
    with verdict.refused():
        [piece async for piece in stage.client(gateway).chat_stream(stage.prompt)]
    assert "app.failed" in gateway.eyes.log.getvalue()


@attack("send no token to a service that forwards its callers' tokens, so that it answers as itself", "client",
        "only None means absent: an empty token is refused, and the environment's token does not replace it", UsageError,
        cases=["", " ", "\r\n", lambda: "", lambda: " "])  # fmt: skip
async def test_no_token_to_pass_on(
    stage: Stage, gateway: GatewayOwner, verdict: Verdict, monkeypatch: pytest.MonkeyPatch, case: Any
) -> None:
    monkeypatch.setenv("LACRE_TOKEN", "of-the-service")
    with verdict.refused():
        await stage.client(gateway, token=case).chat(stage.prompt)
