"""Cancellation and Ctrl-C pass through the SDK unchanged, and so does what the caller's own function raises."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import Any

import httpx2
import pytest

import lacre
import lacre.legacy
from parts.chat_app import ChatApp
from parts.relay import AsyncWire, Relay, Wire


class Mine(Exception):
    """The caller's own."""


ENDS = [KeyboardInterrupt, SystemExit, GeneratorExit, asyncio.CancelledError, Mine]


def raising(kind: type[BaseException]) -> Callable[..., Any]:
    def end(*_: object) -> Any:
        raise kind

    return end


@pytest.mark.parametrize("kind", ENDS)
@pytest.mark.parametrize("place", ["token", "hook", "wire"])
@pytest.mark.parametrize("make", [lacre.Client, lacre.legacy.Client])
def test_it_passes(kind: type[BaseException], place: str, make: Callable[..., Any]) -> None:
    relay = Relay(ChatApp())
    end = raising(kind)
    if place == "wire":
        relay.respond = end
    client = make(
        relay.url,
        token=end if place == "token" else "t",
        memory=lacre.VersionMemory(),
        transport=Wire(relay),
        event_hooks={"request": [end]} if place == "hook" else None,
    )
    body = {"messages": [{"role": "user", "content": "Hello."}]}
    with client, pytest.raises(kind) as caught:
        client.post("/v1/chat/completions", json=body)
    assert type(caught.value) is kind


@pytest.mark.parametrize("place", ["token", "wire", "stream"])
async def test_a_cancelled_call(place: str) -> None:
    relay, begun = Relay(ChatApp()), asyncio.Event()

    async def wait(*_: object) -> Any:
        begun.set()
        await asyncio.sleep(60)

    class Waiting(httpx2.AsyncBaseTransport):
        async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
            return await wait()  # type: ignore[no-any-return]

    transport = Waiting() if place == "wire" else AsyncWire(relay)
    memory = lacre.VersionMemory()
    token: Any = wait if place != "wire" else "t"
    async with lacre.AsyncClient(relay.url, token=token, memory=memory, transport=transport) as client:
        stream = client.chat_stream("Hello.")
        call = asyncio.ensure_future(anext(stream) if place == "stream" else client.chat("Hello."))
        await begun.wait()
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        with contextlib.suppress(RuntimeError):
            await stream.aclose()
        assert stream.usage is None and stream.text == ""  # and nothing replaces the cancellation


def test_a_program_interrupted_between_two_pieces() -> None:
    relay = Relay(ChatApp())
    with lacre.Client(relay.url, token="t", memory=lacre.VersionMemory(), transport=Wire(relay)) as client:
        with pytest.raises(KeyboardInterrupt):
            for piece in client.chat_stream("Hello."):
                assert piece
                raise KeyboardInterrupt
        assert client.chat("Hello.").text == "one two three"  # and the client works on
