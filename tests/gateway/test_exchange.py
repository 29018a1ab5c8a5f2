"""One exchange over bare ASGI: what the relay relies on when the other side misbehaves."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Any

import pytest

from lacre import problems
from lacre_gateway.exchange import ClientGone, Exchange, Message, Stalled
from lacre_gateway.refusal import Refusal


def exchange(messages: Iterable[Message], sent: list[Message] | None = None, **options: Any) -> Exchange:
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

    scope: dict[str, Any] = {"headers": [], "client": ("192.0.2.1", 1), "state": {"request_id": "0" * 32}}
    return Exchange(scope, receive, send, **options)


def piece(body: bytes, more: bool = True) -> Message:
    return {"type": "http.request", "body": body, "more_body": more}


GONE: Message = {"type": "http.disconnect"}


async def test_body_in_pieces() -> None:
    assert await exchange([piece(b"a"), piece(b""), piece(b"b"), piece(b"c", False)]).sealed_body(1) == b"abc"


async def test_client_gone_in_the_body() -> None:
    with pytest.raises(ClientGone):
        await exchange([piece(b"a"), GONE]).sealed_body(1)


async def test_body_that_stops_coming() -> None:
    with pytest.raises(Refusal) as refused:
        await exchange([piece(b"a")]).sealed_body(0.05)
    assert refused.value.problem is problems.SLOW_BODY


async def test_client_that_takes_nothing() -> None:
    stuck = exchange([piece(b"", False)], stall_limit=0.05)
    await stuck.sealed_body(1)
    with pytest.raises(Stalled):
        await stuck.write(b"a")


async def test_gone_waits_for_the_disconnect() -> None:
    await asyncio.wait_for(exchange([piece(b"", False), GONE]).gone(), 1)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(exchange([piece(b"", False)]).gone(), 0.05)


@pytest.mark.parametrize("rest", [[], [GONE], [piece(b"a" * 70_000)] * 2, [piece(b"a"), GONE]])
async def test_refusal_is_sent_whole_whatever_still_comes(rest: list[Message]) -> None:
    sent: list[Message] = []
    await exchange(rest, sent).refuse(Refusal(problems.FORBIDDEN))
    assert sent[0]["status"] == 403
    assert b"".join(message.get("body", b"") for message in sent[1:]) == problems.FORBIDDEN.body()
    assert [message["more_body"] for message in sent[1:]][-1] is False


async def test_refusal_without_a_body_to_come_keeps_the_connection() -> None:
    sent: list[Message] = []
    await exchange([piece(b"", False)], sent).refuse(Refusal(problems.FORBIDDEN))
    assert b"connection" not in dict(sent[0]["headers"])
    assert len(sent) == 2
