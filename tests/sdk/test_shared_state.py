"""What the calls of one client share, and what they must not: errors, proofs, pseudonyms, cookies, and one fetch for all."""

from __future__ import annotations

import asyncio
import email.utils
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx2
import pytest

import lacre
from lacre import asgi, direct, problems
from lacre.exchange.call import REFRESH_PAUSE, SALT_LIFETIME
from lacre.wire.opening import PrivateKey
from parts.chat_app import ChatApp, reply
from parts.relay import MANIFEST, AsyncWire, Relay, Wire, clocked, connect, connect_async, refusing, served

CALLS = 30
BODY: dict[str, Any] = {"messages": [{"role": "user", "content": "x"}]}
PROBLEM = (b"content-type", problems.MEDIA_TYPE.encode())
UNAVAILABLE = problems.UNAVAILABLE.body()


class Held(AsyncWire):
    """Each request waits a moment, as on a network; `before` may do more."""

    def __init__(self, relay: Relay, before: Callable[[httpx2.Request], Any] = lambda _request: None) -> None:
        super().__init__(relay)
        self._before = before

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        await asyncio.sleep(0.02)
        waits = self._before(request)
        if waits is not None:
            await waits
        return await super().handle_async_request(request)


class Slow(Wire):
    """The same for threads."""

    def handle_request(self, request: httpx2.Request) -> httpx2.Response:
        time.sleep(0.02)
        return super().handle_request(request)


class TestErrors:
    async def test_tell_of_their_own_call_alone(self, relay: Relay) -> None:
        """The first call fails after the second one has its answer, receipt and proof."""
        over, held = asyncio.Event(), list[httpx2.Request]()

        async def fail() -> None:
            await over.wait()
            raise httpx2.ConnectError("gone")

        def first_fails(request: httpx2.Request) -> Any:
            return None if request.url.path == MANIFEST or held else held.append(request) or fail()  # type: ignore[func-returns-value]

        async with connect_async(relay, transport=Held(relay, first_fails), retries=0) as client:
            first = asyncio.create_task(client.chat("first"))
            while not held:
                await asyncio.sleep(0.01)
            second = await client.chat("second")
            over.set()
            with pytest.raises(lacre.LacreError) as failed:
                await first
        known = failed.value.verification
        assert known is not None and known.sealed_to is not None
        assert (known.receipt, known.audit) == (None, None)
        assert client.verification.receipt == second.receipt

    def test_before_anything_was_sealed(self, relay: Relay) -> None:
        """Of the manifest alone, although other calls went well."""
        with connect(relay, retries=0) as client:
            assert client.chat("x").receipt
            with pytest.raises(lacre.UsageError) as failed:
                client.chat("x", model="no such model")
        known = failed.value.verification
        assert known is not None and known.manifest is not None
        assert (known.sealed_to, known.receipt, known.audit) == (None, None, None)

    def test_of_models(self, relay: Relay) -> None:
        relay.respond = lambda _request: served(403, problems.FORBIDDEN.body())
        with connect(relay, retries=0) as client, pytest.raises(lacre.Forbidden) as failed:
            client.models()
        assert failed.value.verification is not None and failed.value.verification.manifest is None


