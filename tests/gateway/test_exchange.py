"""One exchange over bare ASGI: what the relay relies on when the other side misbehaves."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator
from typing import Any

import pytest
from starlette.types import Message

from lacre import problems
from lacre_gateway.budget.in_flight import BodyBytes, BodyReservation, LimitExceeded
from lacre_gateway.http.exchange import ClientGone, Exchange, Stalled
from lacre_gateway.http.refusal import Refusal


def exchange(
    messages: Iterable[Message], sent: list[Message] | None = None, headers: Iterable[tuple[bytes, bytes]] = (), **options: Any
) -> Exchange:
    """sent: what the server sends; None: it gets nothing out."""
    coming = iter(messages)

    async def receive() -> Message:
        message = next(coming, None)
        if message is None:
            await asyncio.Event().wait()
        assert message is not None
        return message

    async def send(message: Message) -> None:
        if sent is None:
            await asyncio.Event().wait()
        else:
            sent.append(message)

    scope: dict[str, Any] = {"headers": list(headers), "client": ("192.0.2.1", 1), "state": {"request_id": "0" * 32}}
    return Exchange(scope, receive, send, **options)


def piece(body: bytes, more: bool = True) -> Message:
    return {"type": "http.request", "body": body, "more_body": more}


GONE: Message = {"type": "http.disconnect"}


def room(total: int = 100) -> BodyReservation:
    return BodyReservation(BodyBytes(total=total, each=100), "alice")


async def test_body_in_pieces() -> None:
    reading, counted = exchange([piece(b"a"), piece(b""), piece(b"b"), piece(b"c", False)]), room()
    assert await reading.sealed_start(counted, 1, 2) == b"ab"
    assert (counted.size, reading.received) == (2, 2), "the rest waits in the network"
    assert await reading.sealed_body(counted) == b"abc"
    assert (counted.size, reading.received) == (3, 3)


async def test_client_gone_in_the_body() -> None:
    with pytest.raises(ClientGone):
        await exchange([piece(b"a"), GONE]).sealed_start(room(), 1, 2)


@pytest.mark.parametrize("size", [1, 2])
async def test_body_that_stops_coming(size: int) -> None:
    reading, counted = exchange([piece(b"a")]), room()
    with pytest.raises(Refusal) as refused:
        await reading.sealed_start(counted, 0.05, size)
        await reading.sealed_body(counted)
    assert refused.value.problem is problems.SLOW_BODY


async def test_body_for_which_there_is_no_room() -> None:
    reading, counted = exchange([piece(b"a" * 60), piece(b"b" * 60, False)]), room(100)
    await reading.sealed_start(counted, 1, 10)
    with pytest.raises(LimitExceeded):
        await reading.sealed_body(counted)
    assert counted.size == 60, "bytes are asked for before they are kept"


async def test_a_client_that_waits_to_be_told_is_not_told_to_send_what_is_refused() -> None:
    sent: list[Message] = []

    def asked() -> Iterator[Message]:
        raise AssertionError("it was told to send")
        yield GONE

    waiting = exchange(asked(), sent, headers=[(b"expect", b"100-continue")])
    await waiting.refuse(Refusal(problems.INVALID_TOKEN))
    assert (sent[0]["status"], dict(sent[0]["headers"])[b"connection"]) == (401, b"close")
    assert [message["more_body"] for message in sent[1:]] == [False]


async def test_client_that_takes_nothing() -> None:
    stuck = exchange([piece(b"", False)], stall_limit=0.05)
    await stuck.sealed_start(room(), 1, 1)
    with pytest.raises(Stalled):
        await stuck.write(b"a")


async def test_gone_waits_for_the_disconnect() -> None:
    await asyncio.wait_for(exchange([piece(b"", False), GONE]).gone(), 1)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(exchange([piece(b"", False)]).gone(), 0.05)


@pytest.mark.parametrize("rest", [[], [GONE], [piece(b"a" * 70_000)] * 2, [piece(b"a"), GONE], [piece(b"", False)]])
async def test_refusal_is_sent_whole_whatever_still_comes(rest: list[Message]) -> None:
    """Without a body to come, it keeps the connection."""
    sent: list[Message] = []
    await exchange(rest, sent).refuse(Refusal(problems.FORBIDDEN))
    assert sent[0]["status"] == 403
    if rest == [piece(b"", False)]:
        assert b"connection" not in dict(sent[0]["headers"])
    assert b"".join(message.get("body", b"") for message in sent[1:]) == problems.FORBIDDEN.body({"request_id": "0" * 32})
    assert [message["more_body"] for message in sent[1:]][-1] is False
