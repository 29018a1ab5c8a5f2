"""Turns of one conversation come to one worker, without overtaking anybody, and never run twice."""

from __future__ import annotations

import asyncio
import secrets
from collections import deque
from dataclasses import dataclass, field, replace

import pytest

from lacre import problems
from lacre_fabric.nats import subjects
from lacre_fabric.nats.affinity import MAX_UNANSWERED, in_turn
from lacre_fabric.nats.delivery import NatsDelivery
from lacre_fabric.nats.gateway import NatsGateway
from lacre_fabric.nats.model_queue import QUIET, ModelQueue
from lacre_fabric.nats.roles import Role
from lacre_fabric.nats.streams import MAX_PAYLOAD
from lacre_fabric.nats.worker import PULL, NatsWorker
from lacre_fabric.work.contract import Dispatch, FabricUnavailable, Work, WorkerLost
from lacre_fabric.work.frames import FrameKind
from lacre_fabric.work.presence import Presence, Roster
from parts.fabric import LiveFabric, Parties, new_work, read
from parts.waiting import until

NODES = ("n1", "n2")
WHOLE = [b"x", b"receipt"]


def conversation(*turns: str) -> bytes:
    """An affinity for which the workers have these turns."""
    while True:
        affinity = secrets.token_bytes(16)
        if in_turn(affinity, dict.fromkeys(NODES, 1)) == list(turns):
            return affinity


def turn(affinity: bytes | None, **of: bytes) -> Work:
    return replace(new_work(**of), affinity=affinity)


@dataclass
class Serving:
    """A worker that answers what it gets, or keeps it."""

    worker: NatsWorker
    keeps: bool = False
    got: list[Work] = field(default_factory=list)
    kept: list[NatsDelivery] = field(default_factory=list)

    async def run(self) -> None:
        while True:
            try:
                delivery = await self.worker.pull()
            except FabricUnavailable:
                await asyncio.sleep(0.05)
                continue
            self.got.append(delivery.work)
            if not await delivery.claim():
                await delivery.drop()
                self.worker.release(delivery)
            elif self.keeps:
                self.kept.append(delivery)
                await delivery.send(FrameKind.BEAT, b"")
            else:
                await self.finish(delivery)

    async def finish(self, delivery: NatsDelivery) -> None:
        await delivery.send(FrameKind.DATA, b"x")
        await delivery.send(FrameKind.USAGE, b"receipt")
        await delivery.drop()
        self.worker.release(delivery)


@dataclass
class Pool:
    """Two workers of a pool and a gateway that has heard them."""

    parties: Parties
    gateway: NatsGateway
    nodes: dict[str, Serving]

    @classmethod
    async def of(cls, parties: Parties, slots: int = 2, *, keeps: bool = False) -> Pool:
        nodes = {node: Serving(await parties.worker(node=node, slots=slots), keeps) for node in NODES}
        for each in nodes.values():
            parties.background(each.run())
        pool = cls(parties, await parties.gateway(), nodes)
        await until(lambda: pool.heard() == dict.fromkeys(NODES, slots))
        await asyncio.sleep(2 * QUIET)
        return pool

    def heard(self) -> dict[str, int]:
        side = self.gateway._sides.get("a")
        return {} if side is None else side.roster.offered("m1", subjects.DEFAULT_REGION)

    async def ask(self, work: Work) -> Dispatch:
        return await self.gateway.dispatch(work)

    def counts(self) -> list[int]:
        return [len(self.nodes[node].got) for node in NODES]


def test_a_conversation_moves_only_if_its_worker_comes_or_goes() -> None:
    conversations = [secrets.token_bytes(16) for _ in range(300)]
    free = {f"n{number}": 1 for number in range(5)}
    first = {one: in_turn(one, free)[0] for one in conversations}
    assert {node: list(first.values()).count(node) > 20 for node in free} == dict.fromkeys(free, True)
    fewer = {node: slots for node, slots in free.items() if node != "n3"}
    moved = [one for one in conversations if in_turn(one, fewer)[0] != first[one]]
    assert moved == [one for one in conversations if first[one] == "n3"]
    assert [in_turn(one, fewer)[0] for one in moved] == [in_turn(one, free)[1] for one in moved]


def test_no_other_worker_is_asked_in_place_of_a_busy_one() -> None:
    affinity = conversation("n1", "n2")
    assert in_turn(affinity, {"n1": 0, "n2": 1}) == []
    assert in_turn(affinity, {"n1": 1, "n2": 0}) == ["n1"]
    assert in_turn(affinity, {}) == []


def test_a_worker_has_few_offers_to_answer_at_once() -> None:
    """All are on its connection, and NATS ends one for which too many bytes wait."""
    affinity, free = conversation("n1", "n2"), {"n1": 100, "n2": 2}
    assert in_turn(affinity, free, {"n1": MAX_UNANSWERED - 1}) == ["n1", "n2"]
    assert in_turn(affinity, free, {"n1": MAX_UNANSWERED}) == []
    assert in_turn(affinity, free, {"n1": 0, "n2": 2}) == ["n1"]
    assert MAX_UNANSWERED * MAX_PAYLOAD < 64 * 2**20