class TestOneFetchForAll:
    async def test_first_calls(self, relay: Relay) -> None:
        async with connect_async(relay, transport=Held(relay)) as client:
            await asyncio.gather(*(client.chat("x") for _ in range(CALLS)))
        assert relay.manifests == 1

    def test_first_calls_of_threads(self, relay: Relay) -> None:
        with connect(relay, transport=Slow(relay)) as client, ThreadPoolExecutor(CALLS) as pool:
            assert all(pool.map(client.chat, ["x"] * CALLS))
        assert relay.manifests == 1

    async def test_a_failure_is_shared_and_forgotten(self, relay: Relay) -> None:
        relay.respond = lambda _request: served(503, UNAVAILABLE)
        async with connect_async(relay, transport=Held(relay), retries=0) as client:
            failed = await asyncio.gather(*(client.chat("x") for _ in range(CALLS)), return_exceptions=True)
            assert {(type(error), str(error)) for error in failed} == {(lacre.Unavailable, str(failed[0]))}
            assert len({id(error) for error in failed}) == CALLS
            assert relay.manifests == 1
            relay.respond = lambda _request: None
            assert (await client.chat("x")).text
        assert relay.manifests == 2

    def test_a_failure_is_shared_by_threads(self, relay: Relay) -> None:
        relay.respond = lambda _request: served(503, UNAVAILABLE)
        begin = threading.Barrier(CALLS)

        def call(_number: int) -> lacre.LacreError:
            begin.wait()
            with pytest.raises(lacre.Unavailable) as failed:
                client.chat("x")
            return failed.value

        with connect(relay, transport=Slow(relay), retries=0) as client, ThreadPoolExecutor(CALLS) as pool:
            assert len({id(error) for error in list(pool.map(call, range(CALLS)))}) == CALLS
        assert relay.manifests < CALLS / 2  # who comes after the failure asks anew

    async def test_who_fetches_is_cancelled(self, relay: Relay) -> None:
        over = asyncio.Event()
        async with connect_async(relay, transport=Held(relay, lambda _request: over.wait())) as client:
            first = asyncio.create_task(client.chat("x"))
            others = [asyncio.create_task(client.chat("x")) for _ in range(CALLS)]
            await asyncio.sleep(0.1)
            first.cancel()
            over.set()
            assert all(await asyncio.gather(*others))
            with pytest.raises(asyncio.CancelledError):
                await first
        assert relay.manifests == 1  # the first one's never arrived

    async def test_who_fetches_has_less_patience(self, relay: Relay) -> None:
        """Its time-out is its own."""
        late = iter([True])

        async def stall() -> None:
            await asyncio.sleep(0.1)
            if next(late, False):
                raise httpx2.ReadTimeout("late")

        wire = Held(relay, lambda request: stall() if request.url.path == MANIFEST else None)
        async with connect_async(relay, transport=wire, retries=0) as client:
            first = asyncio.create_task(client.post("/v1/chat/completions", json=BODY, timeout=0.1))
            await asyncio.sleep(0.01)
            assert all(await asyncio.gather(*(client.chat("x") for _ in range(CALLS))))
            with pytest.raises(lacre.NetworkError):
                await first
        assert relay.manifests == 1

    async def test_who_waits_has_less_patience(self, relay: Relay) -> None:
        over = asyncio.Event()
        wire = Held(relay, lambda _request: over.wait())
        async with connect_async(relay, transport=wire, retries=0, resume=0) as client:
            first = asyncio.create_task(client.chat("x"))
            await asyncio.sleep(0.05)
            with pytest.raises(lacre.NetworkError) as failed:
                await client.post("/v1/chat/completions", json=BODY, timeout=0.02)
            assert failed.value.timed_out
            over.set()
            assert (await first).text

    async def test_a_key_that_is_known_no_more(self, relay: Relay) -> None:
        """All calls under way meet it; one of them asks."""
        relay.clock = lambda now=time.time(): now  # type: ignore[misc]  # noqa: B008 - the signer's clock stands still
        async with connect_async(relay, transport=Held(relay)) as client:
            await client.chat("x")
            relay.key, relay.version = PrivateKey.generate(2, relay.kem), 2
            unknown = refusing(problems.UNKNOWN_KEY)
            relay.respond = lambda request: None if request.content[:1] == b"\x02" else unknown(request)
            replies = await asyncio.gather(*(client.chat("x") for _ in range(CALLS)))
        assert {each.attempts for each in replies} == {2}
        assert relay.manifests == 2

    def test_a_manifest_that_grows_old(self, relay: Relay) -> None:
        now = [time.time()]
        with clocked(relay, lambda: now[0], Slow(relay)) as client, ThreadPoolExecutor(8) as pool:
            client.post("/chat/completions", json=BODY)
            now[0] += relay.lifetime * 0.6
            answers = list(pool.map(lambda _: client.post("/chat/completions", json=BODY), range(8)))
        assert {each.status_code for each in answers} == {200}
        assert relay.manifests == 2

    def test_a_newer_one_does_not_come(self, relay: Relay) -> None:
        """The one that there is serves until it expires, and is asked for now and then, not by every call."""
        now = [time.time()]
        with clocked(relay, lambda: now[0]) as client:
            client.post("/chat/completions", json=BODY)
            relay.respond = lambda request: served(503, UNAVAILABLE) if request.url.path == MANIFEST else None
            now[0] += relay.lifetime * 0.6
            assert [client.post("/chat/completions", json=BODY).status_code for _ in range(5)] == [200] * 5
            assert relay.manifests == 2
            now[0] += REFRESH_PAUSE + 1
            assert client.post("/chat/completions", json=BODY).status_code == 200
            assert relay.manifests == 3
            now[0] += relay.lifetime
            with pytest.raises(lacre.Unavailable):
                client.post("/chat/completions", json=BODY)

    async def test_a_token(self, relay: Relay) -> None:
        """A token server that fails is asked once by all who wait."""
        relay.respond = lambda request: served(500) if request.url.host == "issuer.example" else None
        source = lacre.ClientCredentials("https://issuer.example/token", "app", "s")
        async with connect_async(relay, token=source, transport=Held(relay), retries=0) as client:
            failed = await asyncio.gather(*(client.chat("x") for _ in range(CALLS)), return_exceptions=True)
        assert {type(error) for error in failed} == {lacre.Unavailable}
        assert [request.url.host for request in relay.requests].count("issuer.example") == 1

    async def test_the_keys_of_an_app(self) -> None:
        asked: list[str] = []
        app = asgi.Sealed(echo, keys=PrivateKey.generate(1))

        async def counting(scope: Any, receive: Any, send: Any) -> None:
            if scope["method"] == "GET":
                asked.append(scope["path"])
                await asyncio.sleep(0.05)
            await app(scope, receive, send)

        wire = httpx2.ASGITransport(counting)
        async with direct.AsyncClient("http://service", key=app.pins, transport=wire) as client:
            answers = await asyncio.gather(*(client.post("/x", json={}) for _ in range(CALLS)))
        assert {each.status_code for each in answers} == {200} and len(asked) == 1


