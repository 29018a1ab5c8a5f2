"""Calls as the node makes them: clients that leave, engines that fail, grants and usage."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import pytest

from backend.posting import CHAT, chat, post
from lacre.asgi import App, Call
from lacre_backend.api.app import create_app
from lacre_backend.engine.protocol import Task
from lacre_backend.engine.turns import NOBODY
from parts.echo_engine import EchoEngine


class Recording(EchoEngine):
    """Keeps the tasks that it was given, and the ids of those that were cancelled."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.tasks: list[Task] = []
        self.cancelled: list[str] = []

    def submit(self, task: Task) -> Any:
        self.tasks.append(task)
        return super().submit(task)

    def cancel(self, task_id: str) -> None:
        self.cancelled.append(task_id)
        super().cancel(task_id)


@pytest.fixture
def recording() -> Iterator[Recording]:
    with closing(Recording(delay=0.002)) as engine:
        yield engine


def granted(**fields: Any) -> Call:
    return Call("r", **{"model": "echo", "action": "chat", "max_tokens": 12, "max_prompt_tokens": 100, **fields})


# Leaving, failing


@pytest.mark.parametrize("n", [1, 3])
async def test_a_client_that_leaves_frees_the_engine(n: int) -> None:
    call = Call("r", max_tokens=3000)
    with closing(EchoEngine(n_ctx=4096, delay=0.002, repeat=100)) as engine:
        reply = await asyncio.wait_for(post(create_app([engine]), CHAT, chat(stream=True, n=n), call=call, leave_after=3), 15)
        assert not reply.complete
        await asyncio.sleep(0.05)
        assert engine.running == 0
    assert call.usage.completion_tokens < 20 * n


@pytest.mark.parametrize("leave", ["cancelled", "disconnected"])
async def test_a_client_that_leaves_before_the_first_token(leave: str) -> None:
    engine, leaving = Recording(delay=0.2), asyncio.Event()
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


async def test_an_engine_that_closes_ends_the_stream_with_an_error(slow: EchoEngine, app: App) -> None:
    task = asyncio.create_task(post(app, CHAT, chat("x" * 200, stream=True)))
    await asyncio.sleep(0.05)
    slow.close()
    reply = await task
    assert reply.complete
    assert b"[DONE]" not in reply.body
    assert json.loads(reply.pieces[-1][1].removeprefix(b"data: "))["error"]["type"] == "server_error"
    assert (await post(app, CHAT, chat())).error(503)["type"] == "server_error"


async def test_time_limit(slow: EchoEngine) -> None:
    reply = (await post(create_app([slow], time_limit=0.0), CHAT, chat())).json()
    assert reply["choices"][0]["finish_reason"] == "length"
    assert reply["usage"]["completion_tokens"] == 0


# Grants


async def test_the_grant_alone_says_whose_turn_it_is(recording: Recording) -> None:
    """Not the salt, nor any header that a client may send inside; and every choice of a call is its caller's."""
    app, fair = create_app([recording]), ("T" * 22, "C" * 22)
    headers = [(b"lacre-cache-salt", b"s"), (b"lacre-fair", b"x"), (b"fair", b"y"), (b"lacre-call", b"z")]
    await post(app, CHAT, chat(n=3), call=granted(fair=fair, max_tokens=100), headers=headers)
    await post(app, CHAT, chat(), headers=headers)
    assert [task.fair for task in recording.tasks] == [*[fair] * 3, NOBODY], "without a grant all are one caller"
    assert len({task.cache_scope for task in recording.tasks[:3]}) == 1


async def test_usage_of_a_call_is_written(app: App, slow: EchoEngine) -> None:
    call = granted()
    usage = (await post(app, CHAT, chat(max_tokens=4), call=call)).json()["usage"]
    assert call.usage.completion_tokens == usage["completion_tokens"] == 4
    assert call.usage.prompt_tokens == usage["prompt_tokens"] > 0
    assert call.usage.model_digest == slow.model.digest


async def test_usage_grows_as_tokens_come(app: App) -> None:
    call, seen = granted(max_tokens=100), set()
    task = asyncio.create_task(post(app, CHAT, chat("x" * 60, stream=True), call=call))
    while not task.done():
        seen.add(call.usage.completion_tokens)
        await asyncio.sleep(0.005)
    assert len(seen) > 10


@pytest.mark.parametrize(("n", "each"), [(1, 12), (2, 6), (5, 2)])
async def test_without_a_limit_the_grants_holds(app: App, n: int, each: int) -> None:
    usage = (await post(app, CHAT, chat(n=n), call=granted())).json()["usage"]
    assert usage["completion_tokens"] == n * each


@pytest.mark.parametrize(
    ("call", "change", "param"),
    [
        ({"model": "other"}, {}, "model"), ({"model": "echo"}, {"model": "other"}, "model"),
        ({"action": "embed"}, {}, "action"), ({}, {"max_tokens": 13}, "max_tokens"),
        ({}, {"max_completion_tokens": 13}, "max_completion_tokens"), ({}, {"max_tokens": 5, "n": 3}, "max_tokens"),
        ({"max_tokens": 2}, {"n": 3}, "max_tokens"), ({"max_tokens": 0}, {}, "max_tokens"),
        ({"max_prompt_tokens": 10}, {}, "messages"),
    ],
)  # fmt: skip
async def test_more_than_granted(app: App, call: dict[str, Any], change: dict[str, Any], param: str) -> None:
    grant = granted(**call)
    error = (await post(app, CHAT, chat(**change), call=grant)).error(403)
    assert (error["code"], error["type"], error["param"]) == ("grant_mismatch", "invalid_request_error", param)
    assert grant.usage.completion_tokens == grant.usage.prompt_tokens == 0


async def test_choices_of_one_seed_differ(recording: Recording) -> None:
    await post(create_app([recording]), CHAT, chat(n=3, seed=2**63 - 1))
    await post(create_app([recording]), CHAT, chat(n=2))
    seeds = [task.sampling.seed for task in recording.tasks]
    assert (len(set(seeds[:3])), seeds[3:]) == (3, [None, None])


async def test_cache_salt_becomes_a_scope(recording: Recording) -> None:
    app, other = create_app([recording]), create_app([recording])
    for target, salts in ((app, [b"one"]), (app, [b"one"]), (app, [b"two"]), (app, []), (other, [b"one"])):
        headers = [(b"lacre-cache-salt", salt) for salt in salts]
        assert (await post(target, CHAT, chat(), headers=headers)).status == 200
    same, again, two, none, elsewhere = (task.cache_scope for task in recording.tasks)
    assert same == again != two
    assert none is None
    assert elsewhere != same, "a scope means nothing in another process"
    assert b"one" not in (same or b"")
    for bad in ([(b"lacre-cache-salt", b"x" * 300)], [(b"lacre-cache-salt", b"a"), (b"lacre-cache-salt", b"b")]):
        (await post(app, CHAT, chat(), headers=bad)).error(400)
