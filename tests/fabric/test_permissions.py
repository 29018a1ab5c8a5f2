"""What each role must not be able to do is tried, and denied by nats-server itself; what it must be able to do works."""

from __future__ import annotations

import asyncio
import json
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from nats.aio.msg import Msg

from lacre.errors import SettingsError
from lacre_fabric.nats import roles, subjects
from lacre_fabric.nats.accounts import accounts
from lacre_fabric.nats.connection import Connection
from lacre_fabric.nats.gateway import NatsGateway
from lacre_fabric.nats.provisioning import publish_manifest
from lacre_fabric.nats.roles import Credential, Role
from lacre_fabric.nats.worker import NatsDelivery, NatsWorker
from lacre_fabric.work.contract import FabricUnavailable
from lacre_fabric.work.frames import Frame, FrameKind
from parts.fabric import GATEWAYS, POOLS, LiveFabric, new_work

ID = "0123456789abcdef" * 2
M1 = subjects.model_token("m1")
NEXT = f"CONSUMER.MSG.NEXT.WORK_a_lacre.model-{M1}"
ONE = b'{"batch":1,"expires":1000000000}'
STREAM_CALLS = ("UPDATE", "DELETE", "PURGE", "INFO", "MSG.GET", "MSG.DELETE")
# What tells which streams, consumers, subjects and connections there are.
LISTS = [
    *(f"{api}.{call}" for api in ("$JS.API", subjects.API) for call in ("INFO", "STREAM.NAMES", "STREAM.LIST")),
    *(
        f"{api}.CONSUMER.{call}.WORK_{pool}_lacre"
        for api in ("$JS.API", subjects.API)
        for call in ("NAMES", "LIST")
        for pool in POOLS
    ),
    *(f"$SYS.REQ.SERVER.PING{what}" for what in ("", ".SUBSZ", ".CONNZ", ".JSZ", ".ACCOUNTZ")),
    *(
        f"$SYS.REQ.ACCOUNT.{account}.{what}"
        for account in (roles.FABRIC, *map(roles.gateway_account, GATEWAYS), *map(roles.workers_account, POOLS))
        for what in ("SUBSZ", "CONNZ", "INFO")
    ),
]


@dataclass
class Parties:
    """Connections that are closed after the test."""

    live: LiveFabric
    stack: AsyncExitStack

    async def connect(self, role: str) -> Connection:
        connection = await self.live.connect(role)
        self.stack.push_async_callback(connection.close)
        return connection

    async def gateway(self, name: str = "g1") -> NatsGateway:
        gateway = await self.live.gateway(name)
        self.stack.push_async_callback(gateway.close)
        return gateway

    async def worker(self, pool: str = "a", node: str = "n1") -> NatsWorker:
        worker = await self.live.worker(pool, node)
        self.stack.push_async_callback(worker.close)
        return worker


@pytest.fixture
async def parties(nats: LiveFabric) -> AsyncIterator[Parties]:
    async with AsyncExitStack() as stack:
        yield Parties(nats, stack)


async def is_denied(connection: Connection, attempt: Awaitable[object]) -> bool:
    """Whether the server said so; the round trip makes sure that it had the time to."""
    denials = connection.denials
    await attempt
    await connection.round_trip()
    return connection.denials > denials


async def hear(connection: Connection, subject: str) -> list[Msg]:
    """The list that what comes on `subject` is added to."""
    heard: list[Msg] = []

    async def take(message: Msg) -> None:
        heard.append(message)

    await connection.client.subscribe(subject, cb=take)
    await connection.round_trip()
    return heard


async def state(provisioner: Connection) -> dict[str, tuple[int, int, int]]:
    """Of every stream and bucket: messages, the last sequence, consumers."""
    streams = await provisioner.jetstream.streams_info()
    return {info.config.name or "": (info.state.messages, info.state.last_seq, info.state.consumer_count) for info in streams}


