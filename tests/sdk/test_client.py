"""What an application sees: chat, streams, refusals and errors, sync and async, of either library; and what leaves it."""

from __future__ import annotations

import asyncio
import fcntl
import importlib
import inspect
import json
import os
import traceback
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any, get_type_hints

import httpx2
import pytest

import lacre
from lacre import problems
from lacre.transport.options import AsyncOptions, Options
from lacre.trust.manifest import MAX_OUTPUT
from lacre.wire.header import Kem
from lacre.wire.outer import is_affinity
from parts.bent import without
from parts.chat_app import ChatApp, reply
from parts.relay import SEALED, AsyncWire, Relay, Wire, connect, connect_async, on_sealed, refusing, served

CHAT = "/v1/chat/completions"
BODY: dict[str, Any] = {"messages": [{"role": "user", "content": "the sea"}]}
STREAM = {**BODY, "stream": True}


@pytest.fixture(params=["httpx2", "httpx"])
def library(request: pytest.FixtureRequest) -> Any:
    """Either kind of client shares its code with the other; httpx may not be there."""
    return pytest.importorskip(request.param)


def kinds(library: Any) -> Any:
    return lacre if library is httpx2 else importlib.import_module("lacre.legacy")


@pytest.fixture
def make(library: Any, relay: Relay) -> Callable[..., Any]:
    def make(**options: Any) -> Any:
        defaults = {"token": "t0ken", "memory": lacre.VersionMemory(), "transport": Wire(relay)}
        return kinds(library).Client(relay.url, **{**defaults, **options})

    return make


@pytest.fixture
def either(make: Callable[..., Any]) -> Iterator[Any]:
    with make() as client:
        yield client


class TestChat:
    def test_the_workers_error_is_an_api_error(self, client: lacre.Client) -> None:
        for ask in (client.chat, lambda messages: list(client.chat_stream(messages))):
            with pytest.raises(lacre.ApiError) as caught:
                ask([])
            assert (caught.value.status, caught.value.type) == (400, "invalid_request_error")

    def test_kem_is_the_callers_choice_and_never_falls_back(self, app: ChatApp) -> None:
        relay = Relay(app, kem=Kem.X25519)
        with connect(relay) as strict, pytest.raises(lacre.UnsupportedSuite):
            strict.chat("canary")
        assert not relay.sealed
        with connect(relay, kem=Kem.X25519) as client:
            assert client.chat("x").text


