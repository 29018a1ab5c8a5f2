"""`lacre.asgi.Sealed`: an app of one's own behind the seal. What gets in, what never does, and that nothing runs twice."""

from __future__ import annotations

import asyncio
import email.utils
import json
import stat
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest
from fastapi import FastAPI
from fastapi.responses import StreamingResponse

import lacre
from lacre import direct, problems
from lacre.asgi import Sealed, key_file, pin
from lacre.asgi.admission import DATE_WINDOW
from lacre.wire import bhttp
from lacre.wire.header import Kem, encode_key_list, parse_key_list
from lacre.wire.ohttp import ResponseOpener, seal_request
from lacre.wire.opening import PrivateKey
from lacre.wire.padding import request_length
from parts.bent import flipped
from parts.chat_app import reply

WELL_KNOWN = "/.well-known/ohttp-gateway"
RES = "message/ohttp-chunked-res"
NOW = 1_800_000_000.0


class Service:
    """A FastAPI app behind the seal, and what reached it."""

    def __init__(self, **options: Any) -> None:
        self.now = NOW
        self.calls: list[str] = []
        self.cancelled = asyncio.Event()
        self.key = PrivateKey.generate(7, Kem.X25519)
        self.app = Sealed(self.api(), **{"keys": self.key, "clock": lambda: self.now, **options})

    def api(self) -> FastAPI:
        api = FastAPI()

        @api.get("/words/{text}")
        async def words(text: str) -> dict[str, int]:
            self.calls.append(text)
            return {"words": len(text.split())}

        @api.get("/stream")
        async def stream(events: int = 1000) -> StreamingResponse:
            async def pieces() -> AsyncIterator[bytes]:
                try:
                    for i in range(events):
                        yield f"data: {i}\n\n".encode()
                        await asyncio.sleep(0 if i < 2 else 0.01)
                finally:
                    self.cancelled.set()

            return StreamingResponse(pieces(), media_type="text/event-stream")

        @api.get("/fails")
        async def fails() -> None:
            raise RuntimeError("with a secret in it")

        return api

    def seal(self, path: str = "/words/a%20b", *, date: float | None = None) -> tuple[bytes, ResponseOpener]:
        sent = email.utils.formatdate(self.now if date is None else date, usegmt=True)
        request = bhttp.Request("GET", "https", "lacre.invalid", path, (("date", sent),), b"")
        body, _, opener = seal_request(self.key.config, bhttp.encode_request(request, padded_to=request_length))
        return body, opener

    @asynccontextmanager
    async def client(self) -> AsyncIterator[httpx2.AsyncClient]:
        transport = httpx2.ASGITransport(self.app, raise_app_exceptions=False)
        headers = {"content-type": "message/ohttp-chunked-req"}
        async with httpx2.AsyncClient(transport=transport, base_url="http://service", headers=headers) as client:
            yield client

    async def post(self, body: bytes, **options: Any) -> httpx2.Response:
        async with self.client() as client:
            return await client.post(WELL_KNOWN, content=body, **options)


def opened(opener: ResponseOpener, body: bytes) -> tuple[int, Any, dict[str, str]]:
    decoder = bhttp.ResponseDecoder()
    events = [event for record in [*opener.feed(body), *opener.close()] for event in decoder.feed(record)] + list(
        decoder.close()
    )
    head = next(event for event in events if isinstance(event, bhttp.ResponseHead))
    content = b"".join(event.content for event in events if isinstance(event, bhttp.Data))
    return head.status, json.loads(content), dict(head.headers)


async def test_a_request_and_its_answer_are_sealed() -> None:
    service = Service()
    body, opener = service.seal("/words/the%20secret%20sea")
    answer = await service.post(body)
    assert (answer.status_code, answer.headers["content-type"]) == (200, RES)
    assert (answer.headers["incremental"], answer.headers["x-accel-buffering"]) == ("?1", "no"), "nothing on the way keeps it"
    assert b"secret" not in body and b"words" not in answer.content
    assert opened(opener, answer.content)[:2] == (200, {"words": 3})


async def test_the_keys_are_where_rfc_9540_has_them() -> None:
    service = Service()
    async with service.client() as client:
        answer = await client.get(WELL_KNOWN)
    assert answer.headers["content-type"] == "application/ohttp-keys"
    assert parse_key_list(answer.content) == (service.key.config,)
    assert service.app.pins == (pin(service.key.config),)