API = ("$JS.API", subjects.API)
NOT_FOR_WORKERS = [
    *(f"{api}.{NEXT}" for api in API),
    f"$JS.ACK.WORK_a_lacre.model-{M1}.1.1.1.1.0",
    f"reply.a.g1.{ID}",
    f"work.a.lacre.{M1}",
    f"work.b.lacre.{M1}",
    f"$KV.claims_a.{ID}",
    "$KV.trust.manifest",
    "$KV.budgets.user.a.b",
    f"{subjects.API}.DIRECT.GET.KV_budgets.$KV.budgets.user.a.b",
    f"cancel.a.{ID}",
    f"cancel.b.{ID}",
    f"credit.a.{ID}",
    "presence.a.lacre.n1",
    "presence.b.lacre.n2",
    *(f"{api}.STREAM.CREATE.MINE" for api in API),
    *(f"{api}.STREAM.{call}.WORK_{pool}_lacre" for api in API for call in STREAM_CALLS for pool in POOLS),
    *(f"{api}.STREAM.{call}.KV_claims_a" for api in API for call in STREAM_CALLS),
    *(f"{api}.DIRECT.GET.WORK_{pool}_lacre" for api in API for pool in POOLS),
    *(f"{api}.CONSUMER.INFO.WORK_{pool}_lacre.model-{M1}" for api in API for pool in POOLS),
    *LISTS,
    *(f"{api}.STREAM.{call}.KV_claims_b" for api in API for call in ("UPDATE", "DELETE", "PURGE", "MSG.DELETE")),
    *(f"{api}.CONSUMER.CREATE.WORK_{pool}_lacre.mine" for api in API for pool in POOLS),
    *(f"{api}.CONSUMER.DURABLE.CREATE.WORK_{pool}_lacre.mine" for api in API for pool in POOLS),
    f"{subjects.API}.DIRECT.GET.KV_claims_a.$KV.claims_a.{ID}",
    *(f"{api}.STREAM.INFO.KV_claims_b" for api in API),
    subjects.revocation("x"),
    *(f"{api}.{call}.GET.{subjects.REVOCATIONS_STREAM}" for api in API for call in ("DIRECT", "STREAM.MSG")),
    "_INBOX_worker-a-n1.x",
]
NOT_FOR_GATEWAYS = [
    *(f"{api}.{NEXT}" for api in API),
    f"$JS.ACK.WORK_a_lacre.model-{M1}.1.1.1.1.0",
    f"reply.a.g1.{ID}",
    f"$KV.claims_a.{ID}",
    "$KV.trust.manifest",
    f"{subjects.API}.DIRECT.GET.{subjects.REVOCATIONS_STREAM}",
    *(subjects.revocation(writer) for writer in ("x", "gateway-g1", "provisioner")),
    *(f"$KV.budgets.{key}" for key in ("x", "user.a.b", "gateway-g1.user.a.b", "gateway-g2")),
    f"{subjects.API}.DIRECT.GET.KV_budgets.$KV.budgets.user.a.b",
    "presence.a.lacre.n1",
    *(f"{api}.STREAM.CREATE.MINE" for api in API),
    *(f"{api}.STREAM.{call}.WORK_a_lacre" for api in API for call in ("UPDATE", "DELETE", "PURGE", "MSG.GET")),
    *(
        f"{api}.STREAM.{call}.KV_{bucket}"
        for api in API
        for bucket in ("trust", "claims_a", "revocations", "budgets")
        for call in ("DELETE", "MSG.DELETE")
    ),
    *(f"{api}.CONSUMER.CREATE.WORK_a_lacre.mine" for api in API),
    *LISTS,
    "_INBOX_gateway-g1.x",
    "_INBOX_worker-a-n1.x",
]


