"""A stolen credential that speaks NATS byte for byte, against a gateway and workers of two pools on a real server."""

from __future__ import annotations

import asyncio
import math
import secrets
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack
from typing import Any

import pytest

from hostile.attacks import Verdict, attack
from lacre.errors import UsageError
from lacre_fabric.nats import subjects
from lacre_fabric.nats.client import DirectClient
from lacre_fabric.nats.connection import Connection
from lacre_fabric.nats.gateway import NatsGateway
from lacre_fabric.nats.pool import KEEP, MAX_STRAY, PoolSide
from lacre_fabric.nats.worker import NatsWorker
from lacre_fabric.work.contract import WorkerLost
from lacre_fabric.work.frames import Frame, FrameKind
from lacre_fabric.work.presence import MAX_NODES, MAX_SLOTS, Presence
from parts.cut import Cut, way_to
from parts.fabric import LiveFabric, new_work
from parts.frames import frames_of
from parts.stolen_nats import StolenNats, published
from parts.waiting import until

THIEF = "worker-a-n2"
BOUNDED = "the parser limits everything that a worker announces"
OWN_LOOP = "the gateway parses messages by its own rules, and an exception drops only that message"
ODD_HEADERS = (
    b"NATS/1.0 \xff\xff\xff\r\n\r\n",
    b"NATS/1.0 100 \xff\xff\r\n\r\n",
    b"NATS/1.0\r\n\xff\xfe: x\r\n\r\n",
    b"NATS/1.0\r\n",
    b"\r\n",
    b"NATS/1.0\r\n" + b"A: b\r\n" * 70 + b"\r\n",
)


class Site:
    """A gateway, a worker of each pool and a thief. way: that to what pool a says; it can be cut."""

    def __init__(self, nats: LiveFabric, way: Cut, stack: AsyncExitStack) -> None:
        self.nats, self.way, self.stack = nats, way, stack

    async def start(self) -> None:
        self.gateway: NatsGateway = await self._kept(await self.nats.gateway())
        self.gateway._open_pool = self._open
        self.workers: dict[str, NatsWorker] = {pool: await self._kept(await self.nats.worker(pool)) for pool in ("a", "b")}
        for pool in self.workers:
            await self.side(pool).connect()

    async def _kept(self, end: Any) -> Any:
        self.stack.push_async_callback(end.close)
        return end

    async def _open(self, pool: str) -> Connection:
        url = self.way.url if pool == "a" else self.nats.server.url
        return await Connection.open(url, self.nats.credentials["gateway-g1"], keep=KEEP)

    def side(self, pool: str) -> PoolSide:
        return self.gateway._side(pool)

    def client(self, pool: str) -> DirectClient:
        connection = self.side(pool)._connection
        assert connection is not None
        return connection.client

    async def hears(self, *messages: bytes, of: str = THIEF) -> None:
        """The thief publishes these, and nobody minds."""
        await self.said(*messages, of=of)
        await self.goes_on()

    async def said(self, *messages: bytes, of: str) -> None:
        thief = await self._kept(await StolenNats.open(self.nats.server.port, self.nats.credentials[of]))
        thief.say(b"".join(messages))
        await thief.settle()

    async def goes_on(self) -> None:
        """A question of each pool is answered, and no connection of the gateway's broke."""
        for pool, worker in self.workers.items():
            async with asyncio.timeout(3):
                dispatch = await self.gateway.dispatch(new_work(pool))
                delivery = await worker.pull()
                worker.release()
                await delivery.send(FrameKind.USAGE, b"")
                await delivery.drop()
                assert [frame.kind async for frame in frames_of(dispatch)] == [FrameKind.USAGE]
        clients = (self.gateway.connection.client, self.gateway._lobby.client, *map(self.client, self.workers))
        assert [client.stats["reconnects"] for client in clients] == [0] * len(clients)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveFabric]:
    with LiveFabric.running(tmp_path_factory.mktemp("nats")) as live:
        yield live