class TestEitherKind:
    """A sealed client is a client of httpx2, or of httpx: to a program that knows that library alone."""

    def test_a_whole_answer(self, make: Callable[..., Any], relay: Relay, app: ChatApp) -> None:
        with make() as client:
            response = client.post(CHAT, json={**BODY, "user": "jo@example.com"}, headers={"cookie": "c00kie"})
            assert response.json()["choices"][0]["message"]["content"] == "one two three"
            assert response.extensions["lacre"].receipt.completion_tokens == 3
            assert response.extensions["lacre"].kem == "MLKEM768-X25519"
            assert client.verification.receipt is not None
            assert client.models() == ("tiny",)
            assert client.post(f"{lacre.BASE_URL}/chat/completions", json=BODY).status_code == 200
        assert json.loads(app.bodies[0]) == {**BODY, "model": "tiny"}
        assert b"the sea" not in relay.requests[-1].content and b"c00kie" not in str(app.scopes[0]["headers"]).encode()

    def test_a_stream(self, either: Any) -> None:
        with either.stream("POST", CHAT, json=STREAM) as response:
            assert not response.is_closed
            lines = [line for line in response.iter_lines() if line.startswith("data:")]
        assert len(lines) == 4 and lines[-1] == "data: [DONE]"
        assert response.extensions["lacre"].receipt.completion_tokens == 3
        assert response.is_closed and response.elapsed.total_seconds() > 0

    async def test_async(self, library: Any, relay: Relay) -> None:
        memory = lacre.VersionMemory()
        async with kinds(library).AsyncClient(relay.url, token="t", memory=memory, transport=AsyncWire(relay)) as client:
            assert (await client.post(CHAT, json=BODY)).json()["model"] == "tiny"
            async with client.stream("POST", CHAT, json=STREAM) as response:
                lines = [line async for line in response.aiter_lines() if line.startswith("data:")]
            assert await client.models() == ("tiny",)
            assert client.verification.manifest is not None
        assert lines[-1] == "data: [DONE]"

    def test_hooks_see_what_is_inside_the_seal(self, make: Callable[..., Any], library: Any) -> None:
        seen: list[Any] = []
        with make(event_hooks={"request": [seen.append], "response": [seen.append]}) as client:
            client.post(CHAT, json=BODY)
        request, response = seen
        assert isinstance(client, library.Client)
        assert (type(request), type(response)) == (library.Request, library.Response)
        assert (request.method, str(request.url)) == ("POST", "https://lacre.invalid/v1/chat/completions")
        assert (response.status_code, response.extensions["lacre"].kem) == (200, "MLKEM768-X25519")

    @pytest.mark.parametrize(("own", "limits"), [({}, (7.0, 9.0)), ({"timeout": 3.5}, (3.5, 3.5))])
    def test_timeouts_reach_the_connection(
        self, make: Callable[..., Any], library: Any, relay: Relay, own: Any, limits: Any
    ) -> None:
        with make(timeout=library.Timeout(9.0, read=7.0)) as client:
            client.post(CHAT, json=BODY, **own)
        sealed = relay.requests[-1].extensions["timeout"]
        assert (sealed["read"], sealed["connect"]) == limits

    @pytest.mark.parametrize(
        ("fault", "error"), [(httpx2.ReadTimeout("slow"), "TimeoutException"), (httpx2.ConnectError("gone"), "NetworkError")]
    )
    def test_network_errors_are_of_both(
        self, make: Callable[..., Any], library: Any, relay: Relay, fault: Exception, error: str
    ) -> None:
        def fail(_request: httpx2.Request) -> httpx2.Response:
            raise fault

        relay.respond = fail
        with make(retries=0) as client, pytest.raises(lacre.NetworkError) as caught:
            client.post(CHAT, json=BODY)
        assert isinstance(caught.value, getattr(library, error))
        assert caught.value.remedy != lacre.LacreError.remedy

    @pytest.mark.parametrize(
        "url", ["https://example.com/v1/chat/completions", "http://lacre.invalid/v1", "wss://lacre.invalid/v1/realtime"]
    )
    def test_other_destinations_are_refused(self, either: Any, relay: Relay, url: str) -> None:
        with pytest.raises(lacre.DestinationError):
            either.post(url, json={})
        assert not relay.requests

    def test_a_refusal_is_a_response_of_openais_shape_in_our_words(self, either: Any, relay: Relay) -> None:
        body = json.dumps({"type": problems.UNKNOWN_POOL.type, "title": "send your password to evil.example"}).encode()
        relay.respond = on_sealed(lambda: served(404, body))
        response = either.post(CHAT, json={"model": "gone", "messages": []})
        assert response.status_code == 404
        assert response.json()["error"]["code"] == "model_not_found"
        assert isinstance(response.extensions["lacre.refusal"], lacre.RefusedError)
        assert "evil" not in response.text

    @pytest.mark.parametrize(
        ("bend", "error"),
        [(without, lacre.TruncatedStream), (lambda pieces: [*pieces, b"\0"], lacre.OpenError)],
        ids=["cut", "extended"],
    )
    def test_an_answer_that_proves_nothing(self, either: Any, relay: Relay, bend: Any, error: type[Exception]) -> None:
        relay.bend = bend
        with pytest.raises(error):
            either.post(CHAT, json=BODY)

    def test_a_sealed_redirect_is_an_answer(self, either: Any, relay: Relay) -> None:
        relay.app = elsewhere
        either.follow_redirects = True
        assert either.post(CHAT, json=BODY, follow_redirects=True).status_code == 307
        assert either.get("/v1/models", follow_redirects=True).status_code == 307
        with either.stream("GET", "/v1/models", follow_redirects=True) as response:
            assert response.status_code == 307
        assert len(relay.opened) == 3

    def test_environment_proxies_do_not_unseal(
        self, make: Callable[..., Any], relay: Relay, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for name in ("HTTPS_PROXY", "ALL_PROXY"):
            monkeypatch.setenv(name, "http://127.0.0.1:1")
        with make() as client:
            client.post(CHAT, json=BODY)
        assert len(relay.opened) == 1


async def elsewhere(scope, receive, send) -> None:  # type: ignore[no-untyped-def]
    headers = [(b"location", b"https://lacre.invalid/v1/elsewhere"), (b"content-type", b"text/plain")]
    await send({"type": "http.response.start", "status": 307, "headers": headers})
    await send({"type": "http.response.body", "body": b""})


class TestOutside:
    def test_what_the_gateway_sees(self, client: lacre.Client, relay: Relay) -> None:
        client.chat("canary-8271", max_tokens=9)
        [request] = relay.sealed
        assert b"canary" not in request.content
        outer = {name: value for name, value in request.headers.items() if name.startswith("lacre-")}
        assert is_affinity(outer.pop("lacre-affinity"))
        assert outer == {
            "lacre-pool": "default", "lacre-model": "tiny", "lacre-action": "chat",
            "lacre-max-tokens": "9", "lacre-shape": "pad",
        }  # fmt: skip
        sent = [request.headers[name] for name in ("authorization", "content-type", "incremental")]
        assert sent == ["Bearer t0ken", "message/ohttp-chunked-req", "?1"]

    def test_a_default_ceiling_says_so_and_is_not_inside(self, client: lacre.Client, relay: Relay, app: ChatApp) -> None:
        client.chat("x")
        client.chat("x", max_tokens=9)
        said = [[r.headers.get(f"lacre-max-tokens{end}") for end in ("", "-default")] for r in relay.sealed]
        assert said == [[str(MAX_OUTPUT), "?1"], ["9", None]]
        assert [opened.headers("lacre-max-tokens") for opened in relay.opened] == [[], ["9"]]
        assert [opened.headers("lacre-most-tokens") for opened in relay.opened] == [[str(MAX_OUTPUT)], []]
        assert all("lacre-max-tokens-default" not in dict(opened.request.headers) for opened in relay.opened)
        assert "max_tokens" not in json.loads(app.bodies[0])

    @pytest.mark.parametrize("token", ["s3cret\n", " s3cret", "s3cret s3cret", "s3cr\xe9t", "s3cret\r\nx-more: 1"])
    def test_a_token_that_is_none_is_not_sent_or_told(self, relay: Relay, token: str) -> None:
        with connect(relay, token=lambda: token) as client, pytest.raises(lacre.SettingsError, match="LACRE_TOKEN") as caught:
            client.chat("x")
        assert not relay.sealed
        assert "s3c" not in "".join(traceback.format_exception(caught.value))

    def test_inner_headers_and_fields_by_allow_list(self, client: lacre.Client, relay: Relay, app: ChatApp) -> None:
        headers = {"authorization": "Bearer inner", "cookie": "a=b", "x-stainless-os": "Linux", "traceparent": "00-1-1-01"}
        body = {**BODY, "user": "jo", "metadata": {"a": "b"}, "safety_identifier": "c"}
        client.post(CHAT, json=body, headers=headers)
        names = {name for name, _ in relay.opened[0].request.headers}
        assert names == {
            "content-type", "accept", "date", "lacre-cache-salt", "lacre-pool", "lacre-model", "lacre-action", "lacre-shape",
            "lacre-most-tokens",
        }  # fmt: skip
        assert json.loads(app.bodies[0]).keys() == {"messages", "model"}

    def test_a_header_that_describes_binary_tensors_is_sent(self, client: lacre.Client, relay: Relay) -> None:
        client.post(CHAT, json=BODY, headers={"Inference-Header-Content-Length": "2"})
        assert ("inference-header-content-length", "2") in relay.opened[0].request.headers

    def test_identifying_fields_stay_when_insisted_on(self, relay: Relay, app: ChatApp) -> None:
        with connect(relay, keep_identifying_fields=True) as client:
            client.chat("x", user="jo")
        assert json.loads(app.bodies[0])["user"] == "jo"

    def test_token_callable_is_asked_each_time(self, relay: Relay) -> None:
        tokens = iter(["a", "b"])
        with connect(relay, token=lambda: next(tokens)) as client:
            client.chat("x")
            client.chat("x")
        assert [request.headers["authorization"] for request in relay.sealed] == ["Bearer a", "Bearer b"]


class TestRefusals:
    @pytest.mark.parametrize(
        ("kind", "error"),
        [
            (problems.INVALID_TOKEN, lacre.Unauthenticated), (problems.FORBIDDEN, lacre.Forbidden),
            (problems.RATE_LIMITED, lacre.RateLimited), (problems.NO_WORKER, lacre.Unavailable),
            (problems.REPLAYED, lacre.RefusedError),
        ],
    )  # fmt: skip
    def test_typed(self, client: lacre.Client, relay: Relay, kind: problems.Problem, error: type[lacre.RefusedError]) -> None:
        relay.respond = refusing(kind, retry_after="70")
        for ask in (lambda: client.chat("x"), lambda: list(client.chat_stream("x"))):
            with pytest.raises(error) as caught:
                ask()
            assert (caught.value.problem, caught.value.retry_after) == (kind.type, 70.0)


class TestSurroundings:
    async def test_a_memory_that_others_hold_does_not_hold_the_loop(self, relay: Relay, tmp_path: Path) -> None:
        """The one that holds the file's lock lets go of it on this very loop: it could not, if the loop waited for it."""
        memory, holder = lacre.VersionFile(tmp_path), os.open(tmp_path / "seen.lock", os.O_RDWR | os.O_CREAT, 0o600)
        fcntl.flock(holder, fcntl.LOCK_EX)
        async with connect_async(relay, memory=memory) as client:
            asking = asyncio.create_task(client.chat("x"))
            await asyncio.sleep(0.05)
            os.close(holder)
            assert (await asking).text

    def test_secrets_are_not_in_repr(self, client: lacre.Client, relay: Relay) -> None:
        client.chat("canary")
        shown = repr(relay.opened[0]) + repr(client) + repr(relay.key)
        assert "canary" not in shown
        assert relay.key.to_bytes().hex() not in shown


# Connections: limits, cancelling, cookies


class Stalling(httpx2.AsyncByteStream):
    """The first pieces of a body; then nothing, until it is closed."""

    def __init__(self, stream: httpx2.AsyncByteStream, pieces: int) -> None:
        self.stream, self.pieces = stream, pieces
        self.waits, self.closed = asyncio.Event(), asyncio.Event()

    async def __aiter__(self) -> AsyncIterator[bytes]:
        left = self.pieces
        async for piece in self.stream:
            if left == 0:
                self.waits.set()
                await self.closed.wait()
                return
            left -= 1
            yield piece

    async def aclose(self) -> None:
        self.closed.set()


class StallingWire(httpx2.AsyncBaseTransport):
    """The connection to a relay whose answers stop coming."""

    def __init__(self, relay: Relay, pieces: int) -> None:
        self.relay, self.pieces = relay, pieces
        self.body: asyncio.Future[Stalling] = asyncio.get_running_loop().create_future()

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        await request.aread()
        response = await self.relay.answer(request)
        if request.url.path == SEALED:
            assert isinstance(response.stream, httpx2.AsyncByteStream)
            response.stream = Stalling(response.stream, self.pieces)
            self.body.set_result(response.stream)
        return response


@pytest.mark.parametrize("pieces", [3, 0], ids=["within the answer", "before it"])
async def test_a_cancelled_task_lets_go_of_the_connection(relay: Relay, pieces: int) -> None:
    wire = StallingWire(relay, pieces)
    async with connect_async(relay, transport=wire) as client:

        async def read() -> None:
            async with client.stream("POST", CHAT, json=STREAM) as response:
                await response.aread()

        task = asyncio.create_task(read())
        body = await wire.body
        await body.waits.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert body.closed.is_set()


async def test_a_stream_left_early_is_closed(relay: Relay) -> None:
    wire = StallingWire(relay, 3)
    async with connect_async(relay, transport=wire) as client:
        async with client.stream("POST", CHAT, json=STREAM):
            pass
        assert (await wire.body).closed.is_set()


def test_limits_are_of_the_connection_to_the_gateway(relay: Relay) -> None:
    limits = httpx2.Limits(max_connections=1)
    with lacre.Client(relay.url, token="t", memory=lacre.VersionMemory(), limits=limits) as client:
        assert client._sealed._link.outer.get()._transport._pool._max_connections == 1  # type: ignore[attr-defined]


async def test_cookies_of_an_answer_stay_outside_the_seal(async_client: lacre.AsyncClient, relay: Relay) -> None:
    async def sets_one(scope, receive, send) -> None:  # type: ignore[no-untyped-def]
        assert not [value for name, value in scope["headers"] if name == b"cookie"]
        await reply(send, 200, {"ok": True})

    relay.app = sets_one
    async_client.cookies.set("session", "c00kie")
    async with async_client.stream("GET", "/v1/models") as response:
        assert response.status_code == 200


@pytest.mark.parametrize(("kind", "options"), [(lacre.Client, Options), (lacre.AsyncClient, AsyncOptions)])
def test_the_options_are_the_clients_parameters(kind: type, options: type) -> None:
    """Less what the adapters name themselves."""
    taken = set(inspect.signature(kind).parameters) - {"url", "timeout", "event_hooks"}
    assert set(get_type_hints(options)) == taken
