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

from lacre.asgi import App, AppFailed, Send
from lacre.errors import SettingsError
from lacre.evidence.receipts import UNIT
from lacre.jose.jws import b64u
from lacre.wire import bhttp
from lacre_backend.app_thread import Elsewhere
from lacre_backend.serve import served
from lacre_backend.settings import Upstream, WorkerSettings
from lacre_backend.upstream.app import create_app
from lacre_fabric.operate.nats_server import free_port
from lacre_fabric.settings import parse, validated
from parts.behind import Respond, answering, ask, opened, serving
from parts.upstream import CHAT, JSON, PREDICT, code, granted, settings, used

# What goes on


async def test_a_request_goes_on_without_what_says_who_asks() -> None:
    headers = [
        *JSON, ("accept", "*/*"), ("authorization", "Bearer t0ken"), ("cookie", "id=7"), ("user-agent", "theirs"),
        ("te", "trailers"), ("traceparent", "00-1-2-00"), ("x-forwarded-for", "192.0.2.7"), ("lacre-cache-salt", "5a17"),
        ("date", "then"), ("x-mine", "1"),
    ]  # fmt: skip
    async with serving(answering(200, JSON, b'{"predictions":[]}')) as server:
        app = create_app(settings(server.url, 'headers = ["x-mine"]'))
        answered = await ask(app, granted(), "POST", PREDICT + "?v=1", b'{"instances":[]}', headers)
    assert (answered.status, answered.content) == (200, b'{"predictions":[]}')
    assert server.bodies == [b'{"instances":[]}']
    assert (server.seen[0]["raw_path"], server.seen[0]["query_string"]) == (PREDICT.encode(), b"v=1")
    assert server.headers == {
        "host": server.url.removeprefix("http://"), "content-type": "application/json", "accept": "*/*", "x-mine": "1",
        "accept-encoding": "identity", "content-length": "16",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("model", "method", "path", "told"),
    [
        ("encoder", "POST", "/v1/models/other:predict", (404, "unknown_url")),
        ("encoder", "POST", "/admin", (404, "unknown_url")),
        ("encoder", "GET", PREDICT, (405, "method_not_supported")),
        ("encoder", "POST", CHAT, (404, "unknown_url")),  # another model's
        ("encoder", "POST", "/v1/models/encoder%3Apredict", (404, "unknown_url")),
        ("encoder", "GET", "/v2/models/%2e%2e/ready", (404, "unknown_url")),
        ("encoder", "GET", "/v2/models/a%2Fb/ready", (404, "unknown_url")),
        ("encoder", "GET", "/v2/models/../ready", (404, "unknown_url")),
        ("encoder", "GET", "/v2/models//ready", (404, "unknown_url")),
        ("encoder", "GET", "/v2/models/a/b/ready", (404, "unknown_url")),
        ("encoder", "DELETE", "/v2/A", (404, "unknown_url")),
        ("writer", "POST", PREDICT, (404, "unknown_url")),
        ("nobody", "POST", PREDICT, (404, "model_not_found")),
    ],
)
async def test_what_is_not_on_the_models_own_list_goes_nowhere(
    model: str, method: str, path: str, told: tuple[int, str]
) -> None:
    async with serving(answering(200, JSON, b"{}")) as server:
        answered = await ask(create_app(settings(server.url)), granted(model=model), method, path)
    assert code(answered) == told
    assert not server.seen


@pytest.mark.parametrize(
    ("method", "path"), [("GET", "/v2/models/any-1.5:x/ready"), ("HEAD", "/v2"), ("DELETE", "/v2/%41"), ("POST", PREDICT)]
)
async def test_what_is_on_it_does(method: str, path: str) -> None:
    async with serving(answering(200, JSON, b"")) as server:
        answered = await ask(create_app(settings(server.url)), granted(), method, path)
    assert answered.status == 200
    assert [(seen["method"], seen["raw_path"].decode()) for seen in server.seen] == [(method, path)]


async def test_a_coded_body_is_refused() -> None:
    async with serving(answering(200, JSON, b"{}")) as server:
        answered = await ask(create_app(settings(server.url)), granted(), "POST", PREDICT, b"x", [("content-encoding", "gzip")])
    assert code(answered) == (415, "content_encoding")
    assert not server.seen


async def test_models_are_told_by_the_worker() -> None:
    async with serving(answering(500, JSON, b"")) as server:
        answered = await ask(create_app(settings(server.url)), granted("inspect"), "GET", "/v1/models")
    assert [model["id"] for model in json.loads(answered.content)["data"]] == ["writer", "encoder"]
    assert not server.seen


# What comes back