@pytest.mark.parametrize(
    ("method", "path", "problem"),
    [
        ("GET", "/words/plain", problems.NOT_FOUND),
        ("POST", "/words/plain", problems.NOT_FOUND),
        ("GET", "/", problems.NOT_FOUND),
        ("GET", "/docs", problems.NOT_FOUND),
        ("GET", WELL_KNOWN + "/words/plain", problems.NOT_FOUND),
        ("PUT", WELL_KNOWN, problems.METHOD_NOT_ALLOWED),
    ],
)
async def test_nothing_gets_in_in_the_clear(method: str, path: str, problem: problems.Problem) -> None:
    service = Service()
    async with service.client() as client:
        answer = await client.request(method, path)
    assert (answer.status_code, answer.json()["type"]) == (problem.status, problem.type)
    assert not service.calls


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda body: b"", problems.INVALID_REQUEST),
        (lambda body: body[:-1], problems.INVALID_REQUEST),
        (flipped, problems.INVALID_REQUEST),
        (lambda body: b"\x09" + body[1:], problems.UNKNOWN_KEY),
        (lambda body: bytes(8 * 2**20), problems.TOO_LARGE),
    ],
    ids=["empty", "cut", "altered", "another key", "too large"],
)
async def test_what_does_not_open(change: Any, problem: problems.Problem) -> None:
    service = Service()
    answer = await service.post(change(service.seal()[0]))
    assert (answer.status_code, answer.json()["type"]) == (problem.status, problem.type)
    assert not service.calls


async def test_a_request_that_does_not_come() -> None:
    service = Service(body_timeout=0.05)

    async def body() -> AsyncIterator[bytes]:
        yield service.seal()[0][:10]
        await asyncio.Event().wait()

    answer = await asyncio.wait_for(service.post(body()), 20)  # type: ignore[arg-type]
    assert (answer.status_code, answer.json()["type"]) == (408, problems.SLOW_BODY.type)


async def test_requests_that_are_being_read_share_a_bounded_number_of_bytes() -> None:
    """Nobody is known before a request is opened; however many fill it up, a short one finds room."""
    service, over = Service(max_reading=100_000), asyncio.Event()

    async def body() -> AsyncIterator[bytes]:
        for _ in range(100):
            yield bytes(1000)
            await asyncio.sleep(0)
        await over.wait()

    crowd = [asyncio.create_task(service.post(body())) for _ in range(9)]  # type: ignore[arg-type]
    refused = await asyncio.gather(*crowd)
    assert {(answer.status_code, answer.headers["retry-after"]) for answer in refused} == {(503, "1")}
    crowd = [asyncio.create_task(service.post(_held(bytes(9_000), over))) for _ in range(9)]  # type: ignore[arg-type]
    await asyncio.sleep(0.05)
    sealed, opener = service.seal()
    assert opened(opener, (await service.post(sealed)).content)[0] == 200
    over.set()
    assert {answer.status_code for answer in await asyncio.gather(*crowd)} == {400}


async def _held(body: bytes, over: asyncio.Event) -> AsyncIterator[bytes]:
    yield body
    await over.wait()


async def test_another_media_type() -> None:
    service = Service()
    answer = await service.post(service.seal()[0], headers={"content-type": "message/ohttp-req"})
    assert answer.status_code == 415 and not service.calls


class TestReplay:
    async def test_a_request_runs_once(self) -> None:
        service = Service()
        body, _ = service.seal()
        answers = [await service.post(body) for _ in range(2)]
        assert [answer.status_code for answer in answers] == [200, 409]
        service.now += DATE_WINDOW * 2.5  # nothing is forgotten while its date is good
        assert (await service.post(body)).status_code == 409
        assert len(service.calls) == 1

    async def test_long_after(self) -> None:
        service = Service()
        body, _ = service.seal()
        await service.post(body)
        service.now += 86400
        assert (await service.post(body)).status_code == 200  # a sealed refusal: its date is too old
        assert len(service.calls) == 1

    async def test_after_a_restart(self) -> None:
        service = Service()
        body, opener = service.seal()
        await service.post(body)
        again = Service(keys=service.key)
        again.now += 3
        again.app = Sealed(again.api(), keys=service.key, clock=lambda: again.now)
        status, problem, headers = opened(opener, (await again.post(body)).content)
        assert (status, problem["type"]) == (400, problems.DATE.type)
        assert email.utils.parsedate_to_datetime(headers["date"]).timestamp() == again.now  # an honest client tries again
        assert not again.calls
        again.key = service.key
        assert (await again.post(again.seal()[0])).status_code == 200 and again.calls

    async def test_what_is_refused_for_its_date_is_not_remembered(self) -> None:
        """Anybody can make such requests, without end; and it can run once its time has come."""
        service = Service()
        body, opener = service.seal(date=NOW + DATE_WINDOW + 60)
        for _ in range(3):
            assert (await service.post(body)).headers["content-type"] == RES  # refused inside the seal
        service.now += 60
        assert opened(opener, (await service.post(body)).content)[:2] == (200, {"words": 2})
        assert (await service.post(body)).json()["type"] == problems.REPLAYED.type

    async def test_several_processes_share_a_claim(self) -> None:
        taken: set[bytes] = set()

        async def claim(digest: bytes) -> bool:
            assert len(digest) == 32
            return digest not in taken and not taken.add(digest)

        one = Service(claim=claim)
        other = Service(claim=claim, keys=one.key)
        body, _ = one.seal()
        assert [(await each.post(body)).status_code for each in (one, other)] == [200, 409]
        assert len(one.calls) == 1 and not other.calls


