"""Another program on the host, served sealed: what goes on to it, what comes back, and what neither does."""

from __future__ import annotations

import asyncio
import json
import re
import tomllib
from contextlib import AsyncExitStack, aclosing
from pathlib import Path
from typing import Any

import pytest

from lacre.asgi import App, AppFailed, Call, Send
from lacre.errors import SettingsError
from lacre.evidence.receipts import UNIT
from lacre.jose.jws import b64u
from lacre.wire import bhttp
from lacre_backend.app_thread import Elsewhere
from lacre_backend.serve import served
from lacre_backend.settings import Upstream, WorkerSettings
from lacre_fabric.operate.nats_server import free_port
from lacre_fabric.settings import parse, validated
from parts.behind import Answered, Respond, Server, answering, ask, opened, saying, serving
from parts.upstream import CHAT, JSON, PREDICT, code, forwarding, granted, settings, used


async def passed(
    respond: Respond, call: Call | None = None, path: str = PREDICT, content: bytes = b"", headers: Any = (), *,
    method: str = "POST", more: str = "",
) -> tuple[Answered, Server]:  # fmt: skip
    """What came of a call, and what the other program saw of it."""
    async with serving(respond) as server:
        return await ask(forwarding(settings(server.url, more)), call or granted(), method, path, content, headers), server


# What goes on


async def test_a_request_goes_on_without_what_says_who_asks() -> None:
    headers = [
        *JSON, ("accept", "*/*"), ("authorization", "Bearer t0ken"), ("cookie", "id=7"), ("user-agent", "theirs"),
        ("te", "trailers"), ("traceparent", "00-1-2-00"), ("x-forwarded-for", "192.0.2.7"), ("lacre-cache-salt", "5a17"),
        ("date", "then"), ("x-mine", "1"),
        ("Inference-Header-Content-Length", "16"),
    ]  # fmt: skip
    respond = answering(200, JSON, b'{"predictions":[]}')
    answered, server = await passed(respond, None, PREDICT + "?v=1", b'{"instances":[]}', headers, more='headers = ["x-mine"]')
    assert (answered.status, answered.content) == (200, b'{"predictions":[]}')
    assert server.bodies == [b'{"instances":[]}']
    assert (server.seen[0]["raw_path"], server.seen[0]["query_string"]) == (PREDICT.encode(), b"v=1")
    assert server.headers == {
        "host": server.url.removeprefix("http://"), "content-type": "application/json", "accept": "*/*", "x-mine": "1",
        "inference-header-content-length": "16",
        "accept-encoding": "identity", "content-length": "16",
    }  # fmt: skip


GZIP = [("content-encoding", "gzip")]
BIG = b"x" * (2 * UNIT + 1)


# Of which model, and what is not on its list.
ELSEWHERE = {
    "encoder": [
        ("POST", "/v1/models/other:predict"), ("POST", "/admin"), ("POST", CHAT), ("POST", "/v1/models/encoder%3Apredict"),
        ("GET", "/v2/models/%2e%2e/ready"), ("GET", "/v2/models/a%2Fb/ready"), ("GET", "/v2/models/../ready"),
        ("GET", "/v2/models//ready"), ("GET", "/v2/models/a/b/ready"), ("DELETE", "/v2/A"),
    ],
    "writer": [("POST", PREDICT)],
}  # fmt: skip


@pytest.mark.parametrize(
    ("call", "method", "path", "content", "told"),
    [
        *((granted(model=name), *row, b"", (404, "unknown_url")) for name, rows in ELSEWHERE.items() for row in rows),
        (granted(), "GET", PREDICT, b"", (405, "method_not_supported")),
        (granted(model="nobody"), "POST", PREDICT, b"", (404, "model_not_found")),
        (granted(), "POST", PREDICT, b"coded", (415, "content_encoding")),
        (granted(max_prompt_tokens=2), "POST", PREDICT, BIG, (403, "grant_mismatch")),
    ],
    ids=lambda value: str(value)[:30],
)
async def test_what_the_model_or_the_grant_does_not_allow_goes_nowhere(
    call: Call, method: str, path: str, content: bytes, told: tuple[int, str]
) -> None:
    headers = GZIP if content == b"coded" else ()
    answered, server = await passed(answering(200, JSON, b"{}"), call, path, content, headers, method=method)
    assert code(answered) == told
    assert (server.seen, used(call)) == ([], (0, 0, 0))


@pytest.mark.parametrize(
    ("method", "path"), [("GET", "/v2/models/any-1.5:x/ready"), ("HEAD", "/v2"), ("DELETE", "/v2/%41"), ("POST", PREDICT)]
)
async def test_what_is_on_its_list_goes_on(method: str, path: str) -> None:
    answered, server = await passed(answering(200, JSON, b""), path=path, method=method)
    assert answered.status == 200
    assert [(seen["method"], seen["raw_path"].decode()) for seen in server.seen] == [(method, path)]