def test_a_worker_of_before_takes_no_offers() -> None:
    said = Presence.parse(b'{"models": ["m"], "busy": 0, "free": 1}')
    roster = Roster()
    roster.hear("r", "n1", said)
    roster.hear("r", "n2", replace(said, offers=True))
    assert roster.offered("m", "r") == {"n2": 1}
    assert (roster.offered("m", "elsewhere"), roster.offered("other", "r")) == ({}, {})
    roster.silenced("r", "n2")
    assert (roster.offered("m", "r"), roster.free("m")) == ({}, {"r": 2})


def test_a_queue_is_quiet_after_pulls_in_vain() -> None:
    queue = ModelQueue("m1", pull=None)  # type: ignore[arg-type]  # its state needs no connection
    assert not queue.quiet(1.0, waits=True)
    queue.pulling(1.0)
    assert [queue.quiet(1.0 + after, waits=True) for after in (QUIET / 2, QUIET)] == [False, True]
    queue.empty(3.0)
    assert [queue.quiet(3.0 + after, waits=False) for after in (QUIET / 2, QUIET)] == [True, False]
    queue.pulling(3.0 + QUIET / 2)
    assert queue.quiet(3.0 + QUIET / 2, waits=True)
    queue.empty(5.0)
    queue.pulling(5.1 + QUIET)  # the worker was full in between: there may be work by now
    assert not queue.quiet(5.1 + QUIET, waits=True)
    queue.brought()
    queue.pulling(5.1 + QUIET)
    assert not queue.quiet(5.1 + QUIET, waits=True)


async def test_turns_come_to_one_worker(parties: Parties) -> None:
    pool = await Pool.of(parties)
    for node, other in (NODES, NODES[::-1]):
        before = pool.counts()
        affinity = conversation(node, other)
        for _ in range(8):
            assert await read(await pool.ask(turn(affinity))) == WHOLE
        gained = dict(zip(NODES, (now - then for now, then in zip(pool.counts(), before, strict=True)), strict=True))
        assert gained[node] >= 7, "a slow machine may have it decline one"
    assert await parties.live.queued() == 0
    assert not pool.gateway._sides["a"].unanswered
    assert all(work.affinity is None for each in pool.nodes.values() for work in each.got)


async def test_a_dead_worker_costs_nobody_a_request(parties: Parties) -> None:
    """Its presence still says that it lives."""
    pool = await Pool.of(parties)
    affinity = conversation("n1", "n2")
    await pool.nodes["n1"].worker.connection.close()
    await asyncio.sleep(0.2)  # the server notices
    assert pool.heard() == {"n1": 2, "n2": 2}
    for _ in range(3):
        assert await read(await pool.ask(turn(affinity))) == WHOLE
    assert pool.counts() == [0, 3]
    assert await parties.live.queued() == 0


async def test_a_busy_worker_declines(parties: Parties) -> None:
    """Its presence still says that it has free slots."""
    pool = await Pool.of(parties, keeps=True)
    pool.nodes["n2"].keeps = False
    affinity, idle = conversation("n1", "n2"), Presence(frozenset({"m1"}), 0, 2, offers=True)

    async def ask() -> None:
        before = sum(pool.counts())
        pool.gateway._sides["a"].roster.hear(subjects.DEFAULT_REGION, "n1", idle)
        await pool.ask(turn(affinity))
        await until(lambda: sum(pool.counts()) == before + 1)

    while pool.counts()[0] < 2:
        await ask()
    before = pool.counts()[1]
    assert before <= 1
    for _ in range(3):
        await ask()
    assert pool.counts() == [2, before + 3]


@pytest.mark.slow
async def test_an_offer_overtakes_nobody(parties: Parties) -> None:
    """Work waits in the queue when the slots become free: it runs first, though the worker has the other's conversation."""
    pool = await Pool.of(parties, slots=1, keeps=True)
    held = [await pool.ask(turn(conversation(node, other))) for node, other in (NODES, NODES[::-1])]
    await until(lambda: all(each.kept for each in pool.nodes.values()))
    await asyncio.sleep(PULL + 0.5)  # the pulls that the offers found waiting have ended
    waiting = [turn(None) for _ in range(3)]
    held += [await pool.ask(work) for work in waiting]
    serving = pool.nodes["n1"]
    affinity, idle = conversation("n1", "n2"), Presence(frozenset({"m1"}), 0, 1, offers=True)
    serving.keeps = False
    release = asyncio.ensure_future(serving.finish(serving.kept.pop()))
    offered = []
    while len(serving.got) < 4:
        pool.gateway._sides["a"].roster.hear(subjects.DEFAULT_REGION, "n1", idle)
        work = turn(affinity)
        offered.append(work.request_id)
        held.append(await pool.ask(work))
    await release
    came = [work.request_id for work in serving.got][1:4]
    assert came == [work.request_id for work in waiting]
    assert offered
    for dispatch in held:
        await dispatch.cancel()


