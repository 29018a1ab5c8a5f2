"""A worker that cannot work takes nothing and is announced for nothing; what it took a moment too early it gives back."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass

import pytest

from lacre import problems
from lacre.runtime import tasks
from lacre_fabric.nats import subjects
from lacre_fabric.nats.gateway import NatsGateway
from lacre_fabric.nats.streams import CLAIMS
from lacre_fabric.nats.worker import NatsWorker
from lacre_fabric.work.contract import FabricUnavailable, NoWorkers
from lacre_fabric.work.frames import FrameKind
from parts.fabric import Parties, answer, new_work, until


class Able:
    def __init__(self, *models: str) -> None:
        self.able = set(models)

    def models(self) -> set[str]:
        return self.able

    def kinds(self) -> Sequence[str]:
        return [] if self.able else ["upstream"]


@dataclass
class Ends:
    gateway: NatsGateway
    worker: NatsWorker
    able: Able

    async def until(self, workers: int) -> None:
        await until(lambda: self.gateway.workers("a", "m1") == workers)


@pytest.fixture
async def ends(parties: Parties) -> Ends:
    able = Able("m1")
    return Ends(await parties.gateway(), await parties.worker(able=able), able)


async def test_it_is_announced_only_while_it_can_work(ends: Ends) -> None:
    await ends.until(1)
    ends.able.able = set()
    await ends.until(0)
    with pytest.raises(NoWorkers):
        await ends.gateway.dispatch(new_work(), queue_limit=1)
    ends.able.able = {"m1"}
    await ends.until(1)
    work = new_work()
    await ends.gateway.dispatch(work)
    assert await answer(ends.worker) == work


async def test_what_came_when_it_could_not_any_more_goes_back(ends: Ends) -> None:
    """It had asked for work while it could: the caller is told that nobody began, and sends it again."""
    await ends.until(1)
    pulling = tasks.spawn("pull", ends.worker.pull())
    await asyncio.sleep(0.1)  # the pull waits at the server
    ends.able.able = set()
    dispatch = await ends.gateway.dispatch(new_work())
    async with asyncio.timeout(15):
        frames = [frame async for frame in dispatch.frames()]
    assert [(frame.kind, frame.payload) for frame in frames] == [(FrameKind.ERROR, problems.UNCLAIMED.type.encode())]
    assert not pulling.done()
    await tasks.end(pulling)


async def test_a_claim_that_is_tried_says_what_time_it_is(ends: Ends) -> None:
    assert abs((await ends.worker.try_claim() or 0.0) - time.time()) < 5
    assert await ends.worker.try_claim() is not None, "each time another one: a claim can be made once"


async def test_a_full_bucket_is_noticed(parties: Parties, ends: Ends) -> None:
    jetstream = (await parties.connect()).jetstream
    await ends.worker.try_claim()
    info = await jetstream.stream_info(f"KV_{subjects.claims_bucket('a')}")
    await jetstream.update_stream(info.config.evolve(max_msgs=info.state.messages))
    with pytest.raises(FabricUnavailable):
        await ends.worker.try_claim()
    await jetstream.update_stream(info.config.evolve(max_msgs=CLAIMS.messages))
    assert await ends.worker.try_claim() is not None
