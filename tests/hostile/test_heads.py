"""What an honest gateway hears from anybody who reaches its port, and from callers outside of the seal."""

from __future__ import annotations

import asyncio
import contextlib
import re
import ssl
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

import httpx2
import pytest
from starlette.types import ASGIApp, Receive, Scope, Send

from hostile.adversary import HostileFabric, HttpWire, inner
from hostile.attacks import Verdict, attack
from hostile.shapes import Test
from lacre import problems
from lacre.runtime.http1 import MAX_HEAD, UnreadableRequest, parse_head
from lacre.wire.bhttp import encode_request
from lacre.wire.header import MAX_HEADER, MAX_SEALED_REQUEST, MEDIA_TYPE_REQUEST
from lacre.wire.ohttp import seal_request
from lacre.wire.opening import PrivateKey
from lacre_gateway.admin.api import MAX_BODY, create_admin
from lacre_gateway.app import create_app
from lacre_gateway.http.answers import BODY_TOO_LARGE
from lacre_gateway.http.exchange import STALL_LIMIT, Exchange, Stalled
from lacre_gateway.http.server import Server, bind, make_server
from lacre_gateway.settings import Listen
from parts.in_memory_http import Connection
from parts.issuer import Issuer
from parts.keys import MODEL
from parts.stage import Stage
from parts.waiting import PATIENCE, until

OUTER_HEADERS = {
    "content-type": MEDIA_TYPE_REQUEST, "lacre-pool": "default", "lacre-model": MODEL, "lacre-action": "chat",
    "lacre-max-tokens": "512", "lacre-shape": "none",
}  # fmt: skip
OUTER = "".join(f"{name}: {value}\r\n" for name, value in OUTER_HEADERS.items()).encode()
POST = b"POST /v1/sealed HTTP/1.1\r\nHost: x\r\n"
AHEAD = 1500  # requests in as many bytes as a connection keeps of those that wait
SETTLED = 0.2  # seconds in which a gateway refuses hundreds of requests
HEAD_TIMEOUT = 3.0  # seconds; what is refused is refused much sooner


@dataclass(frozen=True)
class Port:
    """An honest gateway's port. server: what holds it. open: connections to it, which end with the test."""

    server: Server
    number: int
    open: list[asyncio.StreamWriter] = field(default_factory=list)

    @property
    def door(self) -> Any:
        return self.server.config.door  # type: ignore[attr-defined]

    async def dial(self, said: bytes = b"") -> asyncio.StreamReader:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.number)
        self.open.append(writer)
        writer.write(said)
        return reader

    async def told(self, said: bytes) -> bytes:
        """All that comes back. Raises UnreadableRequest where it is a bare status, and the end of the connection."""
        reader = await self.dial(said)
        async with asyncio.timeout(20):
            answer = await reader.read()
        if bare := BARE.fullmatch(answer):
            raise UnreadableRequest(int(bare[1]), "a bare status, and the end")
        return answer


# A status, and at most one fixed line of what is wrong.
BARE = re.compile(
    rb"HTTP/1.1 (\d+) [ -~]+\r\n(?:content-type: text/plain\r\n)?content-length: \d+\r\nconnection: close\r\n\r\n(?:[ -~]+\n)?"
)


@contextlib.asynccontextmanager
async def opened(
    honest: Stage, app: ASGIApp | None = None, context: ssl.SSLContext | None = None, **listen: float
) -> AsyncIterator[Port]:
    settings = Listen(port=0, drain=1, **{"header_timeout": HEAD_TIMEOUT, **listen})  # type: ignore[arg-type]
    with bind(settings) as listener:
        server = make_server(app or honest.app, settings, None if context is None else lambda: context)
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        await until(lambda: server.started or serving.done(), PATIENCE)
        assert server.started, serving.exception()
        port = Port(server, listener.getsockname()[1])
        try:
            yield port
        finally:
            for writer in port.open:
                writer.close()
            server.should_exit = True
            await serving
            await server.settle()


@pytest.fixture
async def port(honest: Stage) -> AsyncIterator[Port]:
    async with opened(honest) as port:
        yield port


