"""What goes wrong between gateways, NATS and workers, and how little of it the caller sees."""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

import pytest

from lacre import problems
from lacre.errors import MessageTooLarge
from lacre.runtime import tasks
from lacre_fabric.nats import handing_back, roles, subjects
from lacre_fabric.nats.gateway import NatsGateway
from lacre_fabric.nats.provisioning import provision
from lacre_fabric.nats.streams import CLAIMS, QUEUED_MESSAGES
from lacre_fabric.nats.worker import NatsWorker
from lacre_fabric.work import contract
from lacre_fabric.work.contract import BEAT, PRESENT_FOR, Dispatch, FabricError, FabricUnavailable, NoWorkers, WorkerLost
from lacre_fabric.work.frames import FrameKind
from parts.fabric import POOLS, Parties, answer, new_work, read, sealed_bytes
from parts.frames import frames_of
from parts.waiting import until


async def die(worker: NatsWorker) -> None:
    """What the death of a worker's process looks like from outside: the connection is gone, and nothing was said."""
    assert worker._presence is not None
    await worker._presence.close()
    await worker.connection.close()


async def answered(worker: NatsWorker, gateway: NatsGateway) -> bool:
    """Whether work goes through from end to end."""
    dispatch = await gateway.dispatch(new_work())
    await answer(worker)
    return await read(dispatch) == [b"x", b"receipt"]


async def ends_with(dispatch: Dispatch) -> FabricError:
    """The error that the answer ends with."""
    with pytest.raises(FabricError) as caught:
        async with asyncio.timeout(15):
            async for _ in frames_of(dispatch):
                pass
    return caught.value


# Redelivery


async def test_a_death_before_the_claim_costs_one_redelivery(parties: Parties) -> None:
    await parties.live.provision(ack_wait=0.5)
    gateway, first, second = await parties.gateway(), await parties.worker("a", "n1"), await parties.worker("a", "n2")
    work = new_work()
    dispatch = await gateway.dispatch(work)
    await first.pull()
    await die(first)
    async with asyncio.timeout(10):
        delivery = await second.pull()
    assert (delivery.work, delivery.again) == (work, True)
    assert await delivery.claim()
    await delivery.send(FrameKind.USAGE, b"")
    assert [frame.attempt async for frame in frames_of(dispatch)] == [delivery.attempt]
    assert await parties.live.queued() == 0


async def test_work_in_progress_is_not_delivered_again(parties: Parties) -> None:
    await parties.live.provision(ack_wait=2.5)
    gateway, first, second = await parties.gateway(), await parties.worker("a", "n1"), await parties.worker("a", "n2")
    await gateway.dispatch(new_work())
    delivery = await first.pull()
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(3.5):
            await second.pull()
    await delivery.drop()


async def test_deliveries_that_come_to_nothing_lose_the_request(parties: Parties) -> None:
    await parties.live.provision(ack_wait=0.3)
    gateway, worker, other = await parties.gateway(), await parties.worker("a", "n1", slots=3), await parties.worker("a", "n2")
    dispatch = await gateway.dispatch(new_work())
    waiting = asyncio.create_task(other.pull())
    frames = asyncio.create_task(anext(frames_of(dispatch)))
    for _ in range(2):
        with suppress(TimeoutError):
            async with asyncio.timeout(1):
                (await worker.pull())._leave()
        if waiting.done():
            waiting.result()._leave()
            other.release()
            waiting = asyncio.create_task(other.pull())
    with pytest.raises(WorkerLost, match="every delivery"):
        async with asyncio.timeout(10):
            await frames
    assert await parties.live.queued() == 0, "the message would stay until its time is over"
    await tasks.end(waiting)


# The queue


async def test_a_full_queue_takes_no_more(parties: Parties) -> None:
    gateway, _ = await parties.gateway(), await parties.worker()
    await (await gateway.dispatch(new_work())).cancel()
    for _ in range(QUEUED_MESSAGES):
        await gateway.connection.jetstream.publish(subjects.work("a", subjects.DEFAULT_REGION, "m2"), b"x")
    with pytest.raises(contract.QueueFull):
        await gateway.dispatch(new_work())
    assert not gateway._side("a").waiting


async def test_what_the_server_would_not_take_is_not_sent(parties: Parties) -> None:
    gateway, worker = await parties.gateway(), await parties.worker()
    limit = gateway.connection.client.max_payload
    sealed = sealed_bytes() + bytes(limit)
    largest = None
    for size in range(limit - 400, limit + 1):  # the header's size is the gateway's affair
        try:
            dispatch = await gateway.dispatch(new_work(sealed=sealed_bytes() + sealed[: size - 71])) if size % 64 == 0 else None
        except MessageTooLarge:
            break
        largest = dispatch or largest
    assert largest is not None, "the largest that is taken arrives"
    delivery = await worker.pull()
    await delivery.drop()
    with pytest.raises(MessageTooLarge):
        await gateway.dispatch(new_work(sealed=sealed))
    assert gateway.connected
    assert gateway.connection.client.stats["reconnects"] == 0


