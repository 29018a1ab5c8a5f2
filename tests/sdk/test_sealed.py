"""`lacre.asgi.Sealed`: an app of one's own behind the seal. What gets in, what never does, and that nothing runs twice."""

from __future__ import annotations

import asyncio
import email.utils
import json
import stat
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
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
from parts.relay import served

WELL_KNOWN = "/.well-known/ohttp-gateway"
REQ, RES = "message/ohttp-chunked-req", "message/ohttp-chunked-res"
NOW = 1_800_000_000.0
OLD, NEW = PrivateKey.generate(1, Kem.X25519), PrivateKey.generate(2, Kem.X25519)


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

    async def ask(self, method: str, path: str, content: Any = None, media_type: str = REQ) -> httpx2.Response:
        transport = httpx2.ASGITransport(self.app, raise_app_exceptions=False)
        async with httpx2.AsyncClient(transport=transport, base_url="http://service") as client:
            return await client.request(method, path, content=content, headers={"content-type": media_type})

    async def post(self, body: Any, media_type: str = REQ) -> httpx2.Response:
        return await self.ask("POST", WELL_KNOWN, body, media_type)

    async def opened(self, sealed: tuple[bytes, ResponseOpener]) -> tuple[int, Any, dict[str, str]]:
        """What is inside the answer: its status, its content and its headers."""
        return opened(sealed[1], (await self.post(sealed[0])).content)


@pytest.fixture
async def service() -> Service:
    return Service()


def opened(opener: ResponseOpener, body: bytes) -> tuple[int, Any, dict[str, str]]:
    decoder = bhttp.ResponseDecoder()
    events = [event for record in [*opener.feed(body), *opener.close()] for event in decoder.feed(record)] + decoder.close()
    head = next(event for event in events if isinstance(event, bhttp.ResponseHead))
    content = b"".join(event.content for event in events if isinstance(event, bhttp.Data))
    return head.status, json.loads(content), dict(head.headers)


def refused_by(answer: httpx2.Response, problem: problems.Problem) -> bool:
    return (answer.status_code, answer.json()["type"]) == (problem.status, problem.type)


async def test_a_request_and_its_answer_are_sealed(service: Service) -> None:
    body, opener = service.seal("/words/the%20secret%20sea")
    answer = await service.post(body)
    assert (answer.status_code, answer.headers["content-type"]) == (200, RES)
    assert (answer.headers["incremental"], answer.headers["x-accel-buffering"]) == ("?1", "no"), "nothing on the way keeps it"
    assert b"secret" not in body and b"words" not in answer.content
    assert opened(opener, answer.content)[:2] == (200, {"words": 3})


async def test_the_keys_are_where_rfc_9540_has_them(service: Service) -> None:
    answer = await service.ask("GET", WELL_KNOWN)
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
async def test_nothing_gets_in_in_the_clear(service: Service, method: str, path: str, problem: problems.Problem) -> None:
    assert refused_by(await service.ask(method, path), problem)
    assert not service.calls


@pytest.mark.parametrize(
    ("change", "media_type", "problem"),
    [
        (lambda body: b"", REQ, problems.INVALID_REQUEST),
        (lambda body: body[:-1], REQ, problems.INVALID_REQUEST),
        (flipped, REQ, problems.INVALID_REQUEST),
        (lambda body: b"\x09" + body[1:], REQ, problems.UNKNOWN_KEY),
        (lambda body: bytes(8 * 2**20), REQ, problems.TOO_LARGE),
        (bytes, "message/ohttp-req", problems.UNSUPPORTED_MEDIA_TYPE),
    ],
    ids=["empty", "cut", "altered", "another key", "too large", "another media type"],
)
async def test_what_does_not_open(service: Service, change: Any, media_type: str, problem: problems.Problem) -> None:
    assert refused_by(await service.post(change(service.seal()[0]), media_type), problem)
    assert not service.calls


async def test_a_request_that_does_not_come() -> None:
    service = Service(body_timeout=0.05)
    answer = await asyncio.wait_for(service.post(_held(service.seal()[0][:10], asyncio.Event())), 20)
    assert refused_by(answer, problems.SLOW_BODY)


async def _held(body: bytes, over: asyncio.Event, pieces: int = 1) -> AsyncIterator[bytes]:
    for _ in range(pieces):
        yield body
        await asyncio.sleep(0)
    await over.wait()


async def test_requests_that_are_being_read_share_a_bounded_number_of_bytes() -> None:
    """Nobody is known before a request is opened; however many fill it up, a short one finds room."""
    service, over = Service(max_reading=100_000), asyncio.Event()
    refused = await asyncio.gather(*(service.post(_held(bytes(1000), over, 100)) for _ in range(9)))
    assert {(answer.status_code, answer.headers["retry-after"]) for answer in refused} == {(503, "1")}
    crowd = [asyncio.create_task(service.post(_held(bytes(9_000), over))) for _ in range(9)]
    await asyncio.sleep(0.05)
    assert (await service.opened(service.seal()))[0] == 200
    over.set()
    assert {answer.status_code for answer in await asyncio.gather(*crowd)} == {400}