@pytest.mark.parametrize(("role", "denied"), [("worker-b-n1", NOT_FOR_WORKERS), ("gateway-g2", NOT_FOR_GATEWAYS)])
async def test_publishing_is_denied_and_changes_nothing(parties: Parties, role: str, denied: list[str]) -> None:
    provisioner, who = await parties.connect("provisioner"), await parties.connect(role)
    before = await state(provisioner)
    reply = f"_INBOX_{role}.answer"
    answers = await hear(who, f"{reply}.*")
    for number, subject in enumerate(denied):
        attempt = who.client.publish(subject, b"{}", reply=f"{reply}.{number}")
        assert await is_denied(who, attempt), subject
    assert not answers
    assert await state(provisioner) == before


@pytest.mark.parametrize(
    ("role", "subject"),
    [
        *(
            ("worker-b-n1", subject)
            for subject in (
                "reply.a.>",
                "reply.b.>",
                "work.>",
                "cancel.a.*",
                "credit.a.*",
                "presence.>",
                "_INBOX.>",
                "_INBOX_worker-a-n1.>",
                "_INBOX_worker-b-n2.>",
                "_INBOX_gateway-g1.>",
                "$KV.>",
                "$JS.>",
                "$SYS.>",
                ">",
                "*.a.g1.*",
            )
        ),
        *(
            ("gateway-g2", subject)
            for subject in ("reply.*.g1.*", "reply.>", "_INBOX_gateway-g1.>", "_INBOX.>", "work.>", "$KV.>", "cancel.>", ">")
        ),
    ],
)
async def test_subscribing_is_denied(parties: Parties, role: str, subject: str) -> None:
    who = await parties.connect(role)
    assert await is_denied(who, hear(who, subject))


@pytest.mark.parametrize("role", ["worker-b-n1", "gateway-g2"])
async def test_its_own_is_allowed(parties: Parties, role: str) -> None:
    """Else the denials above would prove nothing."""
    who = await parties.connect(role)
    own = {
        "worker-b-n1": (["reply.b.g1.x", "presence.b.lacre.n1", f"$KV.claims_b.{ID}"], ["cancel.b.*", "credit.b.*"]),
        "gateway-g2": ([f"work.a.lacre.{M1}", "cancel.b.x", "credit.a.x"], ["reply.*.g2.*", "presence.>"]),
    }
    publish, subscribe = own[role]
    for subject in publish:
        assert not await is_denied(who, who.client.publish(subject, b"{}"))
    for subject in [*subscribe, f"_INBOX_{role}.>"]:
        assert not await is_denied(who, hear(who, subject))


async def test_work_goes_to_its_pool_alone(parties: Parties) -> None:
    gateway, worker = await parties.gateway(), await parties.worker("a")
    thief = await parties.connect("worker-b-n1")
    work = new_work("a")
    await gateway.dispatch(work)
    pull = await thief.jetstream.pull_subscribe_bind(consumer=subjects.consumer("m1"), stream="WORK_a_lacre")
    with pytest.raises(TimeoutError):
        await pull.fetch(1, timeout=0.3)
    assert NEXT.lower() in thief.denied  # the client library does not keep the case
    assert (await worker.pull()).work == work


async def test_frames_come_from_the_pool_alone(parties: Parties) -> None:
    gateway, worker = await parties.gateway(), await parties.worker("a")
    intruder, other_gateway = await parties.connect("worker-b-n1"), await parties.connect("gateway-g2")
    work = new_work("a")
    dispatch = await gateway.dispatch(work)
    forged = Frame("f" * 32, 0, FrameKind.DATA, b"forged")
    send = intruder.client.publish

    # Where A's workers answer, and in the name of its own pool: NATS allows the second, and the gateway heeds it not.
    assert await is_denied(intruder, send(f"reply.a.g1.{work.request_id}", forged.payload, headers=forged.headers()))
    assert not await is_denied(intruder, send(f"reply.b.g1.{work.request_id}", forged.payload, headers=forged.headers()))
    overheard = [await hear(who, "reply.a.>") for who in (intruder, other_gateway)]
    overheard.append(await hear(other_gateway, "reply.*.g1.*"))

    delivery = await worker.pull()
    await delivery.send(FrameKind.DATA, b"true")
    await delivery.send(FrameKind.USAGE, b"")
    assert [frame.payload async for frame in dispatch.frames()] == [b"true", b""]
    assert overheard == [[], [], []]
    assert intruder.denials == 2
    assert other_gateway.denials == 2