async def echo(_scope: Any, receive: Any, send: Any) -> None:
    await receive()
    await reply(send, 200, {"ok": True})


class TestPseudonyms:
    """A salt is a pseudonym, and so is an unusual clock."""

    def setup_method(self) -> None:
        self.now = 1_800_000_000.0
        self.app = ChatApp()
        self.ahead = 7777.0  # seconds, of the workers' clock
        self.relay = Relay(self.strict, lifetime=10 * SALT_LIFETIME)
        self.relay.clock = lambda: self.now
        self.client = clocked(self.relay, lambda: self.now)
        self.sealing = self.client._transport._sealing  # type: ignore[attr-defined]
        self.meanwhile: Callable[[], None] = lambda: None

    async def strict(self, scope: Any, receive: Any, send: Any) -> None:
        headers = dict(scope["headers"])
        sent = email.utils.parsedate_to_datetime(headers[b"date"].decode()).timestamp()
        self.seen.append((headers[b"lacre-cache-salt"].decode(), sent - self.now))
        if abs(sent - self.now - self.ahead) < 5:
            return await self.app(scope, receive, send)
        self.meanwhile()
        date = email.utils.formatdate(self.now + self.ahead, usegmt=True).encode()
        await send({"type": "http.response.start", "status": 400, "headers": [PROBLEM, (b"date", date)]})
        await send({"type": "http.response.body", "body": problems.DATE.body()})

    def call(self) -> list[tuple[str, float]]:
        """The salts that its attempts went out with, and how far their dates were off."""
        self.seen: list[tuple[str, float]] = []
        assert self.client.post("/chat/completions", json=BODY).status_code == 200
        return self.seen

    def test_a_new_salt_goes_out_with_this_machines_clock(self) -> None:
        first = self.call()
        assert [off for _, off in first] == [0, self.ahead]
        assert [off for _, off in self.call()] == [self.ahead]
        self.now += SALT_LIFETIME + 1
        later = self.call()
        assert [off for _, off in later] == [0, self.ahead]
        assert {salt for salt, _ in first}.isdisjoint({salt for salt, _ in later})

    def test_a_correction_that_comes_late(self) -> None:
        """It was learned under a salt that ended meanwhile, by another call."""
        newer = []

        def another() -> None:
            self.meanwhile, self.now = lambda: None, self.now + SALT_LIFETIME + 1
            newer.append(self.sealing._scope_now())

        self.meanwhile = another
        self.call()
        assert newer[0].offset == 0
        assert [off for _, off in self.call()] == [0, self.ahead]

    def test_a_clock_that_was_turned_back(self) -> None:
        """A salt does not live on until that hour comes again."""
        first = self.sealing._scope_now()
        self.now -= 10 * SALT_LIFETIME
        assert self.sealing._scope_now().salt != first.salt


class TestCookies:
    def test_none_is_kept_or_sent(self, relay: Relay) -> None:
        class Marking(Wire):
            def handle_request(self, request: httpx2.Request) -> httpx2.Response:
                answer = super().handle_request(request)
                cookies = [("set-cookie", f"c{number}={'x' * 100}; Path=/") for number in range(50)]
                headers = [*answer.headers.multi_items(), *cookies]
                return httpx2.Response(answer.status_code, headers=headers, stream=answer.stream)

        with connect(relay, transport=Marking(relay)) as client:
            client.cookies.set("own", "x")
            for _ in range(3):
                client.chat("x")
            outer = client._sealed._link.outer.get()
            assert (len(outer.cookies.jar), len(client.cookies.jar)) == (0, 0)
        assert not [request for request in relay.requests if "cookie" in request.headers]

    def test_of_what_is_sealed(self, relay: Relay, app: ChatApp) -> None:
        async def marking(scope: Any, receive: Any, send: Any) -> None:
            async def sent(message: Any) -> None:
                if message["type"] == "http.response.start":
                    message = message | {"headers": [*message["headers"], (b"set-cookie", b"id=1; Path=/")]}
                await send(message)

            await app(scope, receive, sent)

        relay.app = marking
        with connect(relay) as client:
            assert client.post("/v1/chat/completions", json=BODY).headers["set-cookie"]
            assert client.post("/v1/chat/completions", json=BODY).status_code == 200
            assert not len(client.cookies.jar)
        assert not [name for scope in app.scopes for name, _ in scope["headers"] if name == b"cookie"]