class TestReplay:
    async def test_a_request_runs_once(self, service: Service) -> None:
        body, opener = service.seal()
        assert [(await service.post(body)).status_code for _ in range(2)] == [200, 409]
        service.now += DATE_WINDOW * 2.5  # nothing is forgotten while its date is good
        assert (await service.post(body)).status_code == 409
        service.now += 86400
        assert (await service.opened((body, opener)))[0] == 400  # a sealed refusal: its date is too old
        assert len(service.calls) == 1

    async def test_after_a_restart(self, service: Service) -> None:
        sealed = service.seal()
        await service.post(sealed[0])
        again = Service(keys=service.key)
        again.now, again.key = again.now + 3, service.key
        again.app = Sealed(again.api(), keys=service.key, clock=lambda: again.now)
        status, problem, headers = await again.opened(sealed)
        assert (status, problem["type"]) == (400, problems.DATE.type)
        assert email.utils.parsedate_to_datetime(headers["date"]).timestamp() == again.now  # an honest client tries again
        assert not again.calls
        assert (await again.post(again.seal()[0])).status_code == 200 and again.calls

    async def test_what_is_refused_for_its_date_is_not_remembered(self, service: Service) -> None:
        """Anybody can make such requests, without end; and it can run once its time has come."""
        body, opener = service.seal(date=NOW + DATE_WINDOW + 60)
        for _ in range(3):
            assert (await service.post(body)).headers["content-type"] == RES  # refused inside the seal
        service.now += 60
        assert (await service.opened((body, opener)))[:2] == (200, {"words": 2})
        assert refused_by(await service.post(body), problems.REPLAYED)

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


@pytest.mark.parametrize(
    ("path", "date", "problem"),
    [
        ("/words/a", NOW + DATE_WINDOW + 2, problems.DATE.type),
        ("/words/a", NOW - DATE_WINDOW - 2, problems.DATE.type),
        *((path, None, "invalid_path") for path in ("/words/../docs", "/words//x", "/words/%2e%2e/x")),
    ],
)
async def test_what_is_refused_inside_the_seal(service: Service, path: str, date: float | None, problem: str) -> None:
    """A date far off, and a path that could be read differently."""
    service.app._began -= 86400
    status, told, _ = await service.opened(service.seal(path, date=date))
    assert (status, told["type"] if date else told["error"]["code"]) == (400, problem)
    assert not service.calls


async def test_an_app_that_fails_says_nothing(service: Service) -> None:
    body, opener = service.seal("/fails")
    answer = await service.post(body)
    assert b"secret" not in answer.content
    if answer.headers["content-type"] == RES:  # Starlette's own 500 had left before it raised
        with pytest.raises(lacre.TruncatedStream):
            opened(opener, answer.content)
    else:
        assert refused_by(answer, problems.INTERNAL)


