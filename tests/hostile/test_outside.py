"""A malicious caller, outside of the seal: what it says to an honest gateway, and what its bodies may cost."""

from __future__ import annotations

import asyncio
import re
from typing import Any

import httpx2

from hostile.adversary import AsgiWire, inner
from hostile.attacks import Verdict, attack
from hostile.test_heads import OUTER, POST, Port, opened, problem_of
from lacre import problems
from lacre.wire.bhttp import encode_request
from lacre.wire.header import MAX_HEADER, MAX_SEALED_REQUEST, MEDIA_TYPE_REQUEST
from lacre.wire.ohttp import seal_request
from lacre.wire.opening import PrivateKey
from lacre_gateway.admin.api import MAX_BODY, create_admin
from lacre_gateway.http.answers import BODY_TOO_LARGE
from parts.issuer import Issuer
from parts.keys import MODEL
from parts.stage import Stage
from parts.waiting import until

OUTER_HEADERS = {
    "content-type": MEDIA_TYPE_REQUEST, "lacre-pool": "default", "lacre-model": MODEL, "lacre-action": "chat",
    "lacre-max-tokens": "512", "lacre-shape": "none",
}  # fmt: skip


async def refused_outside(wire: AsgiWire, verdict: Verdict, content: bytes, headers: list[tuple[str, str]]) -> None:
    request = httpx2.Request("POST", "http://gateway.test/v1/sealed", headers=headers, content=content)
    verdict.said(problems.Problem.type_in(await (await wire.handle_async_request(request)).aread()))


def headers_of(honest: Stage, **changes: str) -> list[tuple[str, str]]:
    return [*(OUTER_HEADERS | {name.replace("_", "-"): value for name, value in changes.items()}).items(),
            ("authorization", f"Bearer {honest.token}")]  # fmt: skip


@attack("send a request in the clear", "client", "there is one media type, and no other endpoint",
        problems.UNSUPPORTED_MEDIA_TYPE, cases=["application/json", "message/ohttp-req", "message/bhttp"])  # fmt: skip
async def test_clear(honest: Stage, wire: AsgiWire, verdict: Verdict, case: str) -> None:
    await refused_outside(wire, verdict, b'{"messages":[]}', headers_of(honest, content_type=case))


@attack("say one thing to policy and another to the worker, by an outer header given twice", "client",
        "each outer header appears once", problems.INVALID_HEADERS,
        cases=["lacre-model", "lacre-pool", "lacre-action", "lacre-max-tokens", "lacre-shape"])  # fmt: skip
async def test_twice(stage: Stage, honest: Stage, wire: AsgiWire, verdict: Verdict, case: str) -> None:
    worker = await stage.worker()
    sealed, *_ = seal_request(stage.keys.pool.config, encode_request(inner()))
    await refused_outside(wire, verdict, sealed, [*headers_of(honest), (case, OUTER_HEADERS[case])])
    assert worker.calls == 0


@attack("send the gateway a request that is cut short", "client", "the gateway walks the chunks to the final one",
        problems.INVALID_REQUEST)  # fmt: skip
async def test_cut_outside(stage: Stage, honest: Stage, wire: AsgiWire, fabric: Any, verdict: Verdict) -> None:
    sealed, *_ = seal_request(stage.keys.pool.config, bytes(20_000))
    await refused_outside(wire, verdict, sealed[:8000], headers_of(honest))
    assert not fabric.works


@attack("send the gateway more than 7 MiB", "client", "a limit, counted while it is read", problems.TOO_LARGE)
async def test_too_large(honest: Stage, wire: AsgiWire, verdict: Verdict) -> None:
    headers = [pair for pair in headers_of(honest) if pair[0] != "content-length"]
    await refused_outside(wire, verdict, bytes(MAX_SEALED_REQUEST + 1), headers)


@attack("use an action that policy does not grant", "client", "Cedar policies, default deny", problems.PATH_NOT_ALLOWED)
async def test_policy(stage: Stage, honest: Stage, wire: AsgiWire, verdict: Verdict) -> None:
    worker = await stage.worker()
    sealed, *_ = seal_request(stage.keys.pool.config, encode_request(inner(path="/admin")))
    await refused_outside(wire, verdict, sealed, headers_of(honest, lacre_action="http"))
    assert worker.calls == 0


@attack("seal to an older generation's key", "client", "the gateway knows each key's `not_after`", problems.UNKNOWN_KEY,
        cases=[True, False])  # fmt: skip
async def test_old_generation(stage: Stage, honest: Stage, wire: AsgiWire, verdict: Verdict, case: bool) -> None:
    worker = await stage.worker()
    older = stage.pools(PrivateKey.generate(7)) if case else stage.pools(stage.keys.pool, lives=-1)
    stage.bucket = stage.document(2, pools=older)
    await honest.gateway.feed.refresh()
    sealed, *_ = seal_request(stage.keys.pool.config, encode_request(inner()))
    await refused_outside(wire, verdict, sealed, headers_of(honest))
    assert worker.calls == 0


SOON = 5.0  # seconds in which a refusal comes; none of these waits for a body
REVOKE = b"POST /v1/revocations HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"