async def test_models_are_told_by_the_worker() -> None:
    answered, server = await passed(answering(500, JSON, b""), granted("inspect"), "/v1/models", method="GET")
    assert [model["id"] for model in json.loads(answered.content)["data"]] == ["writer", "encoder"]
    assert not server.seen


# What comes back


async def test_what_belongs_to_the_connection_stays_on_it() -> None:
    headers = [
        *JSON, ("connection", "x-private, Close"), ("x-private", "1"), ("keep-alive", "timeout=9"),
        ("proxy-authenticate", "Basic"), ("set-cookie", "id=7"), ("lacre-receipt", "forged"),
        ("lacre-model-digest", "forged"), ("server", "secret/1.0"), ("x-public", "2"),
    ]  # fmt: skip
    answered, _ = await passed(answering(201, headers, b"{}"))
    assert (answered.status, answered.headers) == (201, {"content-type": "application/json", "x-public": "2"})


@pytest.mark.parametrize(
    ("status", "headers"),
    [
        (307, [("location", "http://127.0.0.1:1/")]), (301, [("location", "/v2")]), (304, []), (200, GZIP),
        (200, [("content-encoding", "identity, br")]),
    ],
)  # fmt: skip
async def test_what_clients_could_not_use_is_not_passed_on(status: int, headers: list[tuple[str, str]]) -> None:
    answered, server = await passed(answering(status, headers), content=b"x")
    assert code(answered) == (502, "upstream_unusable")
    assert len(server.seen) == 1
    assert b"127.0.0.1" not in answered.content


async def test_its_errors_are_passed_on() -> None:
    answered, _ = await passed(answering(422, JSON, b'{"error":"no such tensor"}'), content=b"x")
    assert (answered.status, answered.content) == (422, b'{"error":"no such tensor"}')


async def test_pieces_come_as_they_are_made() -> None:
    go = asyncio.Event()

    async def respond(_scope: Any, _body: bytes, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"one", "more_body": True})
        await go.wait()
        await send({"type": "http.response.body", "body": b"two", "more_body": False})

    pieces = []
    async with serving(respond) as server:
        async with aclosing(opened(forwarding(settings(server.url)), granted(), "POST", PREDICT)) as events:
            async for event in events:
                if isinstance(event, bhttp.Data):
                    pieces.append(event.content)
                    go.set()
    assert pieces == [b"one", b"two"]


# How much


@pytest.mark.parametrize(("sent", "answer", "counted"), [(0, 0, (0, 0, 0)), (1, 1, (1, 0, 1)), (UNIT, UNIT + 1, (1, 0, 2))])
async def test_bytes_are_counted(sent: int, answer: int, counted: tuple[int, int, int]) -> None:
    call = granted()
    await passed(answering(200, [], b"a" * answer), call, content=b"x" * sent)
    assert used(call) == counted


async def test_an_announced_answer_above_its_grant_is_refused() -> None:
    call = granted(max_tokens=2)
    answered, _ = await passed(answering(200, [("content-length", str(len(BIG)))], BIG), call)
    assert (code(answered), used(call)) == ((413, "answer_too_large"), (0, 0, 0))


@pytest.mark.parametrize(("status", "headers"), [(200, [(b"content-length", b"3000")]), (307, [(b"location", b"/")])])
async def test_what_is_refused_is_not_waited_for(status: int, headers: list[tuple[bytes, bytes]]) -> None:
    async def respond(_scope: Any, _body: bytes, send: Send) -> None:
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": b"a", "more_body": True})
        await asyncio.sleep(60)

    async with serving(respond) as server:
        answered = await ask(forwarding(settings(server.url)), granted(max_tokens=2), "POST", PREDICT)
        assert answered.status in (413, 502)
        await asyncio.wait_for(server.left.wait(), 15)


async def test_any_other_is_cut_there() -> None:
    call, got = granted(max_tokens=2), []
    async with serving(answering(200, [], *[b"a" * UNIT] * 3)) as server:
        with pytest.raises(AppFailed):
            async for event in opened(forwarding(settings(server.url)), call, "POST", PREDICT):
                got.append(event)
    assert sum(len(event.content) for event in got if isinstance(event, bhttp.Data)) <= 2 * UNIT
    assert call.usage.completion_tokens <= 2


async def test_an_upstream_that_is_not_there() -> None:
    answered = await ask(forwarding(settings(f"http://127.0.0.1:{free_port()}")), granted(), "POST", PREDICT)
    assert code(answered) == (502, "upstream_unavailable")
    assert "Try again" in json.loads(answered.content)["error"]["message"]


async def test_an_upstream_that_hangs_up() -> None:
    async with saying(b"") as port:
        answered = await ask(forwarding(settings(f"http://127.0.0.1:{port}")), granted(), "POST", PREDICT)
        assert code(answered) == (502, "upstream_broken")
    async with saying(b"HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\nhalf") as port:
        with pytest.raises(AppFailed):  # not passed for whole
            await ask(forwarding(settings(f"http://127.0.0.1:{port}")), granted(), "POST", PREDICT)


async def silence(_scope: Any, _body: bytes, _send: Send) -> None:
    await asyncio.sleep(60)


