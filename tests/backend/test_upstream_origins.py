"""Several servers behind one worker: which of them gets a request, which never does, and what their checks say."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, aclosing
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from lacre.asgi import AppFailed, Send
from lacre.errors import SettingsError
from lacre.wire import bhttp
from lacre_backend.settings import Upstream
from lacre_backend.upstream.app import create_app
from lacre_backend.upstream.origins import Origins
from lacre_backend.upstream.probe import Probe
from lacre_backend.upstream.state import ASIDE, OriginState
from lacre_fabric.operate.nats_server import free_port
from lacre_fabric.settings import parse
from parts.behind import Respond, Server, answering, ask, opened, saying, serving
from parts.upstream import JSON, PREDICT, code, granted, several
from parts.waiting import until

OK = answering(200, JSON, b"{}")


@pytest.fixture
async def stack() -> AsyncIterator[AsyncExitStack]:
    async with AsyncExitStack() as stack:
        yield stack


class Fleet:
    """An app in front of several servers."""

    def __init__(self, urls: list[str], more: str = "") -> None:
        settings = several(urls, more)
        self.origins = Origins(settings)
        self.probe = Probe(settings, self.origins)
        self.app = create_app(settings, self.origins)

    async def post(self) -> tuple[int, bytes]:
        answered = await ask(self.app, granted(), "POST", PREDICT, b"x")
        return answered.status, answered.content

    def counts(self, what: str) -> list[int]:
        return [getattr(state, what) for state in self.origins.states]


def nobody() -> str:
    return f"http://127.0.0.1:{free_port()}"


class Held:
    """Answers once it is let go."""

    def __init__(self) -> None:
        self.go = asyncio.Event()

    async def __call__(self, _scope: Any, _body: bytes, send: Send) -> None:
        await self.go.wait()
        await OK(_scope, _body, send)


# Who gets it


async def test_idle_servers_take_turns(stack: AsyncExitStack) -> None:
    servers = [await stack.enter_async_context(serving(OK)) for _ in range(3)]
    fleet = Fleet([server.url for server in servers])
    for _ in range(6):
        assert (await fleet.post())[0] == 200
    assert [len(server.seen) for server in servers] == [2, 2, 2]
    assert (fleet.counts("tried"), fleet.counts("running")) == ([2, 2, 2], [0, 0, 0])


async def test_the_least_busy_server_is_chosen(stack: AsyncExitStack) -> None:
    held = Held()
    busy, free = [await stack.enter_async_context(serving(respond)) for respond in (held, OK)]
    fleet = Fleet([busy.url, free.url])
    first = asyncio.create_task(fleet.post())
    await until(lambda: len(busy.seen) == 1)
    assert fleet.counts("running") == [1, 0]
    for _ in range(3):
        await fleet.post()
    assert (len(busy.seen), len(free.seen)) == (1, 3)
    held.go.set()
    assert (await first)[0] == 200


async def test_a_server_that_is_not_there_is_passed_over_and_left_alone(stack: AsyncExitStack) -> None:
    live = await stack.enter_async_context(serving(OK))
    fleet = Fleet([nobody(), live.url])
    for _ in range(4):
        assert (await fleet.post())[0] == 200
    assert (len(live.seen), fleet.counts("unreachable"), fleet.counts("failed")) == (4, [1, 0], [0, 0])
    assert " down running=0 sent=0 unreachable=1 failed=0" in fleet.origins.lines()[0]
    assert "sent=4 unreachable=0 failed=0" in fleet.origins.lines()[1]


async def test_one_that_was_set_aside_is_used_again_once_a_check_reaches_it(stack: AsyncExitStack) -> None:
    live = await stack.enter_async_context(serving(OK))
    fleet = Fleet([nobody(), live.url])
    await fleet.post()
    port = int(fleet.origins.states[0].url.rpartition(":")[2])
    async with saying(b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nother", port):
        assert (await fleet.post())[1] == b"{}"
        await fleet.probe.look()
        assert {(await fleet.post())[1], (await fleet.post())[1]} == {b"other", b"{}"}
    await fleet.probe.close()


async def test_it_is_set_aside_for_a_while_only() -> None:
    state = OriginState("http://127.0.0.1:1")
    state.put_aside(100.0)
    assert not state.usable(100.0 + ASIDE - 0.1)
    assert state.usable(100.0 + ASIDE)


async def test_all_are_tried_before_a_request_fails() -> None:
    fleet = Fleet([nobody(), nobody(), nobody()])
    for calls in (1, 2):  # also when all are set aside
        answered = await ask(fleet.app, granted(), "POST", PREDICT)
        assert code(answered) == (502, "upstream_unavailable")
        assert fleet.counts("unreachable") == [calls] * 3


# Never twice


@pytest.mark.parametrize(
    ("respond", "told"),
    [
        (None, (502, "upstream_broken")),
        (answering(307, [("location", "/")]), (502, "upstream_unusable")),
        (answering(500, JSON, b'{"error": {"code": "own"}}'), (500, "own")),
        (Held(), (504, "upstream_timeout")),
    ],
    ids=["hangs up", "redirects", "fails", "says nothing"],
)  # fmt: skip
async def test_what_was_sent_is_not_sent_again(stack: AsyncExitStack, respond: Respond | None, told: tuple[int, str]) -> None:
    other = await stack.enter_async_context(serving(OK))
    if respond is None:
        url = f"http://127.0.0.1:{await stack.enter_async_context(saying(b''))}"
    else:
        url = (await stack.enter_async_context(serving(respond))).url
    fleet = Fleet([url, other.url], "wait = 0.3")
    assert code(await ask(fleet.app, granted(), "POST", PREDICT, b"x")) == told
    assert not other.seen
    assert fleet.counts("failed") == [0 if told[1] == "own" else 1, 0]


async def test_a_stream_stays_where_it_is_and_breaks_there(stack: AsyncExitStack) -> None:
    go = asyncio.Event()

    async def half(_scope: Any, _body: bytes, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"9")]})
        await send({"type": "http.response.body", "body": b"one", "more_body": True})
        await go.wait()

    broken, other = [await stack.enter_async_context(serving(respond)) for respond in (half, OK)]
    fleet, pieces = Fleet([broken.url, other.url]), []
    with pytest.raises(AppFailed):
        async with aclosing(opened(fleet.app, granted(), "POST", PREDICT)) as events:
            async for event in events:
                if isinstance(event, bhttp.Data):
                    pieces.append(event.content)
                    assert fleet.counts("running") == [1, 0]
                    go.set()
    assert (pieces, len(other.seen)) == ([b"one"], 0)
    assert (fleet.counts("failed"), fleet.counts("running")) == ([1, 0], [0, 0])


# Checks


async def test_one_that_is_down_gets_nothing_and_the_worker_goes_on(stack: AsyncExitStack) -> None:
    health: dict[str, int] = {}

    def of(name: str) -> Respond:
        async def respond(scope: Any, body: bytes, send: Send) -> None:
            status = health.get(name, 200) if scope["path"] == "/health" else 200
            await answering(status, JSON, name.encode())(scope, body, send)

        return respond

    servers: list[Server] = [await stack.enter_async_context(serving(of(name))) for name in "ab"]
    fleet = Fleet([server.url for server in servers], 'health = "/health"\nhealth_failures = 2')
    assert "was not checked yet" in str(fleet.probe.reason())
    await fleet.probe.look()
    assert fleet.probe.reason() is None
    health["a"] = 503
    await fleet.probe.look()
    assert not fleet.probe.faults(), "one failure may be chance"
    with capture_logs() as logs:
        await fleet.probe.look()
    assert [(entry["event"], entry["reason"]) for entry in logs] == [("upstream.down", "answers /health with status 503")]
    assert fleet.probe.reason() is None and len(fleet.probe.faults()) == 1
    assert [(await fleet.post())[1] for _ in range(3)] == [b"b"] * 3
    health["b"] = 500
    for _ in range(2):
        await fleet.probe.look()
    reason = fleet.probe.reason()
    assert reason is not None and servers[0].url in reason.detail and "status 500" in reason.detail
    health.clear()
    with capture_logs() as logs:
        await fleet.probe.look()
    assert [entry["event"] for entry in logs] == ["upstream.up"] * 2
    assert fleet.probe.reason() is None
    assert {(await fleet.post())[1] for _ in range(2)} == {b"a", b"b"}
    await fleet.probe.close()


async def test_a_request_that_finds_no_connection_makes_the_worker_unready(stack: AsyncExitStack) -> None:
    async with serving(OK) as server:
        fleet = Fleet([server.url])
        await fleet.probe.look()
        assert fleet.probe.reason() is None
    await fleet.post()
    reason = fleet.probe.reason()
    assert reason is not None and "refused" in reason.detail
    await fleet.probe.close()


# Settings

A, B = "http://127.0.0.1:8080", "http://127.0.0.1:8081"


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ("", "write `origin` for one server, or `origins` for several"),
        (f'origin = "{A}"\norigins = ["{B}"]', "write `origin` for one server, or `origins` for several"),
        (f'origins = ["{A}", "{A}"]', r"origins\.1: is in the list already"),
        (f'origins = ["{A}", "http://192.0.2.7"]', r"origins\.1: not on this host"),
        (f'origins = ["{A}", "{B}/v1"]', r"origins\.1: write scheme, host and port"),
        (f'origin = "{A}"\nhealth_every = 0', "health_every: must be greater"),
        (f'origin = "{A}"\nhealth_failures = 0', "health_failures: must be greater"),
    ],
)
def test_settings_that_are_refused(lines: str, said: str) -> None:
    with pytest.raises(SettingsError, match=said):
        parse(Upstream, f'{lines}\n[[models]]\nname = "m"\nallow = ["GET /"]', Path("worker.toml"))
