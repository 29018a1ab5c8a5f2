"""Three message servers, as `examples/nats/node.conf` configures them: one of them may die."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from lacre.runtime import tasks
from lacre_fabric.nats import roles
from lacre_fabric.nats.connection import Connection
from lacre_fabric.nats.gateway import NatsGateway
from lacre_fabric.nats.provisioning import provision
from lacre_fabric.nats.roles import Credential
from lacre_fabric.nats.streams import streams
from lacre_fabric.nats.worker import NatsWorker
from lacre_fabric.operate import floods
from lacre_fabric.operate.fabric_check import FabricFinding, Severity, inspect
from lacre_fabric.work.contract import FabricError
from parts.fabric import Kept, ask_once, work
from parts.nats_cluster import NatsCluster
from parts.stolen_nats import published
from parts.waiting import PATIENCE, until

POOLS = {"a": ("m1",)}
CREDENTIALS = {name: Credential.new(name) for name in ("provisioner", "inspector", "warden", "gateway-g1", "worker-a-n1")}
ROLES = [
    roles.provisioner(CREDENTIALS["provisioner"]),
    roles.inspector(CREDENTIALS["inspector"]),
    roles.warden(CREDENTIALS["warden"]),
    roles.gateway(CREDENTIALS["gateway-g1"], "g1", tuple(POOLS)),
    roles.worker(CREDENTIALS["worker-a-n1"], "a", "n1"),
]
OUTAGE = 10.0  # seconds that nothing may go through; servers choose a new leader in one to five
LOAD = 15.0  # seconds

pytestmark = [pytest.mark.slow]


@pytest.fixture
async def cluster(tmp_path: Path) -> AsyncIterator[NatsCluster]:
    cluster = NatsCluster(tmp_path, ROLES, POOLS)
    try:
        cluster.start()
        await cluster.ready(CREDENTIALS["provisioner"])
        yield cluster
    finally:
        cluster.stop()


async def test_provisioning_changes_the_number_of_replicas(cluster: NatsCluster) -> None:
    async with connected(cluster) as connection:
        every = {config.name for config in streams(tuple(POOLS), 1)}
        for wanted in (3, 1, 3):
            await provision(connection, POOLS, replicas=wanted)
            found = {info.config.name: info.config.num_replicas for info in await connection.jetstream.streams_info()}
            assert found == dict.fromkeys(every, wanted)


@asynccontextmanager
async def connected(cluster: NatsCluster) -> AsyncIterator[Connection]:
    connection = await Connection.open(cluster.servers, CREDENTIALS["provisioner"])
    yield connection
    await connection.close()


async def checked(cluster: NatsCluster, replicas: int = 3) -> list[FabricFinding]:
    credentials = {name.removesuffix("-g1").removesuffix("-n1"): each for name, each in CREDENTIALS.items()}
    return await inspect(cluster.servers, POOLS, replicas, credentials)


async def test_the_check_has_nothing_to_say(cluster: NatsCluster) -> None:
    async def nothing_weak() -> bool:
        weak = [each for each in await checked(cluster) if each.verdict is not Severity.OK]
        assert all("behind or offline" in each.detail for each in weak), weak
        return not weak

    await until(nothing_weak, 20)  # copies are made in the servers' own time


async def test_the_check_names_each_stream_whose_copy_is_lost(cluster: NatsCluster) -> None:
    """From the first moment: NATS itself calls a dead server's copy current for ten seconds, if nobody writes to the stream."""
    names = {config.name for config in streams(tuple(POOLS), 3)}

    async def all_are_named() -> bool:
        found = {each.check: each for each in await checked(cluster)}
        there = [each for name, each in found.items() if name in names]
        assert not [each for each in there if each.verdict is Severity.OK], there
        lost = {each.check for each in there if each.detail.endswith("behind or offline: n1")}
        return lost == names and found["servers"].detail.startswith("2 servers answer")

    cluster.nodes[0].stop(signal.SIGKILL)
    await until(all_are_named, PATIENCE)  # when there are leaders again


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
async def test_the_check_goes_on_behind_a_stream_without_a_leader(cluster: NatsCluster, how: int) -> None:
    """Killed, a server's only copy says nothing; stopped in order, the others know that it is offline."""
    names = {config.name for config in streams(tuple(POOLS), 1)}
    async with connected(cluster) as connection:
        await provision(connection, POOLS, replicas=1)
        at: dict[str | None, str | None] = {}

        async def no_copies() -> bool:
            clusters = {info.config.name: info.cluster for info in await connection.jetstream.streams_info()}
            at.update({name: cluster and cluster.leader for name, cluster in clusters.items()})
            return not any(cluster is None or cluster.replicas for cluster in clusters.values())

        await until(no_copies, PATIENCE)
    gone = next(node for node in cluster.nodes if node.name == at["KV_trust"])

    async def only_these_are_wrong() -> bool:
        found = {each.check: each for each in await checked(cluster, 1) if each.check in names}
        told = {name: (each.verdict, each.detail) for name, each in found.items() if each.verdict is not Severity.OK}
        wrong = (Severity.WRONG, "no server leads it, so it takes no writes")
        return found.keys() == names and told == {name: wrong for name, leader in at.items() if leader == gone.name}

    gone.stop(how)
    await until(only_these_are_wrong, PATIENCE)  # when JetStream has a leader again


