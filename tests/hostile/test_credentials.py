"""One stolen credential of the message server: what it may say, said in every form, stops nobody but its own pool."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from hostile.attacks import Verdict, attack
from lacre.jose.jws import raw_public_key
from lacre.runtime import tasks
from lacre.trust.manifest import Manifest
from lacre_backend.node.ordered_drain import OrderedDrain
from lacre_fabric.nats import subjects
from lacre_fabric.nats.accounts import WORKER_PAYLOAD, WORKER_SUBSCRIPTIONS
from lacre_fabric.nats.connection import Connection
from lacre_fabric.nats.delivery import NatsDelivery
from lacre_fabric.nats.gateway import NatsGateway
from lacre_fabric.nats.kv import NatsBucket
from lacre_fabric.nats.provisioning import provision
from lacre_fabric.nats.servers import Servers
from lacre_fabric.nats.streams import BucketLimits
from lacre_fabric.operate import floods
from lacre_fabric.operate.nats_server import NatsServer, free_port
from lacre_fabric.operate.rotation import NotTakenUp, Schedule, tend
from lacre_fabric.operate.site import Site as StateFolder
from lacre_fabric.work.contract import CREDIT
from lacre_fabric.work.drain_orders import DrainOrder
from lacre_fabric.work.frames import FrameKind
from parts.fabric import POOLS, LiveFabric, new_work
from parts.stolen_nats import StolenNats, published
from parts.waiting import until

CLAIMS = BucketLimits(32 * 1024, 50, 512)  # so little room that it is quickly full
PRESENT = b'{"models":["m1"],"busy":0,"free":9,"keys":[]}'
FULL = "its own pool can claim nothing for 15 minutes, the life of a claim"


class Site:
    """A running message server of two pools, and who is connected to it."""

    def __init__(self, live: LiveFabric, stack: AsyncExitStack) -> None:
        self.live, self._stack = live, stack

    async def _kept(self, opening: Awaitable[Any], end: str = "close") -> Any:
        opened = await opening
        self._stack.push_async_callback(getattr(opened, end))
        return opened

    async def stolen(self, role: str) -> StolenNats:
        return await self._kept(StolenNats.open(self.live.server.port, self.live.credentials[role]))

    async def connect(self, role: str) -> Connection:
        return await self._kept(self.live.connect(role))

    async def gateway(self, name: str) -> NatsGateway:
        return await self._kept(self.live.gateway(name))

    async def running(self, gateway: NatsGateway, pool: str = "a") -> NatsDelivery:
        """A request of the pool's whose worker has spent its credit."""
        worker = await self._kept(self.live.worker(pool))
        await gateway.dispatch(new_work(pool))
        delivery = await self._kept(worker.pull(), "drop")
        assert await delivery.claim()
        await delivery.send(FrameKind.DATA, bytes(CREDIT))
        return delivery


@pytest.fixture
async def site(tmp_path: Path) -> AsyncIterator[Site]:
    with LiveFabric.running(tmp_path) as live:
        async with AsyncExitStack() as stack:
            site = Site(live, stack)
            await provision(await site.connect("provisioner"), POOLS, claims=CLAIMS)
            yield site


async def flood(thief: StolenNats) -> None:
    """For a minute, or until the server hangs up. Raises ConnectionError then."""
    batch, until = published("reply.a.g1.x", b"x") * 20_000, time.monotonic() + 60
    while time.monotonic() < until:
        thief.say(batch)
        await thief.settle()


async def answers(site: Site) -> None:
    """Pool b takes a request and claims it."""
    await site.running(await site.gateway("g2"), "b")


@attack("fill the claims of its pool, with entries that never go", "credential",
        "every bucket has a reserved size; a claim cannot set its own time to live", gain=FULL)  # fmt: skip
async def test_claims_fill(site: Site) -> None:
    thief = await site.stolen("worker-a-n1")
    for headers in ({"Nats-TTL": "never"}, {"Nats-TTL": "1s"}):
        assert "error" in await thief.ask("$KV.claims_a.x", b"x", headers)
    told = [await thief.ask(f"$KV.claims_a.fill{number}", bytes(200)) for number in range(CLAIMS.messages + 3)]
    assert ["error" in answer for answer in told] == [False] * CLAIMS.messages + [True] * 3
    for subject in ("$KV.budgets.gateway-g1.x", subjects.revocation("gateway-g1")):
        assert "error" not in await (await site.stolen("gateway-g1")).ask(subject, b"x")
    await answers(site)


@attack("write another claim over one, or erase it, so that a request runs again", "credential",
        "a claim is written once; the bucket accepts no roll-ups")  # fmt: skip
async def test_claim_again(site: Site) -> None:
    delivery = await site.running(await site.gateway("g1"))
    thief = await site.stolen("worker-a-n2")
    subject = f"$KV.claims_a.{delivery.work.digest.hex()}"
    for headers in (None, {"Nats-Rollup": "sub"}, {"Nats-Rollup": "all"}, {"KV-Operation": "DEL"}, {"KV-Operation": "PURGE"}):
        assert "error" in await thief.ask(subject, b"", headers)
    assert not await delivery.claim()


