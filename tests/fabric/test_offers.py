"""Turns of one conversation come to one worker, without overtaking anybody, and never run twice."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections import deque
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from lacre import problems
from lacre_fabric.nats import orders, subjects
from lacre_fabric.nats.affinity import MAX_OFFERED
from lacre_fabric.nats.delivery import COPY_AFTER, NatsDelivery
from lacre_fabric.nats.gateway import GATEWAY, GRANT, REQUEST, NatsGateway
from lacre_fabric.nats.model_queue import QUIET
from lacre_fabric.nats.roles import OFFERS_GROUP, Role
from lacre_fabric.nats.worker import PULL, NatsWorker
from lacre_fabric.work.contract import Dispatch, FabricUnavailable, Work, WorkerLost
from lacre_fabric.work.frames import FrameKind
from lacre_fabric.work.presence import Presence
from parts.fabric import LiveFabric, Parties, new_work, read, sealed_bytes
from parts.waiting import until

from .test_offer_choice import NODES, conversation

WHOLE = [b"x", b"receipt"]


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


async def test_a_queue_is_not_quiet_after_a_reconnection(parties: Parties) -> None:
    worker = await parties.worker()
    parties.background(Serving(worker).run())
    (queue,) = worker._queues
    await until(lambda: queue.quiet(time.monotonic(), waits=True))
    worker.connection.on_reconnect()
    assert not queue.quiet(time.monotonic() + 2 * QUIET, waits=True)
    await until(lambda: queue.quiet(time.monotonic(), waits=True))


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
    await thief.client.subscribe(subjects.offers("a", subjects.DEFAULT_REGION, "n1"), OFFERS_GROUP)
    await thief.round_trip()
    with pytest.raises(WorkerLost):
        await pool.ask(turn(affinity))
    assert (await own.live.queued(), pool.counts()) == (0, [0, 0])
    idle = Presence(frozenset({"m1"}), 0, 2, offers=True)
    for _ in range(3):  # it still announces that it takes offers
        pool.gateway._sides["a"].roster.hear(subjects.DEFAULT_REGION, "n1", idle)
        assert await read(await pool.ask(turn(affinity))) == WHOLE


async def test_nobody_gets_a_silent_copy_of_offers(parties: Parties) -> None:
    thief = await parties.connect("worker-a-n1")
    await thief.client.subscribe(subjects.offers("a", subjects.DEFAULT_REGION, "n1"))
    await thief.round_trip()
    assert thief.denials == 1
    for group, denied in ((OFFERS_GROUP, 1), ("another", 2)):
        await thief.client.subscribe(subjects.offers("a", subjects.DEFAULT_REGION, "n1"), group)
        await thief.round_trip()
        assert thief.denials == denied


async def test_taken_work_is_no_error(parties: Parties) -> None:
    """NATS denies something else to the gateway while the worker answers."""
    pool = await Pool.of(parties)
    worker, connection = pool.nodes["n1"].worker, pool.gateway.connection
    answer, said = worker._answer_offer, []

    async def later(delivery: NatsDelivery, *, taken: bool) -> None:
        said.append(taken)
        before = connection.denials
        await connection.client.publish("work.elsewhere", b"")
        await until(lambda: connection.denials > before)
        await answer(delivery, taken=taken)

    worker._answer_offer = later  # type: ignore[method-assign]  # it only waits
    assert await read(await pool.ask(turn(conversation("n1", "n2")))) == WHOLE
    assert said == [True]
    assert pool.counts() == [1, 0]


async def test_long_work_is_queued(parties: Parties) -> None:
    """All offers to a worker are on its connection, whichever gateway process they are of."""
    pool = await Pool.of(parties)
    asked, publish = [], pool.gateway._sent_to

    async def noted(subject: str, *more: Any, **options: Any) -> Any:
        asked.append(subject.partition(".")[0])
        return await publish(subject, *more, **options)

    pool.gateway._sent_to = noted  # type: ignore[method-assign]  # it only looks
    for size in (MAX_OFFERED, MAX_OFFERED + 1):
        sealed = sealed_bytes()
        work = turn(conversation("n1", "n2"), sealed=sealed + bytes(size - len(sealed)))
        assert await read(await pool.ask(work)) == WHOLE
    assert asked[0] == "offer"
    assert asked[-1] == "work"
    assert asked.count("offer") == 1


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


async def test_an_offer_on_its_way_to_a_worker_that_leaves_is_declined(parties: Parties) -> None:
    """It would wait for an answer in vain otherwise."""
    pool = await Pool.of(parties)
    worker, side = pool.nodes["n1"].worker, pool.gateway._sides["a"]
    network = worker.connection.client._transport._io_writer.transport  # type: ignore[union-attr]  # it is connected
    network.pause_reading()  # type: ignore[attr-defined]  # a socket's has it
    asked = asyncio.ensure_future(pool.ask(turn(conversation("n1", "n2"))))
    await until(lambda: bool(side.unanswered))
    await asyncio.sleep(0.2)  # the server sends it to the worker
    leaving = asyncio.ensure_future(worker.drain())
    await asyncio.sleep(0.2)
    network.resume_reading()  # type: ignore[attr-defined]  # as above
    assert await read(await asked) == WHOLE
    await leaving
    assert pool.counts() == [0, 1]


async def test_one_offer_is_weighed_at_a_time(parties: Parties) -> None:
    """Each may have as many sequences as the worker has slots."""
    worker = await parties.worker(slots=16)
    pulled = asyncio.ensure_future(worker.pull())
    await until(lambda: worker._queues[0].quiet(time.monotonic(), waits=True))
    taken: list[bool] = []
    answer = worker._answer_offer

    async def noted(delivery: NatsDelivery, *, taken: bool, seen: list[bool] = taken) -> None:
        seen.append(taken)
        await answer(delivery, taken=taken)

    worker._answer_offer = noted  # type: ignore[method-assign]  # it only looks
    key = orders.OrderKeys("secret").of("a", "x").hex()
    request = {orders.KEY: key, REQUEST: "", GATEWAY: "g1", GRANT: ""}
    subject = subjects.offer("a", subjects.DEFAULT_REGION, "n1", "m1")
    for _ in range(3):  # as one chunk brings them
        head = "".join(f"{name}: {value}\r\n" for name, value in (request | {REQUEST: secrets.token_hex(16)}).items())
        assert worker._on_offer(subject, f"NATS/1.0\r\n{head}\r\n".encode(), sealed_bytes())
    await pulled
    assert taken == [True, False, False]


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


async def test_offered_work_is_not_replayed_through_the_queue(parties: Parties) -> None:
    """No queue knows its digest. The caller hears so, long before the queue's limit would end its waiting."""
    pool = await Pool.of(parties)
    work = turn(conversation("n1", "n2"))
    assert await read(await pool.ask(work)) == WHOLE
    async with asyncio.timeout(COPY_AFTER + 5):
        assert await read(await pool.ask(turn(None, sealed=work.sealed))) == [problems.REPLAYED.type.encode()]
    assert sum(pool.counts()) == 2