async def test_a_gateway_that_died_leaves_nothing_in_the_queue(parties: Parties) -> None:
    gateway, _ = await parties.gateway(), await parties.worker()
    await gateway.dispatch(new_work(), queue_limit=0.5)
    await gateway.close()
    assert await parties.live.queued() == 1
    await asyncio.sleep(2.7)  # its time to live: the queue limit in whole seconds, and one
    assert await parties.live.queued() == 0


async def test_a_model_nobody_serves_keeps_no_other_waiting(parties: Parties) -> None:
    gateway, _ = await parties.gateway(), await parties.worker(models=("m1",))
    await (await gateway.dispatch(new_work(model="m1"))).cancel()
    gateway._side("a").settled_at = 0.0
    with pytest.raises(NoWorkers):
        await gateway.dispatch(new_work(model="m2"))


# Gateways and workers that come and go


async def test_work_of_a_gateway_that_is_gone_is_stopped(parties: Parties) -> None:
    gateway, worker = await parties.gateway(), await parties.worker()
    await gateway.dispatch(new_work())
    delivery = await worker.pull()
    await delivery.send(FrameKind.DATA, b"x")
    await gateway.close()
    successor = await parties.gateway()
    await until(lambda: successor._side("a").connected)  # once it has heard of the pool
    async with asyncio.timeout(10):
        await delivery.send(FrameKind.BEAT, b"")
        await delivery.cancelled.wait()


async def test_a_drained_worker_leaves_no_pull_behind(parties: Parties) -> None:
    gateway, leaving, staying = await parties.gateway(), await parties.worker("a", "n1"), await parties.worker("a", "n2")
    pulling = asyncio.create_task(leaving.pull())
    await asyncio.sleep(0.2)
    await tasks.end(pulling)
    await leaving.drain()
    await gateway.dispatch(work := new_work())
    async with asyncio.timeout(10):
        delivery = await staying.pull()
    assert (delivery.work, delivery._message.metadata.num_delivered) == (work, 1)
    await delivery.drop()


async def drained_with(worker: NatsWorker) -> None:
    """The worker drains when work has just reached it."""
    worker._ask()
    (pull,) = worker._pulls.values()
    async with asyncio.timeout(10):
        await asyncio.wait([pull])
    await worker.drain()


async def test_a_draining_worker_returns_work_and_another_one_answers(parties: Parties) -> None:
    gateway, leaving, staying = await parties.gateway(), await parties.worker("a", "n1"), await parties.worker("a", "n2")
    dispatch = await gateway.dispatch(work := new_work())
    await drained_with(leaving)
    async with asyncio.timeout(2):  # NATS does not wait for a missing ack
        delivery = await staying.pull()
    assert (delivery.work, delivery.again, delivery._message.metadata.num_delivered) == (work, False, 2)
    assert await delivery.claim()
    await delivery.send(FrameKind.DATA, b"x")
    await delivery.send(FrameKind.USAGE, b"")
    assert await read(dispatch) == [b"x", b""]
    assert await parties.live.queued() == 0
    await delivery.drop()


@pytest.mark.parametrize("kept_by", ["deliveries", "claims"])
async def test_work_that_cannot_be_returned_is_rejected(parties: Parties, kept_by: str) -> None:
    """NATS would not deliver it a third time; without its mark, the next worker would refuse it."""
    gateway, first, second = await parties.gateway(), await parties.worker("a", "n1"), await parties.worker("a", "n2")
    dispatch = await gateway.dispatch(new_work())
    if kept_by == "deliveries":
        await drained_with(first)
        await drained_with(second)
    else:
        provisioner = await parties.connect("provisioner")
        await provisioner.jetstream.delete_stream(f"KV_{subjects.claims_bucket('a')}")
        await drained_with(first)
    async with asyncio.timeout(5):
        frames = [(frame.kind, frame.payload) async for frame in frames_of(dispatch)]
    assert frames == [(FrameKind.ERROR, problems.BUSY.type.encode())]
    assert await parties.live.queued() == 0
    await parties.live.provision()