async def test_only_gateways_cancel(parties: Parties) -> None:
    gateway, worker = await parties.gateway(), await parties.worker("a")
    dispatch = await gateway.dispatch(new_work("a"))
    delivery = await worker.pull()
    for role in ("worker-b-n1", "worker-a-n2"):
        other = await parties.connect(role)
        assert await is_denied(other, other.client.publish(f"cancel.a.{delivery.work.request_id}"))
    await asyncio.sleep(0.1)
    assert not delivery.cancelled.is_set()
    await dispatch.cancel()
    async with asyncio.timeout(10):
        await delivery.cancelled.wait()


async def test_presence_is_a_node_s_own(parties: Parties) -> None:
    gateway = await parties.gateway()
    said = json.dumps({"models": ["m1"], "busy": 0, "free": 1}).encode()
    for role, node in (("worker-b-n1", "a.n1"), ("worker-b-n1", "a.n9"), ("worker-a-n2", "a.n1")):
        other = await parties.connect(role)
        assert await is_denied(other, other.client.publish(f"presence.{node}", said))
    await asyncio.sleep(0.1)
    assert gateway.workers("a", "m1") == 0
    await parties.worker("a", "n1")
    await asyncio.sleep(0.1)
    assert gateway.workers("a", "m1") == 1


async def test_only_the_provisioner_writes_the_manifest(parties: Parties) -> None:
    provisioner = await parties.connect("provisioner")
    document = secrets.token_bytes(40)
    await publish_manifest(provisioner, document)
    for role in ("worker-a-n1", "gateway-g1"):
        who = await parties.connect(role)
        assert await is_denied(who, who.client.publish("$KV.trust.manifest", b"another"))
        assert await who.manifest() == document


async def test_claims_are_the_pool_s_own(parties: Parties) -> None:
    gateway, worker = await parties.gateway(), await parties.worker("a")
    work = new_work("a")
    await gateway.dispatch(work)
    other = await parties.connect("worker-b-n1")
    assert await is_denied(other, other.client.publish(f"$KV.claims_a.{work.digest.hex()}", b"mine"))
    assert await (await worker.pull()).claim()


@pytest.mark.parametrize(
    "connect",
    [
        lambda live, url: NatsWorker.connect(url, live.credentials["worker-b-n1"], "a", "n1", ["m1"]),
        lambda live, url: NatsWorker.connect(url, live.credentials["worker-b-n1"], "b", "n2", ["m1"]),
        lambda live, url: NatsGateway.connect(url, live.credentials["gateway-g2"], "g1"),
        lambda live, url: NatsGateway.connect(url, live.credentials["worker-a-n1"], "g1"),
    ],
    ids=["another pool", "another node", "another gateway", "another role"],
)
async def test_a_denial_is_said(nats: LiveFabric, connect: Callable[[LiveFabric, str], Awaitable[object]]) -> None:
    with pytest.raises(FabricUnavailable, match=r"denies (worker|gateway)-.*permissions violation for (publish|subscription)"):
        await connect(nats, nats.server.url)


async def test_each_denied_call_is_said(parties: Parties) -> None:
    """The second like the first, and not those that were not denied."""
    worker = await parties.connect("worker-a-n1")
    for _ in range(2):
        with pytest.raises(FabricUnavailable, match=r"denies worker-a-n1 .*\$kv.trust.manifest"):
            async with worker.mapped():
                await worker.jetstream.publish("$KV.trust.manifest", b"", timeout=0.2)
        with pytest.raises(FabricUnavailable, match="no service on NATS answers"):
            async with worker.mapped():
                await worker.client.request("presence.a.lacre.n1", b"", timeout=0.2)
    await worker.manifest()


