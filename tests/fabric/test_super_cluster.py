"""Two regions, as `examples/nats/region.conf` joins them: a request finds a worker in either, and runs at most once in both."""

from __future__ import annotations

import asyncio
import secrets
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Iterator, Sequence
from contextlib import AsyncExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import nats.errors
import pytest

from lacre_fabric.nats import roles, subjects
from lacre_fabric.nats.connection import Connection
from lacre_fabric.nats.delivery import NatsDelivery
from lacre_fabric.nats.gateway import NatsGateway
from lacre_fabric.nats.kv import Conflict, NatsBucket
from lacre_fabric.nats.provisioning import provision
from lacre_fabric.nats.roles import Credential
from lacre_fabric.nats.streams import QUEUED_MESSAGES
from lacre_fabric.nats.worker import NatsWorker
from lacre_fabric.operate.fabric_check import Severity, _majority, inspect
from lacre_fabric.work.contract import CREDIT, DuplicateWork, FabricError, FabricUnavailable, QueueTimeout, Work, WorkerLost
from lacre_fabric.work.frames import FrameKind
from lacre_fabric.work.revocations import Revocation, subject_key
from parts.fabric import Kept, new_work, read
from parts.frames import frames_of
from parts.nats_cluster import VOTER, SuperCluster
from parts.waiting import until

POOL, MODEL = "a", "m1"
POOLS = {POOL: (MODEL, "m2"), "b": (MODEL,)}
REGIONS = ("eu", "us")
HOME, AWAY = REGIONS
WHOLE = [b"x", b"receipt"]  # an answer
NOTICED = 15.0  # seconds: longer than servers take to find that they are not the most of all
QUEUES = [subjects.work_stream(pool, region) for pool in POOLS for region in REGIONS]

pytestmark = [pytest.mark.slow]


@dataclass
class Regions(Kept):
    """Both, and what was connected to them."""

    cluster: SuperCluster
    credentials: dict[str, Credential]
    ran: list[tuple[str, bytes]] = field(default_factory=list)  # what was claimed: node, digest

    async def connect(self, name: str, region: str) -> Connection:
        return await self.kept(Connection.open(self.cluster.servers(region), self.credentials[name]))

    async def gateway(self, region: str) -> NatsGateway:
        credential, servers = self.credentials[f"gateway-{region}"], self.cluster.servers(region)
        return await self.kept(NatsGateway.connect(servers, credential, f"g-{region}", region))

    async def worker(self, region: str, slots: int = 1) -> NatsWorker:
        """Not working yet: it pulls when it is told to."""
        credential, servers = self.credentials[f"worker-{POOL}-{region}"], self.cluster.servers(region)
        connecting = NatsWorker.connect(servers, credential, POOL, f"n-{region}", [MODEL], slots=slots, region=region)
        return await self.kept(connecting)

    async def everybody(self, slots_away: int = 1) -> tuple[NatsWorker, NatsWorker, NatsGateway, NatsGateway]:
        """A worker and a gateway at home, and both away; each gateway knows of each worker."""
        near, far = await self.worker(HOME), await self.worker(AWAY, slots_away)
        gateway, other = await self.gateway(HOME), await self.gateway(AWAY)
        for each in (gateway, other):
            await until_seen(each, eu=1, us=slots_away)
        return near, far, gateway, other

    async def work(self, worker: NatsWorker) -> None:
        """Answers one request after the other."""
        while True:
            try:
                delivery = await worker.pull()
            except FabricError:
                await asyncio.sleep(0.1)
                continue
            await self.answer(worker, delivery)

    async def answer(self, worker: NatsWorker, delivery: NatsDelivery | None = None, pieces: Sequence[bytes] = (b"x",)) -> None:
        delivery = delivery or await worker.pull()
        with suppress(FabricError):  # what became of it, the gateway tells
            if await delivery.claim():
                self.ran.append((worker._node, delivery.work.digest))
                for piece in pieces:
                    await delivery.send(FrameKind.DATA, piece)
                await delivery.send(FrameKind.USAGE, b"receipt")
        await delivery.drop()
        worker.release()

    def nodes(self) -> list[str]:
        return [node for node, _ in self.ran]

    def runs(self, work: Work) -> int:
        return [digest for _, digest in self.ran].count(work.digest)


