"""Calls as the node makes them: clients that leave, engines that fail, sealed answers, grants and usage."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from contextlib import aclosing
from typing import Any

import pytest

from lacre import asgi
from lacre.asgi import App, Call
from lacre.wire import bhttp
from lacre.wire.ohttp import seal_request
from lacre.wire.opening import PrivateKey
from lacre_backend.api.app import create_app
from lacre_backend.engine.turns import NOBODY, Fair
from parts.echo_engine import EchoEngine

Post = Callable[..., Any]
CHAT = "/v1/chat/completions"
MESSAGE = "Olá, mar é azul."


def chat(content: Any = MESSAGE, **fields: Any) -> dict[str, Any]:
    return {"model": "echo", "messages": [{"role": "user", "content": content}], **fields}


# Leaving, failing


@pytest.mark.parametrize("n", [1, 3])
async def test_a_client_that_leaves_frees_the_engine(post: Post, n: int) -> None:
    engine = EchoEngine(n_ctx=4096, delay=0.002, repeat=100)
    call = Call("r", max_tokens=3000)
    reply = await asyncio.wait_for(post(create_app([engine]), CHAT, chat(stream=True, n=n), call=call, leave_after=3), 15)
    assert not reply.complete
    await asyncio.sleep(0.05)
    assert engine.running == 0
    assert call.usage.completion_tokens < 20 * n
    engine.close()


class Recording(EchoEngine):
    """Keeps what it was asked: cache scopes, seeds, and the ids of cancelled tasks."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.scopes: list[bytes | None] = []
        self.turns: list[Fair] = []
        self.seeds: list[int | None] = []
        self.cancelled: list[str] = []

    def submit(self, task: Any) -> Any:
        self.scopes.append(task.cache_scope)
        self.turns.append(task.fair)
        self.seeds.append(task.sampling.seed)
        return super().submit(task)

    def cancel(self, task_id: str) -> None:
        self.cancelled.append(task_id)
        super().cancel(task_id)


@pytest.mark.parametrize("leave", ["cancelled", "disconnected"])
async def test_a_client_that_leaves_before_the_first_token(post: Post, leave: str) -> None:
    engine = Recording(delay=0.2)
    leaving = asyncio.Event()
    task = asyncio.create_task(post(create_app([engine]), CHAT, chat(), leaving=leaving))
    await asyncio.sleep(0.05)
    assert engine.running == 1
    if leave == "cancelled":
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    else:
        leaving.set()
        assert (await task).status == 0
    assert len(engine.cancelled) == 1
    await asyncio.sleep(0.3)
    assert engine.running == 0


async def test_an_engine_that_closes_ends_the_stream_with_an_error(slow: EchoEngine, app: App, post: Post) -> None:
    task = asyncio.create_task(post(app, CHAT, chat("x" * 200, stream=True)))
    await asyncio.sleep(0.05)
    slow.close()
    reply = await task
    assert reply.complete
    assert b"[DONE]" not in reply.body
    assert json.loads(reply.pieces[-1][1].removeprefix(b"data: "))["error"]["type"] == "server_error"
    assert (await post(app, CHAT, chat())).error(503)["type"] == "server_error"


async def test_time_limit(post: Post, slow: EchoEngine) -> None:
    reply = (await post(create_app([slow], time_limit=0.0), CHAT, chat())).json()
    assert reply["choices"][0]["finish_reason"] == "length"
    assert reply["usage"]["completion_tokens"] == 0


# Sealed, as the node calls it


async def test_sealed(app: App, slow: EchoEngine) -> None:
    key = PrivateKey.generate(1)
    body = json.dumps(chat("x" * 100, stream=True)).encode()
    request = bhttp.Request("POST", "https", "lacre.invalid", CHAT, (("content-type", "application/json"),), body)
    sealed, _, opener = seal_request(key.config, bhttp.encode_request(request))
    call = Call("r", max_tokens=200)
    decoder = bhttp.ResponseDecoder()
    seen: list[bytes] = []

    def read(opened: list[bytes]) -> None:
        seen.extend(e.content for each in opened for e in decoder.feed(each) if isinstance(e, bhttp.Data))

    async for piece in asgi.answer(app, asgi.open_sealed(sealed, {1: key}), call):
        read(opener.feed(piece))
    read(opener.close())
    decoder.close()
    assert len(seen) > 100, "each token left in a record of its own"
    assert seen[-1] == b"data: [DONE]\n\n"
    assert call.usage.completion_tokens == 100