async def test_a_denied_pull_is_said(parties: Parties) -> None:
    worker = await parties.worker("a")
    worker._queues[0].pull = await worker.connection.jetstream.pull_subscribe_bind(subjects.consumer("m1"), "WORK_b_lacre")
    with pytest.raises(FabricUnavailable, match=r"denies worker-a-n1 .*work_b"):
        await worker.pull()


async def test_a_denied_claim_is_said_and_may_be_asked_again(parties: Parties) -> None:
    gateway, worker = await parties.gateway(), await parties.worker("a")
    await gateway.dispatch(new_work("a"))
    delivery: NatsDelivery = await worker.pull()
    worker.claims_of = "b"
    with pytest.raises(FabricUnavailable, match="denies worker-a-n1"):
        await delivery.claim()
    worker.claims_of = "a"
    assert await delivery.claim()
    await delivery.drop()


@pytest.mark.parametrize("name", ["worker-a-n1", "nobody"])
async def test_a_wrong_password_is_refused_at_once(nats: LiveFabric, name: str) -> None:
    async with asyncio.timeout(10):
        with pytest.raises(FabricUnavailable, match=f"as {name}: 'Authorization Violation'"):
            await Connection.open(nats.server.url, Credential(name, "wrong"))


async def test_no_server_is_said(unused_port: int) -> None:
    with pytest.raises(FabricUnavailable, match="cannot connect to NATS"):
        await Connection.open(f"nats://127.0.0.1:{unused_port}", Credential.new("worker-a-n1"))


# Between accounts


TARGETS = [
    "$KV.trust.manifest",
    f"work.a.lacre.{M1}",
    f"reply.a.g1.{ID}",
    f"cancel.a.{ID}",
    "presence.a.lacre.n9",
    f"$KV.claims_a.{ID}",
]
CALLS = [f"$JS.API.STREAM.PURGE.{name}" for name in ("WORK_a_lacre", "KV_trust")] + ["$JS.API.STREAM.CREATE.MINE"]


@pytest.mark.parametrize("role", ["worker-b-n1", "gateway-g2"])
async def test_answers_go_to_who_asked(parties: Parties, role: str) -> None:
    """NATS lets a client name any subject for the answer: JetStream must not be made to speak for it there."""
    gateway, worker = await parties.gateway(), await parties.worker("a")
    await gateway.dispatch(new_work("a"))
    await worker.pull()
    inbound = gateway._side("a").add(ID, 1.0).inbound
    provisioner, who = await parties.connect("provisioner"), await parties.connect(role)
    await publish_manifest(provisioner, b"genuine")
    heard = await hear(provisioner, ">")
    before = await state(provisioner)
    stored = {"worker-b-n1": "$KV.claims_b.mine", "gateway-g2": f"work.b.lacre.{M1}"}[role]
    for target in [*TARGETS, *CALLS]:
        config = {"name": "MINE", "subjects": ["mine"]}
        headers = Frame("f" * 32, 0, FrameKind.DATA, b"").headers()
        await who.client.publish(stored, json.dumps(config).encode(), headers=headers, reply=target)  # the ack
        if role.startswith("gateway"):
            revocation = subjects.revocation(role)
            await who.client.publish(revocation, json.dumps(config).encode(), headers=headers, reply=target)
            await who.client.publish(subjects.READ_REVOCATIONS, b'{"last_by_subj":"$KV.revocations.*"}', reply=target)
            await who.client.publish(f"$KV.budgets.{role}.x", json.dumps(config).encode(), headers=headers, reply=target)
            await who.client.publish(subjects.READ_BUDGETS, b'{"last_by_subj":"$KV.budgets.*.x"}', reply=target)
        else:  # what it stored, and the status of a pull
            await who.client.publish(f"{subjects.API}.DIRECT.GET.KV_claims_b.{stored}", reply=target)
            await who.client.publish(
                f"{subjects.API}.CONSUMER.MSG.NEXT.WORK_b_lacre.model-{M1}", b'{"no_wait":true}', reply=target
            )
    await who.round_trip()
    await asyncio.sleep(0.2)
    assert not who.denials
    assert not {message.subject for message in heard} & {*TARGETS, *CALLS}
    after, written = (
        await state(provisioner),
        dict.fromkeys(("KV_claims_b", "KV_revocations", "KV_budgets", "WORK_b_lacre"), ()),
    )
    assert {**after, **written} == {**before, **written}
    assert after != before, "what it may write was written"
    assert await who.manifest() == b"genuine"
    assert not inbound.started.is_set()
    assert gateway.workers("a", "m1") == 1


