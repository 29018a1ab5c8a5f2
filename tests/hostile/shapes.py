"""What attacks share: the application that is attacked, messages by hand, and attacks that differ in one thing alone.

Each function of the last kind makes the test of one, which is then a row of its file's table.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import time
from collections.abc import Awaitable, Callable
from email.utils import formatdate
from functools import partial
from typing import Any, Final, Protocol, TypeAlias

import httpx2

import lacre
from hostile.adversary import GatewayOwner, inner
from hostile.attacks import NOTHING, Verdict, attack
from lacre import ApiError, problems
from lacre.wire import varint
from lacre.wire.bhttp import encode_request
from parts.keys import MODEL
from parts.stage import Stage
from parts.wires import Pieces

Test: TypeAlias = Callable[..., Awaitable[None]]


class Caller(Protocol):
    async def chat(self, prompt: str, **params: Any) -> lacre.Reply: ...

    async def stream(self, prompt: str, **params: Any) -> str:
        """The text, once the stream has ended well."""


class AsyncCaller:
    def __init__(self, client: lacre.AsyncClient) -> None:
        self._client = client

    async def chat(self, prompt: str, **params: Any) -> lacre.Reply:
        return await self._client.chat(prompt, **params)

    async def stream(self, prompt: str, **params: Any) -> str:
        return "".join([piece async for piece in self._client.chat_stream(prompt, **params)])


class SyncCaller:
    def __init__(self, client: lacre.Client) -> None:
        self._client = client

    async def chat(self, prompt: str, **params: Any) -> lacre.Reply:
        return await asyncio.to_thread(self._client.chat, prompt, **params)

    async def stream(self, prompt: str, **params: Any) -> str:
        return await asyncio.to_thread(lambda: "".join(self._client.chat_stream(prompt, **params)))


def bent(
    attribute: str, name: str, defence: str, refused: Any, *values: Any, ask: str = "chat", calls: int = 0, code: str = "",
    gain: str = NOTHING, status: int | None = None, posts: int | None = None, max_tokens: int | None = None, **worker: Any,
) -> Test:  # fmt: skip
    """The attack of a gateway's owner with that `attribute`, with each of `values` in turn: the caller raises.

    max_tokens: as the caller names it. calls: how often the worker's app was called. status: of the ApiError. posts: how many
    sealed requests there were. worker: options of its own.
    """

    @attack(name, "gateway", defence, refused, code=code, gain=gain, cases=values, ids=range(len(values)))
    async def test(stage: Stage, caller: Caller, gateway: GatewayOwner, verdict: Verdict, case: Any) -> None:
        running = await stage.worker(**worker)
        setattr(gateway, attribute, case)
        with verdict.refused() as caught:
            await getattr(caller, ask)(stage.prompt, max_tokens=max_tokens)
        assert running.calls == calls
        assert posts is None or len(gateway.posts) == posts
        assert {request.url.host for request in gateway.requests} == {"127.0.0.1"}
        if status is not None:
            assert isinstance(caught.value, ApiError)
            assert caught.value.status == status

    return test


answered: Final = partial(bent, "respond")  # it says this instead of relaying
changed: Final = partial(bent, "change", ask="stream", calls=1)  # of the sealed answer
granted: Final = partial(bent, "grant")
recorded: Final = partial(bent, "recorded", calls=1)


FORM = "the whole message in the seal is checked before it is used (RFC 9292)"


def chat(stage: Stage, **members: Any) -> bytes:
    body = {"model": MODEL, "messages": [{"role": "user", "content": stage.prompt}], **members}
    return json.dumps({name: value for name, value in body.items() if value is not None}).encode()


def part(data: bytes) -> bytes:
    return varint.encode(len(data)) + data


def by_hand(*headers: tuple[bytes, bytes], content: bytes = b"{}", path: bytes = b"/v1/chat/completions") -> bytes:
    """A known-length request that no encoder of ours would write."""
    date = (b"date", formatdate(time.time(), usegmt=True).encode())
    control = b"".join(map(part, (b"POST", b"https", b"lacre.invalid", path)))
    lines = b"".join(part(name) + part(value) for name, value in (date, *headers))
    return b"\x00" + control + part(lines) + part(content) + b"\x00"


Message: TypeAlias = Callable[[Stage], bytes]


def unread(name: str, defence: str, *messages: Message, then: Message | None = None) -> Test:
    """The attack of a caller that seals one of these: the worker takes it for no request, and goes on working for others.

    then: what the worker does take, in place of an honest chat.
    """

    @attack(name, "client", defence, problems.INVALID_REQUEST, cases=messages, ids=range(len(messages)))
    async def test(stage: Stage, gateway: GatewayOwner, verdict: Verdict, case: Message) -> None:
        worker = await stage.worker()
        verdict.said((await gateway.submit(case(stage))).problem)
        assert worker.calls == 0
        honest = then(stage) if then else encode_request(inner(chat(stage)))
        assert (await gateway.submit(honest)).status == 200

    return test


def told(name: str, defence: str, code: str, *messages: Message, calls: int = 0, **grant: Any) -> Test:
    """The attack of a caller that seals one of these: the worker answers with that error inside the seal.

    calls: how often its app was called. grant: members of the caller's grant.
    """

    @attack(name, "client", defence, ApiError, code=code, cases=messages, ids=range(len(messages)))
    async def test(stage: Stage, gateway: GatewayOwner, verdict: Verdict, case: Message) -> None:
        worker = await stage.worker()
        answer = await gateway.submit(case(stage), **grant)
        assert answer.problem is None
        verdict.answered(answer.status, str(answer.code))
        assert worker.calls == calls

    return test


def flooded(
    name: str, defence: str, refused: Any, *types: str, below: int, start: bytes = b"", piece: bytes = bytes(65536),
    pieces: int = 1600, status: int = 200, to: str = "respond",
) -> Test:  # fmt: skip
    """The attack of a gateway's owner that answers with `start` and so many pieces: `below` that, the caller stops to read.

    types: of the media, each in turn. to: the gateway's attribute that says what it answers.
    """

    @attack(name, "gateway", defence, refused, cases=types, ids=range(len(types)))
    async def test(stage: Stage, caller: Caller, gateway: GatewayOwner, verdict: Verdict, case: str) -> None:
        body = Pieces(itertools.chain([start], itertools.repeat(piece, pieces)))
        setattr(gateway, to, lambda *_request: httpx2.Response(status, headers={"content-type": case}, stream=body))
        with verdict.refused():
            await caller.stream(stage.prompt)
        assert body.pulled < below
        assert to == "respond" or not gateway.posts

    return test