async def test_pulled_work_that_finds_no_slot_goes_to_another_worker(parties: Parties) -> None:
    """The offer took the slot for which a pull waits, and NATS gives that pull the next work."""
    pool = await Pool.of(parties, slots=1, keeps=True)
    affinity = conversation("n1", "n2")
    first = await pool.ask(turn(affinity))
    await until(lambda: pool.counts() == [1, 0])
    others = [await pool.ask(turn(None)) for _ in range(1)]
    await until(lambda: pool.counts() == [1, 1])
    for dispatch in (first, *others):
        await dispatch.cancel()


@pytest.mark.slow
async def test_a_worker_that_dies_with_taken_work_is_lost_soon(parties: Parties) -> None:
    worker, gateway = await parties.worker(slots=2), await parties.gateway()
    pulled = asyncio.ensure_future(worker.pull())
    await until(lambda: bool(gateway._sides) and gateway._sides["a"].roster.offered("m1", subjects.DEFAULT_REGION) == {"n1": 2})
    await asyncio.sleep(2 * QUIET)
    dispatch = await gateway.dispatch(turn(secrets.token_bytes(16)))
    await pulled
    await worker.connection.close()
    with pytest.raises(WorkerLost, match="before its answer"):
        await asyncio.wait_for(dispatch.next(), 15)
    assert await parties.live.queued() == 0


async def test_an_offer_without_an_answer_is_in_no_queue(own: Parties) -> None:
    """The worker may have taken it. A thief of its credential hears the offer and says nothing."""
    pool = await Pool.of(own)
    affinity = conversation("n1", "n2")
    await pool.nodes["n1"].worker._offers.unsubscribe()  # type: ignore[union-attr]
    thief = await own.connect("worker-a-n1")
    await thief.client.subscribe(subjects.offers("a", subjects.DEFAULT_REGION, "n1"))
    await thief.round_trip()
    with pytest.raises(WorkerLost):
        await pool.ask(turn(affinity))
    assert (await own.live.queued(), pool.counts()) == (0, [0, 0])


async def test_a_draining_worker_declines(parties: Parties) -> None:
    pool = await Pool.of(parties)
    affinity = conversation("n1", "n2")
    assert await read(await pool.ask(turn(affinity))) == WHOLE
    before = pool.counts()[0]
    draining = asyncio.ensure_future(pool.nodes["n1"].worker.drain())
    for _ in range(20):
        pool.gateway._sides["a"].roster.hear(subjects.DEFAULT_REGION, "n1", Presence(frozenset({"m1"}), 0, 2, offers=True))
        assert await read(await pool.ask(turn(affinity))) == WHOLE
    await draining
    assert before == 1
    assert pool.counts() == [1, 20]


async def test_a_worker_that_drains_declines_what_it_has_not_begun(parties: Parties) -> None:
    pool = await Pool.of(parties)
    worker, drains = pool.nodes["n1"].worker, []

    class Taken(deque[NatsDelivery]):
        def append(self, delivery: NatsDelivery) -> None:
            super().append(delivery)
            drains.append(asyncio.ensure_future(worker.drain()))

    worker._offered = Taken()
    assert await read(await pool.ask(turn(conversation("n1", "n2")))) == WHOLE
    assert len(drains) == 1, "the offer was taken"
    await drains[0]
    assert pool.counts() == [0, 1]


async def test_offered_work_is_replayed_by_nobody(parties: Parties) -> None:
    pool = await Pool.of(parties)
    work = turn(conversation("n1", "n2"))
    assert await read(await pool.ask(work)) == WHOLE
    again = await pool.ask(turn(conversation("n2", "n1"), sealed=work.sealed))
    assert await read(again) == [problems.REPLAYED.type.encode()]
    assert pool.counts() == [1, 1]  # the second one lost the claim


async def test_with_permissions_of_before_all_work_is_queued(own: Parties) -> None:
    def older(role: Role) -> Role:
        subscribe = tuple(subject for subject in role.subscribe if not subject.startswith("offer."))
        publish = tuple(subject for subject in role.publish if not subject.startswith("offer."))
        return replace(role, subscribe=subscribe, publish=publish)

    own.live.stop()
    own.live.start(older)
    await own.live.provision()
    worker, gateway = await own.worker(slots=2), await own.gateway()
    serving = Serving(worker)
    own.background(serving.run())
    await until(lambda: gateway.workers("a", "m1") == 1)
    assert gateway._sides["a"].roster.offered("m1", subjects.DEFAULT_REGION) == {}
    assert await read(await gateway.dispatch(turn(secrets.token_bytes(16)))) == WHOLE
    assert gateway.connection.denials == 0


def test_each_worker_hears_offers_to_itself(server: LiveFabric) -> None:
    for role in server.roles():
        name = role.credential.name
        heard = [subject for subject in role.subscribe if subject.startswith("offer.")]
        pool, _, node = name.removeprefix("worker-").partition("-")
        assert heard == ([f"offer.{pool}.lacre.{node}.*"] if name.startswith("worker-") else []), name
