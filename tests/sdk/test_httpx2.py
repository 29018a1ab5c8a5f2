"""What users of httpx2 expect of a client, of a sealed one: timeouts, limits, hooks, streams, cancelling, redirects."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import AsyncIterator
from typing import get_type_hints

import httpx2
import pytest

import lacre
from lacre.transport.options import AsyncOptions, Options
from parts.chat_app import ChatApp, reply
from parts.relay import Relay, Wire

BODY = {"messages": [{"role": "user", "content": "x"}]}
STREAM = {**BODY, "stream": True}
CHAT = "/v1/chat/completions"


class Stalling(httpx2.AsyncByteStream):
    """The first pieces of a body; of a longer one then nothing, until it is closed."""

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

    def __init__(self, relay: Relay, pieces: int = 3) -> None:
        self.relay, self.pieces = relay, pieces
        self.bodies: list[Stalling] = []
        self.asked = asyncio.Event()

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        await request.aread()
        response = await self.relay.answer(request)
        if request.url.path == "/v1/sealed":
            assert isinstance(response.stream, httpx2.AsyncByteStream)
            self.bodies.append(Stalling(response.stream, self.pieces))
            response.stream = self.bodies[-1]
            self.asked.set()
        return response


def async_client(relay: Relay, wire: httpx2.AsyncBaseTransport) -> lacre.AsyncClient:
    return lacre.AsyncClient(relay.url, token="t0ken", memory=lacre.VersionMemory(), transport=wire)


class TestStreams:
    def test_with_client_stream(self, client: lacre.Client) -> None:
        with client.stream("POST", CHAT, json=STREAM) as response:
            assert not response.is_closed
            lines = [line for line in response.iter_lines() if line.startswith("data:")]
        assert lines[-1] == "data: [DONE]"
        assert response.extensions["lacre"].receipt.completion_tokens == 3
        assert response.is_closed and response.elapsed.total_seconds() > 0

    async def test_a_cancelled_task_lets_go_of_the_connection(self, relay: Relay) -> None:
        wire = StallingWire(relay)
        async with async_client(relay, wire) as client:

            async def read() -> None:
                async with client.stream("POST", CHAT, json=STREAM) as response:
                    async for _line in response.aiter_lines():
                        pass

            task = asyncio.create_task(read())
            await wire.asked.wait()
            await wire.bodies[0].waits.wait()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert wire.bodies[0].closed.is_set()

    async def test_a_cancelled_task_before_the_answer_began(self, relay: Relay) -> None:
        wire = StallingWire(relay, pieces=0)
        async with async_client(relay, wire) as client:
            task = asyncio.create_task(client.post(CHAT, json=BODY))
            await wire.asked.wait()
            await wire.bodies[0].waits.wait()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert wire.bodies[0].closed.is_set()

    async def test_a_stream_left_early_is_closed(self, relay: Relay) -> None:
        wire = StallingWire(relay)
        async with async_client(relay, wire) as client:
            async with client.stream("POST", CHAT, json=STREAM):
                pass
            assert wire.bodies[0].closed.is_set()


class TestHooks:
    def test_see_what_is_inside_the_seal(self, relay: Relay) -> None:
        seen: list[object] = []
        hooks = {
            "request": [lambda request: seen.append((request.method, str(request.url)))],
            "response": [lambda response: seen.append((response.status_code, response.extensions["lacre"].kem))],
        }
        with lacre.Client(
            relay.url, token="t", memory=lacre.VersionMemory(), transport=Wire(relay), event_hooks=hooks
        ) as client:
            client.post(CHAT, json=BODY)
        assert seen == [("POST", "https://lacre.invalid/v1/chat/completions"), (200, "MLKEM768-X25519")]


class TestTimeouts:
    @pytest.mark.parametrize("own", [None, 3.5])
    def test_reach_the_connection(self, relay: Relay, own: float | None) -> None:
        with lacre.Client(
            relay.url, token="t", memory=lacre.VersionMemory(), transport=Wire(relay), timeout=httpx2.Timeout(9.0, read=7.0)
        ) as client:
            client.post(CHAT, json=BODY, **({} if own is None else {"timeout": own}))
        sealed = relay.requests[-1].extensions["timeout"]
        assert (sealed["read"], sealed["connect"]) == ((7.0, 9.0) if own is None else (3.5, 3.5))

    async def test_a_real_one_is_both_kinds(self) -> None:
        """Nobody answers: the connection is taken, and read until its end."""

        async def listen(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.read()
            writer.close()
            gone.set()

        gone = asyncio.Event()
        server = await asyncio.start_server(listen, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        url = Relay(ChatApp()).url.replace(":9?", f":{port}?")
        async with server, lacre.AsyncClient(url, token="t", memory=lacre.VersionMemory(), timeout=0.2) as client:
            with pytest.raises(lacre.NetworkError) as caught:
                async with asyncio.timeout(30):
                    await client.post(CHAT, json=BODY, timeout=0.2)
            await gone.wait()
        assert isinstance(caught.value, httpx2.TimeoutException)


def test_limits_are_of_the_connection_to_the_gateway(relay: Relay) -> None:
    limits = httpx2.Limits(max_connections=1)
    with lacre.Client(relay.url, token="t", memory=lacre.VersionMemory(), limits=limits) as client:
        assert client._sealed._link.outer.get()._transport._pool._max_connections == 1  # type: ignore[attr-defined]


class TestRedirects:
    async def elsewhere(self, scope, receive, send) -> None:  # type: ignore[no-untyped-def]
        headers = [(b"location", b"https://lacre.invalid/v1/elsewhere"), (b"content-type", b"text/plain")]
        await send({"type": "http.response.start", "status": 307, "headers": headers})
        await send({"type": "http.response.body", "body": b""})

    def test_a_sealed_one_is_an_answer(self) -> None:
        relay = Relay(self.elsewhere)
        with lacre.Client(relay.url, token="t", memory=lacre.VersionMemory(), transport=Wire(relay)) as client:
            client.follow_redirects = True
            assert client.post(CHAT, json=BODY, follow_redirects=True).status_code == 307
            assert client.get("/v1/models", follow_redirects=True).status_code == 307
            with client.stream("GET", "/v1/models", follow_redirects=True) as response:
                assert response.status_code == 307
        assert len(relay.opened) == 3

    async def test_nor_by_an_async_client(self) -> None:
        relay = Relay(self.elsewhere)
        async with async_client(relay, StallingWire(relay, pieces=99)) as client:
            async with client.stream("GET", "/v1/models", follow_redirects=True) as response:
                assert response.status_code == 307
        assert len(relay.opened) == 1


async def test_cookies_of_an_answer_stay_outside_the_seal(relay: Relay) -> None:
    async def sets_one(scope, receive, send) -> None:  # type: ignore[no-untyped-def]
        assert not [value for name, value in scope["headers"] if name == b"cookie"]
        await reply(send, 200, {"ok": True})

    relay.app = sets_one
    async with async_client(relay, StallingWire(relay, pieces=99)) as client:
        client.cookies.set("session", "c00kie")
        async with client.stream("GET", "/v1/models") as response:
            assert response.status_code == 200


@pytest.mark.parametrize(("kind", "options"), [(lacre.Client, Options), (lacre.AsyncClient, AsyncOptions)])
def test_the_options_are_the_clients_parameters(kind: type, options: type) -> None:
    """Less what the adapters name themselves."""
    taken = set(inspect.signature(kind).parameters) - {"url", "timeout", "event_hooks"}
    assert set(get_type_hints(options)) == taken