@attack("cancel another worker's request, or renew its credit, through an answer of JetStream", "credential",
        "cancels and credit carry an HMAC by a key that only the gateway and the worker of the request know")  # fmt: skip
async def test_orders(site: Site) -> None:
    delivery = await site.running(await site.gateway("g1"))
    thief, request = await site.stolen("worker-a-n2"), delivery.work.request_id
    await thief.ask(f"$KV.claims_a.{request}", b"262144")
    for target in (subjects.cancel("a", request), subjects.credit("a", request)):
        thief.publish(f"{subjects.API}.DIRECT.GET.KV_claims_a.$KV.claims_a.{request}", reply=target)
        thief.publish(f"$KV.claims_a.{request}.x", b"", reply=target)
    await thief.settle()
    more = asyncio.ensure_future(delivery.send(FrameKind.DATA, b"more"))
    await asyncio.sleep(0.3)
    assert not delivery.cancelled.is_set()
    assert not more.done()
    more.cancel()


@attack("take a worker out of service by an order that no gateway signed, or that a gateway signed before", "credential",
        "a worker obeys orders that a key of the manifest signed, for itself, each newer than the last")  # fmt: skip
async def test_drain_orders(site: Site) -> None:
    key, thief, gateway = Ed25519PrivateKey.generate(), await site.stolen("gateway-g1"), await site.gateway("g2")
    manifest = Manifest("x", 1, time.time() - 9, time.time() + 900, raw_public_key(key), {})
    ordered = OrderedDrain(lambda: manifest, "a", subjects.DEFAULT_REGION, "n1")
    heard: list[bytes] = []

    def obey(order: bytes) -> bool:
        heard.append(order)
        return ordered.obey(order)

    worker = await site._kept(site.live.worker("a"))
    worker.on_order = obey
    place = ("a", subjects.DEFAULT_REGION, "n1")

    async def told(order: DrainOrder, signer: Ed25519PrivateKey = key) -> None:
        before = len(heard)
        thief.publish(subjects.order(*place), order.sign(signer).encode())
        await until(lambda: len(heard) > before)

    now = time.time()
    await told(DrainOrder("0" * 32, now, now + 9, *place, True), Ed25519PrivateKey.generate())
    await told(DrainOrder("0" * 32, now, now + 9, "a", subjects.DEFAULT_REGION, "n2", True))
    assert ordered.reason() is None
    for at, drain in ((now, True), (now + 1, False)):
        before = len(heard)
        await gateway.order(*place, DrainOrder("0" * 32, at, at + 9, *place, drain).sign(key))
        await until(lambda before=before: len(heard) > before)
        assert (ordered.reason() is not None) is drain
    await told(DrainOrder("0" * 32, now, now + 9, *place, True))
    assert ordered.reason() is None


@attack("have a gateway cancel another gateway's request, by a frame for it", "credential",
        "a gateway's orders are proven by keys of its own requests")  # fmt: skip
async def test_deputy(site: Site) -> None:
    delivery = await site.running(await site.gateway("g1"))
    other = await site.gateway("g2")
    await until(lambda: "a" in other._sides and other._sides["a"].connected)  # where it hears what the pool's workers say
    thief, request = await site.stolen("worker-a-n2"), delivery.work.request_id
    thief.publish(subjects.reply("a", "g2", request), b"x", headers={"A": "f" * 32, "S": "0", "K": "data"})
    await thief.settle()
    await other.connection.round_trip()
    await asyncio.sleep(0.3)
    assert not delivery.cancelled.is_set()


@attack("announce a missing worker through an answer of JetStream", "credential",
        "JetStream answers only the account that asked", gain="nothing; a node may say anything about itself")  # fmt: skip
async def test_presence(site: Site) -> None:
    gateway, thief = await site.gateway("g1"), await site.stolen("worker-a-n2")
    await thief.ask("$KV.claims_a.presence", PRESENT)
    thief.publish("presence.a.lacre.n1", PRESENT)
    thief.publish(f"{subjects.API}.DIRECT.GET.KV_claims_a.$KV.claims_a.presence", reply="presence.a.lacre.n1")
    await thief.settle()
    await asyncio.sleep(0.3)
    assert gateway.workers("a", "m1") == 0


@pytest.mark.slow
@attack("say that it holds no key of its pool, so that no pool gets new keys, and old ones stay on disk", "credential",
        "pools rotate independently, and the log names the worker", NotTakenUp,
        gain="its own pool keeps its keys until an operator ends that worker")  # fmt: skip