async def test_a_caller_that_leaves_ends_the_app(service: Service) -> None:
    left, pieces = asyncio.Event(), list[bytes]()
    messages = [{"type": "http.request", "body": service.seal("/stream")[0], "more_body": False}]

    async def receive() -> dict[str, Any]:
        if not messages:
            await left.wait()
        return messages.pop() if messages else {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        pieces.append(message.get("body", b""))
        if len(pieces) == 3:
            left.set()

    headers = [(b"content-type", REQ.encode())]
    scope = {"type": "http", "method": "POST", "path": WELL_KNOWN, "headers": headers, "root_path": ""}
    async with asyncio.timeout(30):
        await service.app(scope, receive, send)
        await service.cancelled.wait()
    assert len(pieces) < 100


async def test_a_websocket_is_closed(service: Service) -> None:
    come, sent = asyncio.Queue[Any](), asyncio.Queue[Any]()
    come.put_nowait({"type": "websocket.connect"})
    await service.app({"type": "websocket", "path": "/ws"}, come.get, sent.put)
    assert sent.get_nowait()["type"] == "websocket.close" and sent.empty()


class TestKeys:
    @pytest.fixture
    def file(self, tmp_path: Path) -> Path:
        return tmp_path / "service.key"

    def test_a_key_file_is_made_once_and_for_its_owner(self, file: Path) -> None:
        first, second = key_file(file), key_file(file)
        assert first.config == second.config and first.config.kem is Kem.XWING
        assert stat.S_IMODE(file.stat().st_mode) == 0o600

    def test_of_processes_that_start_at_once(self, file: Path) -> None:
        """All serve the key of the one that was first, and none reads half of it."""
        with ThreadPoolExecutor(16) as pool:
            keys = list(pool.map(lambda _: key_file(file).config, range(16)))
        assert keys == [keys[0]] * 16
        assert list(file.parent.iterdir()) == [file]

    @pytest.mark.parametrize(
        ("spoil", "says"),
        [
            (lambda file: file.parent.rmdir(), "create its folder"),
            (lambda file: (key_file(file), file.chmod(0o644)), "chmod 600"),
            (lambda file: file.touch(0o600), None),
        ],
        ids=["no folder for it", "others can read it", "none in it"],
    )
    def test_a_key_file_that_is_none(self, file: Path, spoil: Any, says: str | None) -> None:
        spoil(file)
        with pytest.raises(lacre.SettingsError, match=says):
            key_file(file)

    async def test_rotation(self) -> None:
        keys = [OLD]
        service = Service(keys=lambda: keys)
        service.key = OLD
        assert (await service.post(service.seal()[0])).status_code == 200
        keys[:] = [NEW]
        assert (await service.post(service.seal()[0])).status_code == 422
        assert service.app.pins == (pin(NEW.config),)

    @pytest.mark.parametrize("keys", [[], [OLD] * 2])
    def test_none_and_two_with_one_id(self, keys: list[PrivateKey]) -> None:
        with pytest.raises(lacre.UsageError):
            Sealed(FastAPI(), keys=keys)


def test_the_clock_is_the_worlds() -> None:
    assert abs(Sealed(FastAPI(), keys=OLD)._clock() - time.time()) < 60


class TestDirectClient:
    """`lacre.direct`: the clients for it."""

    def client(self, service: Service, **options: Any) -> direct.AsyncClient:
        wire = httpx2.ASGITransport(service.app, raise_app_exceptions=False)
        return direct.AsyncClient("http://service", **{"key": service.app.pins, "transport": wire, **options})

    def service(self, **options: Any) -> Service:
        return Service(**{"clock": time.time, **options})

    async def test_a_call(self) -> None:
        service = self.service()
        async with self.client(service) as client:
            answer = await client.get("/words/the secret sea")
            assert answer.json() == {"words": 3} and service.calls == ["the secret sea"]
            assert answer.extensions["lacre"].verification.pinned == service.app.pins[0]
            # This transport hands on nothing before the app has ended: few events. The stream is left.
            async with client.stream("GET", "/stream?events=9") as answer:
                assert (await anext(answer.aiter_lines())).startswith(("data: 0", ":"))

    async def test_what_names_the_caller_is_inside(self) -> None:
        seen: dict[str, str] = {}

        async def app(scope: Any, _receive: Any, send: Any) -> None:
            seen.update({name.decode(): value.decode() for name, value in scope["headers"]})
            await reply(send, 200, {})

        outside: list[httpx2.Request] = []
        service = self.service()
        service.app = Sealed(app, keys=service.key)

        class Watched(httpx2.ASGITransport):
            async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
                outside.append(request)
                return await super().handle_async_request(request)

        async with self.client(service, token=lambda: "t0ken", transport=Watched(service.app)) as client:
            await client.get("/x", headers={"x-api-key": "k3y", "cookie": "c00kie"})
        assert (seen["authorization"], seen["x-api-key"]) == ("Bearer t0ken", "k3y")
        assert not {"cookie", "user-agent"} & {*seen}
        for request in outside:
            assert not {"authorization", "x-api-key"} & {*request.headers}
            assert b"k3y" not in request.content and str(request.url) == "http://service/.well-known/ohttp-gateway"

    async def test_a_key_that_is_not_pinned_gets_nothing(self) -> None:
        service, other = self.service(), self.service()
        async with self.client(service, key=other.app.pins) as client:
            with pytest.raises(lacre.UntrustedRoot, match="pin"):
                await client.get("/words/secret")
        assert not service.calls

    async def test_a_change_of_keys_and_a_clock_that_is_wrong(self) -> None:
        keys = [OLD]
        service = self.service(keys=lambda: keys, clock=lambda: time.time() + 86400)
        async with self.client(service, key=[pin(NEW.config), pin(OLD.config)]) as client:
            answers = [await client.get("/words/a")]
            keys[:] = [NEW]
            answers.append(await client.get("/words/b"))
        assert [(answer.status_code, answer.extensions["lacre"].attempts) for answer in answers] == [(200, 2)] * 2
        assert service.calls == ["a", "b"]

    async def test_an_unsealed_answer_is_none(self) -> None:
        service = self.service()
        keys = encode_key_list([service.key.config])
        plain = httpx2.MockTransport(lambda request: served(200, keys if request.method == "GET" else b'{"words":3}'))
        async with self.client(service, transport=plain) as client:
            with pytest.raises(lacre.UnsealedResponse):
                await client.get("/words/a")
            with pytest.raises(lacre.DestinationError):
                await client.get("http://service/words/a")

    @pytest.mark.parametrize("key", ["", "short", "!" * 43, []])
    def test_a_pin_that_is_none(self, key: Any) -> None:
        with pytest.raises(lacre.SettingsError, match="pin"):
            direct.Client("http://service", key=key)