@pytest.fixture(scope="module")
def names() -> dict[str, Credential]:
    fixed = ["provisioner", "inspector", *(f"gateway-{region}" for region in REGIONS)]
    return {name: Credential.new(name) for name in [*fixed, *(f"worker-{pool}-{at}" for pool in POOLS for at in REGIONS)]}


def every_role(credentials: dict[str, Credential]) -> list[roles.Role]:
    return [
        roles.provisioner(credentials["provisioner"]),
        roles.inspector(credentials["inspector"]),
        *(roles.gateway(credentials[f"gateway-{at}"], f"g-{at}", tuple(POOLS), REGIONS) for at in REGIONS),
        *(roles.worker(credentials[f"worker-{pool}-{at}"], pool, f"n-{at}", at) for pool in POOLS for at in REGIONS),
    ]


@contextmanager
def running(folder: Path, names: dict[str, Credential]) -> Iterator[SuperCluster]:
    cluster = SuperCluster(folder, every_role(names), POOLS, REGIONS)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory, names: dict[str, Credential]) -> Iterator[SuperCluster]:
    with running(tmp_path_factory.mktemp("regions"), names) as cluster:
        yield cluster


@pytest.fixture
async def own(tmp_path: Path, names: dict[str, Credential]) -> AsyncIterator[Regions]:
    """Regions that may be lost."""
    with running(tmp_path, names) as cluster:
        await cluster.ready(names["provisioner"])
        async with AsyncExitStack() as stack:
            yield Regions(stack, cluster, names)


@pytest.fixture
async def regions(cluster: SuperCluster, names: dict[str, Credential]) -> AsyncIterator[Regions]:
    """With empty queues."""
    await cluster.ready(names["provisioner"])
    async with AsyncExitStack() as stack:
        regions = Regions(stack, cluster, names)
        provisioner = await regions.connect("provisioner", HOME)
        for stream in QUEUES:
            await provisioner.jetstream.purge_stream(stream)
        yield regions


async def until_seen(gateway: NatsGateway, **free: int) -> None:
    """Until the gateway knows that so many slots are free in each region; those that it is not told of have no worker."""
    await until(lambda: {at: seen.free for (pool, at), seen in gateway.capacity().items() if pool == POOL} == free)


async def answered(gateway: NatsGateway, sealed: bytes | None = None, queue_limit: float = 30.0) -> bool:
    return await read(await gateway.dispatch(new_work(sealed=sealed), queue_limit=queue_limit)) == WHOLE


async def test_the_nearest_worker_that_is_free(regions: Regions) -> None:
    near, far, gateway, other = await regions.everybody(slots_away=2)

    # One after the other: here, though more is free there.
    first = await gateway.dispatch(new_work())
    at_home = await near.pull()
    # Presence has not told yet that the only slot here is taken: what was sent counts.
    second, third, fourth = [await gateway.dispatch(new_work()) for _ in range(3)]
    away = [await far.pull() for _ in range(2)]
    assert [(await gateway.backlog(POOL, at)).requests for at in REGIONS] == [2, 2], (
        "not acked yet; the last waits here, for all are busy"
    )
    await asyncio.gather(*(regions.answer(far, delivery) for delivery in away), regions.answer(near, at_home))
    assert [await read(each) for each in (first, second, third)] == [WHOLE] * 3
    await regions.answer(near)
    assert await read(fourth) == WHOLE
    assert regions.nodes().count("n-eu") == 2

    regions.ran.clear()
    for worker in (near, far):
        regions.background(regions.work(worker))
    await until_seen(other, eu=1, us=2)
    assert await answered(other)
    assert regions.nodes() == ["n-us"], "each gateway has a region of its own"