@pytest.fixture
async def site(server: LiveFabric) -> AsyncIterator[Site]:
    await server.provision()
    async with AsyncExitStack() as stack:
        site = Site(server, await stack.enter_async_context(way_to(server.server.port)), stack)
        await site.start()
        yield site


@attack("publish under a subject that is not text, so that the gateway's connection stops reading", "worker", OWN_LOOP,
        gain="nothing; the message is dropped and counted")  # fmt: skip
async def test_subject(site: Site) -> None:
    await site.hears(*(published(b"reply.a.g1." + tail, b"x") for tail in (b"\xff\xfe", b"\x00", b"x\ry", b"x" * 3000)))
    assert site.client("a").unusable == 1


@attack("publish headers that a client library cannot read, so that the gateway loses every pool", "worker", OWN_LOOP,
        gain="nothing; such a frame is ignored")  # fmt: skip
async def test_headers_to_the_gateway(site: Site) -> None:
    said = ((subjects.presence("a", "lacre", "n2"), b"{}"), (subjects.reply("a", "g1", "0" * 32), b"x"))
    await site.hears(*(published(*message, headers=headers) for headers in ODD_HEADERS for message in said))
    assert site.client("a").unusable == 0  # read by the gateway's own rules, and nothing raised


@attack("name another subscription of the gateway in a subject, behind a form feed", "worker",
        "the server's lines are split at spaces, which no subject has",
        gain="nothing; the message goes only where its permission allows")  # fmt: skip
async def test_other_subscription(site: Site) -> None:
    misled: list[str] = []

    def take(subject: str, _block: bytes, _payload: bytes) -> bool:
        misled.append(subject)
        return True

    other = await site.client("a").subscribe_directly(f"{subjects.inbox('gateway-g1')}.other", take)
    await site.hears(*(published(b"reply.a.g1.x%b%d" % (space, other._id)) for space in (b"\x0c", b"\x0b", b"\r")))
    assert misled == []


@attack("queue work with headers that a client library cannot read, so that workers take no more work", "gateway", OWN_LOOP,
        gain="a pull for each message, which the worker acks as unanswerable")  # fmt: skip
async def test_headers(site: Site) -> None:
    work = subjects.work("a", subjects.DEFAULT_REGION, "m1")
    await site.hears(*(published(work, b"x", headers=headers) for headers in ODD_HEADERS * 2), of="gateway-g2")
    assert site.workers["a"].connection.client.stats["reconnects"] == 0


@attack("hide another message in a value that a gateway or a worker publishes", "client",
        "a message that is written is one message: names, subjects and values are single words or lines",
        gain="nothing; the publisher refuses the text", cases=["subject", "reply", "header"])  # fmt: skip
async def test_in_a_value(site: Site, case: str) -> None:
    """The connection is a gateway's own, whose permissions the hidden message would have."""
    heard: list[bytes] = []

    def take(_subject: str, _block: bytes, payload: bytes) -> bool:
        heard.append(payload)
        return True

    client, worker, target = site.client("a"), site.workers["a"].connection, subjects.cancel("a", "0" * 32)
    await worker.client.subscribe_directly(target, take)
    await worker.round_trip()
    await client.flush()  # until then messages take the library's way
    for end in ("\r\n", "\n"):
        hidden = f"x 0 0{end}{end}PUB {target} 6{end}hidden{end}"
        texts = {"subject": "a.b", "reply": "", "header": "v"} | {case: hidden if case != "header" else f"v\r\n\r\n{hidden}"}
        with pytest.raises(UsageError):
            await client.publish_directly(texts["subject"], b"", reply=texts["reply"], headers={"H": texts["header"]})
    await client.publish_directly(target, b"plain", headers={})
    await until(lambda: heard)
    assert heard == [b"plain"]
    await site.goes_on()


@attack("announce a number of slots with 400 digits, so that metrics fail", "worker", BOUNDED,
        gain="nothing; such a sign of presence is ignored")  # fmt: skip