async def test_sealed_and_abandoned(app: App, slow: EchoEngine) -> None:
    key = PrivateKey.generate(1)
    request = bhttp.Request("POST", "https", "lacre.invalid", CHAT, (), json.dumps(chat("x" * 300, stream=True)).encode())
    sealed, _, _ = seal_request(key.config, bhttp.encode_request(request))
    async with aclosing(asgi.answer(app, asgi.open_sealed(sealed, {1: key}), Call("r"))) as pieces:
        await anext(pieces)
    await asyncio.sleep(0.05)
    assert slow.running == 0


# Grants


async def test_the_grant_alone_says_whose_turn_it_is(post: Post) -> None:
    """Not the salt, nor any header that a client may send inside; and every choice of a call is its caller's."""
    engine, fair = Recording(), ("T" * 22, "C" * 22)
    headers = [(b"lacre-cache-salt", b"s"), (b"lacre-fair", b"x"), (b"fair", b"y"), (b"lacre-call", b"z")]
    await post(create_app([engine]), CHAT, chat(n=3), call=granted(fair=fair, max_tokens=100), headers=headers)
    assert engine.turns == [fair] * 3
    assert len(set(engine.scopes)) == 1
    await post(create_app([engine]), CHAT, chat(), headers=headers)
    assert engine.turns[3:] == [NOBODY], "without a grant all are one caller"
    engine.close()


def granted(**fields: Any) -> Call:
    return Call("r", **{"model": "echo", "action": "chat", "max_tokens": 12, "max_prompt_tokens": 100, **fields})


async def test_usage_of_a_call_is_written(app: App, post: Post, slow: EchoEngine) -> None:
    call = granted()
    usage = (await post(app, CHAT, chat(max_tokens=4), call=call)).json()["usage"]
    assert call.usage.completion_tokens == usage["completion_tokens"] == 4
    assert call.usage.prompt_tokens == usage["prompt_tokens"] > 0
    assert call.usage.model_digest == slow.model.digest


async def test_usage_grows_as_tokens_come(app: App, post: Post) -> None:
    call = granted(max_tokens=100)
    task = asyncio.create_task(post(app, CHAT, chat("x" * 60, stream=True), call=call))
    seen = set()
    while not task.done():
        seen.add(call.usage.completion_tokens)
        await asyncio.sleep(0.005)
    assert len(seen) > 10


@pytest.mark.parametrize(("n", "each"), [(1, 12), (2, 6), (5, 2)])
async def test_without_a_limit_the_grants_holds(app: App, post: Post, n: int, each: int) -> None:
    usage = (await post(app, CHAT, chat(n=n), call=granted())).json()["usage"]
    assert usage["completion_tokens"] == n * each


@pytest.mark.parametrize(
    ("call", "change", "param"),
    [
        ({"model": "other"}, {}, "model"),
        ({"model": "echo"}, {"model": "other"}, "model"),
        ({"action": "embed"}, {}, "action"),
        ({}, {"max_tokens": 13}, "max_tokens"),
        ({}, {"max_completion_tokens": 13}, "max_completion_tokens"),
        ({}, {"max_tokens": 5, "n": 3}, "max_tokens"),
        ({"max_tokens": 2}, {"n": 3}, "max_tokens"),
        ({"max_tokens": 0}, {}, "max_tokens"),
        ({"max_prompt_tokens": 10}, {}, "messages"),
    ],
)
async def test_more_than_granted(app: App, post: Post, call: dict[str, Any], change: dict[str, Any], param: str) -> None:
    grant = granted(**call)
    error = (await post(app, CHAT, chat(**change), call=grant)).error(403)
    assert (error["code"], error["type"], error["param"]) == ("grant_mismatch", "invalid_request_error", param)
    assert grant.usage.completion_tokens == grant.usage.prompt_tokens == 0


async def test_choices_of_one_seed_differ(post: Post) -> None:
    engine = Recording()
    await post(create_app([engine]), CHAT, chat(n=3, seed=2**63 - 1))
    await post(create_app([engine]), CHAT, chat(n=2))
    assert len(set(engine.seeds[:3])) == 3
    assert engine.seeds[3:] == [None, None]


async def test_cache_salt_becomes_a_scope(post: Post) -> None:
    engine = Recording()
    app, other = create_app([engine]), create_app([engine])
    for target, salts in ((app, [b"one"]), (app, [b"one"]), (app, [b"two"]), (app, []), (other, [b"one"])):
        headers = [(b"lacre-cache-salt", salt) for salt in salts]
        assert (await post(target, CHAT, chat(), headers=headers)).status == 200
    same, again, two, none, elsewhere = engine.scopes
    assert same == again != two
    assert none is None
    assert elsewhere != same, "a scope means nothing in another process"
    assert b"one" not in (same or b"")
    for bad in ([(b"lacre-cache-salt", b"x" * 300)], [(b"lacre-cache-salt", b"a"), (b"lacre-cache-salt", b"b")]):
        (await post(app, CHAT, chat(), headers=bad)).error(400)