async def test_where_nobody_is_the_others_answer(regions: Regions) -> None:
    """And a stream that crosses is like any other: credit goes there, and word that nobody reads any more."""
    far = await regions.worker(AWAY)
    gateway = await regions.gateway(HOME)
    await until_seen(gateway, us=1)
    pieces = [bytes(CREDIT // 4)] * 12
    dispatch = await gateway.dispatch(new_work())
    regions.background(regions.answer(far, None, pieces))
    assert await read(dispatch) == [*pieces, b"receipt"]

    dispatch = await gateway.dispatch(new_work())
    delivery = await far.pull()
    assert await delivery.claim()
    await delivery.send(FrameKind.DATA, b"x")
    assert (await anext(frames_of(dispatch))).payload == b"x"
    await dispatch.cancel()
    async with asyncio.timeout(10):
        await delivery.cancelled.wait()
    await delivery.drop()
    far.release()

    near = await regions.worker(HOME)
    await until_seen(gateway, eu=1, us=1)
    await near.close()  # as one that died, but at once
    assert (POOL, HOME) not in gateway.capacity()
    regions.background(regions.work(far))
    assert await answered(gateway)
    assert regions.nodes() == ["n-us"] * 2


async def test_a_full_queue_or_none_lets_it_go_on(regions: Regions) -> None:
    near, far, gateway, _ = await regions.everybody()
    for _ in range(QUEUED_MESSAGES):
        await gateway.connection.jetstream.publish(subjects.work(POOL, HOME, "m2"), b"x")
    dispatch = await gateway.dispatch(new_work())
    await regions.answer(far)
    assert await read(dispatch) == WHOLE

    provisioner = await regions.connect("provisioner", HOME)
    await provisioner.jetstream.delete_stream(subjects.work_stream(POOL, HOME))
    assert gateway.workers(POOL, MODEL) == 2, "its workers have not noticed yet"
    dispatch = await gateway.dispatch(new_work())
    await regions.answer(far)
    assert await read(dispatch) == WHOLE
    assert regions.nodes() == ["n-us"] * 2
    assert near.connection.connected


async def test_what_may_be_in_a_queue_is_put_into_no_other(regions: Regions) -> None:
    """The region's server takes the work and its word is late: it may have it or not, and it has."""
    near, far, gateway, _ = await regions.everybody()
    held = await gateway.dispatch(new_work())
    delivery = await near.pull()
    await until_seen(gateway, eu=0, us=1)
    process = regions.cluster.nodes[AWAY].process
    assert process is not None
    process.send_signal(signal.SIGSTOP)
    try:
        work = new_work()
        dispatch = await gateway.dispatch(work, queue_limit=1.0)
        with pytest.raises(QueueTimeout):
            await read(dispatch)
        await regions.answer(near, delivery)
        assert await read(held) == WHOLE
        assert (await gateway.backlog(POOL, HOME)).requests == 0
    finally:
        process.send_signal(signal.SIGCONT)
    async with asyncio.timeout(15):
        assert (await far.pull()).work.digest == work.digest


async def test_a_replay_in_the_other_region_is_refused(regions: Regions) -> None:
    """Neither queue knows what was in the other: the claim does, which both regions' workers make in the home."""
    near, far, gateway, other = await regions.everybody()
    for first, second, here, there in ((gateway, other, near, far), (other, gateway, far, near)):
        work = new_work()
        dispatch = await first.dispatch(work)
        await regions.answer(here)
        assert await read(dispatch) == WHOLE
        with pytest.raises(DuplicateWork):
            await first.dispatch(new_work(sealed=work.sealed))
        again = await second.dispatch(new_work(sealed=work.sealed), queue_limit=1.0)
        await regions.answer(there)
        with pytest.raises(QueueTimeout):
            await read(again)
        assert regions.runs(work) == 1

    # Both at once: one of them runs it.
    work = new_work()
    both = [await each.dispatch(new_work(sealed=work.sealed), queue_limit=2.0) for each in (gateway, other)]
    pulled = [(worker, await worker.pull()) for worker in (near, far)]
    await asyncio.gather(*(regions.answer(*each) for each in pulled))
    told = await asyncio.gather(*map(read, both), return_exceptions=True)
    assert sorted(isinstance(each, QueueTimeout) for each in told) == [False, True]
    assert regions.runs(work) == 1


async def test_revocations_and_budgets_are_the_same_everywhere(regions: Regions) -> None:
    gateway, other = await regions.gateway(HOME), await regions.gateway(AWAY)
    for each in (gateway, other):
        await each.revoked()
    for first, second in ((gateway, other), (other, gateway)):
        revocation = Revocation(subject_key("issuer", secrets.token_hex(8)), time.time() + 60)
        await first.revoke(revocation)
        assert revocation in await second.revoked()

    buckets = [NatsBucket(each.connection, subjects.BUDGETS_BUCKET) for each in (gateway, other)]
    key = f"user.{secrets.token_hex(8)}"
    revision = await buckets[0].write(key, b"0", 0)
    won = [0, 0]

    async def draw(number: int) -> None:
        for _ in range(50):
            entry = await buckets[number].read(key)
            assert entry is not None
            with suppress(Conflict):
                await buckets[number].write(key, b"%d" % (int(entry.value or 0) + 1), entry.revision)
                won[number] += 1

    await asyncio.gather(draw(0), draw(1))
    entry = await buckets[1].read(key)
    assert entry is not None
    assert int(entry.value) + sum(map(int, entry.others)) == sum(won), "every draw counts once"
    assert all(won)
    assert entry.revision > revision


async def test_the_check_knows_regions(regions: Regions) -> None:
    """And what is kept elsewhere than it should be."""
    servers = regions.cluster.servers(HOME)
    parties = {
        **{name: regions.credentials[name] for name in ("provisioner", "inspector")},
        **{f"gateway@{at}": regions.credentials[f"gateway-{at}"] for at in REGIONS},
        **{f"worker-{pool}@{at}": regions.credentials[f"worker-{pool}-{at}"] for pool in POOLS for at in REGIONS},
    }

    async def weak(at: Sequence[str]) -> dict[str, str]:
        return {each.check: each.detail for each in await inspect(servers, POOLS, 1, parties, at) if each.remedy}

    found = await inspect(servers, POOLS, 1, parties, REGIONS)
    assert [each for each in found if each.verdict is not Severity.OK] == []
    assert {"WORK_a_us", "consumers WORK_b_us", "servers us", "server us-n1", "permissions worker-a@us"} <= {
        each.check for each in found
    }
    moved = await weak(REGIONS[::-1])
    assert "placement is eu, should be us" in moved["KV_claims_a"]
    assert "WORK_a_us" not in moved
    more = await weak([*REGIONS, "ap"])
    assert (more["WORK_a_ap"], more["servers ap"]) == ("missing", "0 servers answer; each stream needs 1")
    for third, verdict in ((), Severity.WEAK), ((HOME,), Severity.OK), ((AWAY,), Severity.WEAK):
        assert _majority([{"cluster": {"name": at}} for at in (*REGIONS, *third)], REGIONS).verdict is verdict


async def test_the_home_moves(regions: Regions) -> None:
    """With what was claimed: a replay is refused after it as before."""
    near, far, *gateways = await regions.everybody()
    workers = (near, far)
    provisioner = await regions.connect("provisioner", HOME)

    async def home() -> str | None:
        """The region that keeps the claims, and alone. A stream that just moves may not answer."""
        try:
            info = (await provisioner.jetstream.stream_info("KV_claims_a")).cluster
        except nats.errors.TimeoutError:
            return None
        return None if info is None or info.replicas else info.name

    async def moved() -> bool:
        return await home() == REGIONS[there]

    for here, there in ((0, 1), (1, 0)):
        work = new_work()
        dispatch = await gateways[here].dispatch(work)
        await regions.answer(workers[here])
        assert await read(dispatch) == WHOLE
        await provision(provisioner, POOLS, regions=[REGIONS[there], REGIONS[here]])
        await until(moved, 30)
        again = await gateways[there].dispatch(new_work(sealed=work.sealed), queue_limit=1.0)
        await regions.answer(workers[there])
        with pytest.raises(QueueTimeout):
            await read(again)
    assert len(regions.ran) == 2


async def tells(gateway: NatsGateway) -> bool:
    """Whether it can read the revocations: not while JetStream chooses a leader of all regions, if the lost one had it."""
    try:
        await gateway.revoked()
    except FabricUnavailable as exc:
        assert "temporarily unavailable" in str(exc)
        return False
    return True


async def test_another_region_is_lost(own: Regions) -> None:
    """The home goes on, and what ran there is lost by name."""
    near, far, gateway, _ = await own.everybody()
    held = await gateway.dispatch(new_work())
    at_home = await near.pull()
    crossing = await gateway.dispatch(new_work())
    away = await far.pull()
    assert await away.claim()
    await away.send(FrameKind.DATA, b"x")
    frames = frames_of(crossing)
    assert (await anext(frames)).payload == b"x"
    own.cluster.nodes[AWAY].stop(signal.SIGKILL)
    with pytest.raises(WorkerLost):
        await anext(frames)
    await own.answer(near, at_home)
    assert await read(held) == WHOLE
    await until_seen(gateway, eu=1)
    own.background(own.work(near))
    bucket = NatsBucket(gateway.connection, subjects.BUDGETS_BUCKET)
    revision = 0
    began = time.monotonic()
    while time.monotonic() < began + NOTICED:
        assert await answered(gateway)
        revision = await bucket.write("user.x", b"1", revision)
        await until(lambda: tells(gateway), 30)
        assert (await gateway.backlog(POOL, HOME)).requests == 0
        await asyncio.sleep(0.2)

    await away.drop()
    far.release()
    own.cluster.start(AWAY)
    await own.cluster.ready(own.credentials["provisioner"])
    await until_seen(gateway, eu=1, us=1)
    own.background(own.work(far))
    again = await own.gateway(AWAY)
    await until_seen(again, eu=1, us=1)
    assert await answered(again)
    assert own.nodes()[-1] == "n-us"


async def test_most_servers_are_lost(own: Regions) -> None:
    """What is left of JetStream answers no questions: nothing is known of budgets and revocations, which is said by name."""
    gateway = await own.gateway(HOME)
    bucket = NatsBucket(gateway.connection, subjects.BUDGETS_BUCKET)
    await bucket.write("user.y", b"1", 0)
    for name in (AWAY, VOTER):
        own.cluster.nodes[name].stop(signal.SIGKILL)

    async def silent() -> bool:
        return await unavailable(gateway.revoked())

    async def kept() -> bool:
        with suppress(FabricUnavailable):
            assert await bucket.read("user.y") is not None
            return True
        return False

    await until(silent, 2 * NOTICED)
    assert await unavailable(bucket.read("user.y"))
    own.cluster.start(VOTER)
    await until(kept, 2 * NOTICED)


async def unavailable(asked: Awaitable[object]) -> bool:
    try:
        await asked
    except FabricUnavailable:
        return True
    return False


async def test_the_home_is_lost(own: Regions) -> None:
    """Nothing can be claimed, and so nothing runs; it is said by name, and goes on when the home is back."""
    far = await own.worker(AWAY)
    gateway = await own.gateway(AWAY)
    await until_seen(gateway, us=1)
    own.background(own.work(far))
    work = new_work()
    assert await answered(gateway, work.sealed)
    own.cluster.nodes[HOME].stop(signal.SIGKILL)
    own.ran.clear()
    began = time.monotonic()
    while time.monotonic() < began + NOTICED:
        with pytest.raises((FabricUnavailable, WorkerLost, QueueTimeout)):
            await answered(gateway, queue_limit=5.0)
        assert await unavailable(gateway.revoked())
        assert await unavailable(NatsBucket(gateway.connection, subjects.BUDGETS_BUCKET).read("user.x"))
    assert not own.ran

    async def goes_on() -> bool:
        with suppress(FabricError):
            return await answered(gateway, queue_limit=5.0)
        return False

    own.cluster.start(HOME)
    await own.cluster.ready(own.credentials["provisioner"])
    await until(goes_on, 30)
    own.background(own.work(await own.worker(HOME)))
    other = await own.gateway(HOME)
    await until_seen(other, eu=1, us=1)
    with pytest.raises(QueueTimeout):  # claims outlive every server
        await answered(other, work.sealed, queue_limit=1.0)