@pytest.mark.parametrize("of", ["sequence", "time", "stream"])
async def test_a_mark_excuses_no_other_message(parties: Parties, of: str) -> None:
    """A worker that may have been ended by a request is not followed by another one."""
    await parties.live.provision(ack_wait=0.5)
    gateway, first, second = await parties.gateway(), await parties.worker("a", "n1"), await parties.worker("a", "n2")
    await gateway.dispatch(work := new_work())
    delivery = await first.pull()
    stream, sequence, time_of = handing_back._name(delivery._message).decode().split()
    mark = {
        "sequence": f"{stream} {int(sequence) + 1} {time_of}",
        "time": f"{stream} {sequence} 2026-01-01T00:00:00+00:00",
        "stream": f"WORK_a_us {sequence} {time_of}",
    }[of]
    await first.connection.jetstream.publish(subjects.handed_back("a", work.digest.hex()), mark.encode())
    await die(first)
    async with asyncio.timeout(10):
        again = await second.pull()
    assert (again.work, again.again) == (work, True)
    await again.drop()


@pytest.mark.slow
async def test_closing_ends_what_waits(parties: Parties) -> None:
    gateway, _ = await parties.gateway(), await parties.worker()
    dispatch = await gateway.dispatch(new_work())
    waiting = asyncio.create_task(anext(frames_of(dispatch)))
    await asyncio.sleep(0.1)
    await gateway.close()
    with pytest.raises(FabricUnavailable, match="closing"):
        await waiting
    with pytest.raises(FabricUnavailable, match="not connected"):
        await gateway.dispatch(new_work())


async def test_no_queue_is_said(parties: Parties) -> None:
    gateway, worker = await parties.gateway(), await parties.worker()
    await (await gateway.dispatch(new_work())).cancel()
    await (await parties.connect("provisioner")).jetstream.delete_stream("WORK_a_lacre")
    with pytest.raises(contract.NoQueue):
        await gateway.dispatch(new_work(), queue_limit=0.5)
    # The worker says that it can take nothing, and finds the new queue by itself.
    pulling = asyncio.create_task(worker.pull())
    await asyncio.sleep(0.2)
    assert gateway.workers("a", "m1") == 0
    await parties.live.provision()
    await until(lambda: gateway.workers("a", "m1"))
    async with asyncio.timeout(10):
        await gateway.dispatch(new_work())
        await (await pulling).drop()


async def test_work_waits_for_its_queue_and_is_in_it_once(parties: Parties) -> None:
    """As when the queue's leader dies, and another is chosen."""
    gateway, worker = await parties.gateway(), await parties.worker(slots=2)
    await (await parties.connect("provisioner")).jetstream.delete_stream("WORK_a_lacre")
    work = new_work()
    dispatching = asyncio.create_task(gateway.dispatch(work))
    await asyncio.sleep(0.5)
    assert not dispatching.done()
    await parties.live.provision()
    await dispatching
    async with asyncio.timeout(15):
        delivery = await worker.pull()
    assert (delivery.work.request_id, (await gateway.backlog("a", subjects.DEFAULT_REGION)).requests) == (work.request_id, 1)
    await delivery.drop()


@pytest.mark.parametrize("gone", ["consumer", "stream"])
async def test_a_queue_that_answers_again_soon_refuses_nobody(parties: Parties, gone: str) -> None:
    """As while servers read new accounts: for a moment nothing answers the worker's pull."""
    gateway, worker = await parties.gateway(), await parties.worker(slots=2)
    assert await answered(worker, gateway)
    provisioner = (await parties.connect("provisioner")).jetstream
    stream = subjects.work_stream("a", subjects.DEFAULT_REGION)
    if gone == "consumer":
        await provisioner.delete_consumer(stream, subjects.consumer("m1"))
    else:
        await provisioner.delete_stream(stream)
    pulling = asyncio.create_task(worker.pull())
    deadline = time.monotonic() + PRESENT_FOR + BEAT  # what the worker announced before is no longer valid then
    while time.monotonic() < deadline:
        assert gateway.workers("a", "m1") == 1
        await asyncio.sleep(0.1)
    work = new_work()
    dispatching = asyncio.create_task(gateway.dispatch(work))
    await parties.live.provision()
    await dispatching
    async with asyncio.timeout(10):
        delivery = await pulling
    assert delivery.work == work
    await delivery.drop()