def problem_of(answer: bytes) -> str | None:
    return problems.Problem.type_in(answer.rpartition(b"\r\n\r\n")[2])


def unreadable(name: str, defence: str, *said: tuple[bytes, int]) -> Test:
    """The attack of a stranger that says one of these: the answer is that status, and nothing is kept."""

    @attack(name, "stranger", defence, UnreadableRequest, cases=said, ids=range(len(said)))
    async def test(port: Port, verdict: Verdict, case: tuple[bytes, int]) -> None:
        with verdict.refused() as caught:
            await port.told(case[0])
        assert caught.value.status == case[1]  # type: ignore[attr-defined]
        assert port.door.held_now == 0

    return test


LONG = 4 * MAX_HEAD
HEALTH = b"GET /healthz HTTP/1.1\r\nHost: x\r\n"
HIDDEN = b"0\r\n\r\nGET /readyz HTTP/1.1\r\nHost: x\r\n\r\n"
PATHS = (b"/v1/se%61led", b"/healthz/../v1/sealed", b"//v1/sealed", b"/v1/./sealed")

test_endless = unreadable("send a request's head without an end", "a head has 64 KiB, counted before it is kept",
    (POST + b"a: " + b"x" * LONG, 431), (b"GET /" + b"x" * LONG, 414), (POST + b"a: b\r\n" * (LONG // 6), 431),
    (b"\r\n" * (LONG // 2), 431))  # fmt: skip
test_fields = unreadable(
    "send a head of thousands of fields", "a head has 100 fields", (POST + b"a:b\r\n" * 10_000 + b"\r\n", 431)
)
test_smuggle = unreadable("hide a second request in the body of a first, by an ambiguous length",
    "a request with both a transfer coding and a length is refused",
    (HEALTH + b"Content-Length: %d\r\nTransfer-Encoding: chunked\r\n\r\n" % len(HIDDEN) + HIDDEN, 400))  # fmt: skip
test_coding = unreadable("hide a second request in the body of a first, by a coding that another server decodes",
    "chunked is the only transfer coding", (HEALTH + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n", 501))  # fmt: skip
test_path = unreadable("reach a path that a proxy filters out", "a path that is not in normal form is refused",
    *((POST.replace(b"/v1/sealed", path) + b"Content-Length: 0\r\n\r\n", 400) for path in PATHS))  # fmt: skip


PAGE = b"Origin: https://app.example\r\n"
OTHER_PAGES = (
    b"Origin: https://evil.example\r\n", b"Origin: https://app.example.evil.example\r\n", b"Origin: null\r\n", PAGE + PAGE,
)  # fmt: skip


@attack("use a caller's token from a page whose origin the settings do not name", "stranger",
        "an origin is allowed only as the settings spell it, and a browser's cookies never are", problems.METHOD_NOT_ALLOWED,
        cases=OTHER_PAGES, ids=range(len(OTHER_PAGES)))  # fmt: skip
async def test_page(honest: Stage, verdict: Verdict, case: bytes) -> None:
    settings = honest.gateway.settings
    listen = settings.listen.model_copy(update={"origins": ("https://app.example",)})
    honest.gateway.settings = settings.model_copy(update={"listen": listen})
    asked = b"Access-Control-Request-Method: POST\r\nConnection: close\r\n\r\n"
    async with opened(honest, create_app(honest.gateway)) as port:
        assert (await port.told(POST.replace(b"POST", b"OPTIONS") + PAGE + asked)).startswith(b"HTTP/1.1 204")
        answer = await port.told(POST.replace(b"POST", b"OPTIONS") + case + asked)
    assert b"access-control" not in answer.lower()
    verdict.said(problem_of(answer))


@attack("send many incomplete heads at once", "stranger",
        "bytes that no app asked for are bounded over all connections; the longest holder is cut off",
        gain="that its own older connections end")  # fmt: skip
async def test_held(honest: Stage) -> None:
    async with opened(honest, held_bytes=2**20) as port:
        crowd = [await port.dial(POST + b"a: " + b"x" * 60_000) for _ in range(40)]
        for _ in range(200):
            await asyncio.sleep(0.005)
            assert port.door.held_now <= 2**20
            if sum(reader.at_eof() or reader.exception() is not None for reader in crowd) >= 40 - 2**20 // 60_000:
                break
        else:
            pytest.fail("nobody was cut off")
        assert (await port.told(HEALTH + b"Connection: close\r\n\r\n")).startswith(b"HTTP/1.1 200")


@attack("hold all connections from one address", "stranger",
        "an address has a bounded number of connections, and its own oldest idle one makes room",
        gain="that its own older connections end")  # fmt: skip
async def test_one_address(honest: Stage) -> None:
    async with opened(honest, connections_per_address=3, header_timeout=PATIENCE) as port:  # time ends none of them
        crowd = [await port.dial(b"GET /") for _ in range(5)]
        assert (await port.told(HEALTH + b"Connection: close\r\n\r\n")).startswith(b"HTTP/1.1 200")  # after all others
        assert port.door.inside <= 3
        for reader in crowd[:3]:
            with contextlib.suppress(ConnectionError):
                assert await reader.read() == b""
        assert not any(reader.at_eof() for reader in crowd[3:])


@attack("hold connections whose TLS handshake never ends", "stranger",
        "a handshake counts as a connection, in total and for its address; the oldest makes room",
        gain="that its own older connections end", cases=["connections", "connections_per_address"])  # fmt: skip
async def test_handshakes(honest: Stage, case: str) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    async with opened(honest, context=context, header_timeout=PATIENCE, **{case: 3}) as port:  # time ends none of them
        crowd = [await port.dial(b"\x16\x03") for _ in range(6)]
        async with asyncio.timeout(8):
            for reader in crowd[:3]:
                with contextlib.suppress(ConnectionError):
                    assert await reader.read() == b""
        assert port.door.inside == 3


@attack("authenticate with a token in the trailers, behind the body", "stranger",
        "a request's fields are those of its head; trailers are dropped", problems.INVALID_TOKEN)  # fmt: skip
async def test_trailer(stage: Stage, honest: Stage, port: Port, verdict: Verdict) -> None:
    worker = await stage.worker()
    content = sealed(stage)
    body = b"%x\r\n%b\r\n0\r\nAuthorization: Bearer %b\r\n\r\n" % (len(content), content, honest.token.encode())
    verdict.said(problem_of(await port.told(POST + OUTER + b"Connection: close\r\nTransfer-Encoding: chunked\r\n\r\n" + body)))
    assert worker.calls == 0


@attack("send thousands of requests ahead on one connection", "stranger",
        "one request is read at a time; the others wait in the network", gain="answers, one after the other")  # fmt: skip
async def test_ahead(honest: Stage) -> None:
    running = most = 0

    async def counted(scope: Scope, receive: Receive, send: Send) -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0)
        await honest.app(scope, receive, send)
        running -= 1

    async with opened(honest, counted) as port:
        reader = await port.dial((HEALTH + b"\r\n") * 1000)
        answers = b""
        async with asyncio.timeout(60):
            while answers.count(b"HTTP/1.1 200") < 1000 and (more := await reader.read(65536)):
                answers += more
    assert (answers.count(b"HTTP/1.1 200"), most) == (1000, 1)


def sealed(stage: Stage, size: int = 0, **parts: str) -> bytes:
    return bytes(seal_request(stage.keys.pool.config, encode_request(inner(**parts)) + bytes(size))[0])


def headers_of(honest: Stage, **changes: str) -> list[tuple[str, str]]:
    return [*(OUTER_HEADERS | {name.replace("_", "-"): value for name, value in changes.items()}).items(),
            ("authorization", f"Bearer {honest.token}")]  # fmt: skip


async def told(wire: HttpWire, content: bytes, headers: list[tuple[str, str]]) -> str | None:
    """The problem that an honest gateway answers with."""
    request = httpx2.Request("POST", "http://gateway.test/v1/sealed", headers=headers, content=content)
    return problems.Problem.type_in(await (await wire.handle_async_request(request)).aread())


def outside(
    name: str, defence: str, refused: problems.Problem, *sent: Callable[[Stage], tuple[bytes, list[tuple[str, str]]]]
) -> Test:
    """The attack of a caller that sends one of these, a content and its headers: it becomes no work."""

    @attack(name, "client", defence, refused, cases=sent, ids=range(len(sent)))
    async def test(honest: Stage, wire: HttpWire, fabric: HostileFabric, verdict: Verdict, case: Any) -> None:
        await honest.worker()
        verdict.said(await told(wire, *case(honest)))
        assert not fabric.works

    return test


test_clear = outside(
    "send a request in the clear", "there is one media type, and no other endpoint", problems.UNSUPPORTED_MEDIA_TYPE,
    *(lambda stage, media_type=media_type: (b'{"messages":[]}', headers_of(stage, content_type=media_type))
      for media_type in ("application/json", "message/ohttp-req", "message/bhttp")),
)  # fmt: skip
test_twice = outside(
    "say one thing to policy and another to the worker, by an outer header given twice", "each outer header appears once",
    problems.INVALID_HEADERS,
    *(lambda stage, again=again: (sealed(stage), [*headers_of(stage), again]) for again in [*OUTER_HEADERS.items()][1:]),
)  # fmt: skip
test_cut_outside = outside("send the gateway a request that is cut short", "the gateway walks the chunks to the final one",
    problems.INVALID_REQUEST, lambda stage: (sealed(stage, 20_000)[:8000], headers_of(stage)))  # fmt: skip
test_too_large = outside("send the gateway more than 7 MiB", "a limit, counted while it is read", problems.TOO_LARGE,
    lambda stage: (bytes(MAX_SEALED_REQUEST + 1), headers_of(stage)))  # fmt: skip
test_policy = outside("use an action that policy does not grant", "Cedar policies, default deny", problems.PATH_NOT_ALLOWED,
    lambda stage: (sealed(stage, path="/admin"), headers_of(stage, lacre_action="http")))  # fmt: skip


@attack("seal to an older generation's key", "client", "the gateway knows each key's `not_after`", problems.UNKNOWN_KEY,
        cases=[True, False])  # fmt: skip
async def test_old_generation(stage: Stage, honest: Stage, wire: HttpWire, verdict: Verdict, case: bool) -> None:
    worker = await stage.worker()
    older = stage.pools(PrivateKey.generate(7)) if case else stage.pools(stage.keys.pool, lives=-1)
    stage.bucket = stage.document(2, pools=older)
    await honest.gateway.feed.refresh()
    verdict.said(await told(wire, sealed(stage), headers_of(honest)))
    assert worker.calls == 0


SOON = 5.0  # seconds in which a refusal comes; none of these waits for a body
REVOKE = b"POST /v1/revocations HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"


@attack("fill a gateway's memory with refusals of thousands of requests, and read none of them", "stranger",
        "a refusal waits until the client has taken the bytes before; if it never does, it is cut",
        problems.INVALID_TOKEN)  # fmt: skip
async def test_unread(honest: Stage, verdict: Verdict) -> None:
    protocol = make_server(honest.app, Listen(port=0)).connection()
    connection, answers = Connection(protocol, "192.0.2.9"), b""

    def taken() -> int:
        nonlocal answers
        while not connection.news.empty():
            answers += connection.news.get_nowait()
        return answers.count(b"HTTP/1.1 4")

    protocol.pause_writing()  # as the transport does when it holds more than the client takes
    assert await connection.say((POST + b"\r\n") * AHEAD)
    await asyncio.sleep(SETTLED)
    assert taken() == 0 and answers == b"" and len(protocol.tasks) == 1, "one request is read at a time"
    protocol.resume_writing()
    await until(lambda: taken() == AHEAD)
    assert not connection.transport.ended
    protocol.pause_writing()
    await connection.say(POST + b"\r\n")
    await asyncio.sleep(SETTLED)
    protocol.cycle.late(time.monotonic() + STALL_LIMIT + 1)  # what the clock says then
    await until(lambda: connection.transport.ended)
    assert taken() == AHEAD
    verdict.said(problem_of(answers.partition(b"HTTP/1.1 4")[2].partition(b"HTTP/1.1 4")[0]))


@attack("ask for long answers and read none of them, so that a gateway keeps them", "client",
        "each piece waits until the client has taken those before; if it never does, the answer is cut",
        gain="one piece of an answer, for as long as the gateway waits")  # fmt: skip
async def test_unread_answer(honest: Stage) -> None:
    protocol = make_server(honest.app, Listen(port=0)).connection()
    connection = Connection(protocol, "192.0.2.9")
    exchange = Exchange(protocol, parse_head(POST), "192.0.2.9", "0" * 32)
    protocol.pause_writing()
    writing = asyncio.ensure_future(exchange.write([bytes(2**16)]))
    await asyncio.sleep(SETTLED)
    assert not writing.done() and connection.news.empty()
    exchange.late(time.monotonic() + STALL_LIMIT + 1)
    with pytest.raises(Stalled):
        await writing
    assert connection.news.empty()


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


@attack("have the gateway read megabytes without a token", "stranger",
        "the gateway checks the token before it reads the body or asks for it", problems.INVALID_TOKEN,
        cases=[b"", b"Expect: 100-continue\r\n"])  # fmt: skip
async def test_nobody(honest: Stage, verdict: Verdict, case: bytes) -> None:
    async with opened(honest) as port:
        heard = await answer(port, POST + OUTER + case + b"Content-Length: 7000000\r\n\r\n")
    assert heard.startswith(b"HTTP/1.1 401 ")
    assert honest.gateway.metrics.received == 0
    verdict.said(problem_of(heard))


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
        head = POST + OUTER.replace(b"action: chat", b"action: http") + bearer(honest.token)
        heard = await answer(port, head + b"Content-Length: 7000000\r\n\r\n" + sealed(stage, 2000)[:MAX_HEADER])
    verdict.said(problem_of(heard))
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


@attack("send a body byte by byte, so that it never ends", "client",
        "a body has a limited time to arrive, however often some of it does", problems.SLOW_BODY)  # fmt: skip
async def test_trickle(stage: Stage, honest: Stage, verdict: Verdict) -> None:
    protocol = make_server(honest.app, Listen(port=0)).connection()
    connection, heard = Connection(protocol, "192.0.2.9"), b""
    said = POST + OUTER + bearer(honest.token) + b"Content-Length: 7000\r\n\r\n"
    await connection.say(said + sealed(stage, 2000)[:MAX_HEADER])
    await until(lambda: honest.gateway.bodies.held, SOON)

    def answered() -> bool:
        nonlocal heard
        while not connection.news.empty():
            heard += connection.news.get_nowait()
        return b"}" in heard

    protocol.cycle.late(time.monotonic() + honest.gateway.settings.limits.body_timeout + 1)  # what the clock says then
    await until(answered, SOON)
    verdict.said(problem_of(heard))
    await until(lambda: not honest.gateway.bodies.held, SOON)


@attack("fill the disk of the audit log with requests that are refused", "client",
        "refusals have their own limit; beyond it they are counted, not recorded", problems.RATE_LIMITED)  # fmt: skip
async def test_refusals(stage: Stage, honest: Stage, wire: HttpWire, verdict: Verdict, issuer: Issuer) -> None:
    async def ask(token: str) -> str | None:
        headers = [*headers_of(honest, lacre_action="http")[:-1], ("authorization", f"Bearer {token}")]
        return await told(wire, sealed(stage), headers)

    allowed = honest.gateway.settings.limits.refused_per_minute
    honest.gateway.refusals._clock = lambda: 0.0  # the minute does not end meanwhile
    for _ in range(allowed):
        assert await ask(honest.token) == problems.PATH_NOT_ALLOWED.type
    verdict.said(await ask(honest.token))
    assert await ask(issuer.token(sub="bob")) == problems.PATH_NOT_ALLOWED.type, "another caller is not concerned"
    assert len(await honest.outcomes(allowed + 1)) == allowed + 1
    assert honest.gateway.refusals.unrecorded == 1