async def test_no_new_keys(site: Site, tmp_path: Path, verdict: Verdict) -> None:
    state, thief = StateFolder(tmp_path / "state", POOLS), await site.stolen("worker-a-n1")
    state.create()

    async def announce() -> None:
        while True:
            thief.publish("presence.a.lacre.n1", PRESENT)
            await thief.settle()
            await asyncio.sleep(0.5)

    announcing = asyncio.create_task(announce())
    try:
        with verdict.refused():
            await tend(state, await site.connect("provisioner"), Schedule(every=0, grace=0), wait=3.5)
    finally:
        announcing.cancel()
    kept = {pool: sorted(path.stem for path in state.keys_folder(pool).iterdir()) for pool in POOLS}
    assert kept == {"a": ["1", "2", "3", "4"], "b": ["3", "4"]}


@attack("erase or change other gateways' draws on the budgets", "credential",
        "each gateway credential writes its own part; the bucket accepts no roll-ups, deletes, purges or times to live",
        gain="its own part: it can say that its leases hold a whole budget")  # fmt: skip
async def test_budgets(site: Site) -> None:
    honest = NatsBucket(await site.connect("gateway-g2"), subjects.BUDGETS_BUCKET)
    await honest.write("user.a.b", b"usage", 0)
    thief = await site.stolen("gateway-g1")
    for subject in ("$KV.budgets.user.a.b", "$KV.budgets.gateway-g2.user.a.b", "$KV.budgets.gateway-g2.x"):
        thief.publish(subject, b"{}", headers={"Nats-Rollup": "all"})
        thief.publish(subject, b"{}")
    await thief.settle()
    assert len(thief.errors) == 6
    for headers in ({"Nats-Rollup": "all"}, {"Nats-Rollup": "sub"}, {"Nats-TTL": "1s"}):
        assert "error" in await thief.ask("$KV.budgets.gateway-g1.user.a.b", b"{}", headers)
    entry = await honest.read("user.a.b")
    assert entry is not None
    assert (entry.value, entry.others) == (b"usage", ())


@attack("fill the revocations, so that nobody can be revoked", "credential",
        "each credential has a share of them, in its own name; the provisioner's is the reserve",
        gain="its own share: 10,000 entries that every gateway reads")  # fmt: skip
async def test_revocations(site: Site) -> None:
    thief = await site.stolen("gateway-g1")
    for writer in ("gateway-g2", "provisioner", "A" * 43):
        thief.publish(subjects.revocation(writer), b"{}", headers={"Nats-TTL": "never"})
    await thief.settle()
    assert len(thief.errors) == 3


@attack("take the message server's memory by subscriptions and connections", "credential", "each account has limits of both",
        gain="the connections of its own pool")  # fmt: skip
async def test_subscriptions(site: Site) -> None:
    thief = await site.stolen("worker-a-n1")
    for number in range(WORKER_SUBSCRIPTIONS + 50):
        thief.say(b"SUB credit.a.z%d %d\r\n" % (number, number))
    await thief.settle()
    assert len(thief.errors) == 50
    with pytest.raises(ConnectionError):
        for _ in range(200):
            await site.stolen("worker-a-n1")
    await answers(site)


@attack("take every connection that gateways may have", "credential",
        "each gateway has an account of its own, with connections of its own",
        gain="nothing; only its own gateway cannot reconnect meanwhile")  # fmt: skip
async def test_gateways_connections(site: Site) -> None:
    with pytest.raises(ConnectionError):
        for _ in range(1000):
            await site.stolen("gateway-g1")
    await answers(site)


@pytest.mark.slow
@attack("flood the message server over one connection, and come back when it is cut off", "credential",
        "the warden has nats-server end each connection that floods; the log names the user",
        gain="a second or so of flooding with each connection, until the credential is replaced")  # fmt: skip
async def test_cut_off(tmp_path: Path) -> None:
    folder = StateFolder(tmp_path / "state", {"a": ("m1",)})
    server = NatsServer(tmp_path / "nats", free_port())
    server.configure(folder.roles())
    process = server.start(tmp_path / "nats.log")
    watched = partial(floods.watch, Servers.of(server.url), folder.credential("warden"), look=0.6)
    watching = tasks.start("floods", watched, restart=floods.WATCHED)
    try:
        neighbour, *thieves = [await StolenNats.open(server.port, folder.credential("worker-a-n1")) for _ in range(3)]
        for thief in thieves:
            with pytest.raises(ConnectionError):
                await flood(thief)
            await thief.close()
        assert await neighbour.settle() == [], "the same credential, over another connection"
        await neighbour.close()
    finally:
        await watching.close()
        process.terminate()
        process.wait(10)


@attack("send the gateway messages that no worker sends, 8 MiB each", "credential",
        "a pool's account takes frames of 256 KiB and their headers: the server ends the connection")  # fmt: skip
async def test_large(site: Site) -> None:
    gateway, thief = await site.gateway("g1"), await site.stolen("worker-a-n1")
    thief.publish(subjects.reply("a", "g1", "0" * 32), bytes(WORKER_PAYLOAD + 1))
    with pytest.raises(ConnectionError):
        await thief.settle()
    await gateway.connection.round_trip()
    await answers(site)