@pytest.mark.slow
async def test_everybody_comes_back_after_a_restart(own: Parties) -> None:
    gateway, other, worker = await own.gateway("g1"), await own.gateway("g2"), await own.worker()
    await own.worker("a", "n2", models=("m2",))
    assert await answered(worker, gateway)
    broken = await gateway.dispatch(new_work())
    delivery = await worker.pull()
    await delivery.send(FrameKind.DATA, b"begun")
    waiting = await gateway.dispatch(new_work(), queue_limit=2.0)
    assert waiting._waiting.sequence == 3

    await own.live.restart()
    ending = asyncio.create_task(ends_with(broken))
    await delivery.drop()
    worker.release()
    async with asyncio.timeout(15):
        for party in (gateway, other, worker):
            await party.connection.wait_connected()
    with pytest.raises(FabricError):
        await gateway.dispatch(new_work())
    pulling = asyncio.create_task(worker.pull())
    await asyncio.sleep(0.1)
    await own.live.provision()
    # A sequence of the old queue means another message in the new one: to withdraw the old must not take the new away.
    new = new_work()
    await until(lambda: other.workers("a", "m1") and other.workers("a", "m2"))
    async with asyncio.timeout(15):
        for _ in range(2):
            await (await other.dispatch(new_work(model="m2"))).cancel()
        dispatch = await other.dispatch(new)
        assert dispatch._waiting.sequence == 3
    assert isinstance(await ends_with(waiting), WorkerLost | contract.QueueTimeout)
    assert await own.live.queued() == 1
    assert isinstance(await ending, WorkerLost)
    async with asyncio.timeout(15):
        delivery = await pulling
    assert delivery.work == replace(new, gateway="g2")
    assert await delivery.claim()
    await delivery.send(FrameKind.USAGE, b"")
    assert [frame.kind async for frame in frames_of(dispatch)] == [FrameKind.USAGE]
    await delivery.drop()
    worker.release()
    assert await answered(worker, gateway)


@pytest.mark.slow
async def test_a_worker_takes_no_heap_of_work_after_an_outage(own: Parties) -> None:
    gateway, worker = await own.gateway(), await own.worker(slots=1)
    pulling = asyncio.create_task(worker.pull())
    await asyncio.sleep(0.2)
    await own.live.restart(4.5)  # long enough for two pulls more to be kept for the time after
    await own.live.provision()
    await until(lambda: gateway.connection.connected and gateway.workers("a", "m1"))
    for _ in range(4):
        await gateway.dispatch(new_work())
    async with asyncio.timeout(15):
        delivery = await pulling
    await asyncio.sleep(0.3)
    provisioner = await own.connect("provisioner")
    info = await provisioner.jetstream.consumer_info("WORK_a_lacre", subjects.consumer("m1"))
    assert (info.num_ack_pending, info.num_pending) == (1, 3)
    await delivery.drop()


# The client library leaves the sockets of refused reconnections to the garbage collector; it comes before the next test.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
async def test_a_withdrawn_credential_ends_the_worker(own: Parties) -> None:
    worker, other = await own.worker("a", "n1"), await own.worker("a", "n2")
    own.live.server.configure([role for role in own.live.roles() if role.credential.name != "worker-a-n1"])
    own.live.server.reload(own.live.process)
    with pytest.raises(contract.FabricLost):
        async with asyncio.timeout(10):
            while True:
                with suppress(FabricUnavailable):
                    await worker.pull()
    assert other.connection.connected
    gc.collect()


async def test_a_new_pool_needs_no_restart(own: Parties) -> None:
    gateway = await own.gateway()
    pools = {**POOLS, "c": ("m1",)}
    credential = roles.Credential.new("worker-c-n1")
    others = [role for role in own.live.roles() if role.credential.name != "gateway-g1"]
    gateway_role = roles.gateway(own.live.credentials["gateway-g1"], "g1", tuple(pools))
    own.live.server.configure([*others, gateway_role, roles.worker(credential, "c", "n1")])
    for _ in range(2):
        own.live.server.reload(own.live.process)
        await asyncio.sleep(0.3)
    await provision(await own.connect("provisioner"), pools)
    await until(lambda: gateway.connection.connected)
    worker = await own.kept(NatsWorker.connect(own.live.server.url, credential, "c", "n1", ["m1"]))
    await until(lambda: gateway.workers("c", "m1"))
    dispatch = await gateway.dispatch(new_work("c"))
    await answer(worker)
    assert await read(dispatch) == [b"x", b"receipt"]


# A worker that cannot work takes nothing and is announced for nothing; what it took a moment too early it gives back.


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
    """It had asked for work while it could. The work waits in the queue until a worker can do it, and counts as new there."""
    await ends.until(1)
    pulling = tasks.spawn("pull", ends.worker.pull())
    await asyncio.sleep(0.1)  # the pull waits at the server
    ends.able.able = set()
    work = new_work()
    dispatch = await ends.gateway.dispatch(work)
    async with asyncio.timeout(15):
        frames = asyncio.ensure_future(read(dispatch))
        await asyncio.sleep(0.5)
        assert not pulling.done() and not frames.done()
        ends.able.able = {"m1"}
        delivery = await pulling
        assert (delivery.work, delivery.again) == (work, False)
        await delivery.send(FrameKind.DATA, b"x")
        await delivery.send(FrameKind.USAGE, b"")
        assert await frames == [b"x", b""]
    await delivery.drop()


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