async def test_accounts_hold_without_permissions(tmp_path: Path) -> None:
    """A worker that may publish and read whatever there is finds, in its account, its own pool and no other."""
    live = LiveFabric.make(tmp_path)
    live.start([everything(role) if role.credential.name == "worker-b-n1" else role for role in live.roles()])
    async with AsyncExitStack() as stack:
        stack.callback(live.stop)
        parties = Parties(live, stack)
        await live.provision()
        provisioner, intruder = await parties.connect("provisioner"), await parties.connect("worker-b-n1")
        gateway, worker = await parties.gateway(), await parties.worker("a")
        before = await state(provisioner)
        heard = await hear(intruder, ">")
        work = new_work("a")
        dispatch = await gateway.dispatch(work)
        for subject in NOT_FOR_WORKERS:
            await intruder.client.publish(subject, b"{}" if "CREATE" in subject else b"", reply="_INBOX_worker-b-n1.x")
        await intruder.round_trip()
        delivery = await worker.pull()
        assert delivery.work == work
        await delivery.send(FrameKind.USAGE, b"")
        assert [frame.payload async for frame in dispatch.frames()] == [b""]
        await asyncio.sleep(0.1)
        assert not intruder.denials
        # It hears itself; of the others, nothing.
        assert not [message for message in heard if work.request_id in message.subject or work.sealed in message.data]
        told = b"".join(message.data for message in heard if message.subject == "_INBOX_worker-b-n1.x")
        assert b"JetStream not enabled for account" in told and not any(
            name in told for name in (b"WORK_a_lacre", b"claims_a", M1.encode())
        )
        assert {
            name: held for name, held in (await state(provisioner)).items() if "_b" not in name and name != "WORK_a_lacre"
        } == {name: held for name, held in before.items() if "_b" not in name and name != "WORK_a_lacre"}


def everything(role: Role) -> Role:
    return replace(role, publish=(">",), subscribe=(">",))


def test_names_reach_into_no_subject() -> None:
    credential = Credential.new("x")
    for name in ("*", ">", "a.b", "", "A", "a" * 64, "a b"):
        with pytest.raises(SettingsError):
            roles.worker(credential, name, "n1")
        with pytest.raises(SettingsError):
            roles.worker(credential, "a", name)
        with pytest.raises(SettingsError):
            roles.gateway(credential, name, ["a"])
        with pytest.raises(SettingsError):
            roles.gateway(credential, "g1", [name])
    for name in ("*", ">", "a.b", "", "a b"):
        with pytest.raises(SettingsError):
            roles.worker(Credential.new(name), "a", "n1")


def test_two_roles_share_no_credential() -> None:
    """`worker-a-b-n1` is node n1 of pool a-b, and node b-n1 of pool a."""
    credential = Credential.new("worker-a-b-n1")
    with pytest.raises(SettingsError, match="same name"):
        accounts([roles.worker(credential, "a-b", "n1"), roles.worker(credential, "a", "b-n1")])