async def test_what_belongs_to_the_connection_stays_on_it() -> None:
    headers = [
        *JSON, ("connection", "x-private, Close"), ("x-private", "1"), ("keep-alive", "timeout=9"),
        ("proxy-authenticate", "Basic"), ("set-cookie", "id=7"), ("lacre-receipt", "forged"),
        ("lacre-model-digest", "forged"), ("server", "secret/1.0"), ("x-public", "2"),
    ]  # fmt: skip
    async with serving(answering(201, headers, b"{}")) as server:
        answered = await ask(create_app(settings(server.url)), granted(), "POST", PREDICT)
    assert (answered.status, answered.headers) == (201, {"content-type": "application/json", "x-public": "2"})


@pytest.mark.parametrize(
    ("status", "headers"),
    [
        (307, [("location", "http://127.0.0.1:1/")]),
        (301, [("location", "/v2")]),
        (304, []),
        (200, [("content-encoding", "gzip")]),
        (200, [("content-encoding", "identity, br")]),
    ],
)
async def test_what_clients_could_not_use_is_not_passed_on(status: int, headers: list[tuple[str, str]]) -> None:
    async with serving(answering(status, headers)) as server:
        answered = await ask(create_app(settings(server.url)), granted(), "POST", PREDICT, b"x")
    assert code(answered) == (502, "upstream_unusable")
    assert len(server.seen) == 1
    assert b"127.0.0.1" not in answered.content


async def test_its_errors_are_passed_on() -> None:
    async with serving(answering(422, JSON, b'{"error":"no such tensor"}')) as server:
        answered = await ask(create_app(settings(server.url)), granted(), "POST", PREDICT, b"x")
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
        async with aclosing(opened(create_app(settings(server.url)), granted(), "POST", PREDICT)) as events:
            async for event in events:
                if isinstance(event, bhttp.Data):
                    pieces.append(event.content)
                    go.set()
    assert pieces == [b"one", b"two"]


# How much


@pytest.mark.parametrize(("sent", "answer", "counted"), [(0, 0, (0, 0, 0)), (1, 1, (1, 0, 1)), (UNIT, UNIT + 1, (1, 0, 2))])
async def test_bytes_are_counted(sent: int, answer: int, counted: tuple[int, int, int]) -> None:
    call = granted()
    async with serving(answering(200, [], b"a" * answer)) as server:
        await ask(create_app(settings(server.url)), call, "POST", PREDICT, b"x" * sent)
    assert used(call) == counted


async def test_a_request_above_its_grant_goes_nowhere() -> None:
    async with serving(answering(200, [], b"")) as server:
        call = granted(max_prompt_tokens=2)
        answered = await ask(create_app(settings(server.url)), call, "POST", PREDICT, b"x" * (2 * UNIT + 1))
    assert code(answered) == (403, "grant_mismatch")
    assert not server.seen and used(call) == (0, 0, 0)


async def test_an_announced_answer_above_its_grant_is_refused() -> None:
    call = granted(max_tokens=2)
    async with serving(answering(200, [("content-length", str(2 * UNIT + 1))], b"a" * (2 * UNIT + 1))) as server:
        answered = await ask(create_app(settings(server.url)), call, "POST", PREDICT)
    assert code(answered) == (413, "answer_too_large")
    assert used(call) == (0, 0, 0)


@pytest.mark.parametrize("head", [(200, [(b"content-length", b"3000")]), (307, [(b"location", b"/")])])
async def test_what_is_refused_is_not_waited_for(head: tuple[int, list[tuple[bytes, bytes]]]) -> None:
    status, headers = head

    async def respond(_scope: Any, _body: bytes, send: Send) -> None:
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": b"a", "more_body": True})
        await asyncio.sleep(60)

    async with serving(respond) as server:
        answered = await ask(create_app(settings(server.url)), granted(max_tokens=2), "POST", PREDICT)
        assert answered.status in (413, 502)
        await asyncio.wait_for(server.left.wait(), 15)


async def test_any_other_is_cut_there() -> None:
    call, got = granted(max_tokens=2), []
    async with serving(answering(200, [], *[b"a" * UNIT] * 3)) as server:
        with pytest.raises(AppFailed):
            async for event in opened(create_app(settings(server.url)), call, "POST", PREDICT):
                got.append(event)
    assert sum(len(event.content) for event in got if isinstance(event, bhttp.Data)) <= 2 * UNIT
    assert call.usage.completion_tokens <= 2


async def test_an_upstream_that_is_not_there() -> None:
    answered = await ask(create_app(settings(f"http://127.0.0.1:{free_port()}")), granted(), "POST", PREDICT)
    assert code(answered) == (502, "upstream_unavailable")
    assert "Try again" in json.loads(answered.content)["error"]["message"]