@pytest.mark.parametrize("seconds", [DATE_WINDOW + 2, -DATE_WINDOW - 2])
async def test_a_date_far_off(seconds: float) -> None:
    service = Service()
    service.app._began -= 86400
    body, opener = service.seal(date=NOW + seconds)
    assert opened(opener, (await service.post(body)).content)[0] == 400
    assert not service.calls


@pytest.mark.parametrize("path", ["/words/../docs", "/words//x", "/words/%2e%2e/x"])
async def test_a_path_that_could_be_read_differently(path: str) -> None:
    service = Service()
    body, opener = service.seal(path)
    assert opened(opener, (await service.post(body)).content)[1]["error"]["code"] == "invalid_path"
    assert not service.calls


async def test_an_app_that_fails_says_nothing() -> None:
    service = Service()
    body, opener = service.seal("/fails")
    answer = await service.post(body)
    assert b"secret" not in answer.content
    if answer.headers["content-type"] == RES:  # Starlette's own 500 had left before it raised
        with pytest.raises(lacre.TruncatedStream):
            opened(opener, answer.content)
    else:
        assert answer.json()["type"] == problems.INTERNAL.type


async def test_a_caller_that_leaves_ends_the_app() -> None:
    service = Service()
    body, _ = service.seal("/stream")
    left = asyncio.Event()
    messages = [{"type": "http.request", "body": body, "more_body": False}]
    pieces: list[bytes] = []

    async def receive() -> dict[str, Any]:
        if messages:
            return messages.pop()
        await left.wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        pieces.append(message.get("body", b""))
        if len(pieces) == 3:
            left.set()

    headers = [(b"content-type", b"message/ohttp-chunked-req")]
    scope = {"type": "http", "method": "POST", "path": WELL_KNOWN, "headers": headers, "root_path": ""}
    async with asyncio.timeout(30):
        await service.app(scope, receive, send)
        await service.cancelled.wait()
    assert len(pieces) < 100


async def test_a_websocket_is_closed() -> None:
    service = Service()
    sent: list[Any] = []

    async def receive() -> dict[str, Any]:
        return {"type": "websocket.connect"}

    async def send(message: Any) -> None:
        sent.append(message)

    await service.app({"type": "websocket", "path": "/ws"}, receive, send)
    assert [message["type"] for message in sent] == ["websocket.close"]


class TestKeys:
    def test_a_key_file_is_made_once_and_for_its_owner(self, tmp_path: Path) -> None:
        file = tmp_path / "service.key"
        first, second = key_file(file), key_file(file)
        assert first.config == second.config and first.config.kem is Kem.XWING
        assert stat.S_IMODE(file.stat().st_mode) == 0o600

    def test_of_processes_that_start_at_once(self, tmp_path: Path) -> None:
        """All serve the key of the one that was first, and none reads half of it."""
        file = tmp_path / "service.key"
        with ThreadPoolExecutor(16) as pool:
            keys = list(pool.map(lambda _: key_file(file).config, range(16)))
        assert keys == [keys[0]] * 16
        assert [each.name for each in tmp_path.iterdir()] == ["service.key"]

    def test_no_folder_for_it(self, tmp_path: Path) -> None:
        with pytest.raises(lacre.SettingsError, match="create its folder"):
            key_file(tmp_path / "nowhere" / "service.key")

    def test_one_that_others_can_read(self, tmp_path: Path) -> None:
        file = tmp_path / "service.key"
        key_file(file)
        file.chmod(0o644)
        with pytest.raises(lacre.SettingsError, match="chmod 600"):
            key_file(file)

    def test_one_that_is_none(self, tmp_path: Path) -> None:
        file = tmp_path / "service.key"
        file.touch(0o600)
        with pytest.raises(lacre.SettingsError):
            key_file(file)

    async def test_rotation(self) -> None:
        old, new = PrivateKey.generate(1, Kem.X25519), PrivateKey.generate(2, Kem.X25519)
        keys = [old]
        service = Service(keys=lambda: keys)
        service.key = old
        assert (await service.post(service.seal()[0])).status_code == 200
        keys[:] = [new]
        assert (await service.post(service.seal()[0])).status_code == 422
        assert service.app.pins == (pin(new.config),)

    @pytest.mark.parametrize("keys", [[], [PrivateKey.generate(1, Kem.X25519)] * 2])
    def test_none_and_two_with_one_id(self, keys: list[PrivateKey]) -> None:
        with pytest.raises(lacre.UsageError):
            Sealed(FastAPI(), keys=keys)