async def test_a_flood_is_cut_off_at_every_server(cluster: NatsCluster) -> None:
    """The warden is connected to one of them."""
    watched = partial(floods.watch, cluster.servers, CREDENTIALS["warden"], look=0.6)
    watching = tasks.start("floods", watched, restart=floods.WATCHED)
    batch = published("reply.a.g1.x", b"x") * 20_000
    try:
        for node in cluster.nodes:
            servers = replace(cluster.servers, urls=(node.url,))
            thief = await Connection.open(servers, CREDENTIALS["worker-a-n1"])
            back = asyncio.Event()
            thief.on_reconnect = back.set
            async with asyncio.timeout(60):
                while not back.is_set():
                    if thief.connected:
                        with suppress(OSError):
                            thief.client._transport.write(batch)  # faster than the library says it
                            await thief.client._transport.drain()
                    await asyncio.sleep(0)
            await thief.close()
    finally:
        await watching.close()


async def ask(gateway: NatsGateway) -> str:
    """`whole`, or the kind of error that the caller is told."""
    try:
        return await ask_once(gateway, queue_limit=5.0)
    except FabricError as exc:
        return type(exc).__name__


async def test_a_server_that_is_killed_under_load(cluster: NatsCluster) -> None:
    loop = asyncio.get_running_loop()
    ended: list[tuple[float, str]] = []

    async def load(until: float) -> None:
        while loop.time() < until:
            ended.append((loop.time(), await ask(gateway)))
            await asyncio.sleep(0.02)

    async with AsyncExitStack() as stack:
        parties = Kept(stack)
        gateway = await parties.kept(NatsGateway.connect(cluster.servers, CREDENTIALS["gateway-g1"], "g1"))
        worker = NatsWorker.connect(cluster.servers, CREDENTIALS["worker-a-n1"], "a", "n1", ["m1"], slots=4)
        working = await parties.kept(worker)
        for _ in range(4):
            parties.background(work(working))
        async with connected(cluster) as connection:
            info = await connection.jetstream.stream_info("WORK_a_lacre")
        assert info.cluster is not None
        leader = next(node for node in cluster.nodes if node.name == info.cluster.leader)
        asking = [asyncio.create_task(load(loop.time() + LOAD)) for _ in range(4)]
        await asyncio.sleep(2)
        before = len(ended)
        killed = loop.time()
        leader.stop(signal.SIGKILL)
        await asyncio.gather(*asking)
    assert before > 20
    assert {outcome for _, outcome in ended[:before]} == {"whole"}
    known = {"whole", "FabricUnavailable", "NoQueue", "NoWorkers", "QueueTimeout", "WorkerLost", "QueueFull"}
    assert {outcome for _, outcome in ended} <= known
    whole = [at for at, outcome in ended if outcome == "whole" and at > killed + 1]
    assert whole[0] - killed < OUTAGE, f"whole again after {whole[0] - killed:.1f} s"
    assert all(outcome == "whole" for at, outcome in ended if at > killed + OUTAGE + 2)
