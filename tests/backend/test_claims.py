"""When an app begins: after the claim, or beside it where repeating harms nobody; what a lost claim lets out; weights."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import Any

import pytest

from lacre import problems
from lacre.asgi import Call, Receive, Send
from lacre.evidence.receipts import TRAILER
from lacre_backend.api.app import REPEATABLE, WEIGHED, create_app
from lacre_fabric.work.contract import FabricUnavailable, QueueTimeout
from lacre_fabric.work.frames import FrameKind
from parts.by_hand import Sealed
from parts.echo_engine import EchoEngine
from parts.keys import MODEL, NOW, POOL
from parts.memory_fabric import MemoryFabric
from parts.stage import Stage, running, until
from parts.told_app import App


class Claims(MemoryFabric):
    """A fabric that answers claims once `answered` is set. lost: to another attempt. down: it cannot say."""

    def __init__(self) -> None:
        super().__init__()
        self.answered = asyncio.Event()
        self.lost = self.down = False

    async def claim(self, digest: bytes, attempt: str) -> bool:
        await self.answered.wait()
        if self.down:
            raise FabricUnavailable("no answer")
        return not self.lost and await super().claim(digest, attempt)


@pytest.fixture
def app() -> App:
    return App()


@pytest.fixture
def claims() -> Claims:
    return Claims()


@pytest.fixture
def stage(app: App, claims: Claims) -> Stage:
    return Stage(claims, now=NOW)


async def test_what_is_repeatable_begins_beside_the_claim(stage: Stage, app: App, claims: Claims) -> None:
    async with running(stage.node(app, repeatable=["chat"])):
        asking = asyncio.create_task(stage.ask())
        await until(lambda: app.calls)
        await asyncio.sleep(0.05)
        assert not asking.done() and not any(inbound.started for inbound in claims.inbound.values())  # not a frame yet
        claims.answered.set()
        answer = await asking
    assert [frame.kind for frame in answer.frames] == [FrameKind.DATA, FrameKind.USAGE] and answer.opened()[0].status == 200


async def test_anything_else_waits_for_it(stage: Stage, app: App, claims: Claims) -> None:
    async with running(stage.node(app, repeatable=["embed"])):
        asking = asyncio.create_task(stage.ask())
        await asyncio.sleep(0.1)
        assert not app.calls
        claims.answered.set()
        assert (await asking).opened()[0].status == 200
    assert len(app.calls) == 1


@pytest.mark.parametrize("down", [False, True])
async def test_a_lost_claim_stops_the_app_and_says_nothing(stage: Stage, app: App, claims: Claims, down: bool) -> None:
    app.answer = app.slowly
    claims.lost, claims.down = True, down
    async with running(stage.node(app, repeatable=["chat"])):
        asking = asyncio.create_task(stage.ask())
        await until(lambda: app.calls)
        claims.answered.set()
        await asyncio.wait_for(app.left.wait(), 10)
        with pytest.raises(QueueTimeout):
            await asking


@pytest.mark.parametrize("claimed", [True, False])
async def test_what_was_delivered_before_is_not_begun(stage: Stage, app: App, claims: Claims, claimed: bool) -> None:
    """The worker that had it may have been lost by it. That is told at once, and whether it had claimed the request."""
    claims.answered.set()
    sealed = stage.seal()
    if claimed:
        await claims.claim(sealed.header.digest, "of the one that was lost")
    lost = claims.worker(POOL, [MODEL])
    asking = asyncio.create_task(stage.ask(sealed))
    await (await lost.pull()).abandon()
    async with running(stage.node(app, repeatable=["chat"])):
        answer = await asking
    assert answer.problem == (problems.WORKER_LOST if claimed else problems.UNCLAIMED).type
    assert app.calls == []
    assert not await claims.claim(sealed.header.digest, "of one that was only slow"), "nobody can claim it now"


@pytest.mark.parametrize("lost", [True, False])
async def test_that_the_app_failed_is_for_the_winner_to_say(stage: Stage, app: App, claims: Claims, lost: bool) -> None:
    failed = asyncio.Event()

    async def fail(receive: Receive, send: Send, call: Call) -> None:
        failed.set()
        raise ValueError("no")

    app.answer, claims.lost = fail, lost
    async with running(stage.node(app, repeatable=["chat"])):
        asking = asyncio.create_task(stage.ask())
        await asyncio.wait_for(failed.wait(), 10)
        await asyncio.sleep(0.05)
        assert not asking.done() and not any(inbound.started for inbound in claims.inbound.values())
        claims.answered.set()
        if lost:
            with pytest.raises(QueueTimeout):
                await asking
        else:
            assert (await asking).problem == problems.INTERNAL.type


# With the real API


@contextmanager
def real_api(**settings: Any) -> Iterator[Any]:
    with closing(EchoEngine(name=MODEL, **settings)) as engine:
        yield create_app([engine])


async def test_with_the_real_api() -> None:
    stage = Stage(now=NOW)
    body = {"model": MODEL, "messages": [{"role": "user", "content": "sea"}], "max_tokens": 9, "stream": True}
    with real_api(n_ctx=512) as app:
        async with running(stage.node(app)):
            answer = await stage.ask(stage.seal(content=json.dumps(body).encode()))
    _, content, trailers = answer.opened()
    assert content.count(b"chat.completion.chunk") == 5 and b"data: [DONE]" in content
    receipt = stage.receipt(trailers[TRAILER])
    assert (receipt.completion_tokens, receipt.model) == (3, EchoEngine().model.digest)


class Together:
    """An app around another one: how many calls were under way at once, at most."""

    def __init__(self, app: Any) -> None:
        self._app = app
        self.now = self.most = 0

    async def __call__(self, scope: Any, receive: Receive, send: Send) -> None:
        self.now += 1
        self.most = max(self.most, self.now)
        try:
            await self._app(scope, receive, send)
        finally:
            self.now -= 1


class TestSequences:
    """A request of `n` choices is `n` sequences at the engine: the node (of two slots) pulls accordingly."""

    @pytest.mark.parametrize(("choices", "together"), [(1, 2), (2, 1), (8, 1)])
    async def test_a_burst_is_pulled_by_what_it_weighs(self, choices: int, together: int) -> None:
        stage = Stage(now=NOW)
        stage.queue_limit = 20.0
        body = {"model": MODEL, "n": choices, "max_tokens": 4, "messages": [{"role": "user", "content": "four"}]}
        with real_api(delay=0.01) as app:
            counted = Together(app)
            async with running(stage.node(counted, slots=2, repeatable=REPEATABLE, weighs=WEIGHED)):
                answers = await asyncio.gather(*(stage.ask(*self.sealed(stage, body)) for _ in range(6)))
        assert [answer.opened()[0].status for answer in answers] == [200] * 6
        assert counted.most == together

    async def test_a_request_that_the_app_refuses_holds_nothing(self) -> None:
        stage = Stage(now=NOW)
        with real_api() as app:
            async with running(stage.node(app, repeatable=REPEATABLE, weighs=WEIGHED)):
                for body in ({"model": MODEL, "n": 10**6}, {"model": MODEL, "messages": []}, [], {"model": "other"}):
                    assert (await stage.ask(*self.sealed(stage, body))).opened()[0].status >= 400

    async def test_what_is_no_generation_counts_as_one_at_once(self, app: App) -> None:
        """Though the app says nothing of it."""
        stage = Stage(now=NOW)
        app.answer = app.slowly
        async with running(stage.node(app, slots=2, weighs=WEIGHED)):
            for _ in range(2):
                sealed = stage.seal({"lacre-action": "http"}, path="/predict")
                await stage.dispatch(sealed, stage.grant(sealed.header, action="http"))
            await until(lambda: len(app.calls) == 2)

    @staticmethod
    def sealed(stage: Stage, body: Any) -> tuple[Sealed, str]:
        sealed = stage.seal({"lacre-max-tokens": "32"}, content=json.dumps(body).encode())
        return sealed, stage.grant(sealed.header, max_tokens=32, max_prompt_tokens=1000)