async def test_an_upstream_that_hangs_up() -> None:
    async def hang_up(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.close()

    async with await asyncio.start_server(hang_up, "127.0.0.1", 0) as listener:
        origin = f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}"
        answered = await ask(create_app(settings(origin)), granted(), "POST", PREDICT)
    assert code(answered) == (502, "upstream_broken")


async def test_an_answer_that_breaks_off_is_not_passed_for_whole() -> None:
    async def half(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\nhalf")
        await writer.drain()
        writer.close()

    async with await asyncio.start_server(half, "127.0.0.1", 0) as listener:
        origin = f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}"
        with pytest.raises(AppFailed):
            await ask(create_app(settings(origin)), granted(), "POST", PREDICT)


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
        answered = await ask(create_app(settings(server.url, limit)), granted(), "POST", PREDICT)
        await asyncio.wait_for(server.left.wait(), 15)
    assert code(answered) == (504, "upstream_timeout")


async def test_an_answer_that_never_ends_is_cut() -> None:
    async with serving(drops) as server:
        with pytest.raises(AppFailed):
            await ask(create_app(settings(server.url, "longest = 0.5")), granted(max_tokens=999), "POST", PREDICT)
        await asyncio.wait_for(server.left.wait(), 15)


@pytest.mark.parametrize("elsewhere", [False, True])
@pytest.mark.parametrize("respond", [silence, drops])
async def test_a_client_that_leaves_ends_it_there(respond: Respond, elsewhere: bool) -> None:
    async with serving(respond) as server:
        app: App = create_app(settings(server.url))
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


async def test_nothing_is_begun_before_its_claim(tmp_path: Path) -> None:
    text = f"""{_WORKER}
        [upstream]
        origin = "http://127.0.0.1:8080"
        [[upstream.models]]
        name = "encoder"
        allow = ["POST {PREDICT}"]
    """
    async with AsyncExitStack() as stack:
        serving = served(parse(WorkerSettings, text, tmp_path / "worker.toml"), stack)
        assert (serving.names, serving.slots, serving.repeatable) == (["encoder"], 8, frozenset())


def test_a_worker_has_models_or_an_upstream(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="or a table"):
        parse(WorkerSettings, _WORKER, tmp_path / "worker.toml")
    both = (
        f'{_WORKER}\n[[models]]\n[upstream]\norigin = "http://127.0.0.1:1"\n[[upstream.models]]\nname = "m"\nallow = ["GET /"]'
    )
    with pytest.raises(SettingsError, match="or a table"):
        parse(WorkerSettings, both, tmp_path / "worker.toml")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('origin = "http://192.0.2.7:8080"', "not on this host"),
        ('origin = "http://example.com"', "not on this host"),
        ('origin = "http://127.0.0.1:8080/v1"', "scheme, host and port"),
        ('origin = "http://me:secret@127.0.0.1"', "scheme, host and port"),
        ('origin = "127.0.0.1:8080"', "scheme, host and port"),
        ('origin = "http://127.0.0.1:8080"\nheaders = ["authorization"]', "must not be forwarded"),
        ('origin = "http://127.0.0.1:8080"\nheaders = ["te"]', "must not be forwarded"),
        ('origin = "http://127.0.0.1:8080"\nheaders = ["lacre-model"]', "must not be forwarded"),
    ],
)
def test_settings_that_are_refused(text: str, said: str) -> None:
    with pytest.raises(SettingsError, match=said):
        parse(Upstream, f'{text}\n[[models]]\nname = "m"\nallow = ["GET /"]', Path("worker.toml"))


@pytest.mark.parametrize(
    "route", ["/v1", "get /v1", "CONNECT /v1", "POST v1", "POST /v1//a", "POST /v1?a=b", "POST /v1#a", "POST /a b"]
)
def test_routes_that_are_none(route: str) -> None:
    with pytest.raises(SettingsError, match="write a method and a path"):
        parse(Upstream, f'origin = "http://127.0.0.1:8080"\n[[models]]\nname = "m"\nallow = ["{route}"]', Path("worker.toml"))


def test_the_settings_in_the_guide() -> None:
    guide = Path(__file__).resolve().parents[2] / "docs/upstream.md"
    tables = [tomllib.loads(block)["upstream"] for block in re.findall(r"```toml\n(.*?)```", guide.read_text(), re.DOTALL)]
    assert len(tables) == 5
    for table in tables:
        assert validated(Upstream, table, guide).models[0].allow


@pytest.mark.parametrize("origin", ["http://127.0.0.1:8080", "http://[::1]:8080", "http://localhost:1", "https://127.1.2.3"])
def test_origins_on_this_host(origin: str) -> None:
    assert settings(origin).origin == origin
    assert settings("http://192.0.2.7:1", "beyond_loopback = true").origin == "http://192.0.2.7:1"