async def drops(_scope: Any, _body: bytes, send: Send) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    for _ in range(600):
        await send({"type": "http.response.body", "body": b"a", "more_body": True})
        await asyncio.sleep(0.1)


@pytest.mark.parametrize("limit", ["wait = 0.3", "longest = 0.3"])
async def test_an_upstream_that_says_nothing(limit: str) -> None:
    async with serving(silence) as server:
        answered = await ask(forwarding(settings(server.url, limit)), granted(), "POST", PREDICT)
        await asyncio.wait_for(server.left.wait(), 15)
    assert code(answered) == (504, "upstream_timeout")


async def test_an_answer_that_never_ends_is_cut() -> None:
    async with serving(drops) as server:
        with pytest.raises(AppFailed):
            await ask(forwarding(settings(server.url, "longest = 0.5")), granted(max_tokens=999), "POST", PREDICT)
        await asyncio.wait_for(server.left.wait(), 15)


@pytest.mark.parametrize("elsewhere", [False, True])
@pytest.mark.parametrize("respond", [silence, drops])
async def test_a_client_that_leaves_ends_it_there(respond: Respond, elsewhere: bool) -> None:
    async with serving(respond) as server:
        app: App = forwarding(settings(server.url))
        running = Elsewhere(app) if elsewhere else None

        async def read() -> None:
            async with aclosing(opened(running or app, granted(max_tokens=999), "POST", PREDICT)) as events:
                async for _ in events:
                    pass

        reading = asyncio.create_task(read())
        while not server.seen:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.2)
        reading.cancel()
        await asyncio.gather(reading, return_exceptions=True)
        await asyncio.wait_for(server.left.wait(), 15)
        if running is not None:
            running.close()


# Settings

_WORKER = f"""
    pool = "p"
    node = "n1"
    trust = "{b64u(bytes(32))}"
    keys = "keys"
    receipt_key = "receipt.pem"
    nats = {{url = "nats://127.0.0.1:4222", credentials = "worker"}}
"""
_UPSTREAM = f"""
    [upstream]
    origin = "http://127.0.0.1:8080"
    [[upstream.models]]
    name = "encoder"
    allow = ["POST {PREDICT}"]
"""


async def test_nothing_is_begun_before_its_claim(tmp_path: Path) -> None:
    async with AsyncExitStack() as stack:
        serving = served(parse(WorkerSettings, _WORKER + _UPSTREAM, tmp_path / "worker.toml"), stack)
        assert (serving.names, serving.slots, serving.repeatable) == (["encoder"], 8, frozenset())


@pytest.mark.parametrize("text", [_WORKER, f"{_WORKER}\n[[models]]\n{_UPSTREAM}"], ids=["neither", "both"])
def test_a_worker_has_models_or_an_upstream(tmp_path: Path, text: str) -> None:
    with pytest.raises(SettingsError, match="or a table"):
        parse(WorkerSettings, text, tmp_path / "worker.toml")


LOCAL = 'origin = "http://127.0.0.1:8080"'
ROUTE = "write a method and a path"


REFUSED = {
    "not on this host": ['origin = "http://192.0.2.7:8080"', 'origin = "http://example.com"'],
    "scheme, host and port": [
        'origin = "http://127.0.0.1:8080/v1"', 'origin = "http://me:secret@127.0.0.1"', 'origin = "127.0.0.1:8080"',
    ],
    "must not be forwarded": [f'{LOCAL}\nheaders = ["{name}"]' for name in ("authorization", "te", "lacre-model")],
}  # fmt: skip
NO_ROUTES = ("/v1", "get /v1", "CONNECT /v1", "POST v1", "POST /v1//a", "POST /v1?a=b", "POST /v1#a", "POST /a b")


@pytest.mark.parametrize(
    ("text", "route", "said"),
    [(text, "GET /", said) for said, texts in REFUSED.items() for text in texts]
    + [(LOCAL, route, ROUTE) for route in NO_ROUTES],
)
def test_settings_that_are_refused(text: str, route: str, said: str) -> None:
    with pytest.raises(SettingsError, match=said):
        parse(Upstream, f'{text}\n[[models]]\nname = "m"\nallow = ["{route}"]', Path("worker.toml"))


def test_the_settings_in_the_guide() -> None:
    guide = Path(__file__).resolve().parents[2] / "docs/upstream.md"
    tables = [tomllib.loads(block)["upstream"] for block in re.findall(r"```toml\n(.*?)```", guide.read_text(), re.DOTALL)]
    assert len(tables) == 5
    model = [{"name": "m", "allow": ["GET /"]}]  # for an excerpt
    for table in tables:
        assert validated(Upstream, {"models": model, **table}, guide).models[0].allow


@pytest.mark.parametrize("origin", ["http://127.0.0.1:8080", "http://[::1]:8080", "http://localhost:1", "https://127.1.2.3"])
def test_origins_on_this_host(origin: str) -> None:
    assert settings(origin).origin == origin
    assert settings("http://192.0.2.7:1", "beyond_loopback = true").origin == "http://192.0.2.7:1"