async def answer(port: Port, said: bytes) -> bytes:
    """The head and the problem that come back while the connection stays open: nothing more is sent."""
    reader = await port.dial(said)
    async with asyncio.timeout(SOON):
        head = await reader.readuntil(b"\r\n\r\n")
        found = re.search(rb"content-length: (\d+)", head)
        body = await reader.readexactly(int(found[1])) if found else b""
    return head + body


def bearer(token: str) -> bytes:
    return f"Authorization: Bearer {token}\r\n".encode()


def sealed(stage: Stage, size: int = 0) -> bytes:
    return bytes(seal_request(stage.keys.pool.config, encode_request(inner()) + bytes(size))[0])


@attack("have the gateway read megabytes without a token", "stranger",
        "the gateway checks the token before it reads the body or asks for it", problems.INVALID_TOKEN,
        cases=[b"", b"Expect: 100-continue\r\n"])  # fmt: skip
async def test_nobody(honest: Stage, verdict: Verdict, case: bytes) -> None:
    async with opened(honest) as port:
        told = await answer(port, POST + OUTER + case + b"Content-Length: 7000000\r\n\r\n")
    assert told.startswith(b"HTTP/1.1 401 ")
    assert honest.gateway.metrics.received == 0
    verdict.said(problem_of(told))


@attack("have the admin API read megabytes without a token", "stranger",
        "the gateway checks the token before it reads the body", problems.INVALID_TOKEN)  # fmt: skip
async def test_admin(honest: Stage, verdict: Verdict) -> None:
    async with opened(honest, create_admin(honest.gateway)) as port:
        verdict.said(problem_of(await answer(port, REVOKE + b"Content-Length: 300000000\r\n\r\n" + bytes(100_000))))


@attack("have the admin API read megabytes", "client", "a body has at most 16 KiB, counted while it is read", BODY_TOO_LARGE)
async def test_admin_long(honest: Stage, verdict: Verdict) -> None:
    async with opened(honest, create_admin(honest.gateway)) as port:
        said = REVOKE + bearer(honest.token) + b"Content-Length: 300000000\r\n\r\n" + b" " * (MAX_BODY + 1)
        verdict.said(problem_of(await answer(port, said)))


@attack("have the gateway read megabytes that policy denies anyway", "client",
        "policy decides on the outer headers and the length, before more is read than the sealed request's header",
        problems.PATH_NOT_ALLOWED)  # fmt: skip
async def test_denied(stage: Stage, honest: Stage, verdict: Verdict) -> None:
    async with opened(honest) as port:
        head = POST + OUTER.replace(b"Action: chat", b"Action: http") + bearer(honest.token)
        told = await answer(port, head + b"Content-Length: 7000000\r\n\r\n" + sealed(stage, 2000)[:MAX_HEADER])
    verdict.said(problem_of(told))
    assert (await honest.outcomes())[0]["problem"] == "path-not-allowed"


@attack("take a gateway's memory by bodies that are never whole", "client",
        "bytes of bodies are counted before they are kept, for each caller and for all", problems.RATE_LIMITED)  # fmt: skip
async def test_bytes(stage: Stage, honest: Stage, verdict: Verdict) -> None:
    most, size = honest.gateway.settings.limits.body_bytes_per_subject, MAX_SEALED_REQUEST - 1
    start = sealed(stage, 2000)[:MAX_HEADER]
    said = POST + OUTER + bearer(honest.token) + b"Content-Length: %d\r\n\r\n" % (size + 1) + start.ljust(size, b"\x00")
    async with opened(honest) as port:
        for _ in range(most // size):
            await port.dial(said)
        await until(lambda: honest.gateway.bodies.held >= most - size, SOON)
        verdict.said(problem_of(await answer(port, said)))
        assert honest.gateway.bodies.held <= most
        for writer in port.open:
            writer.close()
        await until(lambda: not honest.gateway.bodies.held, SOON)


@attack("fill the disk of the audit log with requests that are refused", "client",
        "refusals have their own limit; beyond it they are counted, not recorded", problems.RATE_LIMITED)  # fmt: skip
async def test_refusals(stage: Stage, honest: Stage, wire: AsgiWire, verdict: Verdict, issuer: Issuer) -> None:
    async def ask(token: str) -> str | None:
        headers = [*headers_of(honest, lacre_action="http")[:-1], ("authorization", f"Bearer {token}")]
        request = httpx2.Request("POST", "http://gateway.test/v1/sealed", headers=headers, content=sealed(stage))
        return problems.Problem.type_in(await (await wire.handle_async_request(request)).aread())

    allowed = honest.gateway.settings.limits.refused_per_minute
    honest.gateway.refusals._clock = lambda: 0.0  # the minute does not end meanwhile
    for _ in range(allowed):
        assert await ask(honest.token) == problems.PATH_NOT_ALLOWED.type
    verdict.said(await ask(honest.token))
    assert await ask(issuer.token(sub="bob")) == problems.PATH_NOT_ALLOWED.type, "another caller is not concerned"
    assert len(await honest.outcomes(allowed + 1)) == allowed + 1
    assert honest.gateway.refusals.unrecorded == 1