async def test_a_redelivery_that_loses_its_claim_says_nothing(parties: Parties) -> None:
    """The gateway listens to the first worker, which may not have sent anything yet."""
    gateway, worker = await parties.gateway(), await parties.worker()
    dispatch = await gateway.dispatch(work := new_work())
    delivery = await worker.pull()
    claimed = subjects.claim("a", work.digest.hex())
    await worker.connection.jetstream.publish(
        claimed, b"the first worker", headers={"Nats-Expected-Last-Subject-Sequence": "0"}
    )
    assert not await delivery.claim()
    delivery.again = True
    reading = asyncio.ensure_future(read(dispatch))
    await delivery.drop()
    await asyncio.sleep(COPY_AFTER + 0.5)
    assert not reading.done()
    await dispatch.cancel()
    reading.cancel()


async def test_a_denial_of_something_else_is_not_taken_for_this_work_s(parties: Parties) -> None:
    """Without an ack the work may be queued: then the gateway waits for frames, and must not say that nothing ran."""
    gateway, worker = await parties.gateway(), await parties.connect("worker-a-n1")
    work = new_work()
    unanswered = subjects.cancel("a", work.request_id)
    await worker.client.subscribe(unanswered)
    await worker.round_trip()
    sending = asyncio.ensure_future(gateway._sent_to(unanswered, work, {}))
    denials = gateway.connection.denials
    await gateway.connection.client.publish("$KV.trust.manifest", b"")
    await until(lambda: gateway.connection.denials > denials)
    assert not sending.done()
    assert await sending is None
    with pytest.raises(FabricUnavailable, match="denies gateway-g1"):
        await gateway._sent_to("$KV.trust.manifest", work, {})


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


async def test_with_permissions_of_before_a_gateway_queues_all(own: Parties) -> None:
    """Its NATS server denies offers; the workers' does not."""

    def older(role: Role) -> Role:
        if not role.credential.name.startswith("gateway-"):
            return role
        return replace(role, publish=tuple(subject for subject in role.publish if not subject.startswith("offer.")))

    own.live.stop()
    own.live.start(older)
    await own.live.provision()
    pool = await Pool.of(own)
    affinity = conversation("n1", "n2")
    for _ in range(3):
        assert await read(await pool.ask(turn(affinity))) == WHOLE
    assert pool.gateway.connection.denials == 1, "it offers nothing until it reconnects"
    assert not pool.gateway._sides["a"].shunned._until
    own.live.stop()
    await until(lambda: not pool.gateway.connection.connected)
    own.live.start()
    await until(lambda: pool.gateway._may_offer)


def test_each_worker_hears_offers_to_itself(server: LiveFabric) -> None:
    for role in server.roles():
        name = role.credential.name
        heard = [subject for subject in role.subscribe if subject.startswith("offer.")]
        pool, _, node = name.removeprefix("worker-").partition("-")
        assert heard == ([f"offer.{pool}.lacre.{node}.* offers"] if name.startswith("worker-") else []), name