def test_the_clock_is_the_worlds() -> None:
    assert abs(Sealed(FastAPI(), keys=PrivateKey.generate(1))._clock() - time.time()) < 60


class TestDirectClient:
    """`lacre.direct`: the clients for it."""

    def client(self, service: Service, **options: Any) -> direct.AsyncClient:
        wire = httpx2.ASGITransport(service.app, raise_app_exceptions=False)
        return direct.AsyncClient("http://service", **{"key": service.app.pins, "transport": wire, **options})

    def service(self, **options: Any) -> Service:
        service = Service(**options)
        service.app = Sealed(service.api(), **{"keys": service.key, **options})  # by the world's clock
        return service

    async def test_a_call(self) -> None:
        service = self.service()
        async with self.client(service) as client:
            answer = await client.get("/words/the secret sea")
        assert answer.json() == {"words": 3} and service.calls == ["the secret sea"]
        assert answer.extensions["lacre"].verification.pinned == service.app.pins[0]

    async def test_a_stream_that_is_left(self) -> None:
        service = self.service()
        # This transport hands on nothing before the app has ended: few events.
        async with self.client(service) as client, client.stream("GET", "/stream?events=9") as answer:
            lines = answer.aiter_lines()
            assert (await anext(lines)).startswith(("data: 0", ":"))

    async def test_what_names_the_caller_is_inside(self) -> None:
        seen: dict[str, str] = {}

        async def app(scope, receive, send) -> None:  # type: ignore[no-untyped-def]
            seen.update({name.decode(): value.decode() for name, value in scope["headers"]})
            await reply(send, 200, {})

        outside: list[httpx2.Request] = []
        service = self.service()
        service.app = Sealed(app, keys=service.key)
        wire = httpx2.ASGITransport(service.app)

        class Watched(httpx2.AsyncBaseTransport):
            async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
                outside.append(request)
                return await wire.handle_async_request(request)

        async with self.client(service, token=lambda: "t0ken", transport=Watched()) as client:
            await client.get("/x", headers={"x-api-key": "k3y", "cookie": "c00kie"})
        assert (seen["authorization"], seen["x-api-key"]) == ("Bearer t0ken", "k3y")
        assert "cookie" not in seen and "user-agent" not in seen
        for request in outside:
            assert "authorization" not in request.headers and "x-api-key" not in request.headers
            assert b"k3y" not in request.content and str(request.url) == "http://service/.well-known/ohttp-gateway"

    async def test_a_key_that_is_not_pinned_gets_nothing(self) -> None:
        service, other = self.service(), self.service()
        async with self.client(service, key=other.app.pins) as client:
            with pytest.raises(lacre.UntrustedRoot, match="pin"):
                await client.get("/words/secret")
        assert not service.calls

    async def test_a_change_of_keys(self) -> None:
        old, new = PrivateKey.generate(1, Kem.X25519), PrivateKey.generate(2, Kem.X25519)
        keys = [old]
        service = self.service(keys=lambda: keys)
        async with self.client(service, key=[pin(new.config), pin(old.config)]) as client:
            assert (await client.get("/words/a")).status_code == 200
            keys[:] = [new]
            answer = await client.get("/words/b")
        assert (answer.status_code, answer.extensions["lacre"].attempts) == (200, 2)

    async def test_a_clock_that_is_wrong_is_corrected(self) -> None:
        service = self.service(clock=lambda: time.time() + 86400)
        async with self.client(service) as client:
            answer = await client.get("/words/a")
        assert (answer.status_code, answer.extensions["lacre"].attempts) == (200, 2)
        assert service.calls == ["a"]

    async def test_an_unsealed_answer_is_none(self) -> None:
        service = self.service()
        keys = encode_key_list([service.key.config])

        async def plain(scope, receive, send) -> None:  # type: ignore[no-untyped-def]
            if scope["method"] == "POST":
                return await reply(send, 200, {"words": 3})
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": keys})

        async with self.client(service, transport=httpx2.ASGITransport(plain)) as client:
            with pytest.raises(lacre.UnsealedResponse):
                await client.get("/words/a")

    async def test_other_destinations(self) -> None:
        async with self.client(self.service()) as client:
            with pytest.raises(lacre.DestinationError):
                await client.get("http://service/words/a")

    @pytest.mark.parametrize("key", ["", "short", "!" * 43, []])
    def test_a_pin_that_is_none(self, key: Any) -> None:
        with pytest.raises(lacre.SettingsError, match="pin"):
            direct.Client("http://service", key=key)