async def test_count(site: Site) -> None:
    said = (b'{"models":["m1"],"busy":%b,"free":1,"keys":[]}' % count
            for count in (b"1" * 400, b"%d" % (MAX_SLOTS + 1), b"-1", b"1e999"))  # fmt: skip
    await site.hears(*(published(subjects.presence("a", "lacre", "n2"), each) for each in said))
    assert all(math.isfinite(float(at.busy)) for at in site.gateway.capacity().values())
    assert site.gateway.capacity()["a", "lacre"].workers == 1


@attack("answer thousands of unknown requests, each of which the gateway would cancel", "worker",
        "the number of such cancels is limited",
        gain="a few hundred messages a second from the gateway to its own pool")  # fmt: skip
async def test_to_nobody(site: Site) -> None:
    said = site.gateway.connection.client.stats["out_msgs"]
    frames = [Frame(secrets.token_hex(16), 0, FrameKind.BEAT, b"") for _ in range(2000)]
    await site.hears(*(published(f"reply.a.g1.{secrets.token_hex(16)}", headers=frame.headers()) for frame in frames))
    assert site.gateway.connection.client.stats["out_msgs"] - said < 4 * MAX_STRAY


@attack("send messages longer than any frame, which the gateway would have to buffer whole", "worker",
        "a length is checked before the buffer for it exists", gain="nothing; they are dropped as they arrive")  # fmt: skip
async def test_too_long(site: Site) -> None:
    await site.hears(*[published(b"reply.a.g1." + b"0" * 32, bytes(KEEP + 1))] * 4)
    assert site.client("a").unusable == 4


@attack("cut a connection during an answer, so that the caller waits until the queue limit", "fabric",
        "on each new connection the gateway checks whether requests that have not begun are still queued",
        WorkerLost)  # fmt: skip
async def test_cut(site: Site, verdict: Verdict) -> None:
    dispatch = await site.gateway.dispatch(new_work("a"))
    delivery = await site.workers["a"].pull()
    site.way.cut()
    await until(lambda: not site.side("a").connected, 3)
    await delivery.send(FrameKind.USAGE, b"")
    await delivery.drop()
    site.way.mend()
    with verdict.refused():
        async with asyncio.timeout(5):
            await anext(frames_of(dispatch))


@attack("stall a connection without closing it", "fabric", "a connection that stays silent, even to a ping, counts as lost",
        gain="a few seconds, in which the gateway is not ready")  # fmt: skip
async def test_still(site: Site) -> None:
    client, credential = DirectClient(look=0.05), site.nats.credentials["gateway-g1"]
    await client.connect(site.way.url, user=credential.name, password=credential.password, max_reconnect_attempts=-1)
    site.stack.push_async_callback(client.close)
    site.way.flows.clear()
    await until(lambda: not client.is_connected, 3)


@attack("have JetStream's answers sent to other gateways as the presence of unknown pools", "gateway",
        "each gateway has an account of its own",
        gain="nothing; the answers stay in its account, and none is valid as a sign of presence")  # fmt: skip
async def test_pools_of_nobody(site: Site) -> None:
    replies = (f"presence.none{number}.lacre.n1" for number in range(50))
    said = (published(subjects.READ_BUDGETS, b'{"last_by_subj":"x"}', reply=reply) for reply in replies)
    await site.hears(*said, of="gateway-g2")
    assert site.gateway._sides.keys() == {"a", "b"}


@attack("announce so many workers that the gateway's memory grows", "worker", BOUNDED,
        gain="nothing in other pools; its own pool has no room for new workers for 3 s")  # fmt: skip
async def test_crowd(site: Site) -> None:
    present = b'{"models":["m1"],"busy":0,"free":1,"keys":[]}'
    # A credential that a pool's replicas share may say so of every node; here the roster itself is asked.
    for number in range(MAX_NODES + 100):
        site.side("a").hear("lacre", f"x{number}", Presence.parse(present))
    await site.said(published(subjects.presence("a", "lacre", "n1"), present), of="worker-a-n1")
    assert len(site.side("a").roster.live()) == MAX_NODES
    await site.goes_on()
