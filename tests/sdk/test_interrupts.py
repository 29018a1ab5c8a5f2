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
from parts.relay import Relay, Wire, connect_async


class Mine(Exception):
    """The caller's own."""


ENDS = [KeyboardInterrupt, SystemExit, GeneratorExit, asyncio.CancelledError, Mine]


@pytest.mark.parametrize("kind", ENDS)
@pytest.mark.parametrize("place", ["token", "hook", "wire"])
@pytest.mark.parametrize("make", [lacre.Client, lacre.legacy.Client])
def test_it_passes(relay: Relay, kind: type[BaseException], place: str, make: Callable[..., Any]) -> None:
    def end(*_: object) -> Any:
        raise kind

    options: dict[str, Any] = {"token": "t", "memory": lacre.VersionMemory(), "transport": Wire(relay)}
    if place == "wire":
        relay.respond = end
    else:
        options |= {"token": end} if place == "token" else {"event_hooks": {"request": [end]}}
    with make(relay.url, **options) as client, pytest.raises(kind) as caught:
        client.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": "Hello."}]})
    assert type(caught.value) is kind


@pytest.mark.parametrize("place", ["token", "wire", "stream"])
async def test_a_cancelled_call(relay: Relay, place: str) -> None:
    begun = asyncio.Event()

    async def wait(*_: object) -> Any:
        begun.set()
        await asyncio.sleep(60)

    class Waiting(httpx2.AsyncBaseTransport):
        handle_async_request = wait

    async with connect_async(relay, **({"transport": Waiting()} if place == "wire" else {"token": wait})) as client:
        stream = client.chat_stream("Hello.")
        call = asyncio.ensure_future(anext(stream) if place == "stream" else client.chat("Hello."))
        await begun.wait()
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        with contextlib.suppress(RuntimeError):
            await stream.aclose()
        assert stream.usage is None and stream.text == ""  # and nothing replaces the cancellation


def test_a_program_interrupted_between_two_pieces(client: lacre.Client) -> None:
    with pytest.raises(KeyboardInterrupt):
        for piece in client.chat_stream("Hello."):
            assert piece
            raise KeyboardInterrupt
    assert client.chat("Hello.").text == "one two three"  # and the client works on
