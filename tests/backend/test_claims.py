"""When an app begins: after the claim, or beside it where doing a thing twice harms nobody; and what a lost claim lets out."""

from __future__ import annotations

import asyncio

import pytest

from lacre import problems
from lacre.asgi import Call, Receive, Send
from lacre_fabric.work.contract import FabricUnavailable, QueueTimeout
from lacre_fabric.work.frames import FrameKind
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
        assert not asking.done() and not any(inbound.started.is_set() for inbound in claims.inbound.values())  # not a frame yet
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
        assert not asking.done() and not any(inbound.started.is_set() for inbound in claims.inbound.values())
        claims.answered.set()
        if lost:
            with pytest.raises(QueueTimeout):
                await asking
        else:
            assert (await asking).problem == problems.INTERNAL.type
